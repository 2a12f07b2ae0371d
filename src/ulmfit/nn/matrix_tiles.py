"""Products of bfloat16 or 8-bit numbers in the tiles of processors with AMX.

A tile is a register of 16 rows of 64 bytes. One instruction adds to 16 x 16 sums the products of 16 rows and 16
columns, of 16 groups each: 16 times what AVX-512 BF16 does. A panel of weights as `register_tiles` lays it out holds
such columns already. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, on programming with AMX.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from ulmfit.native import prefetch
from ulmfit.nn.processor import cpu_has_tiles
from ulmfit.nn.vectors import compiler

ROWS = 32  # that are multiplied with two tiles of columns at once: each tile that is loaded takes part in two products
SIDE = 16  # rows of a tile, and 32-bit numbers in each
_BYTES = 4 * SIDE  # of a row
_PRODUCTS = {"bf16": "tdpbf16ps", "int8": "tdpbsud"}
# Tiles of sums are 0 to 3: two of columns for each 16 rows or, of at most 16 rows, all four of columns.
_TOP, _BOTTOM = 4, 5  # tiles of x
_LEFT, _RIGHT = 6, 7  # tiles of columns


def multiplies(kind: str) -> bool:
    """Whether this processor has such products of `kind`, and the system lets this process use them."""
    return kind in _PRODUCTS and cpu_has_tiles() and _is_allowed()


@cache
def _is_allowed() -> bool:
    """Linux wants to be asked once in a process, before it keeps what is in tiles when threads take turns."""
    ask = getattr(torch.cpu, "_init_amx", None)  # not in every version of torch
    return bool(ask and ask())


@cache
def multiplier(kind: str, panel_row: int) -> Any:
    """As `register_tiles.multiplier`, for 1 to `ROWS` rows whose groups lie side by side, compiled into its callers.

    With up to 16 rows it fetches nothing ahead.

    Args:
        kind: "bf16" or "int8".
        panel_row: bytes of a group of a panel.
    """
    shapes = torch.frombuffer(_shapes(), dtype=torch.uint8).numpy()  # becomes a part of what is compiled
    configure, release, fetch = _operation("ldtilecfg", 1), _operation("tilerelease", 0), prefetch(for_writing=False)
    zero, put, load = ([_operation(name, n, each) for each in range(8)] for name, n in _OF_ONE_TILE.items())
    zero0, zero1, zero2, zero3 = zero[:4]
    put0, put1, put2, put3 = put[:4]
    load0, load1, load2, load3, top, bottom, left, right = load
    name = _PRODUCTS[kind]
    top_left, top_right, top_third, top_fourth, bottom_left, bottom_right = (
        _operation(name, 0, *tiles)
        for tiles in (
            (0, _TOP, _LEFT), (1, _TOP, _RIGHT), (2, _TOP, _LEFT), (3, _TOP, _RIGHT), (2, _BOTTOM, _LEFT),
            (3, _BOTTOM, _RIGHT),
        )
    )  # fmt: skip
    of_columns, k_bytes = _BYTES, SIDE * panel_row

    @compiler().function
    def begin(one: Any, two: Any, three: Any, four: Any, stride: Any, more: Any) -> None:
        """Sums from what is at these places, or from zero."""
        if more:
            load0(one, stride)
            load1(two, stride)
            load2(three, stride)
            load3(four, stride)
        else:
            zero0()
            zero1()
            zero2()
            zero3()

    @compiler().function
    def end(one: Any, two: Any, three: Any, four: Any, stride: Any) -> None:
        put0(one, stride)
        put1(two, stride)
        put2(three, stride)
        put3(four, stride)

    @compiler().function
    def upper(x: Any, stride: Any, panel: Any) -> None:
        """Of the upper rows and the first two tiles of columns."""
        top(x, stride)
        left(panel, panel_row)
        top_left()
        right(panel + of_columns, panel_row)
        top_right()

    @compiler().function
    def few(x: Any, stride: Any, panel: Any, steps: Any, out: Any, out_stride: Any, more: Any) -> None:
        two, three, four = out + of_columns, out + 2 * of_columns, out + 3 * of_columns
        begin(out, two, three, four, out_stride, more)
        for k in range(steps):
            at = panel + k * k_bytes
            upper(x + k * _BYTES, stride, at)
            left(at + 2 * of_columns, panel_row)
            top_third()
            right(at + 3 * of_columns, panel_row)
            top_fourth()
        end(out, two, three, four, out_stride)

    @compiler().function
    def many(
        x: Any, stride: Any, panel: Any, steps: Any, out: Any, out_stride: Any, more: Any, wanted: Any, portions: Any
    ) -> None:
        lower, lower_out = x + SIDE * stride, out + SIDE * out_stride
        begin(out, out + of_columns, lower_out, lower_out + of_columns, out_stride, more)
        for k in range(steps):
            at = panel + k * k_bytes
            upper(x + k * _BYTES, stride, at)
            bottom(lower + k * _BYTES, stride)
            bottom_left()
            bottom_right()
            for portion in range(portions):
                for line in range(SIDE // 2):
                    fetch(wanted + ((k * portions + portion) * SIDE // 2 + line) * _BYTES)
        end(out, out + of_columns, lower_out, lower_out + of_columns, out_stride)

    @compiler().function
    def multiply(
        rows: Any, x: Any, stride: Any, panel: Any, columns: Any, groups: Any, out: Any, out_stride: Any, more: Any,
        wanted: Any, at_once: Any,
    ) -> None:  # fmt: skip
        whole = groups // SIDE
        # Whole steps, then what is left over in one with smaller tiles.
        for start in range(0, groups, max(whole, 1) * SIDE):
            steps, each = (whole, SIDE) if start + SIDE <= groups else (1, groups - start)
            configure(shapes.ctypes.data + ((rows - 1) * SIDE + each - 1) * 64)
            portions = at_once // _BYTES if start == 0 else 0
            a, b, go_on = x + start * 4, panel + start * panel_row, more or start > 0
            if rows <= SIDE:
                few(a, stride, b, steps, out, out_stride, go_on)
            else:
                for half in range(2 if columns > 2 * SIDE else 1):
                    at = half * 2 * of_columns
                    many(
                        a, stride, b + at, steps, out + at, out_stride, go_on,
                        wanted + half * portions * groups // 2 * _BYTES, portions,
                    )  # fmt: skip
        release()

    return multiply


_OF_ONE_TILE = {"tilezero": 0, "tilestored64": 2, "tileloadd64": 2}


def _shapes() -> bytearray:
    """Shapes of all tiles, 64 bytes for each number of rows and of groups up to a tile's."""
    found = bytearray()
    for rows in range(1, ROWS + 1):
        upper, lower = min(rows, SIDE), rows - SIDE if rows > SIDE else min(rows, SIDE)
        for groups in range(1, SIDE + 1):
            of_rows = [upper, upper, lower, lower, upper, lower, groups, groups]
            widths = [_BYTES] * 4 + [4 * groups] * 2 + [_BYTES] * 2
            found += bytes([1, *[0] * 15]) + b"".join(each.to_bytes(2, "little") for each in widths) + bytes(16)
            found += bytes([*of_rows, *[0] * 8])
    return found


def _operation(name: str, integers: int, *tiles: int) -> Any:
    """For compiled loops: an instruction on these tiles, of an address and, if two are given, bytes between rows."""
    numba, ir = import_module("numba"), import_module("llvmlite.ir")
    i8, i64 = ir.IntType(8), ir.IntType(64)
    types = [i8] * len(tiles) + [i8.as_pointer(), i64][:integers]
    full_name = f"llvm.x86.{name}"

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        found = builder.module.globals.get(full_name)
        if found is None:
            found = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), types), full_name)
        numbers = [builder.inttoptr(each, i8.as_pointer()) if n == 0 else each for n, each in enumerate(given)]
        builder.call(found, [*(ir.Constant(i8, tile) for tile in tiles), *numbers])
        return context.get_dummy_value()

    def nothing(context: Any) -> Any:
        return numba.void(), generate

    def one(context: Any, address: Any) -> Any:
        return numba.void(numba.int64), generate

    def two(context: Any, address: Any, stride: Any) -> Any:
        return numba.void(numba.int64, numba.int64), generate

    return import_module("numba.extending").intrinsic((nothing, one, two)[integers])
