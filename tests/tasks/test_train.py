"""What `ulmfit train` leaves behind and hands on from stage to stage, with a tiny network."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ulmfit.bundle import load_bundle, read_info
from ulmfit.config import TrainConfig
from ulmfit.errors import UlmfitError, UsageError
from ulmfit.plots import read_history
from ulmfit.tasks import evaluate, stages, train
from ulmfit.tasks.evaluate import EvaluateConfig
from ulmfit.tasks.locations import Parent, choose_parent

Settings = Callable[..., TrainConfig]

pytestmark = pytest.mark.usefixtures("no_pictures")

BUNDLE = ["README.md", "bundle.json", "encoder.safetensors", "head.safetensors", "tokenizer.json", "tokenizer.model"]
STAGE = [*(f"bundle/{name}" for name in BUNDLE), "learning_rates.png", "log/attempt-0/metrics.csv", "loss.png"]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def only_run(config: TrainConfig) -> Path:
    (folder,) = (Path(config.runs) / config.dataset.name).iterdir()
    return folder


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "encoder.safetensors") | load_file(bundle / "head.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def some_rows(count: int) -> list[tuple[str, str]]:
    good, bad = "this was good and I liked it", "this was bad and I did not like it"
    return [(f"{good if i % 2 else bad}, number {i}", "yes" if i % 2 else "no") for i in range(count)]


# ------------------------------------------------------------------------------------------------ what is left behind


def test_files_of_a_run(trained: Path) -> None:
    classifier = [*STAGE, "confusion_matrix.png", "metrics.json"]
    expected = ["config.yaml", "metrics.json"]
    expected += [f"lm/{name}" for name in [*STAGE, "metrics.json"]] + [f"classifier/{name}" for name in classifier]
    assert files(trained) == sorted(expected)
    assert [path.name for path in trained.rglob("*") if path.is_dir()].count("checkpoints") == 0


@pytest.mark.parametrize("stage", ["lm_pretrain", "lm_finetune", "classifier"])
def test_files_of_a_single_stage(settings: Settings, stage: str) -> None:
    config = settings(stage, dataset__test="")
    figures = train.run(config)
    assert files(only_run(config)) == sorted([*STAGE, "config.yaml", "metrics.json"])
    assert read_info(only_run(config) / "bundle").provenance["stage"] == stage
    assert json.loads((only_run(config) / "metrics.json").read_text()) == figures


def test_figures(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    of_valid = {"valid_loss", "valid_perplexity", "valid_bits_per_character"}
    assert set(metrics["lm"]) == {"train_loss_epoch", *of_valid, "seconds"}
    assert {"train_loss_epoch", "valid_loss", "valid_accuracy", "valid_macro_f1", "test"} < set(metrics)
    assert metrics["test"]["documents"] == sum(map(sum, metrics["test"]["confusion"])) == 60
    assert read_info(trained / "classifier" / "bundle").metrics["valid_accuracy"] == metrics["valid_accuracy"]
    assert read_info(trained / "lm" / "bundle").provenance["parent"] == "scratch"
    assert read_info(trained / "classifier" / "bundle").provenance["parent"] == str(trained / "lm" / "bundle")


def test_the_figures_are_those_of_the_bundle(trained: Path, caches: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    config = EvaluateConfig([str(trained / "classifier" / "bundle")], cache=str(caches))
    config.dataset.limit, config.trainer.enable_progress_bar = 60, False
    assert evaluate.run(config) == metrics["test"]
    config.split = "valid"
    assert evaluate.run(config)["accuracy"] == metrics["valid_accuracy"]
    config.bundle = [str(trained / "lm")]
    assert evaluate.run(config)["nll"] > 0


def test_a_finished_run_is_not_repeated(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings("lm_finetune")
    first = train.run(config)
    monkeypatch.setattr(stages, "train_language_model", None)
    logging.getLogger("ulmfit").propagate = True
    caplog.set_level(logging.INFO, "ulmfit")
    assert train.run(config) == first
    assert "is finished already" in caplog.text


def test_all_goes_on_with_its_second_half(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise UlmfitError("lost power")

    config = settings("all", stage__classifier__epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_classifier", fail)
        with pytest.raises(UlmfitError, match="lost power"):
            train.run(config)
    assert not (only_run(config) / "metrics.json").exists()
    written = (only_run(config) / "lm" / "metrics.json").stat().st_mtime_ns
    monkeypatch.setattr(stages, "train_language_model", None)
    metrics = train.run(config)
    assert metrics["lm"] == json.loads((only_run(config) / "lm" / "metrics.json").read_text())
    assert (only_run(config) / "lm" / "metrics.json").stat().st_mtime_ns == written


def test_a_short_training_has_a_curve(settings: Settings) -> None:
    config = settings("classifier", stage__classifier__epochs=1)
    train.run(config)
    history = read_history(only_run(config))
    assert [step for step, _ in history["train_loss_step"]] == [0, 1, 2, 3]
    assert len(history["lr_0"]) == 4


# ------------------------------------------------------------------------------------------------ from stage to stage


def test_the_encoder_moves_by_name(settings: Settings, trained: Path) -> None:
    parent = Parent(trained / "lm" / "bundle", "")
    given = stages.prepare_classifier(settings(init=str(parent.path)), parent)
    assert equal(given.model.encoder.state_dict(), load_file(trained / "lm" / "bundle" / "encoder.safetensors"))
    assert given.tokenizer.fingerprint == read_info(parent.path or "").tokenizer_fingerprint


def test_the_bundle_decides_the_architecture(settings: Settings, trained: Path) -> None:
    config = settings(init=str(trained / "lm"), model__num_layers=3, tokenizer__vocab_size=500)
    train.run(config)
    ours, parents = read_info(only_run(config) / "bundle"), read_info(trained / "lm" / "bundle")
    assert ours.architecture == parents.architecture
    assert ours.tokenizer_fingerprint == parents.tokenizer_fingerprint


def test_a_classifier_takes_the_newest_language_model_of_its_data(settings: Settings) -> None:
    train.run(settings("lm_finetune"))
    lm = only_run(settings()) / "bundle"
    config = settings("classifier", init=None)
    train.run(config)
    found = [path for path in (Path(config.runs) / "helpdesk").iterdir() if path.name.startswith("classifier")]
    assert read_info(found[0] / "bundle").provenance["parent"] == str(lm)


def test_a_changed_parent_is_another_run(settings: Settings, trained: Path, trained_backward: Path) -> None:
    """`init` may name a folder whose bundle was replaced: the weights count, not the name."""
    config = settings(init=None)
    one = choose_parent(str(trained), "classifier", Path(config.runs), "helpdesk", None)
    other = choose_parent(str(trained_backward), "classifier", Path(config.runs), "helpdesk", None)
    assert len({one.fingerprint, other.fingerprint, Parent(None, "").fingerprint}) == 3


def test_backward_through_all_stages(trained: Path, trained_backward: Path, caches: Path) -> None:
    bundles = [folder / stage / "bundle" for folder in (trained, trained_backward) for stage in ("lm", "classifier")]
    assert [read_info(path).direction for path in bundles] == ["forward"] * 2 + ["backward"] * 2
    config = EvaluateConfig([str(bundles[1]), str(bundles[3])], cache=str(caches))
    config.dataset.limit = 60
    both = evaluate.run(config)
    alone = []
    for path in (bundles[1], bundles[3]):
        config.bundle = [str(path)]
        alone.append(evaluate.run(config)["log_loss"])
    assert both["documents"] == 60
    assert both["log_loss"] <= sum(alone) / 2  # the mean of probabilities is at least as good, by Jensen's inequality
    assert both["log_loss"] not in alone


def test_a_direction_that_the_parent_does_not_have(settings: Settings, trained: Path) -> None:
    for stage in ("lm_finetune", "classifier"):
        with pytest.raises(UsageError, match=r"reads forward.*stage.lm.direction=backward"):
            train.run(settings(stage, init=str(trained / "lm"), stage__lm__direction="backward"))


def test_a_vocabulary_of_its_own(settings: Settings, trained: Path) -> None:
    parent = Parent(trained / "lm" / "bundle", "")
    config = settings(
        "lm_finetune",
        init=str(parent.path),
        stage__lm__vocabulary="train",
        tokenizer__vocab_size=500,
        dataset__limit=90,
    )
    given = stages.prepare_language_model(config, parent)
    old = load_bundle(trained / "lm" / "bundle")
    assert given.tokenizer.vocab_size == 500
    rows = load_file(trained / "lm" / "bundle" / "encoder.safetensors")["embedding.weight"]
    new, mean = given.model.encoder.embedding.weight, rows.mean(0)
    known = {piece: i for i, piece in enumerate(old.tokenizer.pieces)}
    matched = [piece in known for piece in given.tokenizer.pieces]
    assert 300 < sum(matched) < 500
    for i, piece in enumerate(given.tokenizer.pieces):
        assert torch.equal(new[i], rows[known[piece]]) if matched[i] else torch.allclose(new[i], mean)
    train.run(config)
    assert read_info(only_run(config) / "bundle").architecture["vocab_size"] == 500


# ------------------------------------------------------------------------------------------------ data


def test_low_shot(settings: Settings) -> None:
    """Few labels, all text: the language model's data does not depend on train_size."""
    config = settings("all", dataset__train_size=12, dataset__limit=None)
    given = stages.prepare_classifier(config, Parent(None, ""))
    assert sorted(given.train_labels) == [label for label in range(6) for _ in range(2)]
    assert given.valid is not None and len(given.valid) == 150
    everything = stages.prepare_language_model(settings("all", dataset__limit=None), Parent(None, ""))
    assert len(stages.prepare_language_model(config, Parent(None, "")).train) == len(everything.train) > 1000


