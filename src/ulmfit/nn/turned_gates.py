"""Gates of all steps as the factors of a weight gradient: see `fused_loops`.

They come as rows of a step and text each, and are multiplied with those of inputs and states, over all steps and texts.
So what is multiplied at once, of one row or two, must lie together for each gate. Vectors want the gates of a tile
beside each other, group by group; registers for whole tiles want the groups of a gate beside each other.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from ulmfit.nn import intrinsics, matrix_tiles
from ulmfit.nn.kinds import KINDS, RUN
from ulmfit.nn.register_tiles import rows_of
from ulmfit.nn.vectors import compiler

AT_ONCE = 96  # gates that are laid out at once: whole tiles of all kinds
_SIDE = intrinsics.CELLS  # of what is transposed at once
SCRATCH = max(kind.parts for kind in KINDS.values()) * AT_ONCE * _SIDE * 4  # bytes that a thread works with


def room(kind: str, gates: int, groups: int) -> int:
    """Words of 32 bits that so many gates take, a multiple of 64, with so many groups of rows."""
    if matrix_tiles.multiplies(kind):
        return gates * _row_bytes(groups) // 4
    return (-(-gates // rows_of(kind)) + 1) * groups * rows_of(kind)  # the tile behind the last is fetched


@cache
def layout(kind: str) -> SimpleNamespace:
    """For compiled loops, of addresses.

    Attributes:
        lay_out: (gates in a row, rows, how many rows, how many groups, which `AT_ONCE` gates, room (`SCRATCH`
            bytes), turned gates) -> nothing; part of them.
        place: (turned gates, groups, first gate of a tile, group) -> address.
        stride, step: (groups) -> bytes from gate to gate, and from group to group.
    """
    c, pair, most = compiler(), beside(kind), rows_of(kind)
    neighbours, parts = KINDS[kind].neighbours, KINDS[kind].parts
    move, transpose, words, u32, size_of = (
        intrinsics.copy(), intrinsics.transpose(), c.words, c.numba.uint32, c.numbers[kind].size
    )  # fmt: skip
    by_gate, tile_bytes = matrix_tiles.multiplies(kind), 4 * rows_of(kind)
    together = _SIDE if by_gate else 1
    part_bytes = together * AT_ONCE * 4  # of `scratch`
    row_bytes = c.function(_row_bytes)

    @c.function
    def place_of_group(turned: Any, groups: Any, gate: Any, group: Any) -> Any:
        return turned + (gate // most * groups + group) * tile_bytes

    @c.function
    def place_of_gate(turned: Any, groups: Any, gate: Any, group: Any) -> Any:
        return turned + gate * row_bytes(groups) + group * 4

    @c.function
    def put_groups(n: Any, side_by_side: Any, turned: Any, groups: Any, gate: Any, group: Any) -> None:
        for tile in range((n + most - 1) // most):
            at = place_of_group(turned, groups, gate + tile * most, group)
            move(tile_bytes, side_by_side + tile * tile_bytes, at)

    @c.function
    def put_gates(n: Any, side_by_side: Any, turned: Any, groups: Any, gate: Any, group: Any) -> None:
        for part in range(parts):
            for start in range(0, n, _SIDE):
                at = place_of_gate(turned, groups, gate + start, group * parts + part * _SIDE)
                transpose(side_by_side + part * part_bytes + start * 4, AT_ONCE * 4, at, row_bytes(groups))

    put, place = (put_gates, place_of_gate) if by_gate else (put_groups, place_of_group)

    @c.function
    def lay_out(gates: Any, raw: Any, rows: Any, groups: Any, part: Any, scratch: Any, turned: Any) -> None:
        first = part * AT_ONCE
        n = min(gates - first, AT_ONCE)
        count = groups // parts
        for group in range(count):
            row, at = neighbours * group, scratch + group % together * AT_ONCE * 4
            one = raw + (row * gates + first) * size_of
            if row + 1 < rows or neighbours == 1:
                pair(n, one, one + gates * size_of, at, part_bytes)
            elif row < rows:  # the last row of an odd number is beside zeros
                pair(n, one, one, at, part_bytes)
                for part in range(parts):
                    of_pairs = words(at + part * part_bytes, n)
                    for j in range(n):
                        of_pairs[j] &= u32(0xFFFF)
            else:
                for part in range(parts):
                    words(at + part * part_bytes, n)[:] = u32(0)
            if (group + 1) % together == 0 or group + 1 == count:
                put(n, scratch, turned, groups, first, group // together * together)

    @c.function
    def stride(groups: Any) -> Any:
        return row_bytes(groups) if by_gate else 4

    @c.function
    def step(groups: Any) -> Any:
        return 4 if by_gate else tile_bytes

    return SimpleNamespace(lay_out=lay_out, place=place, stride=stride, step=step)


@cache
def beside(kind: str) -> Any:
    """What is multiplied at once, of two rows of bfloat16 side by side; of float32 a row alone.

    Arguments for compiled loops: numbers, a multiple of a run but at a row's end; addresses of both rows and of the
    result; bytes from one part of it to the next.
    """
    c = compiler()
    halves, words, u32, copy = c.halves, c.words, c.numba.uint32, c.numbers["fp32"].convert

    parts = KINDS[kind].parts

    @c.function
    def pair(n: Any, one_at: Any, other_at: Any, out_at: Any, part_bytes: Any) -> None:
        one, other, out = halves(one_at, n), halves(other_at, n), words(out_at, n)
        for j in range(n):
            out[j] = u32(one[j]) | u32(u32(other[j]) << u32(16))

    @c.function
    def pair_parts(n: Any, one_at: Any, other_at: Any, out_at: Any, part_bytes: Any) -> None:
        for start in range(0, n, RUN):
            for part in range(parts):
                at = (start * parts + part * RUN) * 2
                pair(min(RUN, n - start), one_at + at, other_at + at, out_at + part * part_bytes + start * 4, 0)

    @c.function
    def alone(n: Any, one_at: Any, other_at: Any, out_at: Any, part_bytes: Any) -> None:
        copy(n, one_at, out_at)

    return alone if kind == "fp32" else pair if parts == 1 else pair_parts


@cache
def group_of(kind: str) -> Any:
    """For compiled loops: in which group of a panel a row is, or its first part."""
    neighbours, parts = KINDS[kind].neighbours, KINDS[kind].parts

    @compiler().function
    def group(row: Any) -> Any:
        return row // neighbours

    @compiler().function
    def group_of_part(row: Any) -> Any:
        return row // RUN * (RUN // neighbours * parts) + row % RUN // neighbours

    return group if parts == 1 else group_of_part


def _row_bytes(groups: int) -> int:
    """A gate's groups, up to what is transposed at once, in an odd number of lines: they do not push each other out."""
    return ((groups * 4 + 63) // 64 | 1) * 64
