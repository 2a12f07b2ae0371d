"""The loop of `fused_cross_entropy`, compiled: see there for what its arguments are.

Logits lie panel by panel, and in each row by row. They become part of their rows' largest and sum while they are in a
core's cache. Gradients are made for some rows at a time, for few memory pages can be written to in turns.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from ulmfit.nn import openmp
from ulmfit.nn.fused_loops import summing
from ulmfit.nn.intrinsics import POWERS, TO_NEAREST
from ulmfit.nn.lanes import SMALLEST
from ulmfit.nn.register_tiles import (
    COLUMNS,
    LANES,
    MOST_ROWS,
    NEIGHBOURS,
    PANEL_ROW,
    hook,
    plain_multiplier,
    product,
    rows_of,
)
from ulmfit.nn.softmax_cells import LOWEST, add_bias, gradients, merge
from ulmfit.nn.vectors import compiler

SCRATCH = MOST_ROWS * COLUMNS  # numbers that a thread works with
_ARGUMENTS = 24
_PAIRS_AT_ONCE = 16  # of rows, or rows where one is multiplied at once


@cache
def entry(kind: str) -> int:
    """Address of the loop, for numbers of `kind`, "fp32" or "bf16".

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    c, numbers, neighbours = compiler(), compiler().numbers[kind], NEIGHBOURS[kind]
    multiply, multiply_all, (add, ask) = plain_multiplier(kind), product(kind), summing()
    with_bias, merged, of_panel, most_rows = add_bias(), merge(), gradients(kind), rows_of(kind)
    floats, integers, longs, address = c.floats, c.integers, c.longs, c.address
    of_kind, narrow, size_of = numbers.at, numbers.narrow, numbers.size
    as_bits, as_float = c.as_bits, c.as_float
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    log2_e, smallest, to_nearest, one, lowest = map(f32, (math.log2(math.e), SMALLEST, TO_NEAREST, 1, LOWEST))
    p0, p1, p2, p3, p4, p5 = map(f32, POWERS)
    number, count, barrier = openmp.team()

    @c.function
    def power(x: Any) -> Any:
        """As `Lanes.power`."""
        exponent = (smallest if x < smallest else x) * log2_e  # what is not a number stays it
        shifted = exponent + to_nearest
        rest = exponent - (shifted - to_nearest)
        found = as_float(u32(as_bits(shifted) << u32(23))) * (
            ((((p5 * rest + p4) * rest + p3) * rest + p2) * rest + p1) * rest + p0
        )
        return f32(0) if x < smallest else found

    def finish(given: Any, time: Any, panel: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _ARGUMENTS)
        bias, parts, part_bytes = a[10] + panel * PANEL_ROW, a[21] + panel * 4, a[22]
        for r in range(top, bottom):
            at = parts + 2 * r * part_bytes
            with_bias(sums + (r - top) * PANEL_ROW, bias, at, at + part_bytes)

    finish_at = hook(finish)

    @c.function
    def logit_at(logits: Any, rows: Any, row: Any, piece: Any) -> Any:
        return logits + (piece // COLUMNS * rows + row) * PANEL_ROW + piece % COLUMNS * 4

    @c.function
    def put_together(parts: Any, part_bytes: Any, logit: Any, state_at: Any, found_at: Any, sums_at: Any) -> None:
        """All panels' parts of a row: sum of e^(logit - largest), largest - target's logit; largest, and 1 / sum."""
        state, found, sums = floats(state_at, 2 * LANES), floats(found_at, 2), floats(sums_at, 2)
        state[:LANES], state[LANES:] = lowest, f32(0)
        for at in range(parts, parts + part_bytes, LANES * 4):
            merged(at, at + part_bytes, state_at, state_at + LANES * 4)
        most, total = state[0], f32(0)
        for j in range(LANES):
            most = state[j] if state[j] > most else most
        for j in range(LANES):
            total += state[LANES + j] * power(state[j] - most)
        found[0], found[1] = total, most - logit
        sums[0], sums[1] = most, one / total

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
        of_nobody, panel_of_nobody, state, sums = (
            scratch, scratch + PANEL_ROW, scratch + 2 * PANEL_ROW, scratch + 3 * PANEL_ROW
        )  # fmt: skip
        multiply_all(
            rows, x, x_stride, forward, groups, groups, 1, 0, panels, panels * COLUMNS, logits, PANEL_ROW,
            rows * PANEL_ROW, finish_at, 0, at_a, 0, thread, threads,
        )  # fmt: skip
        barrier()
        stop_pair = pairs * (thread + 1) // threads
        for first_pair in range(pairs * thread // threads, stop_pair, _PAIRS_AT_ONCE):
            end_pair = min(stop_pair, first_pair + _PAIRS_AT_ONCE)
            begin, end = neighbours * first_pair, min(rows, neighbours * end_pair)
            for r in range(begin, end):
                logit = floats(logit_at(logits, rows, r, targets[r]), 1)[0]
                put_together(
                    parts + 2 * r * part_bytes, part_bytes, logit, state, found + r * 8, sums + (r - begin) * 8
                )  # fmt: skip
            if learns:
                # Beside the last of an odd number are zeros.
                behind = floats(sums + (end - begin) * 8, 2)
                behind[0], behind[1] = lowest, f32(0)
                for panel in range(panels):
                    line, of_line = logits + panel * rows * PANEL_ROW, grads + panel * COLUMNS * size_of
                    for p in range(first_pair, end_pair):
                        r = neighbours * p
                        other, of_other, beside = r + 1, of_line + (r + 1) * stride, panel_of_nobody
                        if r + 1 >= rows:
                            other, of_other = r, of_nobody
                        if of_weight or neighbours == 1:
                            beside = packed + (panel * pairs + p) * PANEL_ROW
                        of_panel(
                            line + r * PANEL_ROW, line + other * PANEL_ROW, sums + (r - begin) * 8,
                            of_line + r * stride, of_other, beside, of_bias + panel * PANEL_ROW,
                        )  # fmt: skip
                for r in range(begin, end):
                    target = targets[r]
                    of_row = of_kind(grads + r * stride, vocab)
                    if neighbours > 1:
                        largest_share = floats(sums + (r - begin) * 8, 2)
                        logit = floats(logit_at(logits, rows, r, target), 1)[0]
                        of_row[target] = narrow(power(logit - largest_share[0]) * largest_share[1] - one)
                    else:
                        of_row[target] -= one
                    if of_weight:
                        p = r // neighbours
                        at = packed + (target // COLUMNS * pairs + p) * PANEL_ROW
                        place = target % COLUMNS * neighbours + r - neighbours * p
                        of_kind(at, COLUMNS * neighbours)[place] = of_row[target]
                    floats(of_bias, vocab)[target] -= one
        barrier()
        if of_hidden:
            all_groups = (vocab + neighbours - 1) // neighbours
            multiply_all(
                rows, grads, stride, back, all_groups, all_groups, of_size, 0, 1, size, of_hidden, of_size * PANEL_ROW,
                PANEL_ROW, 0, 0, 0, 0, thread, threads,
            )  # fmt: skip
        if of_weight:
            tiles = (size + most_rows - 1) // most_rows
            for task in range(panels * tiles * thread // threads, panels * tiles * (thread + 1) // threads):
                panel, tile = task // tiles, task % tiles
                top, bottom = size * tile // tiles, size * (tile + 1) // tiles
                for r in range(top, bottom):
                    ask(of_weight + (r * panels + panel) * PANEL_ROW, PANEL_ROW)
                at = packed + panel * pairs * PANEL_ROW
                multiply(bottom - top, turned + top * turned_stride, turned_stride, at, pairs, scratch, PANEL_ROW)
                for r in range(top, bottom):
                    add(COLUMNS, scratch + (r - top) * PANEL_ROW, of_weight + (r * panels + panel) * PANEL_ROW, more)

    return cross_entropy
