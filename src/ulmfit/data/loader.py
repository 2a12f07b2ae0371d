"""What Lightning expects of a loader that is not a torch DataLoader."""

from __future__ import annotations

from typing import Any


class EpochLoader:
    """Base of our loaders: sized iterables whose order is a pure function of (seed, epoch).

    Lightning announces the epoch by `loader.sampler.set_epoch(epoch)`, and looks for `batch_sampler` beside `sampler`.
    """

    batch_sampler = None

    @property
    def sampler(self) -> Any:
        """The loader itself, which has `set_epoch`."""
        return self
