"""Progress for people: one line that shows where training is and the time left, and a table row per epoch."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ulmfit.durations import clock
from ulmfit.status_line import StatusLine

_COLUMNS = ("train_loss_epoch", "valid_loss", "valid_perplexity", "valid_accuracy", "valid_macro_f1")


class Progress(Callback):
    """Writes to standard error, so that standard output stays for results."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._began = 0.0
        self._first_step = 0
        self._epoch_began = 0.0
        self._header: list[str] = []
        self._smooth: float | None = None
        self._status = StatusLine()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = self._epoch_began = time.monotonic()
        self._status = StatusLine()
        self._first_step = trainer.global_step
        if trainer.is_global_zero:
            total = int(trainer.estimated_stepping_batches)
            resumed = f", resumed at step {trainer.global_step}" if trainer.global_step else ""
            epochs = f"{trainer.max_epochs} epoch{'' if trainer.max_epochs == 1 else 's'}"
            print(f"{self.title}: {epochs}, {total} steps{resumed}", file=sys.stderr)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not self._status.due():
            return
        loss = getattr(pl_module, "latest_loss", None)
        if loss is not None:
            self._smooth = float(loss) if self._smooth is None else 0.7 * self._smooth + 0.3 * float(loss)
        total = int(trainer.estimated_stepping_batches)
        done = max(1, trainer.global_step - self._first_step)
        left = (time.monotonic() - self._began) / done * (total - trainer.global_step)
        line = f"  epoch {trainer.current_epoch + 1} · step {trainer.global_step}/{total}"
        if self._smooth is not None:
            line += f" · loss {self._smooth:.3f}"
        self._status.show(f"{line} · {clock(left)} left")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._row(trainer)

    def _row(self, trainer: Trainer) -> None:
        shown = {name: float(trainer.callback_metrics[name]) for name in _COLUMNS if name in trainer.callback_metrics}
        header = ["epoch", *(name.removesuffix("_epoch") for name in shown), "time"]
        took = clock(time.monotonic() - self._epoch_began)
        row = [str(trainer.current_epoch + 1), *(f"{value:.4f}" for value in shown.values()), took]
        clear = self._status.cleared()
        if header != self._header:
            self._header = header
            print(
                clear + "  ".join(f"{name:>16}" if i else f"{name:>5}" for i, name in enumerate(header)),
                file=sys.stderr,
            )
            clear = ""
        print(clear + "  ".join(f"{v:>16}" if i else f"{v:>5}" for i, v in enumerate(row)), file=sys.stderr, flush=True)
