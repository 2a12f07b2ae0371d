"""One fit: which weights it keeps, when it ends, what it says when it fails, what it logs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from ulmfit.config import ClassifierConfig, LMConfig, LoggerConfig, OptimConfig, TrainerConfig
from ulmfit.data.cache import TokenCache
from ulmfit.errors import UlmfitError, UsageError
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.plots import read_history
from ulmfit.training import engine, trainer
from ulmfit.training.checkpoints import CHECKPOINTS, Validated
from ulmfit.training.trainer import FitResult, resolve_precision

VOCABULARY, CLASSES = 30, 3
TRAINER = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)
CONFIG = ClassifierConfig(epochs=5, batch_size=8, tokens_per_batch=400, bptt=8, max_len=20, optim=OptimConfig(lr=0.05))

pytestmark = pytest.mark.filterwarnings("ignore")


def cache(count: int, seed: int) -> TokenCache:
    rng = np.random.default_rng(seed)
    documents = [[2, *rng.integers(3, VOCABULARY, size=rng.integers(2, 25)).tolist()] for _ in range(count)]
    return TokenCache.from_documents(documents, VOCABULARY)


def classifier(config: ClassifierConfig = CONFIG) -> TextClassifier:
    torch.manual_seed(1)
    return new_text_classifier(AWDLSTM(Architecture(VOCABULARY, 6, 8, 2)), CLASSES, config)


class History(lightning.Callback):
    """The weights after each validation, and how many steps there were."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})
        self.steps.append(trainer.global_step)


def fit(
    config: ClassifierConfig,
    folder: Path | None = None,
    given: TrainerConfig = TRAINER,
    logger: LoggerConfig | None = None,
) -> tuple[FitResult, History, dict[str, torch.Tensor]]:
    model, history = classifier(config), History()
    labels = [i % CLASSES for i in range(32)]
    result = engine.fit_classifier(
        model,
        cache(32, 1),
        labels,
        cache(9, 2),
        labels[:9],
        config,
        "forward",
        0,
        given,
        LoggerConfig(csv=False),
        folder,
        callbacks=[history],
    )
    return result, history, model.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The validation accuracies that the next trainings are going to see, in turn."""
    values: list[float] = []

    class Rigged(engine.ClassifierModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("valid_accuracy", values[0], on_epoch=True, batch_size=1)
            self.log("valid_loss", 1 - values[0], on_epoch=True, batch_size=1)

        def on_validation_epoch_end(self) -> None:
            values.pop(0)

    monkeypatch.setattr(engine, "ClassifierModule", Rigged)
    return values


def held() -> int:
    """Bytes of the tensors that Python holds, waiting for the garbage collector or not."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    return sum(tensor.nbytes for tensor in tensors if tensor.layout == torch.strided)


def test_a_training_that_has_ended_holds_nothing_as_large_as_the_weights() -> None:
    """Else trainings in one process, or the stages of a run, add up until the garbage collector comes by."""
    config = replace(CONFIG, epochs=1)
    model = new_text_classifier(AWDLSTM(Architecture(VOCABULARY, 64, 128, 2)), CLASSES, config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    labels = [i % CLASSES for i in range(32)]

    def train() -> None:
        data = (cache(32, 1), labels, cache(9, 2), labels[:9])
        engine.fit_classifier(model, *data, config, "forward", 0, TRAINER, LoggerConfig(csv=False), None)

    train()
    gc.collect()
    before = held()
    gc.disable()
    try:
        for _ in range(3):
            train()
            assert held() - before < weights / 2
    finally:
        gc.enable()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fails", [True, False])
def test_a_language_models_training_gives_its_memory_back(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fit(*given: Any) -> FitResult:
        order.append("fit")
        if fails:
            raise UlmfitError("not a number")
        return FitResult(steps=7)

    monkeypatch.setattr(engine, "fit", fit)
    monkeypatch.setattr(engine.memory, "give_back", lambda: order.append("give back"))
    model = LanguageModel(AWDLSTM(Architecture(VOCABULARY, 6, 8, 2)))
    with pytest.raises(UlmfitError) if fails else nullcontext():
        engine.fit_language_model(
            model, cache(32, 1), None, LMConfig(), "forward", 0, TRAINER, LoggerConfig(csv=False), None
        )
    assert order == ["fit", "give back"]


# ------------------------------------------------------------------------------------------------ weights to keep


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([0.1, 0.5, 0.3, 0.4, 0.2], 1), ([0.1, 0.2, 0.3, 0.4, 0.5], 4), ([0.5, 0.5, 0.4, 0.5, 0.3], 0)],
)
def test_keep_best(rigged: list[float], accuracies: list[float], best: int, folder: bool, tmp_path: Path) -> None:
    rigged[:] = accuracies
    result, history, kept = fit(CONFIG, tmp_path if folder else None)
    assert [equal(kept, weights) for weights in history.weights] == [i == best for i in range(5)]
    assert result.metrics["valid_accuracy"] == pytest.approx(accuracies[best])
    assert result.metrics["valid_loss"] == pytest.approx(1 - accuracies[best])
    assert list(tmp_path.rglob("*.ckpt")) == []


