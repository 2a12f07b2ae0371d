"""What survives an interruption: a checkpoint to go on from exactly, and the best weights so far inside it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ulmfit.errors import DataError
from ulmfit.whole_file import whole_file

CHECKPOINTS = "checkpoints"


def recovery_path(folder: Path) -> Path:
    """The checkpoint of a run folder from which the same command goes on."""
    return folder / CHECKPOINTS / "last.ckpt"


class Recovery(Callback):
    """Saves what is needed to go on exactly from here: now and then, and when asked to stop (Ctrl-C, SIGTERM).

    Only between two optimiser steps of an epoch: Lightning 2.6 neither keeps gradients that accumulate nor makes up for
    a validation that was due, and resumed at the start of an epoch it takes that epoch for done. So a training whose
    epochs have one step is not saved.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.seconds = 60 * minutes
        self._saved = 0.0
        self._asked = 0  # the signal that asked to stop
        self._speaks = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = time.monotonic()
        self._asked = 0
        self._speaks = trainer.is_global_zero
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning puts the old handlers back at the end. Its own for SIGTERM would stop where nothing can be saved.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = number
        interrupted = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if interrupted else signal.SIG_DFL)
        if self._speaks:
            again = " (Ctrl-C again: at once)" if interrupted else ""
            print(f"\nstopping after this step{again}", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not between_steps(trainer, batch_idx):
            return
        asked = self._asked
        due = asked != 0 or time.monotonic() - self._saved >= self.seconds
        if trainer.world_size > 1:  # rank 0 decides
            due, asked = trainer.strategy.broadcast((due, asked))
        if due:
            trainer.save_checkpoint(self.path)
            for logger in trainer.loggers:
                logger.save()  # else the log would have a gap before the point where training goes on
            self._saved = time.monotonic()
        _stop(asked)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.num_training_batches <= trainer.accumulate_grad_batches:
            _stop(self._asked)  # there is no place to save


def _stop(asked: int) -> None:
    if asked:
        raise KeyboardInterrupt if asked == signal.SIGINT else SIGTERMException


def between_steps(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the next batch of the epoch follows, with nothing accumulated and no validation before it."""
    if trainer.is_last_batch or trainer.should_stop or (batch_idx + 1) % trainer.accumulate_grad_batches:
        return False
    if trainer.check_val_every_n_epoch is None and trainer.enable_validation:
        interval = trainer.val_check_batch
        return interval is None or (trainer.fit_loop.total_batch_idx + 1) % interval != 0
    return True


class Validated(Callback):
    """Remembers the figures of the weights to keep, and with keep="best" the weights themselves.

    They are part of every checkpoint, so an interrupted training forgets nothing.

    Attributes:
        step: optimiser steps before the latest validation, -1 before the first.
        metrics: the validation figures of the weights to keep.
        weights: those weights, on the CPU; None: the module's own.
    """

    def __init__(self, monitor: str, mode: str, keep: str = "best") -> None:
        self.monitor = monitor
        self.higher_is_better = mode == "max"
        self.keep = keep
        self.step = -1
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, Tensor] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("valid_")}
        if self.keep == "last" or not self.metrics or self._better(metrics[self.monitor], self.metrics[self.monitor]):
            self.metrics = metrics
            if self.keep == "best":
                self.weights = {name: v.detach().to("cpu", copy=True) for name, v in pl_module.state_dict().items()}

    def _better(self, value: float, best: float) -> bool:
        if best != best:  # not a number
            return value == value
        return value > best if self.higher_is_better else value < best

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "metrics": self.metrics, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.metrics, self.weights = state_dict["step"], state_dict["metrics"], state_dict["weights"]


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: Lightning's own way copies it from the folder for temporary files.

    A checkpoint that is not one any more is a DataError.
    """

    def load_checkpoint(self, path: Any, *options: Any, **more: Any) -> dict[str, Any]:
        try:
            checkpoint = super().load_checkpoint(path, *options, **more)
            _ = checkpoint["state_dict"], checkpoint["pytorch-lightning_version"]
        except Exception as error:  # pickle, zip and torch have errors of their own
            raise DataError(f"{path} is no checkpoint to go on from; delete it to train from the start") from error
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        # Into a file of Python's, because torch's own writer does not tell a full disk from a bug.
        with whole_file(Path(path)) as partial, open(partial, "wb") as file:
            torch.save(checkpoint, file)
