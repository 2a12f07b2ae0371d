"""Every file under `conf/` composes into a valid configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ulmfit.conf_files import conf_dir, description, groups, method_groups, options
from ulmfit.hydra_config import dataset_name, load_config
from ulmfit.schema import VERBS

FILES = sorted(path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*.yaml"))
OWN_DATA = ["dataset.path=mine.csv"]


def places() -> list[tuple[str, str, str]]:
    """Every option of every group, each with one verb and in one place that has the group."""
    place = {group.partition("@")[0]: (verb, group) for verb in reversed(VERBS) for group in groups(verb)}
    return [(verb, group, option) for verb, group in place.values() for option in options(group)]


@pytest.mark.parametrize("verb", VERBS)
def test_primary_composes(verb: str) -> None:
    assert type(load_config(verb)) is VERBS[verb]


@pytest.mark.parametrize(("verb", "group", "option"), places())
def test_option_composes_and_validates(verb: str, group: str, option: str) -> None:
    path = OWN_DATA if "dataset" in groups(verb) and option in ("csv", "wikipedia", "packed") else []
    assert type(load_config(verb, [f"{group}={option}", *path])) is VERBS[verb]


def test_every_file_is_reached() -> None:
    reached = {f"{verb}.yaml" for verb in VERBS} | {"hydra/quiet.yaml"}
    reached |= {f"{group.partition('@')[0]}/{option}.yaml" for _, group, option in places()}
    assert set(FILES) == reached


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is_for(file: str) -> None:
    text = description(conf_dir() / file)
    assert len(text) > 2
    assert "  " not in text


def test_defaults() -> None:
    config = load_config("train")
    assert config.stage.name == "all"
    assert (config.dataset.name, config.dataset.path, config.init) == ("helpdesk", None, None)
    assert config.stage.lm.method.unfreezing.mode == "full"
    assert config.stage.classifier.method.unfreezing.mode == "gradual"
    assert config.stage.classifier.method.schedule.name == "stlr"
    assert config.stage.classifier.method.discriminative.factor == 2.6
    assert config.stage.lm.optim.lr == 2e-2
    assert config.stage.classifier.optim.lr == 3e-2


def test_paper_settings() -> None:
    config = load_config("train", ["experiment=paper", "dataset=imdb"])
    lm, classifier = config.stage.lm, config.stage.classifier
    assert (config.model.embedding_dim, config.model.num_layers) == (400, 3)
    assert (lm.bptt, lm.batch_size, lm.optim.lr, lm.optim.betas) == (70, 64, 4e-3, [0.7, 0.99])
    assert (classifier.epochs, classifier.batch_size, classifier.optim.lr) == (50, 64, 1e-2)
    dropout = classifier.dropout
    assert (dropout.input, dropout.hidden, dropout.embedding, dropout.weight) == (0.4, 0.3, 0.05, 0.5)
    assert (dropout.multiplier, classifier.label_smoothing) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("chain_thaw", ("chain_thaw", "stlr", "factor")),
        ("last", ("last", "stlr", "factor")),
        ("[gradual,cosine]", ("gradual", "cosine", "factor")),
        ("[ulmfit_classifier,one_cycle]", ("gradual", "one_cycle", "factor")),
        ("[full,uniform,constant]", ("full", "constant", "none")),
        ("authors_classifier", ("authors", "stlr", "factor")),
    ],
)
def test_method_pieces(choice: str, expected: tuple[str, str, str]) -> None:
    method = load_config("train", [f"callbacks@stage.classifier.method={choice}"]).stage.classifier.method
    assert (method.unfreezing.mode, method.schedule.name, method.discriminative.mode) == expected


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("lm_pretrain", {"callbacks@stage.lm.method": "pretrain"}),
        ("lm_finetune", {"callbacks@stage.lm.method": "ulmfit_lm"}),
        ("classifier", {"callbacks@stage.classifier.method": "ulmfit_classifier"}),
    ],
)
def test_stages_have_their_methods(stage: str, expected: dict[str, str]) -> None:
    assert method_groups(stage) == expected
    assert load_config("train", [f"stage={stage}"]).stage.name == stage


def test_command_line_wins_over_experiment() -> None:
    config = load_config("train", ["experiment=imdb_100", "dataset=trec6", "dataset.train_size=50"])
    assert (config.dataset.name, config.dataset.train_size) == ("trec6", 50)


def test_data_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULMFIT_DATA", raising=False)
    assert load_config("inspect", ["dataset=trec6"]).dataset.path == "data/trec6"
    monkeypatch.setenv("ULMFIT_DATA", "/somewhere")
    assert load_config("inspect", ["dataset=trec6"]).dataset.path == "/somewhere/trec6"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, "default"),
        ("", "default"),
        ("reviews.csv", "reviews"),
        ("/a/b/reviews.csv.bz2", "reviews"),
        ("/a/b/trec6/", "trec6"),
        ("v1.2.tsv", "v1.2"),
        ("two words.txt", "two-words"),
    ],
)
def test_dataset_name(path: str | None, name: str) -> None:
    assert dataset_name(path, "default") == name


@pytest.mark.parametrize("overrides", [["dataset=csv"], []])
def test_own_file_names_the_data_set(overrides: list[str]) -> None:
    assert load_config("train", [*overrides, "dataset.path=x/reviews.csv"]).dataset.name == "reviews"


def test_own_configuration_folder(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text("name: mine\npath: a.csv\n", encoding="utf-8")
    assert load_config("train", ["dataset=mine"], config_dir=tmp_path).dataset.name == "mine"


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["dataset.text=review"], lambda c: c.dataset.text == ["review"]),
        (["dataset.text=title,body"], lambda c: c.dataset.text == ["title", "body"]),
        (["dataset.text=[title,body]"], lambda c: c.dataset.text == ["title", "body"]),
        (["dataset.path=a=b, (c) 'd'.csv"], lambda c: c.dataset.path == "a=b, (c) 'd'.csv"),
        (["dataset.label=1e3"], lambda c: c.dataset.label == "1e3"),
        (["dataset.label=true"], lambda c: c.dataset.label == "true"),
        (["dataset.label='quoted'"], lambda c: c.dataset.label == "quoted"),
        (["dataset.path=C:\\data\\x\\"], lambda c: c.dataset.path == "C:\\data\\x\\"),
        (["init=null"], lambda c: c.init is None),
        (["+seed=3"], lambda c: c.seed == 3),
        (["++seed=4"], lambda c: c.seed == 4),
        (["stage.lm.optim.betas=0.7,0.9"], lambda c: c.stage.lm.optim.betas == [0.7, 0.9]),
        (["+experiment=smoke"], lambda c: c.model.hidden_dim == 32),
        (["trainer=ddp", "trainer.devices=2"], lambda c: c.trainer.devices == 2),
        (["trainer=ddp"], lambda c: c.trainer.strategy == "ddp_find_unused_parameters_true"),
    ],
)
def test_what_users_type_is_understood(overrides: list[str], read: Any) -> None:
    assert read(load_config("train", overrides))


def test_phases_of_ones_own() -> None:
    phases = "stage.classifier.method.unfreezing.phases=[{name:head,epochs:2,train_top:1},{name:all}]"
    config = load_config("train", ["stage.classifier.method.unfreezing.mode=phases", phases])
    first, second = config.stage.classifier.method.unfreezing.phases
    assert (first.name, first.epochs, first.train_top) == ("head", 2, 1)
    assert (second.name, second.epochs, second.train_top) == ("all", 1, None)
