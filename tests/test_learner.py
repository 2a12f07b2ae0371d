"""The Python door: a walk through it, and that it runs the same engine as the command line."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ulmfit
from ulmfit.bundle import CLASSIFIER, FILES, LANGUAGE_MODEL, load_bundle, read_info
from ulmfit.config import DatasetConfig, GenerateConfig, ModelConfig
from ulmfit.errors import BundleError, DataError, UsageError
from ulmfit.hydra_config import load_config
from ulmfit.learner.classifier import TextClassifierLearner
from ulmfit.learner.language_model import LanguageModelLearner
from ulmfit.tasks import train

WORDS = ["trainer=cpu", "trainer.threads=1", "tokenizer.vocab_size=400"]
QUICK: dict[str, Any] = {"model": "tiny", "config": WORDS, "progress": False}
TEXT = "the printer in room four does not print"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory and temporary folder; both are as empty afterwards, unless a test says otherwise."""
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("ULMFIT_CACHE", str(tmp_path / "cache"))
    yield
    assert list(here.iterdir()) == []
    assert list(temporary.iterdir()) == []


@pytest.fixture(scope="module")
def data() -> ulmfit.TextData:
    return ulmfit.TextData.from_config(DatasetConfig(limit=60))


@pytest.fixture(scope="module")
def lm(data: ulmfit.TextData, tmp_path_factory: pytest.TempPathFactory) -> LanguageModelLearner:
    """Trained a little; tests copy it before they change it."""
    cache = f"cache={tmp_path_factory.mktemp('cache')}"
    learner = ulmfit.language_model_learner(
        data, "scratch", model="tiny", config=[*WORDS, cache], progress=False, bptt=20, batch_size=8
    )
    learner.fine_tune(1)
    return learner


@pytest.fixture(scope="module")
def fitted(data: ulmfit.TextData, lm: LanguageModelLearner) -> TextClassifierLearner:
    """As `lm`."""
    learner = new_classifier(data, lm)
    learner.fine_tune(4)
    return learner


def new_classifier(data: ulmfit.TextData, init: Any, **more: Any) -> TextClassifierLearner:
    return ulmfit.text_classifier_learner(data, init, **{**QUICK, "batch_size": 16, **more})


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed_groups(learner: Any, before: dict[str, torch.Tensor]) -> list[int]:
    """Layer groups with a parameter that is not what it was."""
    names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
    return [
        index
        for index, group in enumerate(learner.model.layer_groups())
        if any(not torch.equal(p, before[names[id(p)]]) for p in group.parameters())
    ]


# ------------------------------------------------------------------------------------------------ one engine


def train_words(stage: str, tmp_path: Path) -> list[str]:
    return [
        "experiment=smoke",
        f"stage={stage}",
        "trainer.threads=1",
        "trainer.enable_progress_bar=false",
        f"cache={tmp_path / 'cache'}",
        f"runs={tmp_path / 'runs'}",
        *("stage.lm.max_steps=null", "stage.lm.epochs=2"),
        *("stage.classifier.max_steps=null", "stage.classifier.epochs=4"),
    ]


def test_classifier_is_the_one_of_the_command_line(tmp_path: Path) -> None:
    config = load_config("train", train_words("classifier", tmp_path))
    train.run(config)
    [folder] = (tmp_path / "runs").rglob("bundle")
    random.seed(5)  # what was drawn before makes no difference
    torch.manual_seed(5)
    learner = ulmfit.text_classifier_learner(ulmfit.TextData.from_config(config.dataset), config=config)
    torch.rand(7)
    learner.fine_tune()
    written = load_bundle(folder)
    assert same(learner.model.encoder.state_dict(), written.encoder)
    assert same(learner.model.head.state_dict(), written.head)
    other = ulmfit.text_classifier_learner(learner.data, config=config, seed=1)
    other.fine_tune()
    assert not same(other.model.encoder.state_dict(), written.encoder)
    assert learner.metrics["valid_loss"] == pytest.approx(written.info.metrics["valid_loss"], rel=1e-12)


