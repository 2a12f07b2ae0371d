"""Training on an NVIDIA GPU: graphs train what single kernels do, and no step waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from ulmfit.config import (
    ClassifierConfig,
    DropoutConfig,
    LMConfig,
    LoggerConfig,
    MethodConfig,
    OptimConfig,
    TrainerConfig,
    UnfreezingConfig,
)
from ulmfit.data.cache import TokenCache
from ulmfit.errors import UlmfitError
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.models import LanguageModel
from ulmfit.plots import read_history
from ulmfit.training import engine, graphs
from ulmfit.training.checkpoints import recovery_path

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),
]

VOCABULARY = 40
SHAPE = Architecture(VOCABULARY, 16, 24, 3)
TRAINER = TrainerConfig(accelerator="gpu", devices=1, precision="bf16-mixed", enable_progress_bar=False)
CONFIG = LMConfig(
    epochs=2,
    batch_size=8,
    bptt=12,
    random_bptt=False,
    optim=OptimConfig(lr=0.01, clip=0.3),
    dropout=DropoutConfig(multiplier=0.0),
)


def cache(count: int = 60, seed: int = 1) -> TokenCache:
    rng = np.random.default_rng(seed)
    documents = [[2, *(3 + rng.integers(0, 2, size=rng.integers(20, 60)).cumsum() % 30)] for _ in range(count)]
    return TokenCache.from_documents(documents, VOCABULARY)


class Counts(lightning.Callback):
    """How many steps were replayed, and from how many graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replayed, self.recorded = 0, 0
        replay, record = graphs._Graph.replay, graphs._Graph.record

        def counted(graph: Any, *inputs: Any) -> Any:
            self.replayed += 1
            return replay(graph, *inputs)

        def made(graph: Any, *inputs: Any) -> None:
            self.recorded += 1
            record(graph, *inputs)

        monkeypatch.setattr(graphs._Graph, "replay", counted)
        monkeypatch.setattr(graphs._Graph, "record", made)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def train(
    config: LMConfig = CONFIG,
    trainer: TrainerConfig = TRAINER,
    folder: Path | None = None,
    callbacks: list[lightning.Callback] | None = None,
) -> tuple[LanguageModel, engine.FitResult]:
    torch.manual_seed(0)
    model = LanguageModel(AWDLSTM(SHAPE))
    result = engine.fit_language_model(
        model, cache(), cache(9, 2), config, "forward", 0, trainer, LoggerConfig(log_every=1), folder,
        callbacks=callbacks or [],
    )  # fmt: skip
    return model, result


def assert_close(one: torch.nn.Module, other: torch.nn.Module, tolerance: float) -> None:
    for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=tolerance, msg=name)


def test_graphs_train_what_single_kernels_do(counts: Counts, tmp_path: Path) -> None:
    by_graphs, result = train(folder=tmp_path / "graphs")
    assert counts.recorded <= 2 and counts.replayed > 0.7 * result.steps
    before = counts.replayed
    eager, _ = train(trainer=replace(TRAINER, cuda_graphs=False), folder=tmp_path / "eager")
    assert counts.replayed == before
    assert_close(by_graphs, eager, 1e-5)
    logged = [read_history(tmp_path / name)["train_loss_step"] for name in ("graphs", "eager")]
    assert [step for step, _ in logged[0]] == list(range(result.steps))
    assert [loss for _, loss in logged[0]] == pytest.approx([loss for _, loss in logged[1]], abs=1e-3)


def test_graphs_follow_what_is_frozen(counts: Counts) -> None:
    config = replace(CONFIG, epochs=4, method=MethodConfig(unfreezing=UnfreezingConfig(mode="gradual")))
    by_graphs, _ = train(config)
    assert counts.recorded >= 4  # for each phase
    eager, _ = train(config, replace(TRAINER, cuda_graphs=False))
    assert_close(by_graphs, eager, 1e-4)


def test_windows_of_many_lengths_and_dropout(counts: Counts) -> None:
    steep = OptimConfig(lr=0.03, clip=0.3)
    config = replace(CONFIG, epochs=12, random_bptt=True, optim=steep, dropout=DropoutConfig(multiplier=0.5))
    _, result = train(config)
    assert counts.recorded > 3 and 0 < counts.replayed < result.steps
    assert result.metrics["train_loss_epoch"] < 2.0  # the entropy of single pieces is 3.4
    first = train(config)[1].metrics, train(replace(config, dropout=DropoutConfig(multiplier=0.0)))[1].metrics
    assert first[0]["train_loss_epoch"] > first[1]["train_loss_epoch"]  # masks are new in each replay, and work


class NoWaiting(lightning.Callback):
    """From the given step on, an error wherever the CPU waits for the GPU inside a step."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.after:
            torch.cuda.set_sync_debug_mode("error")
            self.steps += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _waiting_allowed_again() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_no_step_of_a_language_model_waits(cuda_graphs: bool) -> None:
    watch = NoWaiting(after=6)
    config = replace(CONFIG, dropout=DropoutConfig())
    train(config, replace(TRAINER, cuda_graphs=cuda_graphs), callbacks=[watch])
    assert watch.steps > 20


def test_no_step_of_a_classifier_waits() -> None:
    watch = NoWaiting(after=2)
    config = ClassifierConfig(epochs=2, batch_size=6, bptt=8, max_len=30)
    torch.manual_seed(1)
    model = new_text_classifier(AWDLSTM(SHAPE), 3, config)
    labels = [i % 3 for i in range(60)]
    result = engine.fit_classifier(
        model, cache(), labels, cache(9, 2), labels[:9], config, "forward", 0, TRAINER, LoggerConfig(csv=False), None,
        callbacks=[watch],
    )  # fmt: skip
    assert watch.steps > 10 and 0 <= result.metrics["valid_accuracy"] <= 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(cuda_graphs: bool, tmp_path: Path) -> None:
    class Spoil(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 10:
                pl_module.model.decoder.bias.data.fill_(torch.nan)

    with pytest.raises(UlmfitError, match="training loss became nan at step 10"):
        train(trainer=replace(TRAINER, cuda_graphs=cuda_graphs), folder=tmp_path, callbacks=[Spoil()])
    assert not recovery_path(tmp_path).exists()


def test_a_stopped_training_goes_on(counts: Counts, tmp_path: Path) -> None:
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                raise KeyboardInterrupt

    whole, _ = train()
    often = replace(TRAINER, checkpoint_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(trainer=often, folder=tmp_path, callbacks=[Stop()])
    assert recovery_path(tmp_path).is_file()
    resumed, _ = train(trainer=often, folder=tmp_path)
    assert_close(resumed, whole, 1e-5)
