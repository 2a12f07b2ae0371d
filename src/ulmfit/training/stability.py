"""Trainings whose numbers are lost: stopped at once, before they reach a checkpoint."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import lightning
import torch

from ulmfit.errors import UlmfitError

_BEHIND = 4  # steps that a GPU may be behind before its losses are waited for
EXPLODED = 1e4  # nats for a token or document: knowing nothing costs 9 or so, being sure of the wrong one 100


class NonFiniteGuard(lightning.Callback):
    """Stops a training at the first loss that is no finite number or beyond all measure, with the step and advice.

    Neither such weights nor what follows from them is saved: checkpoints and the best weights stay as they were. Also
    stops when the loss is still finite but the weights are not, which otherwise shows a step later.

    On a GPU the losses are read when they are there, some steps later, so that no step waits; before validation,
    checkpoint and end they are waited for.

    Raises:
        UlmfitError: naming the figure, the step and the rate.
    """

    def __init__(self) -> None:
        self._pending: deque[_Reading] = deque()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._pending.clear()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        factor = float(trainer.accumulate_grad_batches)
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of float16, whose losses are scaled up
        if scaler is not None:
            factor /= scaler.get_scale()
        self._pending.append(_Reading(loss.detach(), factor, trainer.global_step, _rate(trainer)))
        self._look(most=_BEHIND)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._look()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        value = float(trainer.callback_metrics.get("valid_loss", 0.0))
        if not math.isfinite(value):
            raise _stop(f"the validation loss became {value}", trainer.global_step, _rate(trainer))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._look()
        # The last step may have spoilt them, with a gradient that is no number of a loss that was one.
        _require_finite_weights(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look()
        _require_finite_weights(trainer, pl_module)

    def _look(self, most: int = 0) -> None:
        """Judge the losses that are there, and wait until at most so many are not."""
        while self._pending and (self._pending[0].is_there() or len(self._pending) > most):
            read = self._pending.popleft()
            value = read.value()
            if not abs(value) < EXPLODED:
                self._pending.clear()
                raise _stop(f"the training loss became {value:.6g}", read.step, read.rate)


class _Reading:
    """A loss on its way from the GPU; on a CPU it is there at once."""

    def __init__(self, loss: torch.Tensor, factor: float, step: int, rate: float) -> None:
        self.factor, self.step, self.rate = factor, step, rate
        self._event: torch.cuda.Event | None = None
        self._loss = loss
        if loss.device.type == "cuda":
            self._loss = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self._loss.copy_(loss, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def is_there(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def value(self) -> float:
        """Waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._loss) * self.factor


def _require_finite_weights(trainer: Any, module: torch.nn.Module) -> None:
    for name, weights in module.named_parameters():
        # One pass, nothing allocated: a sum is finite only if everything in it is (or overflows, which is as bad).
        if not math.isfinite(float(weights.detach().sum(dtype=torch.float64))):
            what = f"the weights of {name.removeprefix('model.')} became infinite or no numbers"
            raise _stop(what, trainer.global_step, _rate(trainer))


def _rate(trainer: Any) -> float:
    return max(
        (float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups), default=0.0
    )


def _stop(what: str, step: int, rate: float) -> UlmfitError:
    return UlmfitError(
        f"{what} at step {step}, learning rate {rate:.2g}; "
        "lower the learning rate or set gradient clipping (optim.clip=0.3); checkpoints before this step are kept"
    )
