"""Parts of the loops of `reading_loops` in LLVM's own language: the cell of 16 cells at a time, and what reads memory.

Numba compiles loops of just 16 badly, and takes long for many of them.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from typing import Any

from ulmfit.nn.lanes import Lanes

CELLS = 16  # float32 in a register
_MOST = 30.0  # exponents of 2 are kept within +-30: sigmoid and tanh are 1e-9 from their ends there


@cache
def cell(kind: str) -> Any:
    """For compiled loops: from a text's sums to new cells and states.

    Arguments, all addresses: the product of the inputs and that of the states, both (4, 16) of i, f, g and o; factors
    (3, 4, 16) of float32: what a unit of each product is worth, and the bias; cells (16,) before; cells (16,) after;
    states (16,); states (16,) as they are multiplied; of the inputs and of the states, what a unit of the text is
    worth, and (int32) what the shift of the weights added to its sums.

    In "int8" sums are int32, and states are only written as float32. Otherwise sums are float32, and there are no
    units; in "bf16" all states are rounded to bfloat16.
    """
    numba = import_module("numba")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        inputs, states, factors, before, after, out, reduced, *units = given
        lanes = Lanes(builder, CELLS)
        one = lanes.number(1)

        def power(x: Any, factor: float) -> Any:
            """e^(factor x), to 2e-7 of it."""
            exponent = builder.fmul(x, lanes.number(factor * math.log2(math.e)))
            return lanes.power_of_two(lanes.bounded(exponent, _MOST))

        def gate(index: int) -> Any:
            bias = lanes.load(factors, 8 + index)
            if kind != "int8":
                return builder.fadd(builder.fadd(lanes.load(inputs, index), lanes.load(states, index)), bias)
            found = bias
            for part, sums in ((1, states), (0, inputs)):
                whole = builder.sub(lanes.load_whole(sums, index), shifts[part])
                worth = builder.fmul(worths[part], lanes.load(factors, 4 * part + index))
                found = lanes.fma(builder.sitofp(whole, lanes.floats), worth, found)
            return found

        if kind == "int8":
            worths = [lanes.everywhere(each) for each in units]
            shifts = [lanes.everywhere_whole(each, 1) for each in units]
        # Fractions are added up before they are divided: a division takes as long as ten products.
        forget, enter = builder.fadd(one, power(gate(1), -1)), builder.fadd(one, power(gate(0), -1))
        new = power(gate(2), -2)
        both = builder.fmul(enter, builder.fadd(one, new))
        top = lanes.fma(lanes.load(before), both, builder.fmul(builder.fsub(one, new), forget))
        cells = builder.fdiv(top, builder.fmul(both, forget))
        lanes.store(cells, after)
        leave, new = builder.fadd(one, power(gate(3), -1)), power(cells, -2)
        state = builder.fdiv(builder.fsub(one, new), builder.fmul(leave, builder.fadd(one, new)))
        if kind != "int8":
            lanes.store_as(kind, state, reduced)
        if kind == "bf16":  # what is pooled or handed on is what is multiplied
            state = lanes.wide(builder.lshr(lanes.rounded(state), lanes.whole_number(16)))
        lanes.store(state, out)
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def of_16(
        context: Any, inputs: Any, states: Any, factors: Any, before: Any, after: Any, out: Any, reduced: Any,
        units: Any, more: Any,
    ) -> Any:  # fmt: skip
        return numba.void(*[numba.int64] * 9), generate

    return of_16


@cache
def pool() -> Any:
    """For compiled loops: 16 of a text's states added to what is pooled.

    Arguments, each an address but for the last: states (16,); state, maximum and sum (3, 16) before and after; bytes
    from one of these three to the next.
    """
    numba, ir = import_module("numba"), import_module("llvmlite.ir")
    floats = ir.VectorType(ir.FloatType(), CELLS)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        states, before, after, row = given

        def at(start: Any, index: int) -> Any:
            place = builder.add(start, builder.mul(row, ir.Constant(row.type, index)))
            return builder.inttoptr(place, floats.as_pointer())

        state, most = builder.load(at(states, 0), align=4), builder.load(at(before, 1), align=4)
        total = builder.fadd(builder.load(at(before, 2), align=4), state)
        most = builder.select(builder.fcmp_ordered(">", most, state), most, state)
        for index, new in enumerate((state, most, total)):
            builder.store(new, at(after, index), align=4)
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def pooled(context: Any, states: Any, before: Any, after: Any, row: Any) -> Any:
        return numba.void(*[numba.int64] * 4), generate

    return pooled


@cache
def copy() -> Any:
    """For compiled loops: so many bytes, from one address to another. As a loop it would take long to compile."""
    numba, ir = import_module("numba"), import_module("llvmlite.ir")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        count, numbers, out = given
        pointer = ir.IntType(8).as_pointer()
        places = [builder.inttoptr(each, pointer) for each in (out, numbers)]
        function = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, count.type])
        builder.call(function, [*places, count, ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def copied(context: Any, count: Any, numbers: Any, out: Any) -> Any:
        return numba.void(*[numba.int64] * 3), generate

    return copied


@cache
def transpose() -> Any:
    """For compiled loops: 16 x 16 numbers of 32 bits from an address, and bytes from row to row, to another."""
    numba, ir = import_module("numba"), import_module("llvmlite.ir")
    i32, i64 = ir.IntType(32), ir.IntType(64)
    numbers = ir.VectorType(i32, CELLS)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        start, stride, out, out_stride = given

        def at(begin: Any, between: Any, row: int) -> Any:
            place = builder.add(begin, builder.mul(between, ir.Constant(i64, row)))
            return builder.inttoptr(place, numbers.as_pointer())

        def chosen(one: Any, other: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(i32, CELLS), places))

        rows = [builder.load(at(start, stride, row), align=4) for row in range(CELLS)]
        for size in (1, 2, 4, 8):  # blocks of this size beside the diagonal change places
            for row in (each for each in range(CELLS) if not each & size):
                one, other = rows[row], rows[row + size]
                upper = [CELLS + each - size if each & size else each for each in range(CELLS)]
                lower = [CELLS + each if each & size else each + size for each in range(CELLS)]
                rows[row], rows[row + size] = chosen(one, other, upper), chosen(one, other, lower)
        for row, each in enumerate(rows):
            builder.store(each, at(out, out_stride, row), align=4)
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def transposed(context: Any, start: Any, stride: Any, out: Any, out_stride: Any) -> Any:
        return numba.void(*[numba.int64] * 4), generate

    return transposed


@cache
def integer() -> Any:
    """For compiled loops: the int32 at an address."""
    numba, ir = import_module("numba"), import_module("llvmlite.ir")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        found = builder.load(builder.inttoptr(given[0], ir.IntType(32).as_pointer()), align=4)
        return builder.sext(found, ir.IntType(64))

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def loaded(context: Any, address: Any) -> Any:
        return numba.int64(numba.int64), generate

    return loaded
