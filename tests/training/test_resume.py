"""A training that goes on from any of its checkpoints ends as one that was never stopped, bit for bit."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import lightning
import numpy as np
import pytest
import torch

from ulmfit.config import (
    ClassifierConfig,
    FitConfig,
    LMConfig,
    LoggerConfig,
    MethodConfig,
    OptimConfig,
    PhaseConfig,
    TrainerConfig,
    UnfreezingConfig,
)
from ulmfit.data.cache import TokenCache
from ulmfit.errors import NotFinished, Stopped
from ulmfit.nn import fused_layer
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.models import LanguageModel
from ulmfit.nn.processor import cpu_multiplies_bfloat16
from ulmfit.training import engine
from ulmfit.training.checkpoints import WholeFiles, recovery_path
from ulmfit.training.trainer import FitResult

VOCABULARY = 30
TRAINER = TrainerConfig(
    accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False, checkpoint_minutes=1e-9
)
LOGGER = LoggerConfig(csv=False)


@dataclass
class Outcome:
    weights: dict[str, torch.Tensor]
    result: FitResult

    def assert_equal(self, other: Outcome, where: str) -> None:
        assert self.result.steps == other.result.steps, where
        assert _validation(self.result) == _validation(other.result), where
        for name, value in self.weights.items():
            assert torch.equal(value, other.weights[name]), (where, name)


def _validation(result: FitResult) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if name.startswith("valid")}


@dataclass
class Snapshots(lightning.Callback):
    """Keeps a copy of every recovery checkpoint."""

    path: Path
    taken: list[Path] = field(default_factory=list)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.path.is_file():
            copy = self.path.with_name(f"step-{trainer.global_step}.ckpt")
            self.path.rename(copy)
            self.taken.append(copy)


def documents(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[2, *rng.integers(3, VOCABULARY, size=rng.integers(2, 25)).tolist()] for _ in range(count)]


def cache(count: int, seed: int) -> TokenCache:
    return TokenCache.from_documents(documents(count, seed), VOCABULARY)


def language_model() -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(AWDLSTM(Architecture(VOCABULARY, 6, 8, 2)))


def fit_lm(
    config: FitConfig, folder: Path, callbacks: list[lightning.Callback], trainer: TrainerConfig = TRAINER
) -> Outcome:
    model = language_model()
    assert isinstance(config, LMConfig)
    result = engine.fit_language_model(
        model, cache(40, 1), cache(8, 2), config, "forward", 5, trainer, LOGGER, folder, callbacks=callbacks
    )
    return Outcome(dict(model.state_dict()), result)


def fit_classifier(
    config: FitConfig,
    folder: Path,
    callbacks: list[lightning.Callback],
    trainer: TrainerConfig = TRAINER,
    fresh: bool = False,
) -> Outcome:
    assert isinstance(config, ClassifierConfig)
    model = new_text_classifier(language_model().encoder, 3, config)
    train: TokenCache | Callable[[int], TokenCache] = cache(26, 3)
    if fresh:
        train = lambda epoch: cache(26, 100 + epoch)  # noqa: E731
    labels = [i % 3 for i in range(26)]
    result = engine.fit_classifier(
        model,
        train,
        labels,
        cache(9, 4),
        labels[:9],
        config,
        "forward",
        5,
        trainer,
        LOGGER,
        folder,
        callbacks=callbacks,
    )
    return Outcome(dict(model.state_dict()), result)


LM = LMConfig(epochs=3, batch_size=4, bptt=20, optim=OptimConfig(lr=0.05, clip=0.3))
GRADUAL = MethodConfig(UnfreezingConfig("gradual"))
CLASSIFIER = ClassifierConfig(
    epochs=4, batch_size=5, tokens_per_batch=200, bptt=8, max_len=20, method=GRADUAL, optim=OptimConfig(lr=0.05)
)
PHASES = UnfreezingConfig("phases", [PhaseConfig(train_only=[0]), PhaseConfig(train_only=[3]), PhaseConfig()])

CASES: dict[str, tuple[Callable[..., Outcome], FitConfig]] = {
    "lm": (fit_lm, LM),
    "lm, max_steps inside an epoch": (fit_lm, replace(LM, keep="last", max_steps=14)),
    "lm, validation every 4 steps": (fit_lm, replace(LM, valid_every=4)),
    "lm, accumulation": (fit_lm, replace(LM, epochs=4, optim=OptimConfig(lr=0.05, accumulate=2))),
    "classifier": (fit_classifier, CLASSIFIER),
    "classifier, phases": (fit_classifier, replace(CLASSIFIER, method=MethodConfig(PHASES))),
    "classifier, patience": (fit_classifier, replace(CLASSIFIER, epochs=8, patience=2)),
    "classifier, max_steps": (fit_classifier, replace(CLASSIFIER, max_steps=12, valid_every=4)),
    "classifier, accumulation": (fit_classifier, replace(CLASSIFIER, optim=OptimConfig(lr=0.05, accumulate=3))),
    "classifier, fresh documents": (lambda *given: fit_classifier(*given, fresh=True), CLASSIFIER),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_from_any_checkpoint(case: str, tmp_path: Path) -> None:
    fit, config = CASES[case]
    snapshots = Snapshots(recovery_path(tmp_path / "whole"))
    whole = fit(config, tmp_path / "whole", [snapshots])
    assert len(snapshots.taken) > 3
    # The first and the last of an epoch are special to Lightning; epochs have 6 or 7 batches.
    for snapshot in snapshots.taken[:: 2 if case in ("lm", "classifier") else 4]:
        folder = tmp_path / snapshot.stem
        recovery_path(folder).parent.mkdir(parents=True)
        shutil.copy(snapshot, recovery_path(folder))
        fit(config, folder, []).assert_equal(whole, snapshot.stem)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("case", ["lm", "classifier"])
def test_from_a_checkpoint_with_compiled_layers(
    case: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their dropped weights follow from torch's random numbers."""
    if precision == "bf16-mixed" and not cpu_multiplies_bfloat16():
        pytest.skip("no bfloat16 products on this processor")
    monkeypatch.setattr(fused_layer, "LEAST_SIZE_TO_COMPILE", 1)
    fit, config = CASES[case]
    trainer = replace(TRAINER, precision=precision)
    snapshots = Snapshots(recovery_path(tmp_path / "whole"))
    whole = fit(config, tmp_path / "whole", [snapshots], trainer)
    for snapshot in snapshots.taken[1::4]:
        folder = tmp_path / snapshot.stem
        recovery_path(folder).parent.mkdir(parents=True)
        shutil.copy(snapshot, recovery_path(folder))
        fit(config, folder, [], trainer).assert_equal(whole, snapshot.stem)


