"""The loop of `fused_cross_entropy`, compiled: see there for what its arguments are.

Logits lie panel by panel, and in each row by row. While they are in a core's cache, they become powers of e and part of
their rows' largest and sum. A row's powers are in terms of each panel's largest logit, until that of all is known.
Gradients are made for some rows at a time, for few memory pages can be written to in turns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ulmfit.nn import openmp
from ulmfit.nn.fused_loops import fetching
from ulmfit.nn.kept_loops import kept
from ulmfit.nn.kinds import KINDS, RUN
from ulmfit.nn.register_tiles import (
    COLUMNS,
    GROUP,
    LANES,
    MOST_ROWS,
    PANEL_ROW,
    PART,
    hook,
    multiplier,
    product,
    rows_of,
)
from ulmfit.nn.softmax_cells import LOWEST, exponentials, gradients, merge, shares, whole
from ulmfit.nn.turned_gates import group_of
from ulmfit.nn.vectors import compiler

SCRATCH = (4 + MOST_ROWS + 1) * COLUMNS  # numbers that a thread works with
_ARGUMENTS = 24
_PAIRS_AT_ONCE = 16  # of rows, or rows where one is multiplied at once


@cache
def entry(kind: str) -> int:
    """Address of the loop, for numbers of `kind`, one of `KINDS` but "int8".

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    return kept(f"softmax-{kind}", lambda: {"cross_entropy": _cross_entropy(kind)})["cross_entropy"]


