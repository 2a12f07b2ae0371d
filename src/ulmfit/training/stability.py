"""Trainings whose numbers are lost: stopped at once, before they reach a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch

from ulmfit.errors import UlmfitError

EXPLODED = 1e4  # nats for a token or document: knowing nothing costs 9 or so, being sure of the wrong one 100


class NonFiniteGuard(lightning.Callback):
    """Stops a training at the first loss that is no finite number or beyond all measure, with the step and advice.

    Neither such weights nor what follows from them is saved: checkpoints and the best weights stay as they were. Also
    stops when the loss is still finite but the weights are not, which otherwise shows a step later.

    Raises:
        UlmfitError: naming the figure, the step and the rate.
    """

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        value = float(loss.detach()) * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of float16, whose losses are scaled up
        if scaler is not None:
            value /= scaler.get_scale()
        if not abs(value) < EXPLODED:
            raise _stop(trainer, f"the training loss became {value:.6g}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        value = float(trainer.callback_metrics.get("valid_loss", 0.0))
        if not math.isfinite(value):
            raise _stop(trainer, f"the validation loss became {value}")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # The last step may have spoilt them, with a gradient that is no number of a loss that was one.
        _require_finite_weights(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        _require_finite_weights(trainer, pl_module)


def _require_finite_weights(trainer: Any, module: torch.nn.Module) -> None:
    for name, weights in module.named_parameters():
        # One pass, nothing allocated: a sum is finite only if everything in it is (or overflows, which is as bad).
        if not math.isfinite(float(weights.detach().sum(dtype=torch.float64))):
            raise _stop(trainer, f"the weights of {name.removeprefix('model.')} became infinite or no numbers")


def _stop(trainer: Any, what: str) -> UlmfitError:
    rate = max(group["lr"] for group in trainer.optimizers[0].param_groups) if trainer.optimizers else 0.0
    return UlmfitError(
        f"{what} at step {trainer.global_step}, learning rate {rate:.2g}; "
        "lower the learning rate or set gradient clipping (optim.clip=0.3); checkpoints before this step are kept"
    )
