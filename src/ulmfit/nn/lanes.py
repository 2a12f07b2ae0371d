"""Arithmetic with a register full of float32 at a time, put together in LLVM's language for compiled loops.

Numba compiles loops of as few numbers badly, and takes long for many of them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from itertools import zip_longest
from typing import Any

_LEVELS = 11  # of the continued fraction: within 5e-7 of tanh
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
        name = f"llvm.fma.v{lanes}f32"
        self._fused = builder.module.globals.get(name)
        if self._fused is None:
            self._fused = self._ir.Function(builder.module, self._ir.FunctionType(self.floats, [self.floats] * 3), name)

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

    def store(self, value: Any, start: Any, index: int = 0) -> None:
        self._builder.store(value, self.place(start, 4 * self._lanes * index, value.type), align=4)

    def load_halves(self, start: Any, index: int = 0) -> Any:
        """As `load`, of bfloat16."""
        found = self._builder.load(self.place(start, 2 * self._lanes * index, self.halves), align=2)
        return self.wide(self._builder.zext(found, self.integers))

    def store_halves(self, value: Any, start: Any, index: int = 0) -> None:
        """As `store`, rounded to bfloat16: the nearest, ties to even."""
        bits = self._builder.bitcast(value, self.integers)
        odd = self._builder.and_(self._builder.lshr(bits, self.whole_number(16)), self.whole_number(1))
        bits = self._builder.add(self._builder.add(bits, self.whole_number(0x7FFF)), odd)
        bits = self._builder.lshr(bits, self.whole_number(16))
        place = self.place(start, 2 * self._lanes * index, self.halves)
        self._builder.store(self._builder.trunc(bits, self.halves), place, align=2)

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

    def tanh(self, x: Any) -> tuple[Any, Any]:
        """Its numerator and denominator: several fractions take one division."""
        x = self.bounded(x, _LARGEST)
        square = self._builder.fmul(x, x)
        top, bottom = (self.polynomial(square, each) for each in tanh_coefficients())
        return self._builder.fmul(x, top), bottom


@cache
def tanh_coefficients() -> tuple[list[float], list[float]]:
    """Polynomials p, q of x^2 with tanh(x) = x p / q: Lambert's continued fraction, x / (1 + x^2 / (3 + x^2 / ...))."""
    p, q = [1.0], [2.0 * _LEVELS - 1]
    for odd in range(2 * _LEVELS - 3, 0, -2):
        shifted = [0.0, *p]  # x^2 p
        p, q = q, [odd * a + b for a, b in zip_longest(q, shifted, fillvalue=0.0)]
    return [c / q[0] for c in p], [c / q[0] for c in q]