def _cross_entropy(kind: str) -> int:
    c, numbers, group_at = compiler(), compiler().numbers[kind], group_of(kind)
    neighbours, _, size_of, run, _ = KINDS[kind]
    place_of, put = numbers.place, numbers.put
    multiply, multiply_all, ask = multiplier(kind), product(kind), fetching()
    powers, merged, of_all, worth, of_panel = exponentials(), merge(), whole(), shares(), gradients(kind)
    most_rows = rows_of(kind)
    floats, integers, longs, address = c.floats, c.integers, c.longs, c.address
    f32, i64, carray = c.numba.float32, c.numba.int64, c.numba.carray
    one, lowest = f32(1), f32(LOWEST)
    number, count, barrier = openmp.team()

    def finish(given: Any, time: Any, panel: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _ARGUMENTS)
        bias, parts, part_bytes = a[10] + panel * PANEL_ROW, a[21] + panel * 4, a[22]
        targets, found = integers(a[11], bottom), floats(a[15], 2 * bottom)
        for r in range(top, bottom):
            at, row, target = parts + 2 * r * part_bytes, sums + (r - top) * PANEL_ROW, targets[r] - panel * COLUMNS
            if 0 <= target < COLUMNS:
                found[2 * r + 1] = floats(row, COLUMNS)[target] + floats(bias, COLUMNS)[target]
            powers(row, bias, at, at + part_bytes)

    finish_at = hook(finish)

    @c.function
    def put_together(parts: Any, part_bytes: Any, state_at: Any, found_at: Any) -> None:
        """All panels' parts of a row: sum of e^(logit - largest), largest - target's logit.

        Panels' sums become what their powers of e are worth.
        """
        state, found = floats(state_at, 2 * LANES + 2), floats(found_at, 2)
        largest, sums = state_at, state_at + LANES * 4
        state[:LANES], state[LANES:] = lowest, f32(0)
        for at in range(parts, parts + part_bytes, LANES * 4):
            merged(at, at + part_bytes, largest, sums)
        most, one_over_sum = sums + LANES * 4, sums + LANES * 4 + 4
        of_all(largest, sums, most, found_at)
        found[1] = state[2 * LANES] - found[1]
        state[2 * LANES + 1] = one / found[0]
        for at in range(parts, parts + part_bytes, LANES * 4):
            worth(at, most, one_over_sum, at + part_bytes)

    @c.entry
    def cross_entropy(given: Any) -> None:
        a, at_a = carray(given, _ARGUMENTS), address(given)
        rows, vocab, size, x, x_stride, turned, turned_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        forward, groups, back, logits, grads, packed = a[7], a[8], a[9], a[12], a[13], a[14]
        found, of_hidden, of_weight, more, learns = a[15], a[16], a[17], a[19], a[20]
        panels, of_size = (vocab + COLUMNS - 1) // COLUMNS, (size + COLUMNS - 1) // COLUMNS
        stride, pairs = panels * COLUMNS * size_of, (rows + neighbours - 1) // neighbours
        thread, threads = i64(number()), i64(count())
        parts, part_bytes, targets = a[21], a[22], integers(a[11], rows)
        scratch, of_bias = a[23] + thread * SCRATCH * 4, a[18] + thread * panels * PANEL_ROW
        of_nobody, state, nothing, panel_of_nobody = (
            scratch, scratch + 2 * PANEL_ROW, scratch + 3 * PANEL_ROW, scratch + 4 * PANEL_ROW
        )  # fmt: skip
        row_groups = (rows + run - 1) // run * run * size_of // 4
        multiply_all(
            rows, x, x_stride, forward, groups, groups, 1, 0, panels, panels * COLUMNS, logits, PANEL_ROW,
            rows * PANEL_ROW, finish_at, 0, at_a, 0, thread, threads,
        )  # fmt: skip
        barrier()
        floats(nothing, 1)[0] = f32(0)
        stop_pair = pairs * (thread + 1) // threads
        for first_pair in range(pairs * thread // threads, stop_pair, _PAIRS_AT_ONCE):
            end_pair = min(stop_pair, first_pair + _PAIRS_AT_ONCE)
            begin, end = neighbours * first_pair, min(rows, neighbours * end_pair)
            for r in range(begin, end):
                put_together(parts + 2 * r * part_bytes, part_bytes, state, found + r * 8)
            if learns:
                for panel in range(panels):
                    line, of_line = logits + panel * rows * PANEL_ROW, grads + panel * COLUMNS * size_of
                    for p in range(first_pair, end_pair):
                        r = neighbours * p
                        worths = parts + (2 * r + 1) * part_bytes + panel * 4
                        other, of_other, beside = r + 1, of_line + (r + 1) * stride, panel_of_nobody
                        other_worths = worths + 2 * part_bytes
                        if r + 1 >= rows:  # beside the last of an odd number are zeros
                            other, of_other, other_worths = r, of_nobody, nothing
                        if of_weight or neighbours == 1:
                            beside = packed + (panel * row_groups + group_at(r)) * PANEL_ROW
                        of_panel(
                            line + r * PANEL_ROW, line + other * PANEL_ROW, worths, other_worths, of_line + r * stride,
                            of_other, beside, of_bias + panel * PANEL_ROW,
                        )  # fmt: skip
                for r in range(begin, end):
                    target = targets[r]
                    panel, place = target // COLUMNS, target % COLUMNS
                    at = grads + r * stride + place_of(target)
                    if neighbours > 1:  # not rounded before one is taken away
                        powers_of_row = floats(logits + (panel * rows + r) * PANEL_ROW, COLUMNS)
                        worths_of_row = floats(parts + (2 * r + 1) * part_bytes, panels)
                        gradient = powers_of_row[place] * worths_of_row[panel] - one
                    else:
                        gradient = floats(at, 1)[0] - one
                    put(gradient, at, RUN * 2)
                    if of_weight:
                        of_pair = packed + (panel * row_groups + group_at(r)) * PANEL_ROW + place * 4
                        put(gradient, of_pair + r % neighbours * (4 // neighbours), PART)
                    floats(of_bias, vocab)[target] -= one
        barrier()
        if of_hidden:
            all_groups = (vocab + run - 1) // run * run * size_of // 4
            multiply_all(
                rows, grads, stride, back, all_groups, all_groups, of_size, 0, 1, size, of_hidden, of_size * PANEL_ROW,
                PANEL_ROW, 0, 0, 0, 0, thread, threads,
            )  # fmt: skip
        if of_weight:
            tiles = (size + most_rows - 1) // most_rows
            for task in range(panels * tiles * thread // threads, panels * tiles * (thread + 1) // threads):
                panel, tile = task // tiles, task % tiles
                top, bottom = size * tile // tiles, size * (tile + 1) // tiles
                # Sums go on from those of the rows before. The next tile's are wanted soon.
                below = min(size, size * (tile + 2) // tiles)
                for r in range(bottom, below):
                    ask(of_weight + (r * panels + panel) * PANEL_ROW, PANEL_ROW)
                multiply(
                    bottom - top, turned + top * turned_stride, turned_stride, GROUP,
                    packed + panel * row_groups * PANEL_ROW, COLUMNS, row_groups,
                    of_weight + (top * panels + panel) * PANEL_ROW, panels * PANEL_ROW, more, packed, 0,
                )  # fmt: skip

    return cross_entropy
