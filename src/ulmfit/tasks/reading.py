"""How far a long evaluation is, and the time left, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import accumulate

from ulmfit.durations import clock


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
        self._live = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + (2 if self._live else 20)
        self._reported = False

    def __call__(self, done: int) -> None:
        """Report if it is time to."""
        now = time.monotonic()
        if done >= self._total:
            if self._reported and self._live:
                print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
        elif self._shown and now >= self._next and done > 0:
            self._next, self._reported = now + (0.5 if self._live else 60), True
            share = self._characters[done] / self._characters[-1]
            left = (now - self._began) * (1 - share) / share
            line = f"reading: {done:,} of {self._total:,} texts, {clock(left)} left"
            print(f"\r{line:<78}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)
