"""Products of float32, bfloat16 or 8-bit numbers, a tile at a time, whose sums stay in registers.

AVX-512 BF16 and VNNI multiply two or four neighbours of a row with those of a column and add the products to a 32-bit
sum; for float32 there is AVX-512 or AVX2. Numba knows none of that, so that a tile is written in the processor's own
language: what LLVM made of its own kept parts of a tile in memory.
On two cores of a Zen 4 it reaches what they can do (225 GFLOP/s each in bfloat16, 113 in float32), also with a few
rows, where oneDNN reaches four fifths. Where the processor has registers for whole tiles, it is those (`matrix_tiles`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from ulmfit.nn import matrix_tiles
from ulmfit.nn.kinds import KINDS
from ulmfit.nn.processor import cpu_has_avx512
from ulmfit.nn.vectors import compiler

LANES, _VECTORS = (16, 4) if cpu_has_avx512() else (8, 2)  # 32-bit numbers in a register, registers of columns
# Of a tile: with four vectors of columns it takes 24 of 32 registers for sums (AVX2: 12 of 16), 4 for weights.
_ROWS = 6
MOST_ROWS = max(_ROWS, matrix_tiles.ROWS)  # of a tile of any kind
COLUMNS = LANES * _VECTORS  # of a tile
PANEL_ROW = 4 * COLUMNS  # bytes: the neighbours of each column
NEIGHBOURS = {name: kind.neighbours for name, kind in KINDS.items()}  # that are multiplied at once
# Groups of a panel that are multiplied with all rows: they and the next ones stay in a core's cache. Of numbers in
# parts more, as each group takes part in more products.
_BLOCK, _BLOCK_OF_PARTS = 512, 896
GROUP = 4  # bytes of x that are multiplied at once
_HOOK = 6  # arguments that a product's hooks are called with
_TURN = 4  # groups between two jumps: a loop's own arithmetic takes the place of products
_MULTIPLY = {"fp32": "vfmadd231ps", "bf16": "vdpbf16ps", "int8": "vpdpbusd"}  # of 8-bit factors the 2nd is unsigned
_EVERYWHERE = {"fp32": "vbroadcastss", "bf16": "vpbroadcastd", "int8": "vpbroadcastd"}
LINE = 64  # bytes that are fetched at once
PART = matrix_tiles.SIDE * PANEL_ROW  # bytes of a panel from one part of some numbers to the next


def rows_of(kind: str) -> int:
    """How many rows a tile of such products has at most."""
    return matrix_tiles.ROWS if matrix_tiles.multiplies(kind) else _ROWS


def panels_of(columns: int) -> int:
    """How many panels hold so many columns."""
    return -(-columns // COLUMNS)


@cache
def multiplier(kind: str) -> Any:
    """The sums of a product for 1 to `rows_of(kind)` rows and `COLUMNS` columns, compiled; for one of `NEIGHBOURS`.

    Its arguments, all integers: rows; address of x (rows, groups, neighbours), bytes from one row to the next and from
    one group to the next (in `matrix_tiles` they lie side by side); address of a panel of weights (groups, `COLUMNS`,
    neighbours) and how many of its columns are wanted (of the others' sums some are left out); groups, at least one;
    address of the sums (rows, `COLUMNS`) and bytes from row to row; whether they go on from what is there (else from
    zero); the address of what is wanted next, and how much of it is fetched with each group, in bytes: a line of the
    cache at most, in `matrix_tiles` whole lines. 8-bit numbers are signed in x, unsigned as weights; sums are 32-bit
    integers.

    It is called by address: inlined, it would be compiled for each of those that call it.
    """
    if matrix_tiles.multiplies(kind):
        of_tiles = matrix_tiles.multiplier(kind, PANEL_ROW)

        def multiply_tiles(
            rows: Any, x: Any, stride: Any, step: Any, panel: Any, columns: Any, groups: Any, out: Any, out_stride: Any,
            more: Any, wanted: Any, at_once: Any,
        ) -> None:  # fmt: skip
            of_tiles(rows, x, stride, panel, columns, groups, out, out_stride, more, wanted, at_once)

        return _by_address(multiply_tiles, 12)
    wide, narrow = _of_any_rows(_VECTORS, kind), _of_any_rows(1, kind)

    def multiply(
        rows: Any, x: Any, stride: Any, step: Any, panel: Any, columns: Any, groups: Any, out: Any, out_stride: Any,
        more: Any, wanted: Any, at_once: Any,
    ) -> None:  # fmt: skip
        if columns > LANES:
            wide(rows, x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)
        else:
            narrow(rows, x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)

    return _by_address(multiply, 12)


def hook(function: Callable[..., None]) -> int:
    """What `product` calls, by address, with what it was given (an array's address), time, unit, rows and sums."""
    numba = compiler().numba
    return compiler().by_address(numba.void(*[numba.int64] * _HOOK), function)


@cache
def product(kind: str) -> Any:
    """A thread's part of the product of x and all panels, compiled.

    Arguments: rows, any number; address of x and bytes from row to row; address of the panels, how many `groups` each
    has and how many of these are multiplied; how many panels make a unit, the first and behind the last of the units,
    and how many columns they have in all; address of the sums, bytes from row to row and from unit to unit; `finish`
    and `soon`, and two numbers that these are given; thread, threads.

    `finish` and `soon` are addresses of a `hook`, or 0. The first is called for each tile whose sums are complete, at
    once, with its first row, the row behind the last and the address of the sums. The second is called for each block
    of a tile with some of its rows, which will be finished soon.

    Weights are multiplied with all rows in blocks, while the block after them is fetched: they come from memory.
    """
    multiply, call, of_tile, whole_tiles = multiplier(kind), _call(), rows_of(kind), matrix_tiles.multiplies(kind)
    of_block = _BLOCK if KINDS[kind].parts == 1 else _BLOCK_OF_PARTS
    aligned = matrix_tiles.SIDE * KINDS[kind].parts  # groups: all blocks but the last are whole steps of AMX

    @compiler().function
    def edge(groups: Any, block: Any, blocks: Any) -> Any:
        """Where a block begins."""
        return groups if block >= blocks else groups * block // blocks // aligned * aligned

    def part(
        rows: Any, x: Any, stride: Any, packed: Any, groups: Any, used: Any, together: Any, start: Any, units: Any,
        columns: Any, out: Any, row_bytes: Any, unit_bytes: Any, finish: Any, soon: Any, given: Any, time: Any,
        thread: Any, threads: Any,
    ) -> None:  # fmt: skip
        count, panel_bytes, blocks = (
            (rows + of_tile - 1) // of_tile,
            groups * PANEL_ROW,
            (used + of_block - 1) // of_block,
        )
        tasks = (units - start) * count
        task, stop = tasks * thread // threads, tasks * (thread + 1) // threads
        begin = start + task // count
        while task < stop:
            unit, first = start + task // count, task % count
            last = min(count, first + stop - task)
            task += last - first
            sums = out + unit * unit_bytes
            for each in range(together * blocks):
                # All panels of a unit, block by block: rows stay in the cache, too.
                index, block = unit * together + each % together, each // together
                done, panel = edge(used, block, blocks), packed + index * panel_bytes
                n = edge(used, block + 1, blocks) - done
                at = panel + done * PANEL_ROW
                # What is wanted next: the next panel's block, the first one's next, the next unit's first or, in the
                # next step, this thread's first.
                wanted, lines = at + panel_bytes, n
                if each + 1 == together * blocks:
                    wanted, lines = packed + (unit + 1) * together * panel_bytes, used // blocks
                    if task == stop:
                        wanted = packed + begin * together * panel_bytes
                elif each % together + 1 == together:
                    wanted = packed + unit * together * panel_bytes + (done + n) * PANEL_ROW
                    lines = edge(used, block + 2, blocks) - done - n
                lines, asked, a_group = lines * (PANEL_ROW // LINE), 0, 1
                if whole_tiles:  # they are few, so that each has to ask for more lines with a group
                    a_group = (lines + (last - first) * n - 1) // ((last - first) * n)
                for tile in range(first, last):
                    top, bottom = rows * tile // count, rows * (tile + 1) // count
                    tile_sums, ahead, at_once = sums + top * row_bytes, at, 0
                    if soon:
                        all_parts = together * blocks
                        some, most = (bottom - top) * each // all_parts, (bottom - top) * (each + 1) // all_parts
                        call(soon, given, time, unit, top + some, top + most, tile_sums)
                    if (tile > first or whole_tiles) and asked < lines:
                        ahead, at_once = wanted + asked * LINE, LINE * a_group
                        asked += n * a_group
                    multiply(
                        bottom - top, x + top * stride + done * GROUP, stride, GROUP, at,
                        columns - index * COLUMNS, n, tile_sums + each % together * PANEL_ROW, row_bytes, done, ahead,
                        at_once,
                    )  # fmt: skip
                    if finish and each + 1 == together * blocks:
                        call(finish, given, time, unit, top, bottom, tile_sums)
            if finish and blocks == 0:
                for tile in range(first, last):
                    top, bottom = rows * tile // count, rows * (tile + 1) // count
                    call(finish, given, time, unit, top, bottom, sums + top * row_bytes)

    return _by_address(part, 19)


def _by_address(function: Callable[..., None], count: int) -> Any:
    """`function` of so many integers compiled, for loops that call it."""
    numba = compiler().numba
    address = compiler().by_address(numba.void(*[numba.int64] * count), function)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)(address)


@cache
def _call() -> Any:
    """For compiled loops: the `hook` at an address is called."""
    numba, ir = compiler().numba, _ir()
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * _HOOK)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), given[1:])
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def call(context: Any, address: Any, a: Any, time: Any, unit: Any, top: Any, bottom: Any, sums: Any) -> Any:
        return numba.void(*[numba.int64] * (_HOOK + 1)), generate

    return call


