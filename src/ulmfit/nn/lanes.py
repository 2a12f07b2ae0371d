"""Arithmetic with a register full of float32 at a time, put together in LLVM's language for compiled loops.

Numba compiles loops of as few numbers badly, and takes long for many of them.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from itertools import zip_longest
from typing import Any

from ulmfit.nn.kinds import KINDS, RUN

_TO_NEAREST = 1.5 * 2**23 + 127  # added to a float32, its last bits are the nearest integer as an exponent
# Of x^0, x^1, ...: fitted to 2^x on [-1/2, 1/2], within 1e-7 there, and exact at 0: sums are often scaled by e^0.
_POWERS = (1.0, 0.6931469775315594, 0.24022242002352726, 0.055507338247889726, 0.009671518219058723,
           0.001326471446410778)  # fmt: skip
_LEVELS = 11  # of the continued fraction: within 5e-7 of tanh
SMALLEST = -75.0  # e^x below counts as 0: of 1e5 pieces, shares are numbers that processors multiply fast
_LARGEST = 7.35  # beyond, tanh is 1 as exactly


class Lanes:
    """What `builder` is told to do with `lanes` float32 at a time; addresses are integers."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self._ir = import_module("llvmlite.ir")
        self._builder, self._lanes = builder, lanes
        self.f32, self.i16, self.i32, self.i64 = self._ir.FloatType(), *map(self._ir.IntType, (16, 32, 64))
        self.floats, self.integers, self.halves = (
            self._ir.VectorType(each, lanes) for each in (self.f32, self.i32, self.i16)
        )
        self._fused = self._function(f"llvm.fma.v{lanes}f32", self.floats, [self.floats] * 3)

    def _function(self, name: str, found: Any, given: Any) -> Any:
        """One of LLVM's own, declared once in a module."""
        there, module = self._builder.module.globals.get(name), self._builder.module
        return self._ir.Function(module, self._ir.FunctionType(found, given), name) if there is None else there

    def number(self, value: float) -> Any:
        return self._ir.Constant(self.floats, [value] * self._lanes)

    def whole_number(self, value: int) -> Any:
        return self._ir.Constant(self.integers, [value] * self._lanes)

    def place(self, start: Any, offset: int, of_type: Any) -> Any:
        """A pointer to what lies so many bytes behind `start`."""
        return self._builder.inttoptr(
            self._builder.add(start, self._ir.Constant(self.i64, offset)), of_type.as_pointer()
        )

    def load(self, start: Any, index: int = 0) -> Any:
        """The `index`-th register full of 32-bit numbers behind `start`."""
        place = self.place(start, 4 * self._lanes * index, self.floats)
        return self._builder.load(place, align=4)

    def store(self, value: Any, start: Any, index: int = 0, past_caches: bool = False) -> None:
        """`past_caches`: to memory, for what is not read soon; `start` is a multiple of what is stored in bytes."""
        self._put(value, self.place(start, 4 * self._lanes * index, value.type), 4 * self._lanes, past_caches)

    def load_whole(self, start: Any, index: int = 0) -> Any:
        """As `load`, of int32."""
        return self._builder.load(self.place(start, 4 * self._lanes * index, self.integers), align=4)

    def everywhere(self, start: Any, index: int = 0) -> Any:
        """The `index`-th float32 behind `start`, in all places."""
        return self.filled(self._builder.load(self.place(start, 4 * index, self.f32), align=4))

    def everywhere_whole(self, start: Any, index: int = 0) -> Any:
        """As `everywhere`, of int32."""
        return self.filled(self._builder.load(self.place(start, 4 * index, self.i32), align=4))

    def filled(self, one: Any) -> Any:
        """One number of 32 bits in all places."""
        undefined = self._ir.Constant(self._ir.VectorType(one.type, self._lanes), self._ir.Undefined)
        first = self._builder.insert_element(undefined, one, self._ir.Constant(self.i32, 0))
        return self._builder.shuffle_vector(first, undefined, self.whole_number(0))

    def store_one(self, value: Any, start: Any) -> None:
        self._builder.store(value, self.place(start, 0, self.f32), align=4)

    def most(self, value: Any) -> Any:
        """The largest of all places."""
        name = f"llvm.vector.reduce.fmax.v{self._lanes}f32"
        return self._builder.call(self._function(name, self.f32, [self.floats]), [value])

    def sum(self, value: Any) -> Any:
        """Of all places, in an order that suits the processor."""
        name = f"llvm.vector.reduce.fadd.v{self._lanes}f32"
        zero = self._ir.Constant(self.f32, 0)
        function = self._function(name, self.f32, [self.f32, self.floats])
        return self._builder.call(function, [zero, value], fastmath=("reassoc",))

    def load_halves(self, start: Any, index: int = 0) -> Any:
        """As `load`, of bfloat16."""
        found = self._builder.load(self.place(start, 2 * self._lanes * index, self.halves), align=2)
        return self.wide(self._builder.zext(found, self.integers))

    def load_as(self, kind: str, start: Any, index: int = 0) -> Any:
        """As `load`, of "fp32" or "bf16"."""
        return self.load(start, index) if kind == "fp32" else self.load_halves(start, index)

    def store_as(self, kind: str, value: Any, start: Any, index: int = 0, past_caches: bool = False) -> None:
        """As `store`, in numbers of the kind (`kinds`); bfloat16 is the nearest one."""
        if kind == "fp32":
            self.store(value, start, index, past_caches)
            return
        first, count = self._lanes * index, KINDS[kind].parts
        for n, bits in enumerate(self.parts(value, count)):
            place = self.place(start, (first // RUN * count + n) * 2 * RUN + first % RUN * 2, self.halves)
            half = self._builder.trunc(self._builder.lshr(bits, self.whole_number(16)), self.halves)
            self._put(half, place, 2 * self._lanes, past_caches)

    def store_pairs(self, one: Any, other: Any, count: int, start: Any, between: int, index: int) -> None:
        """Of two, each number beside that of the other; parts with so many bytes between them. Past the caches."""
        both = zip(self.parts(one, count), self.parts(other, count), strict=True)
        for n, (low, high) in enumerate(both):
            pairs = self._builder.or_(self._builder.lshr(low, self.whole_number(16)), high)
            at = self._builder.add(start, self._ir.Constant(self.i64, n * between))
            self.store(pairs, at, index, past_caches=True)

    def parts(self, value: Any, count: int) -> list[Any]:
        """Bits of so many bfloat16, in upper halves beside zeros, whose sum is as near to `value` as can be."""
        found: list[Any] = []
        for _ in range(count):
            if found:
                value = self._builder.fsub(value, self._builder.bitcast(found[-1], self.floats))
            found.append(self._builder.and_(self.rounded(value), self.whole_number(-0x10000)))
        return found

    def rounded(self, value: Any) -> Any:
        """Bits whose upper half is the nearest bfloat16, ties to even."""
        bits = self._builder.bitcast(value, self.integers)
        odd = self._builder.and_(self._builder.lshr(bits, self.whole_number(16)), self.whole_number(1))
        return self._builder.add(self._builder.add(bits, self.whole_number(0x7FFF)), odd)

    def _put(self, value: Any, place: Any, size: int, past_caches: bool) -> None:
        stored = self._builder.store(value, place, align=size if past_caches else 2)
        if past_caches:
            one = self._ir.Constant(self.i32, 1)
            stored.set_metadata("nontemporal", self._builder.module.add_metadata([one]))

    def wide(self, bits: Any) -> Any:
        """What bfloat16's bits, in integers, stand for."""
        return self._builder.bitcast(self._builder.shl(bits, self.whole_number(16)), self.floats)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """A b + c."""
        return self._builder.call(self._fused, [a, b, c])

    def product(self, *factors: Any) -> Any:
        first, *others = factors
        for each in others:
            first = self._builder.fmul(first, each)
        return first

    def bounded(self, value: Any, bound: float) -> Any:
        """Between -bound and bound; what is not a number stays it."""
        for compared, end in (("<", -bound), (">", bound)):
            beyond = self._builder.fcmp_ordered(compared, value, self.number(end))
            value = self._builder.select(beyond, self.number(end), value)
        return value

    def polynomial(self, x: Any, coefficients: Any) -> Any:
        """Of x^0, x^1, ..."""
        *others, total = coefficients
        total = self.number(total)
        for each in reversed(others):
            total = self.fma(total, x, self.number(each))
        return total

    def larger(self, a: Any, b: Any) -> Any:
        """Of each two; b where a is not a number."""
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def power(self, x: Any) -> Any:
        """e^x for x <= 0, to 2e-7 of it, or 0 (`SMALLEST`); what is not a number stays it."""
        exponent = self._builder.fmul(self.larger(self.number(SMALLEST), x), self.number(math.log2(math.e)))
        too_small = self._builder.fcmp_ordered("<", x, self.number(SMALLEST))
        return self._builder.select(too_small, self.number(0), self.power_of_two(exponent))

    def power_of_two(self, x: Any) -> Any:
        """2^x for x from -125 to 125, to 2e-7 of it."""
        shifted = self._builder.fadd(x, self.number(_TO_NEAREST))
        rest = self._builder.fsub(x, self._builder.fsub(shifted, self.number(_TO_NEAREST)))
        whole = self._builder.shl(self._builder.bitcast(shifted, self.integers), self.whole_number(23))
        return self._builder.fmul(self._builder.bitcast(whole, self.floats), self.polynomial(rest, _POWERS))

    def tanh(self, x: Any) -> tuple[Any, Any]:
        """Its numerator and denominator: several fractions take one division."""
        x = self.bounded(x, _LARGEST)
        square = self._builder.fmul(x, x)
        top, bottom = (self.polynomial(square, each) for each in tanh_coefficients())
        return self._builder.fmul(x, top), bottom


def of_addresses(count: int, generate: Any) -> Any:
    """For compiled loops: a function of 2, 4, 7 or 8 addresses, which `generate(builder, *addresses)` puts together."""
    numba = import_module("numba")

    def made(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        generate(builder, *given)
        return context.get_dummy_value()

    # Numba wants each argument by name.
    def two(context: Any, a: Any, b: Any) -> Any:
        return numba.void(*[numba.int64] * 2), made

    def four(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return numba.void(*[numba.int64] * 4), made

    def seven(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return numba.void(*[numba.int64] * 7), made

    def eight(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return numba.void(*[numba.int64] * 8), made

    return import_module("numba.extending").intrinsic({2: two, 4: four, 7: seven, 8: eight}[count])


@cache
def tanh_coefficients() -> tuple[list[float], list[float]]:
    """Polynomials p, q of x^2 with tanh(x) = x p / q: Lambert's continued fraction, x / (1 + x^2 / (3 + x^2 / ...))."""
    p, q = [1.0], [2.0 * _LEVELS - 1]
    for odd in range(2 * _LEVELS - 3, 0, -2):
        shifted = [0.0, *p]  # x^2 p
        p, q = q, [odd * a + b for a, b in zip_longest(q, shifted, fillvalue=0.0)]
    return [c / q[0] for c in p], [c / q[0] for c in q]
