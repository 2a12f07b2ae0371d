"""The loop of `fused_cross_entropy`, compiled: see there for what its arguments are."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from ulmfit.nn import openmp
from ulmfit.nn.fused_loops import summing
from ulmfit.nn.intrinsics import POWERS, TO_NEAREST
from ulmfit.nn.register_tiles import COLUMNS, MOST_ROWS, NEIGHBOURS, PANEL_ROW, plain_multiplier, product, rows_of
from ulmfit.nn.turned_gates import beside
from ulmfit.nn.vectors import compiler

_SMALLEST = -87.0  # e^x is a normal number from there on
_LANES = 512  # maxima and sums of a row, each of every 512th number: LLVM does not change the order of a sum
SCRATCH = max(_LANES, MOST_ROWS * COLUMNS)  # numbers that a thread works with


@cache
def entry(kind: str) -> int:
    """Address of the loop, for numbers of `kind`, "fp32" or "bf16".

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    c, numbers, neighbours = compiler(), compiler().numbers[kind], NEIGHBOURS[kind]
    multiply, multiply_all, pair, (add, ask) = plain_multiplier(kind), product(kind), beside(kind), summing()
    floats, integers, of_kind, narrow, size_of = c.floats, c.integers, numbers.at, numbers.narrow, numbers.size
    as_bits, as_float = c.as_bits, c.as_float
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    log2_e, smallest, to_nearest, one = f32(math.log2(math.e)), f32(_SMALLEST), f32(TO_NEAREST), f32(1)
    p0, p1, p2, p3, p4, p5 = map(f32, POWERS)
    number, count, barrier = openmp.team()
    most_rows = rows_of(kind)

    @c.function
    def power(x: Any) -> Any:
        """e^x for x <= 0, to 2e-7 of it."""
        exponent = (smallest if x < smallest else x) * log2_e  # what is not a number stays it
        shifted = exponent + to_nearest
        rest = exponent - (shifted - to_nearest)
        return as_float(u32(as_bits(shifted) << u32(23))) * (
            ((((p5 * rest + p4) * rest + p3) * rest + p2) * rest + p1) * rest + p0
        )

    @c.function
    def find_largest(n: Any, row_at: Any, bias_at: Any, most_at: Any) -> None:
        row, bias, most = floats(row_at, n), floats(bias_at, n), floats(most_at, n)
        for j in range(n):
            logit = row[j] + bias[j]
            row[j] = logit
            most[j] = logit if logit > most[j] else most[j]

    @c.function
    def find_sum(n: Any, row_at: Any, most: Any, total_at: Any) -> None:
        row, total = floats(row_at, n), floats(total_at, n)
        for j in range(n):
            row[j] = power(row[j] - most)
            total[j] += row[j]

    @c.function
    def fold(lanes_at: Any, most: Any) -> Any:
        """The largest of all lanes, or their sum."""
        half = _LANES // 2
        while half > 0:
            one, other = floats(lanes_at, half), floats(lanes_at + half * 4, half)
            for j in range(half):
                one[j] = (one[j] if one[j] > other[j] else other[j]) if most else one[j] + other[j]
            half //= 2
        return floats(lanes_at, 1)[0]

    @c.function
    def softmax(n: Any, row_at: Any, bias_at: Any, lanes_at: Any, target: Any, found_at: Any) -> Any:
        """e^(logit - largest) in place of the products -> 1 / their sum; that sum, and largest - target's logit."""
        row, lanes, found = floats(row_at, n), floats(lanes_at, _LANES), floats(found_at, 2)
        lanes[:] = row[0] + floats(bias_at, n)[0]
        for start in range(0, n, _LANES):
            find_largest(min(n - start, _LANES), row_at + start * 4, bias_at + start * 4, lanes_at)
        most = fold(lanes_at, True)
        found[1] = most - row[target]
        lanes[:] = 0
        for start in range(0, n, _LANES):
            find_sum(min(n - start, _LANES), row_at + start * 4, most, lanes_at)
        found[0] = fold(lanes_at, False)
        return one / found[0]

    @c.function
    def apart(n: Any, row_at: Any, share: Any, out_at: Any, bias_at: Any) -> None:
        row, out, bias = floats(row_at, n), of_kind(out_at, n), floats(bias_at, n)
        for j in range(n):
            probability = row[j] * share
            out[j] = narrow(probability)
            bias[j] += probability

    @c.function
    def in_place(n: Any, row_at: Any, share: Any, out_at: Any, bias_at: Any) -> None:
        row, bias = floats(row_at, n), floats(bias_at, n)
        for j in range(n):
            row[j] *= share
            bias[j] += row[j]

    gradients = in_place if kind == "fp32" else apart  # two arrays at one address are worked on one by one

    @c.function
    def subtract_target(row_at: Any, share: Any, target: Any, out_at: Any, bias_at: Any) -> None:
        row, out, bias = floats(row_at, target + 1), of_kind(out_at, target + 1), floats(bias_at, target + 1)
        out[target] = narrow(row[target] * (share if neighbours > 1 else one) - one)
        bias[target] -= one

    @c.entry
    def cross_entropy(given: Any) -> None:
        a = carray(given, 22)
        rows, vocab, size, x, x_stride, turned, turned_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        forward, groups, back, bias, logits, grads, packed = a[7], a[8], a[9], a[10], a[12], a[13], a[14]
        found, of_hidden, of_weight, more, scratch, learns = a[15], a[16], a[17], a[19], a[20], a[21]
        panels, of_size = (vocab + COLUMNS - 1) // COLUMNS, (size + COLUMNS - 1) // COLUMNS
        stride, pairs = panels * COLUMNS * size_of, (rows + neighbours - 1) // neighbours
        thread, threads = i64(number()), i64(count())
        sums, of_bias, targets = scratch + thread * SCRATCH * 4, a[18] + thread * vocab * 4, integers(a[11], rows)

        multiply_all(
            rows, x, x_stride, forward, groups, groups, 1, 0, panels, vocab, logits, panels * PANEL_ROW, PANEL_ROW,
            0, 0, 0, 0, thread, threads,
        )  # fmt: skip
        barrier()
        for p in range(pairs * thread // threads, pairs * (thread + 1) // threads):
            first, stop = neighbours * p, min(rows, neighbours * (p + 1))
            for r in range(first, stop):
                row, out = logits + r * panels * PANEL_ROW, grads + r * stride
                share = softmax(vocab, row, bias, sums, targets[r], found + r * 8)
                if learns:
                    gradients(vocab, row, share, out, of_bias)
                    subtract_target(row, share, targets[r], out, of_bias)
            if of_weight:
                line, other = grads + first * stride, grads + (stop - 1) * stride
                for panel in range(panels):
                    at, to = panel * COLUMNS * size_of, packed + (panel * pairs + p) * PANEL_ROW
                    pair(COLUMNS, line + at, other + at, to)
        barrier()
        if of_hidden:
            all_groups = (vocab + neighbours - 1) // neighbours
            multiply_all(
                rows, grads, stride, back, all_groups, all_groups, 1, 0, of_size, size, of_hidden, of_size * PANEL_ROW,
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
                multiply(bottom - top, turned + top * turned_stride, turned_stride, at, pairs, sums, PANEL_ROW)
                for r in range(top, bottom):
                    add(COLUMNS, sums + (r - top) * PANEL_ROW, of_weight + (r * panels + panel) * PANEL_ROW, more)

    return cross_entropy
