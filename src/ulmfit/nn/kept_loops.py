"""Compiled loops of this package, which are kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ulmfit import native
from ulmfit.nn import matrix_tiles, openmp
from ulmfit.nn.processor import second_cache
from ulmfit.nn.register_tiles import LANES, NEIGHBOURS


def kept(name: str, build: Callable[[], Mapping[str, int]]) -> dict[str, int]:
    """Addresses of loops by name.

    Args:
        name: of the file they are kept in.
        build: makes them (`Compiler.entry`).

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    facts = [LANES, second_cache(), *(matrix_tiles.multiplies(kind) for kind in NEIGHBOURS)]
    return native.kept(name, sorted(Path(__file__).parent.glob("*.py")), facts, build, openmp.symbols())
