"""Memory that a training on the CPU has freed goes back to the system now and then."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ulmfit import memory

_SECONDS = 10.0  # from one time to the next: pages that are asked for again cost 0.1 s, a hundredth of that
_GROWTH = 1.2  # by less than that it is not worth it


class FreedMemory(Callback):
    """Gives back what glibc keeps, between two steps, when the process has grown since the step after the last time.

    Batches of documents have many shapes (25 in TREC-6). Tensors do not fit into each other's places, and what oneDNN
    keeps for each shape lies between them: after two epochs three quarters of what glibc held were free.
    """

    def __init__(self) -> None:
        self._looked = 0.0
        self._least: int | None = None  # bytes in use after the first step since the last time, freed ones included

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked, self._least = time.monotonic(), None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type != "cpu":
            return
        if self._least is None:
            self._least = memory.resident()
            return
        now = time.monotonic()
        if now - self._looked < _SECONDS:
            return
        self._looked = now
        if memory.resident() >= _GROWTH * self._least:
            memory.give_back()
            self._least = None
