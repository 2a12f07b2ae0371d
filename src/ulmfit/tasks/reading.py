"""How far a long evaluation is, and the time left, on standard error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

from ulmfit.durations import clock
from ulmfit.status_line import StatusLine


class ReadingProgress:
    """For `Predictor.probabilities`: called with the number of texts read so far, which reads the longest first.

    Silent for what is done in a few seconds.

    Args:
        texts: all that will be read.
        shown: whether to report at all.
    """

    def __init__(self, texts: Sequence[str], shown: bool = True) -> None:
        self._total = len(texts)
        # Time goes by the length of the texts, not by their number.
        self._characters = [0, *accumulate(sorted((len(text) + 1 for text in texts), reverse=True))]
        self._shown = shown
        self._began = time.monotonic()
        self._status = StatusLine(first=(2, 20))

    def __call__(self, done: int) -> None:
        """Report if it is time to."""
        if done >= self._total:
            self._status.clear()
        elif self._shown and done > 0 and self._status.due():
            share = self._characters[done] / self._characters[-1]
            left = (time.monotonic() - self._began) * (1 - share) / share
            self._status.show(f"reading: {done:,} of {self._total:,} texts, {clock(left)} left")
