"""Compiled loops on torch's own threads, which wait for work awake, so that even short steps can be shared out."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ulmfit import native

_NAMES = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


@cache
def is_available() -> bool:
    """Whether there is an OpenMP that compiled loops can use; on macOS and Windows there is none."""
    try:
        library()
    except (OSError, AttributeError):
        return False
    return True


@cache
def library() -> Any:
    """The OpenMP that torch is linked to.

    Raises:
        OSError, AttributeError: if it is none that has the entry points of GCC's, as on macOS and Windows.
    """
    found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    for name in _NAMES:
        getattr(found, name).argtypes, getattr(found, name).restype = [], None
    found.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.omp_get_thread_num.restype = found.omp_get_num_threads.restype = ctypes.c_int
    return found


def team() -> tuple[Any, Any, Any]:
    """For compiled loops: which thread this is, of how many, and where all of them meet."""
    kinds = {"omp_get_thread_num": ctypes.c_int, "omp_get_num_threads": ctypes.c_int, "GOMP_barrier": None}
    number, count, barrier = (ctypes.CFUNCTYPE(kind)(native.symbol(name)) for name, kind in kinds.items())
    return number, count, barrier


def symbols() -> dict[str, int]:
    """Where the functions of `team` are, for `native`."""
    return {name: ctypes.cast(getattr(library(), name), ctypes.c_void_p).value or 0 for name in _NAMES[1:]}


def run(address: int, *arguments: int | torch.Tensor, alone: bool = False) -> None:
    """Call the compiled `void f(int64_t *)` at `address` on each of torch's threads; tensors are given by address.

    Args:
        alone: on this thread only, for work that takes less time than waiting for others.
    """
    given = torch.tensor([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments], dtype=torch.int64)
    library().GOMP_parallel(address, given.data_ptr(), 1 if alone else torch.get_num_threads(), 0)