def _of_any_rows(vectors: int, kind: str) -> Any:
    """Compiled into its callers: a tile of 1 to `_ROWS` rows."""
    tile1, tile2, tile3, tile4, tile5, tile6 = (
        _tile(rows, vectors, kind, compiler().numba) for rows in range(1, _ROWS + 1)
    )

    @compiler().function
    def tile(
        rows: Any, x: Any, stride: Any, step: Any, panel: Any, groups: Any, out: Any, out_stride: Any, more: Any,
        wanted: Any, at_once: Any,
    ) -> None:  # fmt: skip
        if rows == 6:
            tile6(x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)
        elif rows == 5:
            tile5(x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)
        elif rows == 4:
            tile4(x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)
        elif rows == 3:
            tile3(x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)
        elif rows == 2:
            tile2(x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)
        else:
            tile1(x, stride, step, panel, groups, out, out_stride, more, wanted, at_once)

    return tile


def _tile(rows: int, vectors: int, kind: str, numba: Any) -> Any:
    """Compiled into its callers: `rows` x `vectors` registers, which hold sums from the first to the last group."""
    ir, intrinsic = _ir(), import_module("numba.extending").intrinsic
    import_module("llvmlite.binding").initialize_native_asmparser()
    text, constraints = _assembly(rows, vectors, kind)
    i64 = ir.IntType(64)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        x, stride, step, panel, groups, out, out_stride, more, wanted, at_once = given
        whole = builder.lshr(groups, ir.Constant(i64, _TURN.bit_length() - 1))
        rest = builder.and_(groups, ir.Constant(i64, _TURN - 1))
        numbers = [x, panel, whole, rest, wanted, stride, step, out, out_stride, more, at_once]
        kind_of = ir.FunctionType(ir.LiteralStructType([i64] * 7), [i64] * len(numbers))
        builder.call(ir.InlineAsm(kind_of, text, constraints, side_effect=True), numbers)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        context: Any, x: Any, stride: Any, step: Any, panel: Any, groups: Any, out: Any, out_stride: Any, more: Any,
        wanted: Any, at_once: Any,
    ) -> Any:  # fmt: skip
        return numba.void(*[numba.int64] * 10), generate

    return tile