@pytest.mark.parametrize(
    ("found", "kept", "better"),
    [
        ((0.5, 0.9), (0.5, 1.0), True),
        ((0.5, 1.0), (0.5, 0.9), False),
        ((0.4, 0.1), (0.5, 0.9), False),
        ((0.6, 2.0), (0.5, 0.9), True),
        ((0.1, 9.0), (float("nan"), 0.1), True),
    ],
)
def test_of_equal_accuracies_the_lower_loss_is_better(
    found: tuple[float, float], kept: tuple[float, float], better: bool
) -> None:
    figures = [dict(zip(("valid_accuracy", "valid_loss"), pair, strict=True)) for pair in (found, kept)]
    assert Validated("valid_accuracy", "max")._better(*figures) == better


def test_keep_last(rigged: list[float]) -> None:
    rigged[:] = [0.9, 0.5, 0.3, 0.4, 0.2]
    result, history, kept = fit(replace(CONFIG, keep="last"))
    assert equal(kept, history.weights[-1]) and not equal(kept, history.weights[0])
    assert result.metrics["valid_accuracy"] == pytest.approx(0.2)


def test_language_models_keep_the_lowest_loss() -> None:
    """Trained on one text and validated on another at a high rate, a language model gets worse."""
    torch.manual_seed(0)
    model = LanguageModel(AWDLSTM(Architecture(VOCABULARY, 6, 8, 1)))
    config, history = LMConfig(epochs=4, batch_size=4, bptt=20, optim=OptimConfig(lr=1.0)), History()
    result = engine.fit_language_model(
        model, cache(40, 1), cache(9, 2), config, "forward", 0, TRAINER, LoggerConfig(csv=False), None, "lm", [history]
    )
    again = engine.fit_language_model(
        model, cache(40, 1), cache(9, 2), replace(config, epochs=1, optim=OptimConfig(lr=1e-30)), "forward", 0, TRAINER,
        LoggerConfig(csv=False), None,
    )  # fmt: skip
    assert result.metrics["valid_loss"] == pytest.approx(again.metrics["valid_loss"], rel=1e-6)
    assert result.metrics["valid_perplexity"] == pytest.approx(np.exp(result.metrics["valid_loss"]), rel=1e-6)
    assert any(not equal(model.state_dict(), weights) for weights in history.weights)


# ------------------------------------------------------------------------------------------------ when it ends


def test_patience(rigged: list[float], caplog: pytest.LogCaptureFixture) -> None:
    rigged[:] = [0.3, 0.4, 0.4, 0.1, 0.9]
    result, history, kept = fit(replace(CONFIG, patience=2))
    assert len(history.weights) == 4 and rigged == [0.9]
    assert equal(kept, history.weights[1])
    assert result.steps == 4 * 4
    assert result.stopped_early == "no better valid_accuracy 2 times"


def test_patience_that_does_not_run_out(rigged: list[float]) -> None:
    rigged[:] = [0.3, 0.4, 0.3, 0.5, 0.5]
    result, _, _ = fit(replace(CONFIG, patience=2))
    assert result.steps == 20
    assert result.stopped_early == ""


@pytest.mark.parametrize(("max_steps", "validations"), [(3, [3]), (4, [4]), (6, [4, 6]), (100, [4, 8, 12, 16, 20])])
def test_the_last_step_is_validated(max_steps: int, validations: list[int]) -> None:
    result, history, _ = fit(replace(CONFIG, max_steps=max_steps, patience=9))
    assert history.steps == validations
    assert result.steps == validations[-1]
    assert {"valid_loss", "valid_accuracy", "train_loss_epoch"} <= result.metrics.keys()


@pytest.mark.parametrize(
    ("accumulate", "every", "validations"), [(1, 3, [3, 6, 9, 10]), (1, 5, [5, 10]), (2, 3, [3, 6, 9, 10])]
)
def test_validation_every_so_many_steps(accumulate: int, every: int, validations: list[int]) -> None:
    optim = OptimConfig(lr=0.05, accumulate=accumulate)
    config = replace(CONFIG, epochs=5 * accumulate, max_steps=10, valid_every=every, optim=optim)
    assert fit(config)[1].steps == validations


def test_time_is_up() -> None:
    result, history, _ = fit(replace(CONFIG, epochs=1000), given=replace(TRAINER, max_time="00:00:00:01"))
    assert result.stopped_early == "the time is up"
    assert history.steps[-1] == result.steps < 4000


# ------------------------------------------------------------------------------------------------ class weights