def test_both_stages_are_those_of_the_command_line(tmp_path: Path) -> None:
    words = [word for word in train_words("all", tmp_path) if not word.startswith("stage=")]
    config = load_config("train", words)
    train.run(config)
    [lm_folder] = (tmp_path / "runs").rglob("lm/bundle")
    [folder] = (tmp_path / "runs").rglob("classifier/bundle")
    data = ulmfit.TextData.from_config(config.dataset)
    lm = ulmfit.language_model_learner(data, config=words)
    lm.fine_tune()
    assert same(lm.model.encoder.state_dict(), load_bundle(lm_folder).encoder)
    classifier = ulmfit.text_classifier_learner(data, lm, config=words)
    classifier.fine_tune()
    assert same(classifier.model.encoder.state_dict(), load_bundle(folder).encoder)
    assert same(classifier.model.head.state_dict(), load_bundle(folder).head)


def test_predicting_before_training_warns_and_changes_nothing(
    data: ulmfit.TextData, lm: LanguageModelLearner, fitted: TextClassifierLearner
) -> None:
    learner = new_classifier(data, lm)
    with pytest.warns(UserWarning, match="nothing has been trained yet"):
        learner.predict(TEXT)
    learner.validate()
    learner.lr_find(steps=10)
    learner.fine_tune(4)
    assert same(weights(learner), weights(fitted))


