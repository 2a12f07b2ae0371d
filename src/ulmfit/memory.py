"""Memory that the process has freed and its C library keeps."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of glibc's `mallopt`: how much is kept at the heap's end, from which size on and how many pieces are mapped by
# themselves, which go back to the system as soon as they are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
# What glibc itself arrives at once large pieces have been freed. Its threshold no longer moves after a call.
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


def _of_glibc(name: str) -> Any:
    """A function of the C library, or None where that is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return freed memory to the system, where the C library offers that (glibc).

    It keeps what lies below a piece in use, and the next stage, with tensors of other sizes, would add to that.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def kept() -> Iterator[None]:
    """Within it, freed memory stays with the process for what is asked for next; afterwards it goes back.

    The system has to fill new pages with zeros, which took a tenth of a training step: each makes and frees the same
    large tensors. Nothing changes where the C library is not glibc or the user has set how it keeps memory.
    """
    option = None if _is_set_by_user() else _of_glibc("mallopt")
    _set(option, _KEPT)
    try:
        yield
    finally:
        _set(option, _USUAL)
        give_back()


def _set(option: Any, values: dict[int, int]) -> None:
    if option is not None:
        for name, value in values.items():
            option(name, value)


def _is_set_by_user() -> bool:
    settings = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    return "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in settings)


def resident() -> int:
    """Bytes of memory that the process has in use, freed ones that the C library keeps included; 0 where not known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
