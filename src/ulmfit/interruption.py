"""Signals that ask a training to save and leave: SIGTERM, and SIGUSR1 as SLURM sends it before a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ulmfit.errors import NotFinished, Stopped

CHECKPOINTS = "checkpoints"  # the part of a run folder that is only needed to resume
# The exit code for each; on Windows there is no SIGUSR1.
STOP_SIGNALS = {signal.SIGTERM: 128 + signal.SIGTERM}
if hasattr(signal, "SIGUSR1"):
    STOP_SIGNALS[signal.SIGUSR1] = NotFinished.exit_code


def stop(number: int, frame: Any = None) -> None:
    """A signal handler for when there is nothing to save.

    Raises:
        Stopped: always.
    """
    raise Stopped(signal.Signals(number).name, STOP_SIGNALS[signal.Signals(number)])


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Afterwards Ctrl-C and the signals do what they did before, however the block ended.

    Lightning 2.6 does not restore handlers where a logger fails in its turn after an error, as on a full disk.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it was not set from Python
                signal.signal(number, handler)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it, the signals raise `Stopped`, so that unfinished files are removed; handlers of others stay."""
    with kept_signal_handlers():
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, stop)
        yield
