"""How graphs are chosen, fed and dropped, with stand-ins that compute at each replay; `test_cuda.py` has real ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ulmfit.config import (
    DropoutConfig,
    LMConfig,
    LoggerConfig,
    MethodConfig,
    OptimConfig,
    TrainerConfig,
    UnfreezingConfig,
)
from ulmfit.data.cache import TokenCache
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture, State
from ulmfit.nn.models import LanguageModel
from ulmfit.training import engine, graphs
from ulmfit.training.lm import LMModule

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = Architecture(40, 8, 12, 2)
CONFIG = LMConfig(
    epochs=2,
    batch_size=8,
    bptt=12,
    random_bptt=False,
    optim=OptimConfig(lr=0.01, clip=0.3),
    dropout=DropoutConfig(multiplier=0.0),
)
TRAINER = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)


class Stand:
    """What a graph does, as if its kernels were started one by one."""

    replayed: list[torch.Size]
    recorded: list[torch.Size]

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        self.shape = tokens.shape

    def record(
        self,
        module: LMModule,
        state: State,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        pool: Any,
    ) -> None:
        Stand.recorded.append(self.shape)
        self.module, self.state, self.parameters, self.gradients = module, state, parameters, gradients

    def replay(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert tokens.shape == self.shape
        Stand.replayed.append(self.shape)
        out = self.module.loss(tokens, targets, self.state)
        found = torch.autograd.grad(out.cross_entropy + out.penalty, self.parameters)
        for kept, new in zip(self.gradients, found, strict=True):
            kept.copy_(new)
        for pair, after in zip(self.state, out.state, strict=True):
            for part, value in zip(pair, after, strict=True):
                part.copy_(value.detach())
        return out.cross_entropy.detach().clone(), out.penalty.detach()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    Stand.replayed, Stand.recorded = [], []
    monkeypatch.setattr(graphs, "_Graph", Stand)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    return Stand


class Graphs(lightning.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.loss_of = graphs.StepGraphs(pl_module)


def train(config: LMConfig, callbacks: list[lightning.Callback]) -> tuple[LanguageModel, engine.FitResult]:
    rng = np.random.default_rng(1)
    documents = [[2, *rng.integers(3, 40, size=rng.integers(20, 60)).tolist()] for _ in range(60)]
    torch.manual_seed(0)
    model = LanguageModel(AWDLSTM(SHAPE))
    cache = TokenCache.from_documents(documents, 40)
    result = engine.fit_language_model(
        model, cache, None, config, "forward", 0, TRAINER, LoggerConfig(csv=False), None, callbacks=callbacks
    )
    return model, result


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, epochs=5, random_bptt=True),
        replace(CONFIG, epochs=3, method=MethodConfig(unfreezing=UnfreezingConfig(mode="gradual"))),
    ],
    ids=["fixed windows", "random windows", "unfreezing"],
)
def test_the_weights_are_those_without_graphs(config: LMConfig, stand_ins: type[Stand]) -> None:
    model, result = train(config, [Graphs()])
    assert 0 < len(stand_ins.replayed) < result.steps
    expected, _ = train(config, [])
    for (name, found), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-7, msg=name)


def test_graphs_are_made_for_common_shapes_only(stand_ins: type[Stand], monkeypatch: pytest.MonkeyPatch) -> None:
    _, result = train(replace(CONFIG, epochs=6, random_bptt=True), [Graphs()])
    made = stand_ins.recorded
    assert 1 < len(made) == len(set(made)) and set(stand_ins.replayed) == set(made)
    assert len(stand_ins.replayed) <= result.steps - graphs._WARM * len(made)
    monkeypatch.setattr(graphs, "_MOST", 2)
    stand_ins.recorded = []
    train(replace(CONFIG, epochs=6, random_bptt=True), [Graphs()])
    assert len(stand_ins.recorded) == 2


def test_other_dropout_or_frozen_layers_want_other_graphs(stand_ins: type[Stand]) -> None:
    class Change(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.encoder.dropout = DropoutConfig(multiplier=0.1 * trainer.current_epoch)

    train(replace(CONFIG, epochs=3), [Graphs(), Change()])
    full = [shape for shape in stand_ins.recorded if shape == (8, 12)]
    assert len(full) == 3


def test_without_graphs_where_they_cannot_be_recorded(
    stand_ins: type[Stand], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Stand, *inputs: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Stand, "record", fail)
    monkeypatch.setattr(logging.getLogger("ulmfit"), "propagate", True)
    model, _ = train(CONFIG, [Graphs()])
    assert not stand_ins.replayed
    assert [record.getMessage() for record in caplog.records if "without CUDA graphs" in record.getMessage()] == [
        "training goes on without CUDA graphs, as with trainer.cuda_graphs=false: "
        "operation not permitted when stream is capturing"
    ]
    expected, _ = train(CONFIG, [])
    for found, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize(
    ("wrong", "on"),
    [
        ({}, True),
        ({"world_size": 2}, False),
        ({"accumulate_grad_batches": 2}, False),
        ({"precision": "16-mixed"}, False),
        ({"device": "cpu"}, False),
    ],
    ids=str,
)
def test_only_where_they_are_right(wrong: dict[str, Any], on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LMModule(LanguageModel(AWDLSTM(SHAPE)), CONFIG)
    given = {"world_size": 1, "accumulate_grad_batches": 1, "precision": "bf16-mixed", "device": "cuda", **wrong}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(LMModule, "device", torch.device(given.pop("device")))
    trainer, callback = SimpleNamespace(**given), graphs.CudaGraphs()
    plain = module.loss_of
    callback.on_train_start(trainer, module)
    assert isinstance(module.loss_of, graphs.StepGraphs) == on
    callback.on_exception(trainer, module, KeyboardInterrupt())
    assert module.loss_of == plain
