"""The loops of `fused_lstm`, compiled: see there for what their arguments are.

What is kept and multiplied has one type, "fp32" or "bf16"; sums and cells are in float32. Numbers in memory are given
by their address. A row is read in parts, each an array of its own: only so does LLVM know that it may take 16 numbers
at once; and sums of addresses take Numba a fraction of the time that slices take it.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from ulmfit.nn import openmp
from ulmfit.nn.intrinsics import prefetch
from ulmfit.nn.register_tiles import COLUMNS, NEIGHBOURS, PANEL_ROW, ROWS, multiplier, product
from ulmfit.nn.vectors import compiler

DRAWS = 1 << 16  # values of the random number that decides whether a weight is kept
_TILES_AT_ONCE = 8  # of a weight gradient: whose factors stay in a core's cache while all panels pass


@cache
def kernels(kind: str) -> SimpleNamespace:
    """Addresses of `prepare`, `forward`, `backward` and `weight_gradients`: some seconds, once in a process.

    Args:
        kind: "fp32" or "bf16".

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    return SimpleNamespace(
        prepare=_prepare(kind), forward=_forward(kind), backward=_backward(kind),
        weight_gradients=_weight_gradients(kind),
    )  # fmt: skip


@cache
def _dropping() -> tuple[Any, Any]:
    """How weights are dropped: `parts` of the number to keep (of `DRAWS`) and the seed, and `is_kept` for each one."""
    c = compiler()
    u32, f32 = c.numba.uint32, c.numba.float32

    @c.function
    def parts(kept: Any, seed: Any) -> Any:
        """What those that are kept are multiplied with, and what `is_kept` asks for."""
        return f32(DRAWS) / f32(kept), u32(kept), u32(seed & 0xFFFFFFFF), u32((seed >> 32) & 0xFFFFFFFF)

    @c.function
    def is_kept(index: Any, kept: Any, low: Any, high: Any) -> Any:
        """Each bit of the index and of the seed's halves changes half of the draw's."""
        x = u32(index + low)  # sums and products of 32-bit numbers have 64 bits in Numba
        x = u32((x ^ (x >> u32(16))) * u32(0x21F0AAAD))
        x = u32((x ^ (x >> u32(15)) ^ high) * u32(0xD35A2D97))
        x = u32((x ^ (x >> u32(15))) * u32(0x21F0AAAD))
        return (x >> u32(16)) < kept

    return parts, is_kept


@cache
def beside(kind: str) -> Any:
    """What is multiplied at once, of two rows of bfloat16 side by side; of float32 a row alone."""
    c = compiler()
    halves, words, u32, copy = c.halves, c.words, c.numba.uint32, c.numbers["fp32"].convert

    @c.function
    def pair(n: Any, one_at: Any, other_at: Any, out_at: Any) -> None:
        one, other, out = halves(one_at, n), halves(other_at, n), words(out_at, n)
        for j in range(n):
            out[j] = u32(one[j]) | u32(u32(other[j]) << u32(16))

    @c.function
    def alone(n: Any, one_at: Any, other_at: Any, out_at: Any) -> None:
        copy(n, one_at, out_at)

    return pair if kind == "bf16" else alone


@cache
def summing() -> tuple[Any, Any]:
    """To put `n` sums where they are wanted, or `more` to what is there; to ask before for that part of the memory."""
    c, ask_for = compiler(), prefetch()
    floats, f32 = c.floats, c.numba.float32

    @c.function
    def add(n: Any, sums_at: Any, out_at: Any, more: Any) -> None:
        sums, out = floats(sums_at, n), floats(out_at, n)
        for j in range(n):
            out[j] = (out[j] if more else f32(0)) + sums[j]

    @c.function
    def ask(out_at: Any, n: Any) -> None:
        for j in range(0, n, 16):
            ask_for(out_at + 4 * j)

    return add, ask


