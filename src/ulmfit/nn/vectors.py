"""Parts of compiled loops: bfloat16 products in registers, numbers as bits, arrays at an address.

Numba compiles. LLVM's instruction for products of bfloat16 (AVX-512 BF16), unknown to Numba, is put in by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import zip_longest
from typing import Any

ROWS = 6  # of a tile: with four vectors of columns it takes 24 of 32 registers for sums, 4 for weights
COLUMNS = 64  # of a tile
_LANES = 16  # 32-bit numbers in a register
_BYTES = 4 * COLUMNS  # of a pair of weights for each column
_LEVELS = 11  # of the continued fraction: within 5e-7 of tanh
_LARGEST = 7.35  # beyond, tanh is 1 as exactly


Decorator = Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True)
class Compiler:
    """What loops are made of.

    Attributes:
        numba: the package.
        function: compiles for those that call it.
        entry: compiles `void f(int64_t *)`; the address of it is its `address`.
        floats, halves, words: (address, count) -> array of float32, of uint16 (bfloat16's bits), of uint32.
        float_parts, half_parts: (address, count) -> four such arrays, one behind the other.
        wide, narrow: bfloat16 as its bits <-> float32, to the nearest, ties to even.
        tanh, sigmoid: of float32.
        multiply: see `_dispatch`.
    """

    numba: Any
    function: Decorator
    entry: Decorator
    floats: Any
    halves: Any
    words: Any
    float_parts: Any
    half_parts: Any
    wide: Any
    narrow: Any
    tanh: Any
    sigmoid: Any
    multiply: Callable[..., None]


@cache
def compiler() -> Compiler:
    """For this processor.

    Raises:
        Exception: of many kinds, where Numba does not work with this NumPy, or its LLVM is too old.
    """
    numba: Any = import_module("numba")
    extending: Any = import_module("numba.extending")
    ir: Any = import_module("llvmlite.ir")
    types = numba.types

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def as_float(context: Any, bits: Any) -> Any:
        return types.float32(types.uint32), lambda c, builder, s, given: builder.bitcast(given[0], ir.FloatType())

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def as_bits(context: Any, number: Any) -> Any:
        return types.uint32(types.float32), lambda c, builder, s, given: builder.bitcast(given[0], ir.IntType(32))

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def pointer(context: Any, address: Any, dtype: Any) -> Any:
        of_type = types.CPointer(dtype.dtype)
        make = lambda c, builder, s, given: builder.inttoptr(given[0], c.get_value_type(of_type))  # noqa: E731
        return of_type(types.int64, dtype), make

    # Contracting only: sums in another order, or numbers taken for finite, would be other results.
    exact = {"error_model": "numpy", "fastmath": {"contract"}}
    function: Decorator = numba.njit(**exact, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    entry: Decorator = numba.cfunc(types.void(types.CPointer(types.int64)), **exact)
    u16, u32, f32, carray = numba.uint16, numba.uint32, numba.float32, numba.carray
    half, large = f32(0.5), f32(_LARGEST)
    (p0, p1, p2, p3, p4, p5), (q0, q1, q2, q3, q4, q5) = (tuple(map(f32, each)) for each in _tanh_coefficients())

    @function
    def floats(address: Any, count: Any) -> Any:
        return carray(pointer(address, f32), count)

    @function
    def halves(address: Any, count: Any) -> Any:
        return carray(pointer(address, u16), count)

    @function
    def words(address: Any, count: Any) -> Any:
        return carray(pointer(address, u32), count)

    @function
    def float_parts(address: Any, n: Any) -> Any:
        return floats(address, n), floats(address + 4 * n, n), floats(address + 8 * n, n), floats(address + 12 * n, n)

    @function
    def half_parts(address: Any, n: Any) -> Any:
        return halves(address, n), halves(address + 2 * n, n), halves(address + 4 * n, n), halves(address + 6 * n, n)

    @function
    def wide(bits: Any) -> Any:
        return as_float(u32(bits) << u32(16))

    @function
    def narrow(x: Any) -> Any:
        bits = as_bits(x)
        return u16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))

    @function
    def tanh(x: Any) -> Any:
        x = -large if x < -large else (large if x > large else x)  # what is not a number stays it
        s = x * x
        top = ((((p5 * s + p4) * s + p3) * s + p2) * s + p1) * s + p0
        return x * top / (((((q5 * s + q4) * s + q3) * s + q2) * s + q1) * s + q0)

    @function
    def sigmoid(x: Any) -> Any:
        return half * tanh(half * x) + half

    tiles = [_tile(rows, ir, types, extending.intrinsic) for rows in range(1, ROWS + 1)]
    return Compiler(
        numba, function, entry, floats, halves, words, float_parts, half_parts, wide, narrow, tanh, sigmoid,
        _dispatch(tiles),
    )  # fmt: skip


def _dispatch(tiles: list[Any]) -> Any:
    """Sums of a product of bfloat16 numbers for 1 to `ROWS` rows and `COLUMNS` columns, in float32; not compiled.

    Arguments, all integers: rows; address of x (rows, 2 pairs) and bytes from one row to the next; address of a panel
    of weights (pairs, `COLUMNS`, 2); pairs; address of the sums (rows, `COLUMNS`) and bytes from row to row.
    """
    tile1, tile2, tile3, tile4, tile5, tile6 = tiles

    def multiply(rows: Any, x: Any, stride: Any, panel: Any, pairs: Any, out: Any, out_stride: Any) -> None:
        if rows == 6:
            tile6(x, stride, panel, pairs, out, out_stride)
        elif rows == 5:
            tile5(x, stride, panel, pairs, out, out_stride)
        elif rows == 4:
            tile4(x, stride, panel, pairs, out, out_stride)
        elif rows == 3:
            tile3(x, stride, panel, pairs, out, out_stride)
        elif rows == 2:
            tile2(x, stride, panel, pairs, out, out_stride)
        else:
            tile1(x, stride, panel, pairs, out, out_stride)

    return multiply


def _tile(rows: int, ir: Any, types: Any, intrinsic: Any) -> Any:
    """`rows` x `COLUMNS` sums of a product, held in registers while the loop goes through the pairs."""
    vectors = COLUMNS // _LANES
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    bfloat = _bfloat(ir)
    sums, words, halves = ir.VectorType(f32, _LANES), ir.VectorType(i32, _LANES), ir.VectorType(bfloat, 2 * _LANES)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        x, stride, weights, pairs, out, out_stride = given
        module = builder.module
        multiply = module.globals.get(name) or ir.Function(module, ir.FunctionType(sums, [sums, halves, halves]), name)
        number: Any = lambda value: ir.Constant(i64, value)  # noqa: E731
        at: Any = lambda address, of_type: builder.inttoptr(address, of_type.as_pointer())  # noqa: E731
        starts = [builder.add(x, builder.mul(stride, number(row))) for row in range(rows)]
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(i64)
        pair.add_incoming(number(0), before)
        held = [[builder.phi(sums) for _ in range(vectors)] for _ in range(rows)]
        place = builder.add(weights, builder.mul(pair, number(_BYTES)))
        columns = [
            builder.load(at(builder.add(place, number(4 * _LANES * v)), halves), align=4 * _LANES)
            for v in range(vectors)
        ]
        new = []
        for start, row in zip(starts, held, strict=True):
            one = builder.load(at(builder.add(start, builder.mul(pair, number(4))), i32), align=4)
            undefined = ir.Constant(words, ir.Undefined)
            first = builder.insert_element(undefined, one, ir.Constant(i32, 0))
            everywhere = builder.shuffle_vector(first, undefined, ir.Constant(words, [0] * _LANES))
            both = builder.bitcast(everywhere, halves)
            new.append([builder.call(multiply, [old, both, c]) for old, c in zip(row, columns, strict=True)])
        following = builder.add(pair, number(1))
        pair.add_incoming(following, loop)
        for row, new_row in zip(held, new, strict=True):
            for old, later in zip(row, new_row, strict=True):
                old.add_incoming(ir.Constant(sums, [0.0] * _LANES), before)
                old.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
        builder.position_at_end(after)
        for index, new_row in enumerate(new):
            start = builder.add(out, builder.mul(out_stride, number(index)))
            for v, later in enumerate(new_row):
                builder.store(later, at(builder.add(start, number(4 * _LANES * v)), sums), align=4)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(context: Any, x: Any, stride: Any, weights: Any, pairs: Any, out: Any, out_stride: Any) -> Any:
        return types.void(*[types.int64] * 6), generate

    return tile


@cache
def _bfloat(ir: Any) -> Any:
    """LLVM's bfloat16, which llvmlite has no name for."""

    class BFloat(ir.Type):  # type: ignore[misc]
        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, BFloat)

        def __hash__(self) -> int:
            return hash(BFloat)

    return BFloat()


def _tanh_coefficients() -> tuple[list[float], list[float]]:
    """Polynomials p, q of x^2 with tanh(x) = x p / q: Lambert's continued fraction, x / (1 + x^2 / (3 + x^2 / ...))."""
    p, q = [1.0], [2.0 * _LEVELS - 1]
    for odd in range(2 * _LEVELS - 3, 0, -2):
        shifted = [0.0, *p]  # x^2 p
        p, q = q, [odd * a + b for a, b in zip_longest(q, shifted, fillvalue=0.0)]
    return [c / q[0] for c in p], [c / q[0] for c in q]