@pytest.mark.parametrize("stage", ["lm_finetune", "classifier"])
def test_without_validation(settings: Settings, tmp_path: Path, stage: str) -> None:
    path = write_csv(tmp_path / "rows.csv", some_rows(40))
    config = settings(
        stage, dataset__name="rows", dataset__path=str(path), dataset__valid_fraction=0.0, stage__lm__patience=1
    )
    metrics = train.run(config)
    assert set(metrics) == {"train_loss_epoch", "seconds"}
    assert read_info(only_run(config) / "bundle").metrics.keys() == {"train_loss_epoch"}


@pytest.mark.parametrize("unfreezing", ["full", "gradual"])
def test_one_document_per_batch(settings: Settings, tmp_path: Path, unfreezing: str) -> None:
    """Batch normalisation has no variance of one row; Lightning and torch alike fail there."""
    path = write_csv(tmp_path / "rows.csv", some_rows(12))
    config = settings(
        dataset__path=str(path),
        dataset__valid_fraction=0.2,
        stage__classifier__batch_size=1,
        stage__classifier__epochs=4,
        stage__classifier__method__unfreezing__mode=unfreezing,
    )
    assert train.run(config)["valid_loss"] > 0
    assert read_info(only_run(config) / "bundle").provenance["steps"] == 40


