"""The loops of `fused_lstm`, compiled: see there for what their arguments are.

Numbers in memory are given by their address. A row is read in parts, each an array of its own: only so does LLVM know
that it may take 16 numbers at once; and sums of addresses take Numba a fraction of the time that slices take it.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from ulmfit.nn import openmp
from ulmfit.nn.register_tiles import COLUMNS, PANEL_ROW, ROWS, multiplier, product
from ulmfit.nn.vectors import compiler

DRAWS = 1 << 16  # values of the random number that decides whether a weight is kept


@cache
def kernels() -> SimpleNamespace:
    """Addresses of `prepare`, `forward`, `backward` and `weight_gradients`: some seconds, once in a process.

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    return SimpleNamespace(
        prepare=_prepare(), forward=_forward(), backward=_backward(), weight_gradients=_weight_gradients()
    )


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
def _pair() -> Any:
    """Numbers of two rows side by side."""
    c = compiler()
    halves, words, u32 = c.halves, c.words, c.numba.uint32

    @c.function
    def pair(n: Any, one_at: Any, other_at: Any, out_at: Any) -> None:
        one, other, out = halves(one_at, n), halves(other_at, n), words(out_at, n)
        for j in range(n):
            out[j] = u32(one[j]) | u32(u32(other[j]) << u32(16))

    return pair


