"""Kinds of numbers that compiled loops multiply, and how rows of them lie in memory.

Where tiles multiply bfloat16 many times as fast as vectors multiply float32, a float32 is taken for the sum of two or
three bfloat16, its parts, and a product of such numbers for the sum of three or six products of parts; those that are
left out are as small as what is rounded off. Three parts are all of a float32: each has 8 bits, and a sign.
Source: Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations" (arXiv:1904.06376).
"""

from __future__ import annotations

from typing import NamedTuple

_GROUP = 4  # bytes of each factor that are multiplied at once
RUN = 32  # numbers whose first parts fill a row of a tile, where there are several


class Kind(NamedTuple):
    """One kind.

    A row of numbers in parts has `run` first parts, the second ones of the same numbers, and so on; then the next run.

    Attributes:
        neighbours: numbers of a column, or their parts, that an instruction multiplies and adds up.
        parts: bfloat16 numbers whose sum a number is; 1: it is none of these.
        size: bytes of a number.
        run: rows are whole runs of so many numbers, the last ones zeros.
        outside: kind of what comes in and goes out.
    """

    neighbours: int
    parts: int
    size: int
    run: int
    outside: str


KINDS = {
    "fp32": Kind(1, 1, 4, 1, "fp32"),
    "bf16": Kind(2, 1, 2, 2, "bf16"),
    "int8": Kind(4, 1, 1, 4, "int8"),
    "bf16x3": Kind(2, 2, 4, RUN, "fp32"),
    "bf16x6": Kind(2, 3, 6, RUN, "fp32"),
}
# Which part of x and which of the weights are multiplied, one after the other: each time only one of them is another.
PRODUCTS = {1: ((0, 0),), 2: ((1, 0), (0, 0), (0, 1)), 3: ((2, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 2))}


def whole(kind: str, numbers: int) -> int:
    """So many numbers, up to a whole run."""
    run = KINDS[kind].run
    return -(-numbers // run) * run


def groups_of(kind: str, numbers: int) -> int:
    """Words of 32 bits that a row of so many numbers takes."""
    return whole(kind, numbers) * KINDS[kind].size // _GROUP