def _prepare(kind: str) -> int:
    c, pair, numbers, neighbours = compiler(), beside(kind), compiler().numbers[kind], NEIGHBOURS[kind]
    floats, words, of_kind, narrow, convert, size_of = (
        c.floats, c.words, numbers.at, numbers.narrow, numbers.convert, numbers.size,
    )  # fmt: skip
    parts, is_kept = _dropping()
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    number, count, _ = openmp.team()

    @c.function
    def drop(n: Any, weights_at: Any, out_at: Any, first: Any, scale: Any, kept: Any, low: Any, high: Any) -> None:
        weights, out = floats(weights_at, n), of_kind(out_at, n)
        for j in range(n):
            out[j] = narrow(weights[j] * scale if is_kept(first + u32(j), kept, low, high) else f32(0))

    @c.function
    def turn(n: Any, tile_at: Any, stride: Any, packed_at: Any) -> None:
        tile, packed = words(tile_at, COLUMNS * stride), words(packed_at, n * COLUMNS)
        for p in range(n):
            for row in range(COLUMNS):
                packed[p * COLUMNS + row] = tile[row * stride + p]

    @c.function
    def lay_out(n: Any, one: Any, stride: Any, panel_at: Any, panel_bytes: Any) -> None:
        for start in range(0, n, COLUMNS):
            panel, filled = panel_at + start // COLUMNS * panel_bytes, min(n - start, COLUMNS)
            pair(filled, one + start * size_of, one + start * size_of + stride, panel)
            for j in range(filled, COLUMNS):
                words(panel, COLUMNS)[j] = 0

    @c.entry
    def prepare(given: Any) -> None:
        a = carray(given, 11)
        weight_ih, weight_hh, gates, width, size = a[0], a[1], a[2], a[3], a[4]
        scale, kept, low, high = parts(a[5], a[6])
        stride, packed, back = a[8] * size_of, a[9], a[10]
        groups, of_size = (width + size + neighbours - 1) // neighbours, (size + COLUMNS - 1) // COLUMNS
        panels, back_bytes = (gates + COLUMNS - 1) // COLUMNS, (gates + neighbours - 1) // neighbours * PANEL_ROW
        thread, threads = i64(number()), i64(count())
        tile = a[7] + thread * COLUMNS * stride
        for panel in range(panels * thread // threads, panels * (thread + 1) // threads):
            first = panel * COLUMNS
            for r in range(COLUMNS):
                n, row = first + r, tile + r * stride
                if n < gates:
                    of_kind(row, groups * neighbours)[groups * neighbours - 1] = narrow(f32(0))
                    convert(width, weight_ih + n * width * 4, row)
                    drop(size, weight_hh + n * size * 4, row + width * size_of, u32(n * size), scale, kept, low, high)
                else:
                    words(row, groups)[:] = 0
            turn(groups, tile, stride // 4, packed + panel * groups * PANEL_ROW)
            for r in range(0, min(COLUMNS, gates - first) if back else 0, neighbours):
                one, at = tile + r * stride, back + (first + r) // neighbours * PANEL_ROW
                lay_out(size, one + width * size_of, stride, at, back_bytes)
                lay_out(width, one, stride, at + of_size * back_bytes, back_bytes)

    return prepare


def _forward(kind: str) -> int:
    c, multiply_all, numbers, neighbours = compiler(), product(kind), compiler().numbers[kind], NEIGHBOURS[kind]
    floats, float_parts, of_kind, parts_of_kind, narrow, size_of = (
        c.floats, c.float_parts, numbers.at, numbers.parts, numbers.narrow, numbers.size,
    )  # fmt: skip
    tanh, sigmoid, i64, carray = c.tanh, c.sigmoid, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()

    @c.function
    def cell(n: Any, sums: Any, bias: Any, before_at: Any, after_at: Any, gates: Any, output_at: Any) -> None:
        i, f, g, o = float_parts(sums, n)
        to_i, to_f, to_g, to_o = float_parts(bias, n)
        i_out, f_out, g_out, o_out = parts_of_kind(gates, n)
        before, after, output = floats(before_at, n), floats(after_at, n), of_kind(output_at, n)
        for j in range(n):
            of_i, of_f, of_o = sigmoid(i[j] + to_i[j]), sigmoid(f[j] + to_f[j]), sigmoid(o[j] + to_o[j])
            of_g = tanh(g[j] + to_g[j])
            new = of_f * before[j] + of_i * of_g
            after[j] = new
            i_out[j], f_out[j], g_out[j], o_out[j] = narrow(of_i), narrow(of_f), narrow(of_g), narrow(of_o)
            output[j] = narrow(of_o * tanh(new))

    @c.entry
    def forward(given: Any) -> None:
        a = carray(given, 12)
        steps, rows, width, size, groups, packed = a[0], a[1], a[2], a[3], a[4], a[5]
        bias, both, cells, gates, sums, from_zero = a[6], a[7], a[8], a[9], a[10], a[11]
        panels, stride = (4 * size + COLUMNS - 1) // COLUMNS, 4 * groups
        thread, threads = i64(number()), i64(count())
        for t in range(steps):
            used = (width + neighbours - 1) // neighbours if from_zero and t == 0 else groups
            multiply_all(rows, both + t * rows * stride, stride, packed, groups, sums, used, 0, panels, thread, threads)
            barrier()
            for b in range(rows * thread // threads, rows * (thread + 1) // threads):
                at = t * rows + b
                cell(
                    size, sums + b * panels * PANEL_ROW, bias, cells + at * size * 4, cells + (at + rows) * size * 4,
                    gates + at * 4 * size * size_of, both + (at + rows) * stride + width * size_of,
                )  # fmt: skip
            barrier()

    return forward


def _backward(kind: str) -> int:
    c, multiply_all, numbers = compiler(), product(kind), compiler().numbers[kind]
    floats, float_parts, of_kind, parts_of_kind, wide, narrow, convert, size_of = (
        c.floats, c.float_parts, numbers.at, numbers.parts, numbers.wide, numbers.narrow, numbers.convert, numbers.size,
    )  # fmt: skip
    tanh, i64, carray, one = c.tanh, c.numba.int64, c.numba.carray, c.numba.float32(1)
    number, count, barrier = openmp.team()

    @c.function
    def cell_back(
        n: Any, gates: Any, before_at: Any, after_at: Any, grad_at: Any, through_at: Any, grad_cell_at: Any, bias: Any
    ) -> None:  # fmt: skip
        i, f, g, o = parts_of_kind(gates, n)
        to_i, to_f, to_g, to_o = float_parts(bias, n)
        before, after, through = floats(before_at, n), floats(after_at, n), floats(through_at, n)
        grad, grad_cell = of_kind(grad_at, n), floats(grad_cell_at, n)
        for j in range(n):
            of_i, of_f, of_g, of_o = wide(i[j]), wide(f[j]), wide(g[j]), wide(o[j])
            dh, t = wide(grad[j]) + through[j], tanh(after[j])
            dc = grad_cell[j] + dh * of_o * (one - t * t)
            grad_cell[j] = dc * of_f
            di = dc * of_g * (of_i * (one - of_i))
            df = dc * before[j] * (of_f * (one - of_f))
            dg = dc * of_i * (one - of_g * of_g)
            do = dh * t * (of_o * (one - of_o))
            i[j], f[j], g[j], o[j] = narrow(di), narrow(df), narrow(dg), narrow(do)
            to_i[j] += di
            to_f[j] += df
            to_g[j] += dg
            to_o[j] += do

    @c.entry
    def backward(given: Any) -> None:
        a = carray(given, 14)
        steps, rows, size, width, panels, packed = a[0], a[1], a[2], a[3], a[4], a[5]
        cells, gates, grad, grad_cell, through = a[6], a[7], a[8], a[9], a[10]
        inputs, of_state = a[12], a[13]
        of_size, stride = (size + COLUMNS - 1) // COLUMNS, 4 * size * size_of
        thread, threads = i64(number()), i64(count())
        bias = a[11] + thread * size * 16
        first, stop = rows * thread // threads, rows * (thread + 1) // threads
        for back in range(steps):
            t = steps - 1 - back
            for b in range(first, stop):
                at = t * rows + b
                cell_back(
                    size, gates + at * stride, cells + at * size * 4, cells + (at + rows) * size * 4,
                    grad + at * size * size_of, through + b * panels * PANEL_ROW, grad_cell + b * size * 4,
                    bias,
                )  # fmt: skip
            barrier()
            start, groups = of_size if t == 0 and not of_state else 0, stride // 4
            multiply_all(
                rows, gates + t * rows * stride, stride, packed, groups, through, groups, start, panels, thread, threads
            )
            barrier()
            if panels > of_size:
                for b in range(first, stop):
                    sums = through + (b * panels + of_size) * PANEL_ROW
                    convert(width, sums, inputs + (t * rows + b) * width * size_of)

    return backward


def _weight_gradients(kind: str) -> int:
    c, multiply, pair, neighbours = compiler(), multiplier(kind), beside(kind), NEIGHBOURS[kind]
    add, ask = summing()
    floats, halves, words, (parts, is_kept) = c.floats, c.halves, c.words, _dropping()
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()
    size_of = compiler().numbers[kind].size

    @c.function
    def turn_pair(n: Any, one_at: Any, other_at: Any, turned_at: Any, stride: Any) -> None:
        one, other, turned = halves(one_at, n), halves(other_at, n), words(turned_at, n * stride)
        for j in range(n):
            turned[j * stride] = u32(one[j]) | u32(u32(other[j]) << u32(16))

    @c.function
    def turn_row(n: Any, one_at: Any, other_at: Any, turned_at: Any, stride: Any) -> None:
        one, turned = words(one_at, n), words(turned_at, n * stride)
        for j in range(n):
            turned[j * stride] = one[j]

    turn = turn_pair if kind == "bf16" else turn_row

    @c.function
    def add_kept(
        n: Any, sums_at: Any, out_at: Any, more: Any, first: Any, scale: Any, kept: Any, low: Any, high: Any
    ) -> None:
        sums, out = floats(sums_at, n), floats(out_at, n)
        for j in range(n):
            old = out[j] if more else f32(0)
            out[j] = old + (sums[j] * scale if is_kept(first + u32(j), kept, low, high) else f32(0))

    @c.entry
    def weight_gradients(given: Any) -> None:
        a = carray(given, 17)
        all_rows, gates, width, size, columns = a[0], a[1], a[2], a[3], neighbours * a[4]
        scale, kept, low, high = parts(a[5], a[6])
        turned, stride, packed, of_inputs, of_state = a[9], a[10] * size_of, a[11], a[13], a[14]
        at_once, of_zeros = a[15], a[16]
        panels, tiles = (columns + COLUMNS - 1) // COLUMNS, (gates + ROWS - 1) // ROWS
        spans = (tiles + _TILES_AT_ONCE - 1) // _TILES_AT_ONCE
        thread, threads = i64(number()), i64(count())
        sums = a[12] + thread * COLUMNS * PANEL_ROW
        for begin in range(0, all_rows, at_once):
            rows = min(at_once, all_rows - begin)
            raw, both = a[7] + begin * gates * size_of, a[8] + begin * columns * size_of
            groups = (rows + neighbours - 1) // neighbours
            # Blocks of 16 columns: as many lines of the cache are filled side by side. The row behind the last of an
            # odd number is the one before it, with zeros for the other factor.
            blocks = (gates + 15) // 16
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                first = 16 * block
                n, at, to = min(gates - first, 16), raw + first * size_of, turned + first * stride
                for p in range(rows // neighbours):
                    one = at + neighbours * p * gates * size_of
                    turn(n, one, one + gates * size_of, to + p * 4, stride // 4)
                if rows % neighbours:
                    last, out = halves(at + (rows - 1) * gates * size_of, n), words(to, n * stride // 4)
                    for j in range(n):
                        out[j * (stride // 4) + groups - 1] = last[j]
            for p in range(groups * thread // threads, groups * (thread + 1) // threads):
                one = both + neighbours * p * columns * size_of
                other = one if neighbours * p + 1 == rows else one + columns * size_of
                for panel in range(panels):
                    first = panel * COLUMNS
                    n, at = min(columns - first, COLUMNS), packed + (panel * groups + p) * PANEL_ROW
                    pair(n, one + first * size_of, other + first * size_of, at)
            barrier()
            for task in range(panels * spans * thread // threads, panels * spans * (thread + 1) // threads):
                span, panel = task // panels, task % panels
                first, stop = panel * COLUMNS, min(width + size, (panel + 1) * COLUMNS)
                skip = min(max(of_zeros - begin, 0) // neighbours, groups - 1) if first >= width else 0
                at = packed + (panel * groups + skip) * PANEL_ROW
                middle = min(max(width, first), stop)
                for tile in range(tiles * span // spans, tiles * (span + 1) // spans):
                    top, bottom = gates * tile // tiles, gates * (tile + 1) // tiles
                    x = turned + top * stride + skip * 4
                    for n in range(top, bottom):
                        ask(of_inputs + (n * width + first) * 4, middle - first)
                        ask(of_state + (n * size + middle - width) * 4, stop - middle)
                    multiply(bottom - top, x, stride, at, groups - skip, sums, PANEL_ROW)
                    for n in range(top, bottom):
                        row = sums + (n - top) * PANEL_ROW
                        add(middle - first, row, of_inputs + (n * width + first) * 4, begin > 0)
                        start = n * size + middle - width
                        add_kept(
                            stop - middle, row + (middle - first) * 4, of_state + start * 4, begin > 0, u32(start),
                            scale, kept, low, high,
                        )  # fmt: skip
            barrier()

    return weight_gradients