def _prepare() -> int:
    c, pair = compiler(), _pair()
    floats, halves, words, narrow, convert = c.floats, c.halves, c.words, c.narrow, c.convert
    parts, is_kept = _dropping()
    u16, u32, i64, carray = c.numba.uint16, c.numba.uint32, c.numba.int64, c.numba.carray
    number, count, _ = openmp.team()

    @c.function
    def drop(n: Any, weights_at: Any, out_at: Any, first: Any, scale: Any, kept: Any, low: Any, high: Any) -> None:
        weights, out = floats(weights_at, n), halves(out_at, n)
        for j in range(n):
            out[j] = narrow(weights[j] * scale) if is_kept(first + u32(j), kept, low, high) else u16(0)

    @c.function
    def turn(n: Any, tile_at: Any, stride: Any, packed_at: Any) -> None:
        tile, packed = words(tile_at, COLUMNS * stride), words(packed_at, n * COLUMNS)
        for p in range(n):
            for row in range(COLUMNS):
                packed[p * COLUMNS + row] = tile[row * stride + p]

    @c.function
    def pair_rows(n: Any, one: Any, stride: Any, panel_at: Any, panel_bytes: Any) -> None:
        for start in range(0, n, COLUMNS):
            panel, filled = panel_at + start // COLUMNS * panel_bytes, min(n - start, COLUMNS)
            pair(filled, one + start * 2, one + start * 2 + stride, panel)
            for j in range(filled, COLUMNS):
                words(panel, COLUMNS)[j] = 0

    @c.entry
    def prepare(given: Any) -> None:
        a = carray(given, 11)
        weight_ih, weight_hh, gates, width, size = a[0], a[1], a[2], a[3], a[4]
        scale, kept, low, high = parts(a[5], a[6])
        stride, packed, back = a[8], a[9], a[10]
        pairs, of_size = (width + size + 1) // 2, (size + COLUMNS - 1) // COLUMNS
        panels, back_bytes = (gates + COLUMNS - 1) // COLUMNS, gates // 2 * PANEL_ROW
        thread, threads = i64(number()), i64(count())
        tile = a[7] + thread * COLUMNS * stride * 2
        for panel in range(panels * thread // threads, panels * (thread + 1) // threads):
            first = panel * COLUMNS
            for r in range(COLUMNS):
                n, row = first + r, tile + r * stride * 2
                if n < gates:
                    convert(width, weight_ih + n * width * 4, row)
                    drop(size, weight_hh + n * size * 4, row + width * 2, u32(n * size), scale, kept, low, high)
                    if width + size < 2 * pairs:
                        halves(row, stride)[width + size] = 0
                else:
                    halves(row, stride)[:] = 0
            turn(pairs, tile, stride // 2, packed + panel * pairs * PANEL_ROW)
            for r in range(0, min(COLUMNS, gates - first) if back else 0, 2):
                one, at = tile + r * stride * 2, back + (first + r) // 2 * PANEL_ROW
                pair_rows(size, one + width * 2, stride * 2, at, back_bytes)
                pair_rows(width, one, stride * 2, at + of_size * back_bytes, back_bytes)

    return prepare


def _forward() -> int:
    c, multiply_all = compiler(), product("bf16")
    floats, halves, float_parts, half_parts = c.floats, c.halves, c.float_parts, c.half_parts
    narrow, tanh, sigmoid, i64, carray = c.narrow, c.tanh, c.sigmoid, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()

    @c.function
    def cell(n: Any, sums: Any, bias: Any, before_at: Any, after_at: Any, gates: Any, output_at: Any) -> None:
        i, f, g, o = float_parts(sums, n)
        to_i, to_f, to_g, to_o = float_parts(bias, n)
        i_out, f_out, g_out, o_out = half_parts(gates, n)
        before, after, output = floats(before_at, n), floats(after_at, n), halves(output_at, n)
        for j in range(n):
            of_i, of_f, of_o = sigmoid(i[j] + to_i[j]), sigmoid(f[j] + to_f[j]), sigmoid(o[j] + to_o[j])
            of_g = tanh(g[j] + to_g[j])
            new = of_f * before[j] + of_i * of_g
            after[j] = new
            i_out[j], f_out[j], g_out[j], o_out[j] = narrow(of_i), narrow(of_f), narrow(of_g), narrow(of_o)
            output[j] = narrow(of_o * tanh(new))

    @c.entry
    def forward(given: Any) -> None:
        a = carray(given, 11)
        steps, rows, width, size, pairs, packed = a[0], a[1], a[2], a[3], a[4], a[5]
        bias, both, cells, gates, sums = a[6], a[7], a[8], a[9], a[10]
        panels, stride = (4 * size + COLUMNS - 1) // COLUMNS, 4 * pairs
        thread, threads = i64(number()), i64(count())
        for t in range(steps):
            multiply_all(rows, both + t * rows * stride, stride, packed, pairs, sums, panels, thread, threads)
            barrier()
            for b in range(rows * thread // threads, rows * (thread + 1) // threads):
                at = t * rows + b
                cell(
                    size, sums + b * panels * PANEL_ROW, bias, cells + at * size * 4, cells + (at + rows) * size * 4,
                    gates + at * size * 8, both + (at + rows) * stride + width * 2,
                )  # fmt: skip
            barrier()

    return forward


def _backward() -> int:
    c, multiply_all = compiler(), product("bf16")
    floats, halves, float_parts, half_parts = c.floats, c.halves, c.float_parts, c.half_parts
    wide, narrow, convert, tanh = c.wide, c.narrow, c.convert, c.tanh
    i64, carray, one = c.numba.int64, c.numba.carray, c.numba.float32(1)
    number, count, barrier = openmp.team()

    @c.function
    def cell_back(
        n: Any, gates: Any, before_at: Any, after_at: Any, grad_at: Any, through_at: Any, grad_cell_at: Any, raw: Any,
        bias: Any,
    ) -> None:  # fmt: skip
        i, f, g, o = half_parts(gates, n)
        raw_i, raw_f, raw_g, raw_o = half_parts(raw, n)
        to_i, to_f, to_g, to_o = float_parts(bias, n)
        before, after, through = floats(before_at, n), floats(after_at, n), floats(through_at, n)
        grad, grad_cell = halves(grad_at, n), floats(grad_cell_at, n)
        for j in range(n):
            of_i, of_f, of_g, of_o = wide(i[j]), wide(f[j]), wide(g[j]), wide(o[j])
            dh, t = wide(grad[j]) + through[j], tanh(after[j])
            dc = grad_cell[j] + dh * of_o * (one - t * t)
            grad_cell[j] = dc * of_f
            di = dc * of_g * (of_i * (one - of_i))
            df = dc * before[j] * (of_f * (one - of_f))
            dg = dc * of_i * (one - of_g * of_g)
            do = dh * t * (of_o * (one - of_o))
            raw_i[j], raw_f[j], raw_g[j], raw_o[j] = narrow(di), narrow(df), narrow(dg), narrow(do)
            to_i[j] += di
            to_f[j] += df
            to_g[j] += dg
            to_o[j] += do

    @c.entry
    def backward(given: Any) -> None:
        a = carray(given, 14)
        steps, rows, size, width, panels, packed = a[0], a[1], a[2], a[3], a[4], a[5]
        cells, gates, grad, grad_cell, raw, through, inputs = a[6], a[7], a[8], a[9], a[10], a[11], a[13]
        of_size = (size + COLUMNS - 1) // COLUMNS
        thread, threads = i64(number()), i64(count())
        bias = a[12] + thread * size * 16
        first, stop = rows * thread // threads, rows * (thread + 1) // threads
        for back in range(steps):
            t = steps - 1 - back
            for b in range(first, stop):
                at = t * rows + b
                cell_back(
                    size, gates + at * size * 8, cells + at * size * 4, cells + (at + rows) * size * 4,
                    grad + at * size * 2, through + b * panels * PANEL_ROW, grad_cell + b * size * 4,
                    raw + at * size * 8, bias,
                )  # fmt: skip
            barrier()
            multiply_all(rows, raw + t * rows * size * 8, 8 * size, packed, 2 * size, through, panels, thread, threads)
            barrier()
            if panels > of_size:
                for b in range(first, stop):
                    sums = through + (b * panels + of_size) * PANEL_ROW
                    convert(width, sums, inputs + (t * rows + b) * width * 2)

    return backward


def _weight_gradients() -> int:
    c, multiply, pair = compiler(), multiplier("bf16"), _pair()
    floats, halves, words, (parts, is_kept) = c.floats, c.halves, c.words, _dropping()
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()

    @c.function
    def turn(n: Any, one_at: Any, other_at: Any, turned_at: Any, stride: Any) -> None:
        one, other, turned = halves(one_at, n), halves(other_at, n), words(turned_at, n * stride)
        for j in range(n):
            turned[j * stride] = u32(one[j]) | u32(u32(other[j]) << u32(16))

    @c.function
    def copy(n: Any, sums_at: Any, out_at: Any) -> None:
        sums, out = floats(sums_at, n), floats(out_at, n)
        for j in range(n):
            out[j] = sums[j]

    @c.function
    def dropped(n: Any, sums_at: Any, out_at: Any, first: Any, scale: Any, kept: Any, low: Any, high: Any) -> None:
        sums, out = floats(sums_at, n), floats(out_at, n)
        for j in range(n):
            out[j] = sums[j] * scale if is_kept(first + u32(j), kept, low, high) else f32(0)

    @c.entry
    def weight_gradients(given: Any) -> None:
        a = carray(given, 15)
        rows, gates, width, size, columns = a[0], a[1], a[2], a[3], 2 * a[4]
        scale, kept, low, high = parts(a[5], a[6])
        raw, both, turned, stride, packed = a[7], a[8], a[9], a[10], a[11]
        of_inputs, of_state, pairs = a[13], a[14], (rows + 1) // 2
        panels, tiles = (columns + COLUMNS - 1) // COLUMNS, (gates + ROWS - 1) // ROWS
        thread, threads = i64(number()), i64(count())
        sums = a[12] + thread * COLUMNS * PANEL_ROW
        # Blocks of 16 columns: as many lines of the cache are filled side by side. The row behind the last of an odd
        # number is the one before it, with zeros for the other factor.
        blocks = (gates + 15) // 16
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            first = 16 * block
            n, at, to = min(gates - first, 16), raw + first * 2, turned + first * stride * 2
            for p in range(rows // 2):
                turn(n, at + 2 * p * gates * 2, at + (2 * p + 1) * gates * 2, to + p * 4, stride // 2)
            if rows % 2:
                last, out = halves(at + (rows - 1) * gates * 2, n), words(to, n * stride // 2)
                for j in range(n):
                    out[j * (stride // 2) + pairs - 1] = last[j]
        for p in range(pairs * thread // threads, pairs * (thread + 1) // threads):
            one = both + 2 * p * columns * 2
            other = one if 2 * p + 1 == rows else one + columns * 2
            for panel in range(panels):
                first = panel * COLUMNS
                n = min(columns - first, COLUMNS)
                pair(n, one + first * 2, other + first * 2, packed + (panel * pairs + p) * PANEL_ROW)
        barrier()
        for task in range(panels * tiles * thread // threads, panels * tiles * (thread + 1) // threads):
            panel, tile = task // tiles, task % tiles
            top, bottom = gates * tile // tiles, gates * (tile + 1) // tiles
            at = packed + panel * pairs * PANEL_ROW
            multiply(bottom - top, turned + top * stride * 2, stride * 2, at, pairs, sums, PANEL_ROW)
            first, stop = panel * COLUMNS, min(width + size, (panel + 1) * COLUMNS)
            middle = min(max(width, first), stop)
            for n in range(top, bottom):
                row = sums + (n - top) * PANEL_ROW
                copy(middle - first, row, of_inputs + (n * width + first) * 4)
                start = n * size + middle - width
                dropped(
                    stop - middle, row + (middle - first) * 4, of_state + start * 4, u32(start), scale, kept, low, high
                )

    return weight_gradients
