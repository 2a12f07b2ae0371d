"""Products of float32, bfloat16 or 8-bit numbers, a tile at a time, whose sums stay in registers.

AVX-512 BF16 and VNNI multiply two or four neighbours of a row with those of a column and add the products to a 32-bit
sum; for float32 there is AVX-512 or AVX2. Numba knows none of that, so that a tile is put together in LLVM's language.
On two cores of a Zen 4 it reaches what they can do (225 GFLOP/s each in bfloat16, 113 in float32), also with a few
rows, where oneDNN reaches four fifths.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from typing import Any

from ulmfit.nn.processor import cpu_has_avx512
from ulmfit.nn.vectors import compiler

_LANES, _VECTORS = (16, 4) if cpu_has_avx512() else (8, 2)  # 32-bit numbers in a register, registers of columns
ROWS = 6  # of a tile: with four vectors of columns it takes 24 of 32 registers for sums (AVX2: 12 of 16), 4 for weights
COLUMNS = _LANES * _VECTORS  # of a tile
PANEL_ROW = 4 * COLUMNS  # bytes: the neighbours of each column
NEIGHBOURS = {"fp32": 1, "bf16": 2, "int8": 4}  # that are multiplied at once


def panels_of(columns: int) -> int:
    """How many panels hold so many columns."""
    return -(-columns // COLUMNS)


@cache
def multiplier(kind: str) -> Any:
    """The sums of a product for 1 to `ROWS` rows and `COLUMNS` columns, compiled; for one of `NEIGHBOURS`.

    Its arguments, all integers: rows; address of x (rows, groups, neighbours) and bytes from one row to the next;
    address of a panel of weights (groups, `COLUMNS`, neighbours); groups, at least one; address of the sums (rows,
    `COLUMNS`) and bytes from row to row. 8-bit numbers are signed in x, unsigned as weights; sums are 32-bit integers.

    It is called by address: inlined, it would be compiled for each of those that call it.
    """
    numba = compiler().numba
    tile1, tile2, tile3, tile4, tile5, tile6 = (_tile(rows, kind, numba) for rows in range(1, ROWS + 1))

    def multiply(rows: Any, x: Any, stride: Any, panel: Any, groups: Any, out: Any, out_stride: Any) -> None:
        if rows == 6:
            tile6(x, stride, panel, groups, out, out_stride)
        elif rows == 5:
            tile5(x, stride, panel, groups, out, out_stride)
        elif rows == 4:
            tile4(x, stride, panel, groups, out, out_stride)
        elif rows == 3:
            tile3(x, stride, panel, groups, out, out_stride)
        elif rows == 2:
            tile2(x, stride, panel, groups, out, out_stride)
        else:
            tile1(x, stride, panel, groups, out, out_stride)

    address = compiler().by_address(numba.void(*[numba.int64] * 7), multiply)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 7)(address)


@cache
def product(kind: str) -> Any:
    """A thread's part of the product of x and all panels, for compiled loops.

    Arguments: as those of `multiplier`; `rows` any number, sums (rows, `COLUMNS` panels); how many of the panels'
    `groups` are multiplied; the first of the panels that is, and how many there are; thread, threads.
    """
    multiply = multiplier(kind)

    @compiler().function
    def part(
        rows: Any, x: Any, stride: Any, packed: Any, groups: Any, out: Any, used: Any, start: Any, panels: Any,
        thread: Any, threads: Any,
    ) -> None:  # fmt: skip
        count = (rows + ROWS - 1) // ROWS
        tasks = (panels - start) * count
        for task in range(tasks * thread // threads, tasks * (thread + 1) // threads):
            panel, tile = start + task // count, task % count
            first, stop = rows * tile // count, rows * (tile + 1) // count
            multiply(
                stop - first, x + first * stride, stride, packed + panel * groups * PANEL_ROW, used,
                out + (first * panels + panel) * PANEL_ROW, panels * PANEL_ROW,
            )  # fmt: skip

    return part


def _tile(rows: int, kind: str, numba: Any) -> Any:
    """Compiled into those that call it: `rows` x `COLUMNS` sums, held in registers from the first group to the last."""
    ir, intrinsic = _ir(), import_module("numba.extending").intrinsic
    vectors, vector_bytes = _VECTORS, 4 * _LANES
    i32, i64 = ir.IntType(32), ir.IntType(64)
    words = ir.VectorType(i32, _LANES)
    if kind == "fp32":
        name, number = f"llvm.fma.v{_LANES}f32", ir.FloatType()
        factors = ir.VectorType(number, _LANES)
    elif kind == "bf16":
        name, number = "llvm.x86.avx512bf16.dpbf16ps.512", ir.FloatType()
        factors = ir.VectorType(_bfloat(), 2 * _LANES)
    else:
        name, number, factors = "llvm.x86.avx512.vpdpbusd.512", i32, words
    sums = ir.VectorType(number, _LANES)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        x, stride, panel, groups, out, out_stride = given
        module = builder.module
        multiply = module.globals.get(name)
        if multiply is None:
            multiply = ir.Function(
                module, ir.FunctionType(sums, [factors] * 3 if kind == "fp32" else [sums, factors, factors]), name
            )

        def at(start: Any, offset: Any, of_type: Any) -> Any:
            offset = ir.Constant(i64, offset) if isinstance(offset, int) else offset
            return builder.inttoptr(builder.add(start, offset), of_type.as_pointer())

        def everywhere(one: Any) -> Any:
            undefined = ir.Constant(words, ir.Undefined)
            first = builder.insert_element(undefined, one, ir.Constant(i32, 0))
            return builder.bitcast(builder.shuffle_vector(first, undefined, ir.Constant(words, [0] * _LANES)), factors)

        starts = [builder.add(x, builder.mul(stride, ir.Constant(i64, row))) for row in range(rows)]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(i64)
        held = [[builder.phi(sums) for _ in range(vectors)] for _ in range(rows)]
        place = builder.add(panel, builder.mul(group, ir.Constant(i64, PANEL_ROW)))
        columns = [builder.load(at(place, v * vector_bytes, factors), align=vector_bytes) for v in range(vectors)]
        new = []
        for start, row in zip(starts, held, strict=True):
            one = everywhere(builder.load(at(start, builder.mul(group, ir.Constant(i64, 4)), i32), align=4))
            # Of two 8-bit factors the first is the unsigned one; elsewhere both are alike.
            terms = [[c, one, old] if kind == "fp32" else [old, c, one] for old, c in zip(row, columns, strict=True)]
            new.append([builder.call(multiply, each) for each in terms])
        following = builder.add(group, ir.Constant(i64, 1))
        group.add_incoming(ir.Constant(i64, 0), before)
        group.add_incoming(following, loop)
        for row, new_row in zip(held, new, strict=True):
            for old, later in zip(row, new_row, strict=True):
                old.add_incoming(ir.Constant(sums, None), before)  # zeros
                old.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, groups), loop, after)
        builder.position_at_end(after)
        for index, new_row in enumerate(new):
            start = builder.add(out, builder.mul(out_stride, ir.Constant(i64, index)))
            for v, later in enumerate(new_row):
                builder.store(later, at(start, v * vector_bytes, sums), align=4)
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(context: Any, x: Any, stride: Any, panel: Any, groups: Any, out: Any, out_stride: Any) -> Any:
        return numba.void(*[numba.int64] * 6), generate

    return tile


def _ir() -> Any:
    return import_module("llvmlite.ir")


@cache
def _bfloat() -> Any:
    """LLVM's bfloat16, which llvmlite has no name for."""
    of_llvm: Any = _ir().Type

    class BFloat(of_llvm):  # type: ignore[misc]
        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, BFloat)

        def __hash__(self) -> int:
            return hash(BFloat)

    return BFloat()
