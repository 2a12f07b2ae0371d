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

from ulmfit.native import fetch_line, prefetch
from ulmfit.nn.kinds import KINDS, PRODUCTS
from ulmfit.nn.processor import cpu_has_tiles
from ulmfit.nn.vectors import compiler

ROWS = 32  # that are multiplied with two tiles of columns at once: each tile that is loaded takes part in two products
SIDE = 16  # rows of a tile, and 32-bit numbers in each
_BYTES = 4 * SIDE  # of a row
_INSTRUCTIONS = {"bf16": "tdpbf16ps", "int8": "tdpbsud", "bf16x3": "tdpbf16ps", "bf16x6": "tdpbf16ps"}
# With fewer rows vectors are as fast or faster: weights in parts are longer, and reading them is what takes the time.
_LEAST_ROWS = {"bf16x3": 4, "bf16x6": ROWS}
# Tiles of sums are 0 to 3: two of columns for each 16 rows or, of at most 16 rows, all four of columns.
_OF_X, _OF_COLUMNS = (4, 5), (6, 7)


def multiplies(kind: str) -> bool:
    """Whether this processor has such products of `kind`, and the system lets this process use them."""
    return kind in _INSTRUCTIONS and cpu_has_tiles() and _is_allowed()


@cache
def _is_allowed() -> bool:
    """Linux wants to be asked once in a process, before it keeps what is in tiles when threads take turns."""
    ask = getattr(torch.cpu, "_init_amx", None)  # not in every version of torch
    return bool(ask and ask())


def kind_of_floats(rows: int | None = None) -> str:
    """The kind that float32 is multiplied as.

    Tiles multiply numbers in three parts faster than vectors multiply float32, and with smaller errors. With two they
    are still faster, and as precise as `torch.set_float32_matmul_precision("high")` allows.

    Args:
        rows: that weights are multiplied with at a time; None: many.
    """
    if not multiplies("bf16x6"):
        return "fp32"
    try:
        enough = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch has newer settings for single backends, and does not answer where they were used
        enough = "highest"
    kind = "bf16x6" if enough == "highest" else "bf16x3"
    return kind if rows is None or rows >= _LEAST_ROWS[kind] else "fp32"


@cache
def multiplier(kind: str, panel_row: int) -> Any:
    """As `register_tiles.multiplier`, for 1 to `ROWS` rows whose groups lie side by side, compiled into its callers.

    With up to 16 rows it fetches nothing ahead.

    Args:
        kind: of `KINDS`, but "fp32".
        panel_row: bytes of a group of a panel.
    """
    shapes = torch.frombuffer(_shapes(), dtype=torch.uint8).numpy()  # becomes a part of what is compiled
    configure, release, fetch = _operation("ldtilecfg", 1), _operation("tilerelease", 0), prefetch(for_writing=False)
    zero, put, load = ([_operation(name, n, each) for each in range(4)] for name, n in _OF_ONE_TILE.items())
    zero0, zero1, zero2, zero3 = zero
    put0, put1, put2, put3 = put
    load0, load1, load2, load3 = load
    step_of_few, step_of_many = _step(kind, panel_row, rows=1), _step(kind, panel_row, rows=2)
    fetching_step = _step(kind, panel_row, rows=2, fetches=True)
    parts = KINDS[kind].parts
    x_bytes, k_bytes, at_a_time = parts * _BYTES, parts * SIDE * panel_row, parts * SIDE
    a_portion = at_a_time // 2 * _BYTES  # of what is fetched: the columns' other half fetches as much

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
    def few(x: Any, stride: Any, panel: Any, steps: Any, out: Any, out_stride: Any, more: Any) -> None:
        two, three, four = out + _BYTES, out + 2 * _BYTES, out + 3 * _BYTES
        begin(out, two, three, four, out_stride, more)
        for k in range(steps):
            step_of_few(x + k * x_bytes, stride, panel + k * k_bytes)
        end(out, two, three, four, out_stride)

    @compiler().function
    def many(
        x: Any, stride: Any, panel: Any, steps: Any, out: Any, out_stride: Any, more: Any, wanted: Any, portions: Any
    ) -> None:
        lower = out + SIDE * out_stride
        begin(out, out + _BYTES, lower, lower + _BYTES, out_stride, more)
        for k in range(steps):
            at, panel_at, ahead = x + k * x_bytes, panel + k * k_bytes, wanted + k * portions * a_portion
            if portions > 0:
                fetching_step(at, stride, panel_at, ahead, ahead + (a_portion if portions > 1 else 0))
            else:
                step_of_many(at, stride, panel_at)
            for line in range(2 * a_portion, portions * a_portion, _BYTES):
                fetch(ahead + line)
        end(out, out + _BYTES, lower, lower + _BYTES, out_stride)

    @compiler().function
    def multiply(
        rows: Any, x: Any, stride: Any, panel: Any, columns: Any, groups: Any, out: Any, out_stride: Any, more: Any,
        wanted: Any, at_once: Any,
    ) -> None:  # fmt: skip
        whole = groups // at_a_time
        # Whole steps, then what is left over in one with smaller tiles.
        for start in range(0, groups, max(whole, 1) * at_a_time):
            steps, each = (whole, SIDE) if start + at_a_time <= groups else (1, groups - start)
            configure(shapes.ctypes.data + ((rows - 1) * SIDE + each - 1) * 64)
            portions = at_once // _BYTES if start == 0 else 0
            a, b, go_on = x + start * 4, panel + start * panel_row, more or start > 0
            if rows <= SIDE:
                few(a, stride, b, steps, out, out_stride, go_on)
            else:
                for half in range(2 if columns > 2 * SIDE else 1):
                    at = half * 2 * _BYTES
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


