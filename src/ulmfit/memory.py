"""Memory that the process has freed and its C library keeps."""

from __future__ import annotations

import ctypes
import os
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library offers that (glibc).

    It keeps what lies below a piece in use, and the next stage, with tensors of other sizes, would add to that.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def resident() -> int:
    """Bytes of memory that the process has in use, freed ones that the C library keeps included; 0 where not known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
