"""What Lightning expects of a loader that is not a torch DataLoader, and how an interrupted epoch is continued."""

from __future__ import annotations

from typing import Any

from ulmfit.errors import UsageError


class EpochLoader:
    """Base of our loaders: sized iterables whose order is a pure function of (seed, epoch).

    Lightning announces the epoch by `loader.sampler.set_epoch(epoch)`, looks for `batch_sampler` beside `sampler`, and
    keeps `state_dict()` in checkpoints. Subclasses start iterating at `_take_start()` and set `_next`, the batch that
    follows the one handed out; with the last batch it is 0 again, for a sized loader is never exhausted.
    """

    batch_sampler = None

    def __init__(self) -> None:
        self.epoch = 0
        self._start = 0  # batch that the next iteration begins with
        self._next = 0

    @property
    def sampler(self) -> Any:
        """The loader itself, which has `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, from its start unless a state of this epoch was loaded."""
        if epoch != self.epoch:
            self.epoch, self._start, self._next = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, the next batch in it, and the layout these count in."""
        return {"epoch": self.epoch, "next_batch": self._next, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration continue where the state was taken.

        Raises:
            UsageError: if the state is of other data, batch sizes, seed or number of ranks.
        """
        for name, value in self._layout().items():
            if state[name] != value:
                raise UsageError(
                    f"The checkpoint was made with {name}={state[name]}, now it is {value}, so the position in the"
                    " epoch means nothing; resume with the same value, or start a new run"
                )
        self.epoch = int(state["epoch"])
        self._start = self._next = int(state["next_batch"])

    def _layout(self) -> dict[str, int]:
        """What a position counts in: a state with other values cannot be continued."""
        return {}

    def _take_start(self) -> int:
        start, self._start = self._start, 0
        return start
