"""The errors a user can meet. Each message is one sentence: what was given, what was expected, how to fix it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from itertools import islice
from typing import Any

DISK_FULL = ("No space left on device", "PytorchStreamWriter failed", "Disk quota exceeded")


class UlmfitError(Exception):
    """A failure while working (exit code 1)."""

    exit_code = 1


class UsageError(UlmfitError):
    """A wrong request: configuration, option, verb (exit code 2)."""

    exit_code = 2


class DataError(UlmfitError):
    """Input files that cannot be used: missing, empty, malformed (exit code 2)."""

    exit_code = 2


class BundleError(DataError):
    """A bundle that is missing, incomplete, of the wrong kind or damaged (exit code 2)."""


class InUseError(UlmfitError):
    """A folder in which another process is at work (exit code 1)."""


class LostProcess(UlmfitError):
    """Another process of a distributed training ended, or cannot be reached (exit code 1).

    Where it is raised, its message is also written to standard error, for there may be no time for that later.
    """


class NotFinished(UlmfitError):
    """A training that stopped as told, with everything saved that the same command needs to go on (exit code 75)."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Stopped(SystemExit):
    """A signal asked to stop. No `Exception`, so that a sweep ends as well.

    Attributes:
        signal: its name.
        code: the exit code.
    """

    def __init__(self, signal: str, code: int) -> None:
        super().__init__(code)
        self.signal = signal

    def __reduce__(self) -> tuple[type[Stopped], tuple[str, Any]]:
        """For a launcher that runs jobs in other processes."""
        return Stopped, (self.signal, self.code)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` when one of `known` is close to `given`, else the empty string."""
    # Comparing takes the product of the lengths, and names may come from files: none that long is a slip of the finger.
    short = [name for name in islice(known, 10_000) if len(name) <= 200]
    close = difflib.get_close_matches(given, short, n=1, cutoff=0.6) if len(given) <= 200 else []
    return f"; did you mean '{close[0]}'?" if close else ""


def disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk is full; torch's writer says so in words of its own."""
    numbers = (errno.ENOSPC, getattr(errno, "EDQUOT", None))  # Windows knows no quota
    if isinstance(error, OSError) and error.errno is not None and error.errno in numbers:
        return True
    return any(sign in str(error) for sign in DISK_FULL)
