"""Trainings whose numbers are lost: they stop at once, say where, and leave the last good checkpoint alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ulmfit.config import ClassifierConfig, LMConfig, LoggerConfig, OptimConfig, TrainerConfig
from ulmfit.data.cache import TokenCache
from ulmfit.errors import UlmfitError
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.models import LanguageModel
from ulmfit.training import engine, stability
from ulmfit.training.checkpoints import recovery_path
from ulmfit.training.stability import EXPLODED, NonFiniteGuard
from ulmfit.training.trainer import cpu_multiplies_bfloat16

VOCABULARY = 30
TRAINER = TrainerConfig(
    accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False, checkpoint_minutes=1e-9
)
OPTIM = OptimConfig(lr=0.01)
CLASSIFIER = ClassifierConfig(epochs=3, batch_size=8, tokens_per_batch=400, bptt=8, max_len=20, optim=OPTIM)
LANGUAGE_MODEL = LMConfig(epochs=3, batch_size=4, bptt=8, random_bptt=False, optim=OPTIM)

pytestmark = pytest.mark.filterwarnings("ignore")


def cache(count: int, seed: int) -> TokenCache:
    rng = np.random.default_rng(seed)
    documents = [[2, *rng.integers(3, VOCABULARY, size=rng.integers(2, 25)).tolist()] for _ in range(count)]
    return TokenCache.from_documents(documents, VOCABULARY)


def train(stage: str, folder: Path | None, optim: OptimConfig = OPTIM, **settings: Any) -> None:
    torch.manual_seed(1)
    encoder = AWDLSTM(Architecture(VOCABULARY, 6, 8, 2))
    logger, given = LoggerConfig(csv=False), replace(TRAINER, **settings)
    train, valid = cache(32, 1), cache(9, 2)
    if stage == "lm":
        config = replace(LANGUAGE_MODEL, optim=optim)
        engine.fit_language_model(
            LanguageModel(encoder), train, valid, config, "forward", 0, given, logger, folder, "lm"
        )
        return
    model = new_text_classifier(encoder, 3, replace(CLASSIFIER, optim=optim))
    labels = [i % 3 for i in range(32)]
    engine.fit_classifier(
        model, train, labels, valid, labels[:9], replace(CLASSIFIER, optim=optim), "forward", 0, given, logger, folder
    )


Change = Callable[[torch.Tensor], torch.Tensor]


def spoil(patch: pytest.MonkeyPatch, stage: str, at: int, change: Change, step: str = "training_step") -> None:
    """Changes the loss (or what is logged of validation) of the batch with this number, counted over epochs."""
    kind: Any = engine.LMModule if stage == "lm" else engine.ClassifierModule
    original, counted = getattr(kind, step), iter(range(10**6))

    def spoilt(self: Any, *batch: Any) -> Any:
        loss = original(self, *batch)
        return change(loss) if next(counted) == at else loss

    patch.setattr(kind, step, spoilt)


def nan_loss(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def explode(loss: torch.Tensor) -> torch.Tensor:
    return loss * 1e6


class NanGradient(torch.autograd.Function):
    """Ones forward, NaN backward."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


def nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    spoilt: torch.Tensor = NanGradient.apply(loss)
    return spoilt


PRECISIONS = [
    "32-true",
    pytest.param(
        "bf16-mixed", marks=pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no bfloat16 units here")
    ),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ["lm", "classifier"])
@pytest.mark.parametrize(
    ("change", "accumulate", "sentence"),
    [
        (nan_loss, 1, "the training loss became nan at step 5, learning rate"),
        (nan_loss, 2, "the training loss became nan at step 2, learning rate"),
        (explode, 1, r"the training loss became \de\+06 at step 5"),
        (nan_gradient, 1, "the weights of .* became infinite or no numbers at step 6"),
    ],
)
def test_it_stops_and_the_last_good_checkpoint_stays(
    change: Change,
    accumulate: int,
    sentence: str,
    stage: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, stage, 5, change)
    with pytest.raises(UlmfitError, match=re.sub(r"\\de", r"[\\d.]+e", sentence)) as caught:
        train(stage, tmp_path, replace(OPTIM, accumulate=accumulate), precision=precision)
    assert "lower the learning rate or set gradient clipping" in str(caught.value)
    assert "\n" not in str(caught.value)
    saved = torch.load(recovery_path(tmp_path), weights_only=True)
    good = 5 if accumulate == 1 else 2
    assert 0 < saved["global_step"] <= good
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values() if value.is_floating_point())


