"""What survives an interruption: a checkpoint to go on from exactly, and the best weights so far inside it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from ulmfit.errors import DataError, NotFinished
from ulmfit.interruption import CHECKPOINTS, STOP_SIGNALS, stop
from ulmfit.pickled_data import refuse_expansion
from ulmfit.whole_file import whole_file

_TIME_IS_UP = -1  # beside the numbers of signals


def recovery_path(folder: Path) -> Path:
    """The checkpoint of a run folder from which the same command goes on."""
    return folder / CHECKPOINTS / "last.ckpt"


class Recovery(Callback):
    """Saves what is needed to go on exactly from here: now and then, when asked to stop, and when the time is up.

    Asked by Ctrl-C, or by a signal such as SIGTERM. Only between two optimiser steps of an epoch and at the end of one:
    Lightning 2.6 neither keeps gradients that accumulate nor makes up for a validation that was due.

    Args:
        minutes: at most so long from one checkpoint to the next, as far as steps and validations are shorter.
        limit: seconds after which this attempt stops; None: never.

    Attributes:
        earlier: seconds that earlier attempts took, up to the checkpoint that this one started from.
    """

    def __init__(self, path: Path, minutes: float, limit: float | None = None) -> None:
        self.path = path
        self.seconds = 60 * minutes
        self.limit = limit
        self.earlier = 0.0
        self._began = time.monotonic()
        self._saved = 0.0
        self._asked = 0  # the signal that asked to stop, or _TIME_IS_UP
        self._leaves = 0  # the same, once everything is saved
        self._epoch_is_over = False  # while the checkpoint between two epochs is made, or when it was loaded
        self._speaks = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recovery"] = {
            "seconds": self.earlier + time.monotonic() - self._began,
            "between_epochs": self._epoch_is_over,
            "stopped": trainer.should_stop,  # by early stopping: nothing is left to do
        }
        if self._epoch_is_over:  # else Lightning would do the epoch's end once more
            for progress in ("current", "total"):
                epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"][progress]
                epochs["completed"] = epochs["processed"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("recovery", {})  # there was none before version 0.2
        self.earlier = float(saved.get("seconds", 0.0))
        self._epoch_is_over = bool(saved.get("between_epochs", False))
        trainer.should_stop = bool(saved.get("stopped", False))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = time.monotonic()
        self._asked = self._leaves = 0
        self._speaks = trainer.is_global_zero
        if self._epoch_is_over:
            # With max_steps Lightning takes every checkpoint for one inside an epoch, and this epoch for done.
            trainer.fit_loop.epoch_loop.restarting = False
            self._epoch_is_over = False
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning puts the old handlers back at the end. Its own for SIGTERM would stop where nothing can be saved.
        signal.signal(signal.SIGTERM, self._ask)
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL, stop):
                signal.signal(number, self._ask)

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
        if between_steps(trainer, batch_idx):
            self._save_if_due(trainer)
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_is_over = True
        self._save_if_due(trainer)
        self._epoch_is_over = False

    # Not at the end of the epoch itself, after which Lightning logs its figures.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._leaves != _TIME_IS_UP:  # it was enough
            self._leave(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        now = time.monotonic()
        asked = self._asked or (_TIME_IS_UP if self.limit is not None and now - self._began >= self.limit else 0)
        due = asked != 0 or now - self._saved >= self.seconds
        if trainer.world_size > 1:  # rank 0 decides
            due, asked = trainer.strategy.broadcast((due, asked))
        if due:
            trainer.save_checkpoint(self.path)
            for logger in trainer.loggers:
                logger.save()  # else the log would have a gap before the point where training goes on
            self._saved = time.monotonic()
        self._leaves = asked

    def _leave(self, trainer: Trainer) -> None:
        """Raises what ends the training, if it was asked to end and is saved."""
        if self._leaves == _TIME_IS_UP:
            step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
            raise NotFinished(f"the time is up (trainer.max_time) at step {step} of {steps}")
        if self._leaves == signal.SIGINT:
            raise KeyboardInterrupt
        if self._leaves:
            stop(self._leaves)


def between_steps(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the next batch of the epoch follows, with nothing accumulated and no validation before it."""
    if trainer.is_last_batch or trainer.should_stop or (batch_idx + 1) % trainer.accumulate_grad_batches:
        return False
    if trainer.check_val_every_n_epoch is None and trainer.enable_validation:
        interval = trainer.val_check_batch
        return interval is None or (trainer.fit_loop.total_batch_idx + 1) % interval != 0
    return True


class Beside(Callback):
    """Writes something else that resuming needs, once, before the first checkpoint."""

    def __init__(self, write: Callable[[], object]) -> None:
        self.write = write
        self._written = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero and not self._written:
            self.write()
            self._written = True


class Validated(Callback):
    """Remembers the figures of the weights to keep, and with keep="best" the weights themselves.

    Of weights with the same best figure (a hundred documents have few different accuracies) the best are those with
    the lowest validation loss. They are part of every checkpoint, so an interrupted training forgets nothing.

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
        if self.keep == "last" or not self.metrics or self._better(metrics, self.metrics):
            self.metrics = metrics
            if self.keep == "best":
                self.weights = {name: v.detach().to("cpu", copy=True) for name, v in pl_module.state_dict().items()}

    def _better(self, found: dict[str, float], kept: dict[str, float]) -> bool:
        value, best = found[self.monitor], kept[self.monitor]
        if best != best:  # not a number
            return value == value
        if value == best:
            return found["valid_loss"] < kept["valid_loss"]
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
            refuse_expansion(Path(path))
            checkpoint = super().load_checkpoint(path, *options, **more)
            _ = checkpoint["state_dict"], checkpoint["pytorch-lightning_version"]
        except Exception as error:  # pickle, zip and torch have errors of their own
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise  # it may be a good one
            raise DataError(f"{path} is no checkpoint to go on from; delete it to train from the start") from error
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        # Into a file of Python's, because torch's own writer does not tell a full disk from a bug.
        with whole_file(Path(path)) as partial, open(partial, "wb") as file:
            torch.save(checkpoint, file)