def test_a_handful_of_rows(settings: Settings, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", some_rows(4))
    metrics = train.run(settings("all", dataset__path=str(path)))
    assert metrics["train_loss_epoch"] > 0


def test_documents_without_text(settings: Settings, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [*some_rows(30), ("", "yes"), ("   ", "no")])
    assert train.run(settings("all", dataset__path=str(path)))["train_loss_epoch"] > 0


# ------------------------------------------------------------------------------------------------ how training goes


@pytest.mark.parametrize(("stage", "section"), [("lm_finetune", "lm"), ("classifier", "classifier")])
def test_max_steps_inside_an_epoch(settings: Settings, stage: str, section: str) -> None:
    config = settings(stage, **{f"stage__{section}__max_steps": 3})
    metrics = train.run(config)
    assert read_info(only_run(config) / "bundle").provenance["steps"] == 3
    assert "valid_loss" in metrics  # although no epoch came to its end
    history = read_history(only_run(config))
    assert history["lr_0"][-1][1] < history["lr_0"][1][1]  # the schedule was laid out for 3 steps


def test_accumulation(settings: Settings) -> None:
    config = settings(stage__classifier__optim__accumulate=3, stage__classifier__epochs=2)
    train.run(config)
    assert (
        read_info(only_run(config) / "bundle").provenance["steps"] == 2 * 2
    )  # 4 batches an epoch, the last of them alone


@pytest.mark.parametrize(("stage", "section"), [("lm_finetune", "lm"), ("classifier", "classifier")])
def test_seeds(settings: Settings, tmp_path: Path, stage: str, section: str) -> None:
    """The same seed gives the same weights and figures bit for bit, whatever random numbers were drawn before."""
    values = {f"stage__{section}__epochs": 1}
    found, figures = [], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = settings(stage, seed=seed, runs=str(tmp_path / name), **values)
        torch.rand(17)
        figures.append({name: value for name, value in train.run(config).items() if name != "seconds"})
        found.append(weights(only_run(config) / "bundle"))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]


def test_subword_sampling(settings: Settings, tmp_path: Path) -> None:
    """Another segmentation in each epoch, the same ones for the same seed."""
    found, lengths = [], []
    for name, alpha in (("a", 0.1), ("b", 0.1), ("c", 0.0)):
        config = settings(tokenizer__sampling_alpha=alpha, runs=str(tmp_path / name))
        train.run(config)
        found.append(weights(only_run(config) / "bundle"))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])
    documents = stages.prepare_classifier(settings(tokenizer__sampling_alpha=0.1), Parent(None, "")).train
    assert callable(documents)
    lengths = [documents(epoch).lengths.sum() for epoch in (0, 1, 0)]
    assert lengths[0] == lengths[2] != lengths[1]


def test_balanced_class_weights(settings: Settings, tmp_path: Path) -> None:
    rows = [row for row in some_rows(60) if row[1] == "yes" or row[0].endswith("0")]
    path = write_csv(tmp_path / "rows.csv", rows)
    found = []
    for name in ("none", "balanced"):
        config = settings(dataset__path=str(path), stage__classifier__class_weights=name, runs=str(tmp_path / name))
        train.run(config)
        found.append(weights(only_run(config) / "bundle"))
    assert not equal(*found)


def test_half_precision_in_the_bundle(settings: Settings) -> None:
    config = settings("lm_finetune", stage__lm__half=True, stage__lm__epochs=1)
    train.run(config)
    assert load_file(only_run(config) / "bundle" / "encoder.safetensors")["embedding.weight"].dtype == torch.float16
    assert load_bundle(only_run(config) / "bundle").encoder["embedding.weight"].dtype == torch.float32
