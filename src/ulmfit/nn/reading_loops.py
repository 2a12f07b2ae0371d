"""The loop over all steps of a layer at work: see `compiled_lstm` for what its arguments are.

Weights are laid out so that the sums of a tile are all gates of 16 cells: they stay in the core's cache, and what goes
through memory are states and cells. A step may have fewer rows than the one before it, or more: each names the row of
the step before that it goes on from.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from ulmfit.nn import intrinsics, matrix_tiles, openmp
from ulmfit.nn.intrinsics import CELLS
from ulmfit.nn.kept_loops import kept
from ulmfit.nn.kinds import KINDS, RUN
from ulmfit.nn.register_tiles import COLUMNS, GROUP, LINE, MOST_ROWS, PANEL_ROW, multiplier, rows_of
from ulmfit.nn.vectors import compiler

AHEAD = 48  # inputs that are multiplied together where steps have few rows: weights are loaded less often
SCRATCH = 2 * MOST_ROWS * COLUMNS  # 32-bit sums of a tile, of inputs and of states
_ARGUMENTS = 35
_UNITS = 8  # bytes: what a unit of a row is worth, and what the shift of the weights adds to its sums


@cache
def layer(kind: str) -> int:
    """Address of the loop over all steps of a layer of `kind`, one of `KINDS` but "fp32"."""
    return kept(f"reading-{kind}", lambda: {"layer": _layer(kind)})["layer"]


def _layer(kind: str) -> int:
    c, multiply, (take, reduce) = compiler(), multiplier(kind), _rows(kind)
    cell, copy, pool, integer = intrinsics.cell(kind), intrinsics.copy(), intrinsics.pool(), intrinsics.integer()
    i64, carray, most_rows = c.numba.int64, c.numba.carray, rows_of(kind)
    place_of = c.numbers["bf16" if kind == "int8" else kind].place  # (in int8 the cell writes nothing there)
    lines, whole_tiles = PANEL_ROW // LINE, matrix_tiles.multiplies(kind)
    number, count, barrier = openmp.team()

    @c.function
    def share(count: Any, part: Any, parts: Any) -> Any:
        return count * part // parts

    @c.entry
    def read(given: Any) -> None:
        a = carray(given, _ARGUMENTS)
        steps, nodes, most, width, size = a[0], a[1], a[2], a[3], a[4]
        panels, groups_x, groups_h, row, sums_row = a[5], a[6], a[7], a[8], a[9]
        x_row, h_row = 4 * groups_x, 4 * groups_h
        starts, parents, tokens = a[10], a[11], a[12]
        table, table_row, x, x_units, y, y_units, h, h_units = a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20]
        weights_x, weights_h, factors, ahead = a[21], a[22], a[23], a[24]
        first, first_row, cells, states, kept = a[26], a[27], a[28], a[29], a[30]
        pools, found, end_starts, ends = a[31], a[32], a[33], a[34]
        thread, threads = i64(number()), i64(count())
        x_sums = a[25] + thread * 4 * SCRATCH
        h_sums = x_sums + 2 * SCRATCH
        if table != 0:
            for r in range(share(nodes, thread, threads), share(nodes, thread + 1, threads)):
                take(width, table + integer(tokens + 4 * r) * table_row, x + r * x_row, x_row, x_units + r * _UNITS)
        n = integer(starts + 4)
        for k in range(share(n, thread, threads), share(n, thread + 1, threads)):
            take(size, first + integer(parents + 4 * k) * first_row, h + k * h_row, h_row, h_units + k * _UNITS)
        barrier()
        ahead_first, ahead_stop = i64(0), i64(0)
        for t in range(steps):
            node, stop = integer(starts + 4 * t), integer(starts + 4 * (t + 1))
            n = stop - node
            old, new, now = (t + 1) % 2 * most, t % 2 * most, states + node * kept
            few = n <= most_rows
            if few and node >= ahead_stop:
                ahead_first, ahead_stop, last = node, stop, t + 2
                while last <= steps:
                    following = integer(starts + 4 * last)
                    if following > node + AHEAD or following > ahead_stop + most_rows:
                        break
                    ahead_stop = following
                    last += 1
                tiles = (ahead_stop - node + most_rows - 1) // most_rows
                # The same panels as below, where a tile has all rows: nobody has to wait for another's sums.
                for panel in range(share(panels, thread, threads), share(panels, thread + 1, threads)):
                    for tile in range(tiles):
                        low, high = share(ahead_stop - node, tile, tiles), share(ahead_stop - node, tile + 1, tiles)
                        multiply(
                            high - low, x + (node + low) * x_row, x_row, GROUP, weights_x + panel * x_row * COLUMNS,
                            COLUMNS, groups_x, ahead + low * sums_row + panel * PANEL_ROW, sums_row, 0, x, 0,
                        )  # fmt: skip
            tiles = (n + most_rows - 1) // most_rows
            begin, end = share(panels * tiles, thread, threads), share(panels * tiles, thread + 1, threads)
            for task in range(begin, end):
                panel, tile = task // tiles, task % tiles
                # The next panel, or in the next step this thread's first, is fetched by a panel's first tiles.
                soon = panel + 1 if panel < (end - 1) // tiles else begin // tiles
                each = (lines + tiles - 1) // tiles if whole_tiles else i64(0)
                at_once = each * LINE if tile * each < lines else i64(0)
                low, high = share(n, tile, tiles), share(n, tile + 1, tiles)
                inputs, inputs_row = ahead + (node - ahead_first) * sums_row + panel * PANEL_ROW, sums_row
                if not few:
                    inputs, inputs_row = x_sums, i64(PANEL_ROW)
                    multiply(
                        high - low, x + (node + low) * x_row, x_row, GROUP, weights_x + panel * x_row * COLUMNS,
                        COLUMNS, groups_x, inputs, inputs_row, 0,
                        weights_x + (soon * PANEL_ROW + tile * each * LINE) * groups_x, at_once,
                    )  # fmt: skip
                multiply(
                    high - low, h + low * h_row, h_row, GROUP, weights_h + panel * h_row * COLUMNS, COLUMNS, groups_h,
                    h_sums, PANEL_ROW, 0, weights_h + (soon * PANEL_ROW + tile * each * LINE) * groups_h, at_once,
                )  # fmt: skip
                place, panel_factors = panel * 4 * CELLS, factors + panel * 3 * PANEL_ROW
                for r in range(low, high):
                    parent = integer(parents + 4 * (node + r))
                    cell(
                        inputs + (r - low) * inputs_row, h_sums + (r - low) * PANEL_ROW, panel_factors,
                        cells + (old + parent) * row + place, cells + (new + r) * row + place,
                        now + r * row + place, y + (node + r) * h_row + place_of(panel * CELLS),
                        x_units + (node + r) * _UNITS, h_units + r * _UNITS,
                    )  # fmt: skip
            barrier()
            low, high = share(n, thread, threads), share(n, thread + 1, threads)
            for r in range(low, high):
                reduce(size, now + r * row, y + (node + r) * h_row, h_row, y_units + (node + r) * _UNITS)
                if pools != 0:
                    parent = integer(parents + 4 * (node + r))
                    before, after = pools + (old + parent) * 3 * row, pools + (new + r) * 3 * row
                    for place in range(0, row, 4 * CELLS):
                        pool(now + r * row + place, before + place, after + place, row)
            if t + 1 < steps:
                for k in range(integer(starts + 4 * (t + 2)) - stop):
                    r = integer(parents + 4 * (stop + k))
                    if low <= r and r < high:
                        copy(h_row, y + (node + r) * h_row, h + k * h_row)
                        copy(_UNITS, y_units + (node + r) * _UNITS, h_units + k * _UNITS)
            if pools != 0:
                for e in range(integer(end_starts + 4 * t), integer(end_starts + 4 * (t + 1))):
                    r, document = integer(ends + 8 * e), integer(ends + 8 * e + 4)
                    if low <= r and r < high:
                        copy(3 * row, pools + (new + r) * 3 * row, found + document * 3 * row)
            barrier()

    return read


@cache
def _rows(kind: str) -> tuple[Any, Any]:
    """Rows of a table, or of states before the first step, and then of all others, to what is multiplied.

    Both are functions of n numbers at an address, where to, `stride` bytes with zeros behind them, and where units go.
    """
    c, copy, run = compiler(), intrinsics.copy(), RUN * KINDS[kind].size
    convert, words = c.numbers["bf16" if kind == "int8" else kind].convert, c.words
    floats, integers, bytes_, as_bits, as_float = c.floats, c.integers, c.bytes_, c.as_bits, c.as_float
    i8, i32, u32, f32 = c.numba.int8, c.numba.int32, c.numba.uint32, c.numba.float32
    floor = math.floor

    @c.function
    def largest(n: Any, numbers_at: Any) -> Any:
        """Bits of the largest magnitude; integers, for their order is that of magnitudes, and of NaN behind all."""
        numbers, most = floats(numbers_at, n), u32(0)
        for j in range(n):
            most = max(most, u32(as_bits(numbers[j]) & u32(0x7FFFFFFF)))
        return most

    @c.function
    def quantise(n: Any, numbers_at: Any, out_at: Any, stride: Any, unit_at: Any) -> None:
        """To 8 bits of the row's largest magnitude; at `unit_at`, what one is worth, and 128 times the row's sum."""
        numbers, out = floats(numbers_at, n), bytes_(out_at, stride)
        most = as_float(largest(n, numbers_at))
        units = f32(127) / most if most > f32(0) else f32(0)
        total = i32(0)
        for j in range(n):
            rounded = i32(floor(numbers[j] * units + f32(0.5)))
            out[j] = i8(rounded)
            total = i32(total + rounded)
        for j in range(n, stride):
            out[j] = i8(0)
        floats(unit_at, 1)[0] = most / f32(127)
        integers(unit_at + 4, 1)[0] = 128 * total

    @c.function
    def taken(n: Any, numbers_at: Any, out_at: Any, stride: Any, unit_at: Any) -> None:
        copy(stride, numbers_at, out_at)

    @c.function
    def in_parts(n: Any, numbers_at: Any, out_at: Any, stride: Any, unit_at: Any) -> None:
        filled = n // RUN * run
        words(out_at + filled, (stride - filled) // 4)[:] = u32(0)
        convert(n, numbers_at, out_at)

    @c.function
    def nothing(n: Any, numbers_at: Any, out_at: Any, stride: Any, unit_at: Any) -> None:
        pass  # the cell has written them

    if kind == "int8":
        return quantise, quantise
    return taken if kind == "bf16" else in_parts, nothing