def _assembly(rows: int, vectors: int, kind: str) -> tuple[str, str]:
    """Of `_tile`, and what its operands are.

    The first seven change: five begin as what is given (7 to 11), two hold 3 and 5 times the bytes from row to row.
    """
    x, panel, whole, rest, wanted, three, five = (f"${n}" for n in range(7))
    stride, step, out, out_stride, more, at_once = (f"${n}" for n in range(12, 18))
    of_size, registers = ("zmm", 32) if LANES == 16 else ("ymm", 16)
    sums = [[f"%{of_size}{row * vectors + v}" for v in range(vectors)] for row in range(rows)]
    columns = [f"%{of_size}{rows * vectors + v}" for v in range(vectors)]
    one = f"%{of_size}{registers - 1}"
    vector_bytes = 4 * LANES

    def row_at(start: str, between: str, row: int, offset: int = 0) -> str:
        index = ["", f",{between}", f",{between},2", f",{three}", f",{between},4", f",{five}"][row]
        return f"{offset}({start}{index})"

    def multiples(between: str) -> list[str]:
        return [f"lea ({between},{between},2), {three}", f"lea ({between},{between},4), {five}"]

    def group(turn: int) -> list[str]:
        lines = [f"vmovups {turn * PANEL_ROW + v * vector_bytes}({panel}), {each}" for v, each in enumerate(columns)]
        lines.append(f"prefetcht1 ({wanted})")
        for row, of_row in enumerate(sums):
            lines.append(f"{_EVERYWHERE[kind]} {row_at(x, stride, row)}, {one}")
            lines += [f"{_MULTIPLY[kind]} {one}, {c}, {s}" for s, c in zip(of_row, columns, strict=True)]
        return [*lines, f"add {step}, {x}", f"add {at_once}, {wanted}"]

    places = [
        (row_at(out, out_stride, row, v * vector_bytes), each)
        for row, of_row in enumerate(sums)
        for v, each in enumerate(of_row)
    ]
    lines = [
        *multiples(out_stride),
        f"test {more}, {more}",
        "jz 1f",
        *(f"vmovups {place}, {each}" for place, each in places),
        "jmp 2f",
        "1:",
        *(f"vpxor{'d' if LANES == 16 else ''} {each}, {each}, {each}" for _, each in places),
        "2:",
        *multiples(stride),
        f"test {whole}, {whole}",
        "jz 4f",
        ".p2align 5",
        "3:",
        *(line for turn in range(_TURN) for line in group(turn)),
        f"add $${_TURN * PANEL_ROW}, {panel}",
        f"dec {whole}",
        "jnz 3b",
        "4:",
        f"test {rest}, {rest}",
        "jz 6f",
        "5:",
        *group(0),
        f"add $${PANEL_ROW}, {panel}",
        f"dec {rest}",
        "jnz 5b",
        "6:",
        *multiples(out_stride),
        *(f"vmovups {each}, {place}" for place, each in places),
    ]
    clobbered = [f"~{{{of_size}{n}}}" for n in range(registers)]
    constraints = ["=&r"] * 7 + [str(n) for n in range(5)] + ["r"] * 6 + ["~{memory}", "~{flags}", *clobbered]
    return "\n".join(lines), ",".join(constraints)


def _ir() -> Any:
    return import_module("llvmlite.ir")