def test_the_callers_random_numbers_go_on(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    new_classifier(data, lm).fit(1)
    assert draw() == expected


# ------------------------------------------------------------------------------------------------ fits


@pytest.mark.parametrize("n", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_freeze_to_trains_what_python_slicing_says(data: ulmfit.TextData, lm: LanguageModelLearner, n: int) -> None:
    learner = new_classifier(data, lm, max_steps=1)
    assert [type(group).__name__ for group in learner.model.layer_groups()][-1] == "ClassifierHead"
    before = weights(learner)
    learner.freeze_to(n)
    learner.fit(1)
    assert changed_groups(learner, before) == list(range(4))[n:]


@pytest.mark.fastai
@pytest.mark.parametrize("n", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_freeze_to_means_what_it_means_in_fastai(data: ulmfit.TextData, lm: LanguageModelLearner, n: int) -> None:
    optimizer = pytest.importorskip("fastai.optimizer")
    parameters = [[torch.nn.Parameter(torch.zeros(1))] for _ in range(4)]
    fastai = optimizer.Optimizer(parameters, [optimizer.sgd_step], lr=0.1)
    fastai.freeze_to(n)
    learner = new_classifier(data, lm)
    learner.freeze_to(n)
    assert learner._first_trained == fastai.frozen_idx % 4
    assert [p.requires_grad for [p] in parameters] == [i >= learner._first_trained for i in range(4)]


def test_a_pretrained_learner_starts_frozen_and_one_from_scratch_does_not(
    data: ulmfit.TextData, lm: LanguageModelLearner
) -> None:
    learner = new_classifier(data, lm, max_steps=1)
    before = weights(learner)
    learner.fit(1)
    assert changed_groups(learner, before) == [3]
    before = weights(learner)
    learner.unfreeze()
    learner.fit(1)
    assert changed_groups(learner, before) == [0, 1, 2, 3]
    learner = new_classifier(data, "scratch", max_steps=1)
    before = weights(learner)
    learner.fit(1)
    assert changed_groups(learner, before) == [0, 1, 2, 3]


def test_fine_tune_unfreezes_one_group_more_each_epoch(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = new_classifier(data, lm, keep="last")
    before = weights(learner)
    with pytest.warns(UserWarning, match="does not reach layer groups"):
        learner.fine_tune(2)
    assert changed_groups(learner, before) == [2, 3]
    before = weights(learner)
    learner.fit(1)  # nothing is frozen any more
    assert changed_groups(learner, before) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (0.02, [0.02, 0.02, 0.02, 0.02]),
        (slice(1e-5, 1e-2), [1e-5, 1e-4, 1e-3, 1e-2]),
        (slice(0.01), [1e-3, 1e-3, 1e-3, 1e-2]),
        (None, [0.03 / 2.6**3, 0.03 / 2.6**2, 0.03 / 2.6, 0.03]),
    ],
)
def test_rates(data: ulmfit.TextData, lm: LanguageModelLearner, lr: Any, expected: list[float]) -> None:
    learner = new_classifier(data, lm, max_steps=2)
    learner.unfreeze()  # a frozen group has no rate to show
    learner.fit(1, lr)
    assert [learner.history[f"lr_{i}"][-1][1] for i in range(4)] == pytest.approx(expected)
    learner = new_classifier(data, lm)
    learner.unfreeze()
    learner.fit_one_cycle(3, lr)
    assert [max(rate for _, rate in learner.history[f"lr_{i}"]) for i in range(4)] == pytest.approx(expected, rel=1e-2)
    assert learner.history["lr_3"][0][1] == pytest.approx(expected[3] / 25)


def test_fine_tune_with_a_rate_keeps_the_ratios(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = new_classifier(data, lm)
    learner.fine_tune(4, 0.05)
    last = [learner.history[f"lr_{i}"][-1][1] for i in range(4)]
    assert [b / a for a, b in pairwise(last)] == pytest.approx([2.6] * 3)
    assert max(rate for _, rate in learner.history["lr_3"]) == pytest.approx(0.05)


def test_fits_go_on_and_history_grows(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = new_classifier(data, lm)
    learner.unfreeze()
    learner.fit(1, 0.01)
    after_first, steps = weights(learner), [step for step, _ in learner.history["train_loss_step"]]
    learner.fit(1, 0.01)
    grown = [step for step, _ in learner.history["train_loss_step"]]
    assert steps == list(range(4))
    assert grown == list(range(8))
    assert len(learner.history["valid_loss"]) == 2
    assert not same(after_first, weights(learner))
    losses = [value for _, value in learner.history["train_loss_step"]]
    assert losses[:4] != losses[4:]
    assert learner.plot_losses().axes[0].lines
    assert len(learner.plot_rates().axes[0].lines) == 4
    assert learner.plot_losses()._repr_png_().startswith(b"\x89PNG")


def test_a_second_fit_sees_another_order(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    first, second = new_classifier(data, lm), new_classifier(data, lm)
    start = weights(first)
    first.fit(1, 1e-12)
    second._fits = 1
    second.fit(1, 1e-12)
    assert same(start, weights(new_classifier(data, lm)))
    assert first.history["train_loss_step"] != second.history["train_loss_step"]


def test_lr_find_changes_nothing(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = new_classifier(data, lm)
    before = weights(learner)
    result = learner.lr_find(steps=12)
    assert same(before, weights(learner))
    assert learner.history == {}
    assert result.rates == sorted(result.rates)
    assert result.suggestion is None or result.rates[0] <= result.suggestion <= result.rates[-1]
    assert result.plot().axes[0].get_xscale() == "log"


def test_folder_keeps_the_logs(data: ulmfit.TextData, lm: LanguageModelLearner, tmp_path: Path) -> None:
    learner = new_classifier(data, lm, folder=tmp_path / "logs", max_steps=2)
    learner.fit(1)
    learner.fit(1)
    kept = sorted(path.relative_to(tmp_path / "logs").as_posix() for path in (tmp_path / "logs").rglob("*.csv"))
    assert kept == ["fit-1/log/attempt-0/metrics.csv", "fit-2/log/attempt-0/metrics.csv"]
    assert not list((tmp_path / "logs").rglob("*.ckpt"))


def test_interrupted_fit_leaves_a_usable_learner(
    data: ulmfit.TextData, lm: LanguageModelLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = new_classifier(data, lm)

    def interrupt(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("ulmfit.training.engine.fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    monkeypatch.undo()
    assert learner.predict(TEXT).label in data.classes


# ------------------------------------------------------------------------------------------------ what comes out


def test_a_time_limit_ends_a_fit(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = new_classifier(data, lm)
    before = weights(learner)
    learner.config.trainer.max_time = "00:00:00:00"
    with pytest.warns(UserWarning, match=r"the time is up .* at step 1 of 4; the network has the weights of"):
        learner.fit(1, 0.01)
    assert not same(before, weights(learner))
    assert learner.predict("my printer").probabilities


def test_predictions_agree(data: ulmfit.TextData, fitted: TextClassifierLearner) -> None:
    one = fitted.predict(TEXT)
    assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert one.label == max(one.probabilities, key=one.probabilities.__getitem__)
    many = fitted.predict_many([TEXT, "hello", ""])
    assert list(one.probabilities.values()) == pytest.approx(list(many[0].probabilities.values()), abs=1e-6)
    probabilities, labels = fitted.get_preds("test")
    table = data.table("test")
    assert probabilities.shape == (len(table), len(data.classes))
    assert labels is not None
    assert [data.classes[i] for i in labels] == table.labels
    assert fitted.validate("test")["accuracy"] == pytest.approx(float((probabilities.argmax(1) == labels).mean()))
    unlabelled, none = fitted.get_preds(table.texts[:3])
    assert none is None
    np.testing.assert_allclose(unlabelled, probabilities[:3], atol=1e-6)


def test_validate_is_what_training_saw(fitted: TextClassifierLearner, lm: LanguageModelLearner) -> None:
    assert fitted.validate()["accuracy"] == pytest.approx(fitted.metrics["valid_accuracy"])
    assert fitted.validate()["log_loss"] == pytest.approx(fitted.metrics["valid_loss"], rel=1e-4)
    assert lm.validate()["loss"] == pytest.approx(lm.metrics["valid_loss"], rel=0.02)  # other streams


def test_top_losses_are_the_worst(data: ulmfit.TextData, fitted: TextClassifierLearner) -> None:
    probabilities, labels = fitted.get_preds()
    assert labels is not None
    true = np.sort(probabilities[np.arange(len(labels)), labels])
    found = fitted.top_losses(3)
    assert [top.probability for top in found] == pytest.approx(list(true[:3]), abs=1e-6)
    assert [top.loss for top in found] == pytest.approx([-float(np.log(p)) for p in true[:3]], abs=1e-4)
    table = data.table("valid")
    assert table.labels is not None
    assert all(table.labels[table.texts.index(top.text)] == top.label for top in found)


def test_what_is_shown(
    data: ulmfit.TextData, lm: LanguageModelLearner, fitted: TextClassifierLearner, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted.show_results(2)
    fitted.plot_top_losses(1)
    fitted.print_report()
    lm.show_results(2)
    data.show(1)
    data.describe()
    out = capsys.readouterr().out
    for part in ("predicted", "probability of the label", "precision", "the model writes", "label", "documents"):
        assert part in out
    confusion = fitted.plot_confusion().axes[0]
    assert [tick.get_text() for tick in confusion.get_xticklabels()] == data.classes


def test_tables_escape_html() -> None:
    from ulmfit.learner.display import Table

    table = Table(["text"], [["<script>alert(1)</script>"], ["x" * 1000]])
    assert "<script>" not in table._repr_html_()
    assert "&lt;script&gt;" in table._repr_html_()
    assert len(table.rows[1][0]) == 400


def test_language_model_writes_on(lm: LanguageModelLearner) -> None:
    written = lm.predict("My laptop", n_words=5, temperature=1.0)
    assert written.startswith("My laptop")
    assert len(written.split()) <= 7
    assert lm.predict("My laptop", seed=1) == lm.predict("My laptop", seed=1)
    assert isinstance(lm.predict(), str)
    defaults = load_config("generate")
    assert isinstance(defaults, GenerateConfig)
    explicit = lm.predict("My laptop", 30, None, defaults.temperature, defaults.top_k, defaults.top_p, defaults.seed)
    assert lm.predict("My laptop", tokens=30) == explicit


# ------------------------------------------------------------------------------------------------ copies and bundles


def test_deepcopy_after_training(fitted: TextClassifierLearner, lm: LanguageModelLearner) -> None:
    twin = copy.deepcopy(fitted)
    assert twin.predict(TEXT) == fitted.predict(TEXT)
    before = weights(fitted)
    twin.fit(1, 0.05)
    assert same(before, weights(fitted))
    assert not same(before, weights(twin))
    assert copy.deepcopy(lm).validate() == lm.validate()


def test_saved_and_loaded_classifier(data: ulmfit.TextData, fitted: TextClassifierLearner, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "bundle")
    assert {item.name for item in path.iterdir()} == set(FILES)
    info = read_info(path, CLASSIFIER)
    assert info.labels == data.classes
    assert info.provenance["steps"] == 16
    assert info.metrics["valid_accuracy"] == fitted.metrics["valid_accuracy"]
    predictor = ulmfit.load(path)
    assert isinstance(predictor, ulmfit.Predictor)
    found, expected = predictor.predict_one(TEXT), fitted.predict(TEXT)
    assert found.label == expected.label
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)  # with its norms folded
    other = new_classifier(data, "scratch").load(path)
    assert other.predict(TEXT) == fitted.predict(TEXT)
    twin = copy.deepcopy(fitted)
    for learner in (twin, other):
        learner._fits = 0
        learner.fit(1, 0.01)
    assert same(weights(twin), weights(other))


def test_saved_and_loaded_language_model(lm: LanguageModelLearner, tmp_path: Path) -> None:
    path = lm.save(tmp_path / "bundle")
    read_info(path, LANGUAGE_MODEL)
    loaded = ulmfit.load(path)
    assert isinstance(loaded, ulmfit.LanguageModelPredictor)
    assert loaded.predict("My laptop") == lm.predict("My laptop")
    valid = list(lm.data.texts("valid"))
    assert loaded.score(valid).perplexity == pytest.approx(lm.validate()["perplexity"], rel=1e-6)


def test_encoder_moves_by_name(data: ulmfit.TextData, lm: LanguageModelLearner, tmp_path: Path) -> None:
    path = lm.save_encoder(tmp_path / "encoder")
    learner = new_classifier(data, "scratch", config=["trainer=cpu", "tokenizer.vocab_size=500"])
    head = {name: value.clone() for name, value in learner.model.head.state_dict().items()}
    assert learner.tokenizer.fingerprint != lm.tokenizer.fingerprint
    learner.load_encoder(path)
    assert same(learner.model.encoder.state_dict(), lm.model.encoder.state_dict())
    assert same(learner.model.head.state_dict(), head)
    assert learner.tokenizer.fingerprint == lm.tokenizer.fingerprint
    before = weights(learner)
    learner.fit(1)
    assert changed_groups(learner, before) == [3]
    wider = new_classifier(data, "scratch", model=ModelConfig(16, 20, 1)).load_encoder(path)
    assert wider.model.head.norms[0].num_features == 3 * 24
    back = ulmfit.language_model_learner(data, "scratch", **QUICK).load_encoder(learner.save(tmp_path / "classifier"))
    assert same(back.model.encoder.state_dict(), learner.model.encoder.state_dict())


def test_backward_and_ensemble(
    data: ulmfit.TextData, lm: LanguageModelLearner, fitted: TextClassifierLearner, tmp_path: Path
) -> None:
    backward = ulmfit.language_model_learner(data, "scratch", direction="backward", max_steps=2, batch_size=8, **QUICK)
    backward.fit(1)
    assert backward.validate()["loss"] > 0
    with pytest.raises(UsageError, match="reads backward"):
        backward.predict("My laptop")
    learner = new_classifier(data, backward, max_steps=2)
    learner.fit(1)
    assert learner.direction == "backward"
    paths = [fitted.save(tmp_path / "forward"), learner.save(tmp_path / "backward")]
    ensemble = ulmfit.load(paths)
    assert isinstance(ensemble, ulmfit.Predictor)
    mean = (fitted.get_preds([TEXT])[0] + learner.get_preds([TEXT])[0]) / 2
    np.testing.assert_allclose(ensemble.probabilities([TEXT]), mean, atol=1e-6)
    with pytest.raises(UsageError, match="direction='backward' with a language model that reads forward"):
        new_classifier(data, lm, direction="backward")


# ------------------------------------------------------------------------------------------------ wrong requests


def test_wrong_requests_are_one_sentence(
    data: ulmfit.TextData, lm: LanguageModelLearner, fitted: TextClassifierLearner, tmp_path: Path
) -> None:
    lm_bundle = lm.save(tmp_path / "lm")
    other = ulmfit.TextData.from_lists(["a b", "c d", "e f", "g h"], ["x", "y", "x", "y"], valid_fraction=0)
    unlabelled = ulmfit.TextData.from_lists(["a b c", "d e f"])
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: new_classifier(unlabelled, lm), DataError, "has no labels"),
        (lambda: new_classifier(data, lm, batchsize=3), UsageError, "did you mean 'batch_size'"),
        (lambda: new_classifier(data, lm, batch_size=0), UsageError, "batch_size=0"),
        (lambda: new_classifier(data, 5), UsageError, "init of type int"),
        (lambda: new_classifier(data, tmp_path / "nothing"), BundleError, "no bundle at"),
        (lambda: new_classifier(data, fitted.save(tmp_path / "clf")), BundleError, "expected a language model"),
        (lambda: ulmfit.language_model_learner("reviews.csv"), UsageError, "TextData.from_csv"),  # type: ignore[arg-type]
        (lambda: ulmfit.language_model_learner(data, config=["stage.lm.lr=1"]), UsageError, "stage.lm.lr"),
        (lambda: fitted.fit(0), UsageError, "epochs=0"),
        (lambda: fitted.fit(1, -1.0), UsageError, "learning rate -1.0"),
        (lambda: fitted.fit_one_cycle(1, slice(1e-3, None)), UsageError, "slice"),
        (lambda: fitted.fit_one_cycle(1, moms=(0.9,)), UsageError, "momentum"),
        (lambda: fitted.fit_one_cycle(1, pct_start=2), UsageError, "pct_start=2"),
        (lambda: fitted.freeze_to(4), UsageError, r"freeze_to\(4\), expected -4 to 3"),
        (lambda: fitted.predict([TEXT]), UsageError, "predict_many"),  # type: ignore[arg-type]
        (lambda: fitted.predict_many(TEXT), UsageError, "list of texts"),
        (lambda: fitted.get_preds("tset"), UsageError, "did you mean 'test'"),
        (lambda: fitted.load(lm_bundle), BundleError, "expected a classifier"),
        (lambda: new_classifier(other, lm).load(fitted.save(tmp_path / "clf")), BundleError, "labels"),
        (lambda: new_classifier(data, lm).plot_losses(), UsageError, "nothing has been trained"),
        (lambda: lm.predict("My", n_words=0), UsageError, "n_words=0"),
        (lambda: ulmfit.load(tmp_path / "nothing"), BundleError, "no bundle at"),
        (lambda: ulmfit.load([lm_bundle]), BundleError, "expected a classifier"),
        (lambda: other.table("test"), UsageError, "no test split"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_without_validation_texts(lm: LanguageModelLearner) -> None:
    data = ulmfit.TextData.from_lists(["red apple", "blue sky"] * 20, ["a", "b"] * 20, valid_fraction=0)
    learner = new_classifier(data, lm)
    learner.fit(1)
    assert "valid_loss" not in learner.history
    language_model = ulmfit.language_model_learner(data, lm, **QUICK)
    language_model.fit(1)
    assert list(language_model.metrics) == ["train_loss_epoch"]


def test_other_vocabulary_is_transferred(lm: LanguageModelLearner) -> None:
    data = ulmfit.TextData.from_lists(["the quick brown fox jumps over the lazy dog"] * 30)
    learner = ulmfit.language_model_learner(data, lm, vocabulary="train", **QUICK)
    assert learner.tokenizer.fingerprint != lm.tokenizer.fingerprint
    shared = set(learner.tokenizer.pieces) & set(lm.tokenizer.pieces)
    piece = max(shared, key=len)
    rows = [one.model.encoder.embedding.weight[one.tokenizer.pieces.index(piece)].tolist() for one in (learner, lm)]
    assert rows[0] == rows[1]
    learner.fit(1)


def test_settings_come_from_the_same_yaml(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = ulmfit.text_classifier_learner(data, lm, drop_mult=0.5, seed=7)
    expected = load_config("train")
    stage = expected.stage.classifier
    assert learner.config.stage.classifier == replace(stage, dropout=replace(stage.dropout, multiplier=0.5))
    assert learner.config.seed == 7
    assert learner.config.trainer == expected.trainer


def test_subword_sampling(data: ulmfit.TextData, lm: LanguageModelLearner) -> None:
    learner = new_classifier(data, copy.deepcopy(lm), config=[*WORDS, "tokenizer.sampling_alpha=0.3"])
    learner.fit(2)
    assert len(learner.history["valid_loss"]) == 2
