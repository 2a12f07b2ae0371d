"""Memory that the process has freed and its C library keeps."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library offers that (glibc).

    It keeps what lies below a piece in use, and the next stage, with tensors of other sizes, would add to that.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
