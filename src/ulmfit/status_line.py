"""The line on standard error that says how far a piece of work is."""

from __future__ import annotations

import sys
import time

_LIVE_SECONDS = 0.5


class StatusLine:
    """Written over and over on a terminal, and as a new line now and then where that is a file.

    Args:
        log_seconds: between two lines in a file.
        first: seconds to the first line, on a terminal and in a file; None: as between two.
    """

    def __init__(self, log_seconds: float = 60.0, first: tuple[float, float] | None = None) -> None:
        self._live = sys.stderr.isatty()
        self._seconds = _LIVE_SECONDS if self._live else log_seconds
        wait = self._seconds if first is None else first[0 if self._live else 1]
        self._next = time.monotonic() + wait
        self._written = False

    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() >= self._next

    def show(self, line: str) -> None:
        """Write it; the next is due some time later."""
        self._next, self._written = time.monotonic() + self._seconds, True
        print(f"\r{line:<78}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave nothing of the line on a terminal."""
        print(self.cleared(), end="", file=sys.stderr, flush=True)

    def cleared(self) -> str:
        """What to print before something else, so that nothing is left of the line."""
        return f"\r{'':<78}\r" if self._live and self._written else ""
