"""The loops of `compiled_lstm`: see there for what their arguments are, and `fused_loops` for how they are written."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from ulmfit.nn import openmp
from ulmfit.nn.register_tiles import COLUMNS, PANEL_ROW, product
from ulmfit.nn.vectors import compiler


@cache
def _cell() -> Any:
    """One text's step: from its sums (4 H,), to which `bias` is added, and cells (H,) the new cells and states (H,)."""
    c = compiler()
    floats, float_parts, tanh, sigmoid = c.floats, c.float_parts, c.tanh, c.sigmoid

    @c.function
    def cell(n: Any, sums: Any, bias: Any, cells_at: Any, out_at: Any) -> None:
        i, f, g, o = float_parts(sums, n)
        to_i, to_f, to_g, to_o = float_parts(bias, n)
        cells, out = floats(cells_at, n), floats(out_at, n)
        for j in range(n):
            new = sigmoid(f[j] + to_f[j]) * cells[j] + sigmoid(i[j] + to_i[j]) * tanh(g[j] + to_g[j])
            cells[j] = new
            out[j] = sigmoid(o[j] + to_o[j]) * tanh(new)

    return cell


@cache
def bfloat16() -> int:
    """Address of the loop over all steps in bfloat16."""
    c, multiply, cell = compiler(), product("bf16"), _cell()
    convert, i64, carray = c.convert, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()

    @c.entry
    def read(given: Any) -> None:
        a = carray(given, 11)
        steps, rows, width, size, pairs, packed = a[0], a[1], a[2], a[3], a[4], a[5]
        bias, both, cells, sums, states = a[6], a[7], a[8], a[9], a[10]
        panels, stride = (4 * size + COLUMNS - 1) // COLUMNS, 4 * pairs
        thread, threads = i64(number()), i64(count())
        for t in range(steps):
            multiply(rows, both + t * rows * stride, stride, packed, pairs, sums, pairs, 0, panels, thread, threads)
            barrier()
            for b in range(rows * thread // threads, rows * (thread + 1) // threads):
                cell(size, sums + b * panels * PANEL_ROW, bias, cells + b * size * 4, states + b * size * 4)
                convert(size, states + b * size * 4, both + ((t + 1) * rows + b) * stride + width * 2)
            barrier()

    return read


@cache
def int8() -> int:
    """Address of the loop over all steps with 8-bit factors."""
    c, multiply, cell = compiler(), product("int8"), _cell()
    floats, integers, bytes_, as_bits, as_float = (
        c.floats, c.integers, c.bytes_, c.as_bits, c.as_float,
    )  # fmt: skip
    i8, i32, u32, i64, f32, carray = (
        c.numba.int8, c.numba.int32, c.numba.uint32, c.numba.int64, c.numba.float32, c.numba.carray,
    )  # fmt: skip
    number, count, barrier = openmp.team()
    floor = math.floor

    @c.function
    def largest(n: Any, numbers_at: Any) -> Any:
        """Bits of the largest magnitude; integers, for their order is that of magnitudes, and of NaN behind all."""
        numbers, most = floats(numbers_at, n), u32(0)
        for j in range(n):
            most = max(most, u32(as_bits(numbers[j]) & u32(0x7FFFFFFF)))
        return most

    @c.function
    def quantise(n: Any, numbers_at: Any, out_at: Any, unit_at: Any) -> None:
        """To 8 bits of the row's largest magnitude; at `unit_at`, what one is worth, and 128 times the row's sum."""
        numbers, out = floats(numbers_at, n), bytes_(out_at, n)
        most = as_float(largest(n, numbers_at))
        units = f32(127) / most if most > f32(0) else f32(0)
        total = i32(0)
        for j in range(n):
            rounded = i32(floor(numbers[j] * units + f32(0.5)))
            out[j] = i8(rounded)
            total = i32(total + rounded)
        floats(unit_at, 1)[0] = most / f32(127)
        integers(unit_at + 4, 1)[0] = 128 * total

    @c.function
    def scaled(
        n: Any, sums_at: Any, more_at: Any, unit_at: Any, more_unit_at: Any, weights_at: Any, more_weights_at: Any,
        out_at: Any,
    ) -> None:  # fmt: skip
        """Two sums of integers -> what they stand for together, without what the shift of weights by 128 added."""
        sums, weights = integers(sums_at, n), floats(weights_at, n)
        more, more_weights = integers(more_at, n), floats(more_weights_at, n)
        unit, shift = floats(unit_at, 1)[0], integers(unit_at + 4, 1)[0]
        more_unit, more_shift = floats(more_unit_at, 1)[0], integers(more_unit_at + 4, 1)[0]
        out = floats(out_at, n)  # elsewhere: in place, LLVM takes one number at a time
        for j in range(n):
            first = f32(i32(sums[j] - shift)) * (unit * weights[j])
            out[j] = first + f32(i32(more[j] - more_shift)) * (more_unit * more_weights[j])

    @c.entry
    def read(given: Any) -> None:
        a = carray(given, 20)
        steps, rows, width, size, x, outputs, cells = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        packed_x, packed_h, scale_x, scale_h, bias = a[7], a[8], a[9], a[10], a[11]
        reduced_x, reduced_h, row_x, row_h, sums, more, h = a[12], a[13], a[14], a[15], a[16], a[17], a[18]
        panels, groups_x, groups_h = (4 * size + COLUMNS - 1) // COLUMNS, (width + 3) // 4, (size + 3) // 4
        thread, threads = i64(number()), i64(count())
        for r in range(steps * rows * thread // threads, steps * rows * (thread + 1) // threads):
            quantise(width, x + r * width * 4, reduced_x + r * groups_x * 4, row_x + r * 8)
        whole = a[19] + thread * panels * PANEL_ROW
        first, stop = rows * thread // threads, rows * (thread + 1) // threads
        for b in range(first, stop):
            quantise(size, h + b * size * 4, reduced_h + b * groups_h * 4, row_h + b * 8)
        barrier()
        for t in range(steps):
            at = reduced_x + t * rows * groups_x * 4
            multiply(rows, at, groups_x * 4, packed_x, groups_x, sums, groups_x, 0, panels, thread, threads)
            multiply(rows, reduced_h, groups_h * 4, packed_h, groups_h, more, groups_h, 0, panels, thread, threads)
            barrier()
            for b in range(first, stop):
                row = b * panels * PANEL_ROW
                scaled(
                    4 * size, sums + row, more + row, row_x + (t * rows + b) * 8, row_h + b * 8, scale_x, scale_h, whole
                )
                out = outputs + (t * rows + b) * size * 4
                cell(size, whole, bias, cells + b * size * 4, out)
                quantise(size, out, reduced_h + b * groups_h * 4, row_h + b * 8)
            barrier()

    return read
