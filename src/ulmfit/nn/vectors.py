"""Parts of loops that Numba compiles: numbers as bits, arrays at an address."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

from ulmfit import native
from ulmfit.nn import openmp
from ulmfit.nn.kinds import KINDS, RUN
from ulmfit.nn.lanes import Lanes, of_addresses

log = logging.getLogger("ulmfit")

LEAST_SIZE_TO_COMPILE = 128  # cells of a layer: with fewer, hardly any work takes as long as Numba takes


Decorator = Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True)
class Numbers:
    """How numbers of one kind (`kinds`) are written by compiled loops, that compute in float32.

    Attributes:
        size: bytes of one.
        place: (which number of a row) -> bytes before it, or before its first part.
        put: (float32, address, bytes from part to part) -> nothing; rounds to the nearest, ties to even.
        convert: (count, address of float32, address of a row) -> nothing.
    """

    size: int
    place: Any
    put: Any
    convert: Any


@dataclass(frozen=True)
class Compiler:
    """What loops are made of.

    Attributes:
        numba: the package.
        function: compiles for those that call it.
        by_address: (signature, function) -> the compiled function (`native.unit`).
        entry: compiles `void f(int64_t *)` (`native.unit`).
        address: of an entry's arguments.
        longs: (address, count) -> array of int64.
        floats, halves, words: (address, count) -> array of float32, of uint16 (bfloat16's bits), of uint32.
        integers, bytes_: the same of int32 and int8.
        numbers: by kind, but "int8".
        as_bits, as_float: a float32 <-> its bits.
    """

    numba: Any
    function: Decorator
    by_address: Callable[[Any, Callable[..., Any]], int]
    entry: Callable[[Callable[..., Any]], int]
    address: Any
    longs: Any
    floats: Any
    halves: Any
    words: Any
    integers: Any
    bytes_: Any
    numbers: dict[str, Numbers]
    as_bits: Any
    as_float: Any


def compiles(make: Callable[[], object]) -> bool:
    """Whether Numba is there and `make` compiles on this machine; if it should and does not, a warning says why."""
    if not native.is_available() or not openmp.is_available():
        return False
    try:
        make()
    except Exception as error:  # it raises errors of many kinds for a NumPy or a processor that it does not know
        log.warning("Numba cannot compile the LSTM, which is slower without: %s", str(error).partition("\n")[0])
        return False
    return True


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

    pointer = native.pointer()
    # Contracting only: sums in another order, or numbers taken for finite, would be other results.
    exact: dict[str, Any] = {"fastmath": {"contract"}}
    function: Decorator = partial(native.part, **exact)
    u16, u32, f32, carray = numba.uint16, numba.uint32, numba.float32, numba.carray
    i8, i32, i64 = numba.int8, numba.int32, numba.int64

    def by_address(signature: Any, given: Callable[..., Any]) -> int:
        return native.unit(given, signature, **exact)

    def entry(loop: Callable[..., Any]) -> int:
        return by_address(types.void(types.CPointer(types.int64)), loop)

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def address(context: Any, pointer: Any) -> Any:
        of_numbers = types.CPointer(types.int64)
        return types.int64(of_numbers), lambda c, builder, s, given: builder.ptrtoint(given[0], ir.IntType(64))

    @function
    def longs(address: Any, count: Any) -> Any:
        return carray(pointer(address, i64), count)

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
    def integers(address: Any, count: Any) -> Any:
        return carray(pointer(address, i32), count)

    @function
    def bytes_(address: Any, count: Any) -> Any:
        return carray(pointer(address, i8), count)

    @function
    def copy(n: Any, numbers_at: Any, out_at: Any) -> None:
        numbers, out = floats(numbers_at, n), floats(out_at, n)
        for j in range(n):
            out[j] = numbers[j]

    @function
    def put_float(x: Any, at: Any, between: Any) -> None:
        floats(at, 1)[0] = x

    @function
    def place_of_float(n: Any) -> Any:
        return n * 4

    def in_parts(kind: str) -> Numbers:
        size, parts, lanes = KINDS[kind].size, KINDS[kind].parts, 16
        many = of_addresses(2, lambda builder, x, out: (v := Lanes(builder, lanes)).store_as(kind, v.load(x), out))

        @function
        def place(n: Any) -> Any:
            return n // RUN * (RUN * size) + n % RUN * 2

        @function
        def put(x: Any, at: Any, between: Any) -> None:
            for part in range(parts):
                bits = as_bits(x)
                bits = u32((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) & u32(0xFFFF0000))
                halves(at + part * between, 1)[0] = u16(bits >> u32(16))
                x = x - as_float(bits)

        @function
        def convert(n: Any, numbers_at: Any, out_at: Any) -> None:
            filled = n // lanes * lanes
            for j in range(0, filled, lanes):
                many(numbers_at + j * 4, out_at + place(j))
            numbers = floats(numbers_at, n)
            for j in range(filled, n):
                put(numbers[j], out_at + place(j), RUN * 2)

        return Numbers(size, place, put, convert)

    numbers = {kind: in_parts(kind) for kind in KINDS if kind not in ("fp32", "int8")}
    numbers["fp32"] = Numbers(4, place_of_float, put_float, copy)
    return Compiler(
        numba, function, by_address, entry, address, longs, floats, halves, words, integers, bytes_, numbers, as_bits,
        as_float,
    )  # fmt: skip