def test_balanced_weights() -> None:
    assert engine.balanced_weights([0, 0, 0, 2], 4) == [pytest.approx(4 / 6), 0.0, 2.0, 0.0]
    labels = [0] * 7 + [1] * 2 + [2]
    weights = engine.balanced_weights(labels, 3)
    assert sum(weights[label] for label in labels) / len(labels) == pytest.approx(1)


def test_class_weights_are_in_the_loss() -> None:
    """With weights, a rare class counts as much as a frequent one: the loss is the mean of the classes' means."""
    labels = [0] * 6 + [1] * 2
    config = replace(CONFIG, class_weights="balanced", batch_size=8)
    module, data = engine.classifier_parts(classifier(), cache(8, 3), labels, None, None, config, "forward", 0)
    batch = next(iter(data.train_dataloader()))
    module.record_loss = lambda loss, size: None  # type: ignore[method-assign]
    module.eval()
    loss = module.training_step(batch, 0)
    losses = nn.functional.cross_entropy(module.model(batch.tokens, batch.lengths), batch.labels, reduction="none")
    means = [losses[batch.labels == label].mean() for label in (0, 1)]
    assert float(loss) == pytest.approx(float(sum(means)) / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------ failures


def test_the_loss_is_no_number(tmp_path: Path) -> None:
    config = replace(CONFIG, optim=OptimConfig(lr=1e30))
    with pytest.raises(
        UlmfitError, match=r"the training loss became (nan|inf|[\de.+]+) at step \d+, learning rate [\de.+]+; lower"
    ):
        fit(config, tmp_path, replace(TRAINER, checkpoint_minutes=1e-9))
    for path in (tmp_path / CHECKPOINTS).glob("*"):
        assert torch.load(path, weights_only=True)["global_step"] > 0


def test_an_empty_checkpoint_folder_starts_anew(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    assert fit(CONFIG, tmp_path)[0].steps == 20


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("accelerator", "cuda", "bfloat16", "native", "expected"),
    [
        ("cpu", False, False, False, "32-true"),
        ("cpu", False, False, True, "bf16-mixed"),
        ("auto", False, False, False, "32-true"),
        ("auto", True, True, False, "bf16-mixed"),
        ("auto", True, False, True, "32-true"),
        ("cpu", True, True, False, "32-true"),
        ("gpu", True, True, False, "bf16-mixed"),
        ("mps", False, False, True, "32-true"),
    ],
)
def test_automatic_precision(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, cuda: bool, bfloat16: bool, native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(trainer, "cpu_multiplies_bfloat16", lambda: native)
    assert resolve_precision(TrainerConfig(accelerator=accelerator)) == expected
    assert resolve_precision(TrainerConfig(accelerator=accelerator, precision="64-true")) == "64-true"
    if expected == "32-true":
        with pytest.raises(UsageError, match="no bfloat16 units; use 32-true or auto"):
            resolve_precision(TrainerConfig(accelerator=accelerator, precision="bf16-mixed"))


@pytest.mark.parametrize(("asked", "found"), [(None, "medium"), ("high", "high"), ("highest", "highest")])
def test_precision_of_float32_products(asked: str | None, found: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        trainer.bare_trainer(replace(TRAINER, matmul_precision=asked), [], max_epochs=1, clip=None)
        assert torch.get_float32_matmul_precision() == found
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------ logs


def test_logs_of_two_attempts(tmp_path: Path) -> None:
    """The steps before and after an interruption are one curve, without a gap and without a step twice."""

    class PowerFailure(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 10:
                raise RuntimeError("power failure")

    def attempt(callbacks: Sequence[lightning.Callback] = ()) -> None:
        labels = [i % CLASSES for i in range(32)]
        engine.fit_classifier(
            classifier(), cache(32, 1), labels, cache(9, 2), labels[:9], CONFIG, "forward", 0,
            replace(TRAINER, checkpoint_minutes=1e-9), LoggerConfig(log_every=1), tmp_path, callbacks=callbacks,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="power failure"):
        attempt([PowerFailure()])
    attempt()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["attempt-0", "attempt-1"]
    history = read_history(tmp_path)
    assert [step for step, _ in history["lr_3"]] == list(range(20))
    assert [step for step, _ in history["train_loss_step"]] == list(range(20))
    assert [step for step, _ in history["valid_loss"]] == [3, 7, 11, 15, 19]


@pytest.mark.filterwarnings("default")
def test_lightning_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        fit(CONFIG, tmp_path)
        fit(replace(CONFIG, patience=3, max_steps=5, optim=OptimConfig(accumulate=2)), tmp_path / "other")
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in given] == []


def test_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(replace(CONFIG, epochs=2), given=replace(TRAINER, enable_progress_bar=True))
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "classifier: 2 epochs, 8 steps"
    assert lines[1].split() == ["epoch", "train_loss", "valid_loss", "valid_accuracy", "valid_macro_f1", "time"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2"]