def _step(kind: str, panel_row: int, rows: int, fetches: bool = False) -> Any:
    """For compiled loops: all products of `SIDE` groups, or of their parts, with 4 tiles of sums, in so many rows.

    Arguments: address of x, and bytes from row to row; address of the panel's groups; then, if something is to be
    fetched, two addresses where as many lines of the cache are as half of the groups or parts: one by one between
    products, for tiles wait while many are on their way. Sums of one tile are never added to twice in a row, as the
    second would wait for the first.
    """
    numba, ir = import_module("numba"), import_module("llvmlite.ir")
    products, columns = PRODUCTS[KINDS[kind].parts], 4 // rows
    lines = KINDS[kind].parts * SIDE // 2

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (x, stride, panel), wanted = given[:3], given[3:]
        between, i8 = ir.Constant(stride.type, panel_row), ir.IntType(8)

        def call(name: str, tiles: tuple[int, ...], *numbers: Any) -> None:
            builder.call(_instruction(builder, name, len(tiles), len(numbers)), [
                *(ir.Constant(i8, tile) for tile in tiles),
                *(builder.inttoptr(each, i8.as_pointer()) if n == 0 else each for n, each in enumerate(numbers)),
            ])  # fmt: skip

        def behind(start: Any, offset: Any) -> Any:
            return builder.add(start, offset if isinstance(offset, ir.Value) else ir.Constant(start.type, offset))

        def multiply(tile: int, of_x: int, of_columns: int) -> None:
            call(_INSTRUCTIONS[kind], (tile, of_x, of_columns))
            done.append(tile)
            of_all = 4 * len(products)
            for line in range(lines * (len(done) - 1) // of_all, lines * len(done) // of_all):
                for each in wanted:
                    fetch_line(builder, behind(each, line * _BYTES), for_writing=False)

        done: list[int] = []
        there: tuple[int, int] | None = None  # the parts in the tiles
        for of_x, of_columns in products:
            at = behind(panel, of_columns * SIDE * panel_row)
            for row in range(rows):
                if there is None or there[0] != of_x:
                    lower = builder.mul(stride, ir.Constant(stride.type, row * SIDE))
                    call("tileloadd64", (_OF_X[row],), behind(behind(x, lower), of_x * _BYTES), stride)
                for column in range(columns):
                    tile = _OF_COLUMNS[column % 2]
                    if rows == 1 or (row == 0 and (there is None or there[1] != of_columns)):
                        call("tileloadd64", (tile,), behind(at, column * _BYTES), between)
                    multiply(row * columns + column, _OF_X[row], tile)
            there = of_x, of_columns
        return context.get_dummy_value()

    def step(context: Any, x: Any, stride: Any, panel: Any) -> Any:
        return numba.void(*[numba.int64] * 3), generate

    def fetching(context: Any, x: Any, stride: Any, panel: Any, wanted: Any, too: Any) -> Any:
        return numba.void(*[numba.int64] * 5), generate

    return import_module("numba.extending").intrinsic(fetching if fetches else step)


def _instruction(builder: Any, name: str, tiles: int, integers: int) -> Any:
    """LLVM's own function for it, declared once in a module."""
    ir = import_module("llvmlite.ir")
    i8, i64, full_name = ir.IntType(8), ir.IntType(64), f"llvm.x86.{name}"
    found = builder.module.globals.get(full_name)
    if found is None:
        types = [i8] * tiles + [i8.as_pointer(), i64][:integers]
        found = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), types), full_name)
    return found


def _operation(name: str, integers: int, *tiles: int) -> Any:
    """For compiled loops: an instruction on these tiles, of an address and, if two are given, bytes between rows."""
    numba, ir = import_module("numba"), import_module("llvmlite.ir")
    i8 = ir.IntType(8)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        numbers = [builder.inttoptr(each, i8.as_pointer()) if n == 0 else each for n, each in enumerate(given)]
        function = _instruction(builder, name, len(tiles), len(numbers))
        builder.call(function, [*(ir.Constant(i8, tile) for tile in tiles), *numbers])
        return context.get_dummy_value()

    def nothing(context: Any) -> Any:
        return numba.void(), generate

    def one(context: Any, address: Any) -> Any:
        return numba.void(numba.int64), generate

    def two(context: Any, address: Any, stride: Any) -> Any:
        return numba.void(numba.int64, numba.int64), generate

    return import_module("numba.extending").intrinsic((nothing, one, two)[integers])
