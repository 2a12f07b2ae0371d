"""The log of a training's steps: losses and rates, kept back so that no step waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

if TYPE_CHECKING:
    from ulmfit.training.base import UlmfitModule

_TOGETHER = 64  # steps handed to the loggers at a time


class TrainingLog(Callback):
    """Hands `train_loss_step` and `lr_<group>` of every so many steps to the trainer's loggers, in blocks.

    `LightningModule.log` costs milliseconds a step, and a figure read from a GPU waits for all that it has to do.
    What is kept back is handed over before a validation, with a checkpoint, and however training ends.
    """

    def __init__(self) -> None:
        self._every = 1
        self._rows: list[tuple[int, Tensor, dict[str, float]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A short training is logged more often, so that there is a curve to see.
        total = int(min(trainer.estimated_stepping_batches, 1 << 30))
        self._every = max(1, min(trainer.log_every_n_steps, total // 20))  # type: ignore[attr-defined]
        self._rows = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not trainer.loggers or not stepped or trainer.global_step % self._every:
            return
        groups = trainer.optimizers[0].param_groups
        training = [g for g in groups if any(p.requires_grad for p in g["params"])]  # a frozen group has no rate
        rates = {f"lr_{g['group']}": float(g["lr"]) for g in training}
        loss = cast("UlmfitModule", pl_module).latest_loss
        assert loss is not None
        self._rows.append((trainer.global_step - 1, loss, rates | {"epoch": float(trainer.current_epoch)}))
        if len(self._rows) >= _TOGETHER:
            self.hand_over(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hand_over(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.hand_over(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hand_over(trainer)
        loss = cast("UlmfitModule", pl_module).epoch_loss()
        if loss is not None:
            pl_module.log("train_loss_epoch", loss)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.hand_over(trainer)

    def hand_over(self, trainer: Trainer) -> None:
        """Give the loggers what was kept back."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        losses = torch.stack([loss for _, loss, _ in rows]).tolist()
        for (step, _, rates), loss in zip(rows, losses, strict=True):
            for logger in trainer.loggers:
                logger.log_metrics({"train_loss_step": loss, **rates}, step)
