"""A training on the CPU keeps neither gradients between steps nor, for long, memory that it has freed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from ulmfit import memory
from ulmfit.config import ClassifierConfig, LoggerConfig, OptimConfig, TrainerConfig
from ulmfit.data.cache import TokenCache
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.training import engine, freed
from ulmfit.training.freed import FreedMemory


class Gradients(lightning.Callback):
    """Whether there are any after each batch."""

    def __init__(self) -> None:
        self.there: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.there.append(any(parameter.grad is not None for parameter in pl_module.parameters()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each time that memory is given back."""
    found: list[str] = []
    monkeypatch.setattr(memory, "give_back", lambda: found.append("given back"))
    return found


def train(accumulate: int) -> list[bool]:
    config = ClassifierConfig(epochs=1, batch_size=4, optim=OptimConfig(lr=0.01, accumulate=accumulate))
    model = new_text_classifier(AWDLSTM(Architecture(30, 6, 8, 2)), 2, config)
    documents = TokenCache.from_documents([[2, 3, 4, 5]] * 16, 30)
    given = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)
    watch = Gradients()
    engine.fit_classifier(
        model, documents, [0, 1] * 8, None, None, config, "forward", 0, given, LoggerConfig(csv=False), None,
        callbacks=[watch],
    )  # fmt: skip
    return watch.there


@pytest.mark.filterwarnings("ignore")
def test_gradients_last_until_the_step_is_made() -> None:
    assert train(1) == [False] * 4
    assert train(2) == [True, False] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_classifiers_training_leaves_no_freed_memory(calls: list[str]) -> None:
    train(1)
    assert calls == ["given back"]


def after_batches(monkeypatch: pytest.MonkeyPatch, resident: list[int], seconds: float, device: str = "cpu") -> None:
    """Batches that end `seconds` apart, with so much memory in use each time that the callback asks."""
    now = [0.0]
    left = iter(resident)
    monkeypatch.setattr(freed, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(memory, "resident", lambda: next(left))
    callback, module = FreedMemory(), SimpleNamespace(device=torch.device(device))
    callback.on_train_start(None, module)  # type: ignore[arg-type]
    for index in range(4):
        now[0] += seconds
        callback.on_train_batch_end(None, module, None, None, index)  # type: ignore[arg-type]


def test_memory_is_given_back_when_it_has_grown(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    # Compared with the first step's, then with that of the step after the first time.
    after_batches(monkeypatch, [100, 121, 50, 61], seconds=10)
    assert len(calls) == 2


def test_steps_of_one_size_keep_what_they_freed(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    after_batches(monkeypatch, [100, 119, 101, 119], seconds=10)
    assert calls == []


def test_it_is_not_given_back_often(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    after_batches(monkeypatch, [100, 200], seconds=3)
    assert len(calls) == 1


def test_a_gpu_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    after_batches(monkeypatch, [], seconds=100, device="meta")
    assert calls == []


@pytest.mark.filterwarnings("ignore")
def test_every_training_looks_after_it(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(freed, "_SECONDS", 0.0)
    rising = iter(np.arange(1, 100) * 1000)
    monkeypatch.setattr(memory, "resident", lambda: int(next(rising)) ** 2)
    train(1)
    assert len(calls) > 1