@pytest.mark.parametrize("stage", ["lm", "classifier"])
def test_after_a_stop_training_goes_on_from_the_good_checkpoint(stage: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, stage, 5, nan_loss)
        with pytest.raises(UlmfitError, match="became nan"):
            train(stage, tmp_path)
    train(stage, tmp_path)  # whatever had spoilt it is gone


@pytest.mark.parametrize("stage", ["lm", "classifier"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_validation_loss_is_no_number(
    stage: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of NaN has an accuracy, that of always saying the first class: it must not count as the best one."""
    from ulmfit.training.metrics import TokenLoss

    monkeypatch.setattr(TokenLoss, "compute", lambda self: self.total * float(value))
    with pytest.raises(UlmfitError, match=rf"the validation loss became {value} at step \d+, learning rate"):
        train(stage, tmp_path)


def test_the_last_step_spoils_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no loss after it that would tell."""
    spoil(monkeypatch, "classifier", 3 * 4 - 1, nan_gradient)
    monkeypatch.setattr(NonFiniteGuard, "on_validation_end", lambda *_: None)  # even if validation did not
    with pytest.raises(UlmfitError, match="became infinite or no numbers"):
        train("classifier", None)


@pytest.mark.parametrize(("loss", "stops"), [(9.0, False), (EXPLODED * 0.99, False), (EXPLODED, True)])
def test_losses_that_float16_scales_up_are_judged_unscaled(loss: float, stops: bool) -> None:
    scaler = SimpleNamespace(get_scale=lambda: 65536.0)
    trainer = SimpleNamespace(
        accumulate_grad_batches=4, precision_plugin=SimpleNamespace(scaler=scaler), optimizers=[], global_step=3
    )
    scaled = torch.tensor(loss * 65536 / 4)
    if stops:
        with pytest.raises(UlmfitError, match="the training loss became 10000 at step 3"):
            NonFiniteGuard().on_before_backward(trainer, None, scaled)
    else:
        NonFiniteGuard().on_before_backward(trainer, None, scaled)


class Late:
    """A loss that the GPU has not handed over until it is waited for."""

    waited: int

    def __init__(self, loss: torch.Tensor, factor: float, step: int, rate: float) -> None:
        self.loss, self.step, self.rate = float(loss) * factor, step, rate

    def is_there(self) -> bool:
        return False

    def value(self) -> float:
        Late.waited += 1
        return self.loss


@pytest.mark.parametrize("end", ["steps", "on_save_checkpoint", "on_validation_start", "on_train_end"])
def test_losses_that_come_late_are_waited_for_where_it_matters(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "_Reading", Late)
    Late.waited = 0
    trainer = SimpleNamespace(accumulate_grad_batches=1, precision_plugin=None, optimizers=[], global_step=7)
    guard = NonFiniteGuard()
    for loss in (3.0, 2.0, float("nan")):
        guard.on_before_backward(trainer, None, torch.tensor(loss))
        trainer.global_step += 1
    assert Late.waited == 0
    more = [torch.tensor(1.0)] * 10  # it is not left behind for good
    go_on: dict[str, Callable[[], Any]] = {
        "steps": lambda: [guard.on_before_backward(trainer, None, loss) for loss in more],
        "on_save_checkpoint": lambda: guard.on_save_checkpoint(trainer, torch.nn.Linear(1, 1), {}),
        "on_validation_start": lambda: guard.on_validation_start(trainer, None),
        "on_train_end": lambda: guard.on_train_end(trainer, torch.nn.Linear(1, 1)),
    }
    with pytest.raises(UlmfitError, match="the training loss became nan at step 9,"):
        go_on[end]()
    assert Late.waited == 3


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0.5), (10.0, 5.0), (None, 5.0)])
def test_gradients_are_scaled_down_to_the_limit_and_never_up(limit: float | None, expected: float) -> None:
    model = LanguageModel(AWDLSTM(Architecture(VOCABULARY, 6, 8, 2)))
    module = engine.LMModule(model, LANGUAGE_MODEL)
    used, *unused = module.parameters()
    used.grad = torch.zeros_like(used)
    used.grad.view(-1)[:2] = torch.tensor([3.0, -4.0])
    optimizer = torch.optim.SGD(module.parameters())
    module.configure_gradient_clipping(optimizer, limit)
    assert used.grad.norm().item() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(used.grad.view(-1)[:2] / expected, torch.tensor([0.6, -0.8]), rtol=1e-4)
    assert all(parameter.grad is None for parameter in unused)