@dataclass
class Interrupt(lightning.Callback):
    """Sends this process a signal in the middle of an optimiser step."""

    step: int
    signal: signal.Signals

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)


RARELY = replace(TRAINER, checkpoint_minutes=60)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("number", "step", "saved_at"),
    [
        (signal.SIGINT, 3, 4),
        (signal.SIGINT, 6, 7),  # the last of its epoch: validation first
        (signal.SIGTERM, 3, 4),
        (signal.SIGTERM, 6, 7),
        (signal.SIGUSR1, 20, 21),  # the last of all
    ],
)
def test_asked_to_stop(
    number: signal.Signals, step: int, saved_at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that was computed is lost, although the next checkpoint was an hour away."""
    whole = fit_lm(LM, tmp_path / "whole", [])
    before = [signal.getsignal(n) for n in SIGNALS]
    expected = KeyboardInterrupt if number == signal.SIGINT else Stopped
    with pytest.raises(expected):
        fit_lm(LM, tmp_path / "run", [Interrupt(step, number)], RARELY)
    assert [signal.getsignal(n) for n in SIGNALS] == before
    said = capsys.readouterr().err
    assert "stopping after this step" in said
    assert ("Ctrl-C again" in said) == (number == signal.SIGINT)
    saved = torch.load(recovery_path(tmp_path / "run"), weights_only=True)
    assert saved["global_step"] == saved_at
    fit_lm(LM, tmp_path / "run", [], RARELY).assert_equal(whole, "resumed")


@pytest.mark.filterwarnings("ignore")
def test_interrupted_twice_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit_lm(LM, tmp_path, [Interrupt(3, signal.SIGINT), Interrupt(3, signal.SIGINT)], RARELY)
    assert not recovery_path(tmp_path).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class FailsTwice(lightning.Callback):
    """In a training, and again when told of that: as a log does whose disk is full. Lightning 2.6 gives up there."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    def on_exception(self, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space for the log either")


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_is_as_before_when_a_training_fails_twice(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(OSError, match="either"):
        fit_lm(LM, tmp_path, [FailsTwice()])
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"max_steps": 4}, {"accumulate": 3}, {"keep": "last"}], ids=str)
def test_interrupted_where_epochs_have_one_step(more: dict[str, Any], tmp_path: Path) -> None:
    """Saved between two epochs, and resumed there."""
    optim = OptimConfig(lr=0.05, accumulate=more.pop("accumulate", 1))
    config = replace(CLASSIFIER, batch_size=50 // optim.accumulate, tokens_per_batch=2000, optim=optim, **more)
    whole = fit_classifier(config, tmp_path / "whole", [])
    for step in range(4):
        with pytest.raises(KeyboardInterrupt):
            fit_classifier(config, tmp_path / "run", [Interrupt(step, signal.SIGINT)], RARELY)
        assert torch.load(recovery_path(tmp_path / "run"), weights_only=True)["global_step"] == step + 1
    resumed = fit_classifier(config, tmp_path / "run", [Interrupt(4, signal.SIGINT)])  # there was nothing left to do
    resumed.assert_equal(whole, "resumed")
    assert resumed.result.metrics == whole.result.metrics


@pytest.mark.filterwarnings("ignore")
def test_figures_are_of_all_attempts(tmp_path: Path) -> None:
    whole = fit_lm(LM, tmp_path / "whole", [])
    with pytest.raises(Stopped):
        fit_lm(LM, tmp_path / "run", [Interrupt(17, signal.SIGTERM)])
    resumed = fit_lm(LM, tmp_path / "run", [])
    assert resumed.result.metrics == whole.result.metrics  # the loss of the last epoch, of which one part came before
    saved = torch.load(recovery_path(tmp_path / "run"), weights_only=True)
    assert whole.result.earlier == 0 < resumed.result.earlier < saved["recovery"]["seconds"]


@pytest.mark.filterwarnings("ignore")
def test_stopped_early_and_then_killed(tmp_path: Path) -> None:
    """Early stopping, whose end is saved, is not forgotten: no epoch follows."""
    config = replace(CLASSIFIER, epochs=8, patience=2)
    whole = fit_classifier(config, tmp_path, [])
    assert whole.result.stopped_early and whole.result.steps < 8 * 7
    again = fit_classifier(config, tmp_path, [Interrupt(whole.result.steps, signal.SIGINT)])
    again.assert_equal(whole, "again")
    assert again.result.stopped_early == whole.result.stopped_early


@pytest.mark.filterwarnings("ignore")
def test_a_time_limit_is_of_each_attempt(tmp_path: Path) -> None:
    whole = fit_lm(LM, tmp_path / "whole", [])
    limited = replace(RARELY, max_time="00:00:00:00")
    for step in (1, 2):
        with pytest.raises(NotFinished, match=rf"the time is up \(trainer.max_time\) at step {step} of "):
            fit_lm(LM, tmp_path / "run", [], limited)
    fit_lm(LM, tmp_path / "run", [], RARELY).assert_equal(whole, "resumed")


@pytest.mark.filterwarnings("ignore")
def test_slurm_is_not_left_to_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would save in the middle of a step, elsewhere, and put the job into the queue again by itself."""
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    whole = fit_lm(LM, tmp_path / "whole", [])
    with pytest.raises(Stopped):
        fit_lm(LM, tmp_path / "run", [Interrupt(3, signal.SIGUSR1)], RARELY)
    assert [path.name for path in (tmp_path / "run").rglob("*.ckpt")] == ["last.ckpt"]
    fit_lm(LM, tmp_path / "run", [], RARELY).assert_equal(whole, "resumed")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "last.ckpt"
    WholeFiles().save_checkpoint({"step": torch.tensor(1)}, path)

    def disk_full(checkpoint: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        WholeFiles().save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert list(path.parent.iterdir()) == [path]
