"""The loops of `fused_lstm`, compiled: see there for what their arguments are.

What is kept and multiplied is of one of the kinds in `kinds`; sums and cells are in float32. Numbers in memory are
given by their address: sums of addresses take Numba a fraction of the time that slices take it.

Gates are in blocks: the input gates of `LANES` cells, then their forget, cell and output gates. So a thread has
all that a cell needs as soon as a product's sums are complete, while they are in its core's cache.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from ulmfit.native import prefetch
from ulmfit.nn import openmp
from ulmfit.nn.fused_cells import backward_cell, forward_cell
from ulmfit.nn.kept_loops import kept
from ulmfit.nn.kinds import KINDS, RUN
from ulmfit.nn.processor import second_cache
from ulmfit.nn.register_tiles import COLUMNS, LANES, LINE, PANEL_ROW, PART, hook, multiplier, product, rows_of
from ulmfit.nn.turned_gates import AT_ONCE, SCRATCH, beside, group_of, layout
from ulmfit.nn.vectors import compiler

DRAWS = 1 << 16  # values of the random number that decides whether a weight is kept
_OF_FORWARD, _OF_BACKWARD = 15, 16  # arguments of the loops over all steps
BLOCK = 4 * LANES  # gates of as many cells as a register holds
SUMS = max(COLUMNS * PANEL_ROW, SCRATCH)  # bytes that a thread works with in a weight gradient


@cache
def kernels(kind: str) -> SimpleNamespace:
    """Addresses of `prepare`, `put` (of numbers in parts), `forward`, `backward` and `weight_gradients`.

    That takes some seconds, once on a machine.

    Args:
        kind: of `KINDS`, but "int8".

    Raises:
        Exception: of many kinds, where Numba does not work, or torch has no OpenMP that it could use.
    """
    loops = {
        "prepare": _prepare, "forward": _forward, "backward": _backward, "weight_gradients": _weight_gradients,
        **({"put": _put} if KINDS[kind].parts > 1 else {}),
    }  # fmt: skip
    return SimpleNamespace(**kept(f"training-{kind}", lambda: {name: make(kind) for name, make in loops.items()}))


@cache
def _dropping() -> tuple[Any, Any]:
    """How weights are dropped: `parts` of the number to keep (of `DRAWS`) and the seed, and `is_kept` for each one."""
    c = compiler()
    u32, f32 = c.numba.uint32, c.numba.float32

    @c.function
    def parts(kept: Any, seed: Any) -> Any:
        """What those that are kept are multiplied with, and what `is_kept` asks for."""
        return f32(DRAWS) / f32(kept), u32(kept), u32(seed & 0xFFFFFFFF), u32((seed >> 32) & 0xFFFFFFFF)

    @c.function
    def is_kept(index: Any, kept: Any, low: Any, high: Any) -> Any:
        """Each bit of the index and of the seed's halves changes half of the draw's."""
        x = u32(index + low)  # sums and products of 32-bit numbers have 64 bits in Numba
        x = u32((x ^ (x >> u32(16))) * u32(0x21F0AAAD))
        x = u32((x ^ (x >> u32(15)) ^ high) * u32(0xD35A2D97))
        x = u32((x ^ (x >> u32(15))) * u32(0x21F0AAAD))
        return (x >> u32(16)) < kept

    return parts, is_kept


@cache
def fetching() -> Any:
    """To ask for so many bytes at an address that will be written soon."""
    ask_for = prefetch()

    @compiler().function
    def ask(at: Any, size: Any) -> None:
        for j in range(0, size, 64):
            ask_for(at + j)

    return ask


@cache
def _gate() -> Any:
    """Which row of torch's weights the n-th of the gates in blocks is; -1 for one behind the last cell."""

    @compiler().function
    def gate(n: Any, size: Any) -> Any:
        cell = n // BLOCK * LANES + n % LANES
        return n // LANES % 4 * size + cell if cell < size else -1

    return gate


def _prepare(kind: str) -> int:
    c, pair, group_at, convert = compiler(), beside(kind), group_of(kind), compiler().numbers[kind].convert
    neighbours, parts_of_one, size_of, run, _ = KINDS[kind]
    floats, words, (parts, is_kept), gate_of = c.floats, c.words, _dropping(), _gate()
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    number, count, _ = openmp.team()

    @c.function
    def drop(n: Any, weights_at: Any, out_at: Any, first: Any, scale: Any, kept: Any, low: Any, high: Any) -> None:
        weights, out = floats(weights_at, n), floats(out_at, n)
        for j in range(n):
            out[j] = weights[j] * scale if is_kept(first + u32(j), kept, low, high) else f32(0)

    @c.function
    def turn(n: Any, tile_at: Any, stride: Any, packed_at: Any) -> None:
        tile, packed = words(tile_at, COLUMNS * stride), words(packed_at, n * COLUMNS)
        for p in range(n):
            for row in range(COLUMNS):
                packed[p * COLUMNS + row] = tile[row * stride + p]

    @c.function
    def lay_out(n: Any, one: Any, stride: Any, panel_at: Any, panel_bytes: Any) -> None:
        for start in range(0, n, COLUMNS):
            panel, filled = panel_at + start // COLUMNS * panel_bytes, min(n - start, COLUMNS)
            pair(filled, one + start * size_of, one + start * size_of + stride, panel, PART)
            for part in range(parts_of_one):
                words(panel + part * PART + filled * 4, COLUMNS - filled)[:] = u32(0)

    @c.entry
    def prepare(given: Any) -> None:
        a = carray(given, 13)
        weight_ih, weight_hh, rows, width, state_at, size, padded = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
        scale, kept, low, high = parts(a[7], a[8])
        stride, packed, back = a[10], a[11], a[12]
        groups, of_size = (state_at + padded) * size_of // 4, (size + COLUMNS - 1) // COLUMNS
        gates = 4 * padded if padded else rows
        whole_gates, panels = (gates + run - 1) // run * run, (gates + COLUMNS - 1) // COLUMNS
        back_bytes = whole_gates * size_of // 4 * PANEL_ROW
        thread, threads = i64(number()), i64(count())
        tile = a[9] + thread * (COLUMNS * stride + (size * 4 + LINE - 1) // LINE * LINE)
        floats_at = tile + COLUMNS * stride
        for panel in range(panels * thread // threads, panels * (thread + 1) // threads):
            first = panel * COLUMNS
            for r in range(COLUMNS):
                n, row = first + r, tile + r * stride
                if padded:
                    n = gate_of(n, size) if n < gates else -1
                words(row, groups)[:] = u32(0)
                if n >= 0 and n < rows:
                    convert(width, weight_ih + n * width * 4, row)
                    drop(size, weight_hh + n * size * 4, floats_at, u32(n * size), scale, kept, low, high)
                    convert(size, floats_at, row + state_at * size_of)
            turn(groups, tile, stride // 4, packed + panel * groups * PANEL_ROW)
            for r in range(0, min(COLUMNS, whole_gates - first) if back else 0, neighbours):
                one, at = tile + r * stride, back + group_at(first + r) * PANEL_ROW
                lay_out(size, one + state_at * size_of, stride, at, back_bytes)
                lay_out(width, one, stride, at + of_size * back_bytes, back_bytes)

    return prepare


def _put(kind: str) -> int:
    c, convert = compiler(), compiler().numbers[kind].convert
    u32, i64, carray, words, size_of = c.numba.uint32, c.numba.int64, c.numba.carray, c.words, KINDS[kind].size
    number, count, _ = openmp.team()

    @c.entry
    def put(given: Any) -> None:
        a = carray(given, 9)
        steps, rows, n, whole_n, x, step_bytes, row_bytes, out, out_bytes = (
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        )  # fmt: skip
        thread, threads = i64(number()), i64(count())
        filled = n // RUN * RUN  # the last numbers share lines with the zeros behind them
        for r in range(steps * rows * thread // threads, steps * rows * (thread + 1) // threads):
            at = out + r * out_bytes
            words(at + filled * size_of, (whole_n - filled) * size_of // 4)[:] = u32(0)
            convert(n, x + r // rows * step_bytes + r % rows * row_bytes, at)

    return put


def _forward(kind: str) -> int:
    c, cell, ask, place_of = compiler(), forward_cell(kind), fetching(), compiler().numbers[kind].place
    size_of, line_bytes, together = KINDS[kind].size, LINE * KINDS[kind].parts, BLOCK // COLUMNS
    sums_row, i64, carray = together * PANEL_ROW, c.numba.int64, c.numba.carray
    longs, address = c.longs, c.address
    number, count, barrier = openmp.team()

    def finish(given: Any, t: Any, block: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _OF_FORWARD)
        rows, state_at, size, stride, bias, both, cells, gates = a[1], a[2], a[3], 4 * a[4], a[6], a[7], a[8], a[9]
        place, inputs_row = block * LANES, 16 * size
        inputs = a[11] + t % a[12] * rows * inputs_row + block * sums_row
        for b in range(top, bottom):
            at = t * rows + b
            cell(
                sums + (b - top) * sums_row, inputs + b * inputs_row, bias + block * BLOCK * 4,
                cells + (at * size + place) * 4, cells + ((at + rows) * size + place) * 4,
                gates + (at * 4 * size + block * BLOCK) * size_of,
                both + (at + rows) * stride + place_of(state_at + place), a[14] + (at * size + place) * 4,
            )  # fmt: skip

    def soon(given: Any, t: Any, block: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _OF_FORWARD)
        rows, state_at, size, stride, both, cells = a[1], a[2], a[3], 4 * a[4], a[7], a[8]
        place, inputs_row = block * LANES, 16 * size
        inputs = a[11] + t % a[12] * rows * inputs_row + block * sums_row
        for b in range(top, bottom):
            at = t * rows + b
            ask(inputs + b * inputs_row, sums_row)
            ask(cells + (at * size + place) * 4, LANES * 4)
            ask(cells + ((at + rows) * size + place) * 4, LANES * 4)
            ask(both + (at + rows) * stride + place_of(state_at + place), line_bytes)

    multiply_all, finish_at, soon_at = product(kind), hook(finish), hook(soon)

    @c.entry
    def forward(given: Any) -> None:
        a, at_a = carray(given, _OF_FORWARD), address(given)
        steps, rows, state_at, size, groups, packed, both, from_zero = a[0], a[1], a[2], a[3], a[4], a[5], a[7], a[13]
        inputs, ahead = a[11], a[12]
        of_inputs, stride, panels = state_at * size_of // 4, 4 * groups, 4 * size // COLUMNS
        thread, threads = i64(number()), i64(count())
        sums = a[10] + thread * rows * sums_row
        for t in range(steps):
            now, used = both + t * rows * stride, i64(0) if from_zero and t == 0 else groups - of_inputs
            if t % ahead == 0:
                multiply_all(
                    min(ahead, steps - t) * rows, now, stride, packed, groups, of_inputs, 1, 0, panels, 4 * size,
                    inputs, 16 * size, PANEL_ROW, 0, 0, at_a, t, thread, threads,
                )  # fmt: skip
                barrier()
            multiply_all(
                rows, now + of_inputs * 4, stride, packed + of_inputs * PANEL_ROW, groups, used, together, 0,
                size // LANES, 4 * size, sums, sums_row, 0, finish_at, soon_at, at_a, t, thread, threads,
            )  # fmt: skip
            barrier()

    return forward


def _backward(kind: str) -> int:
    c, cell, ask, outside = compiler(), backward_cell(kind), fetching(), compiler().numbers[KINDS[kind].outside]
    convert, copy, size_of, outer_size = outside.convert, c.numbers["fp32"].convert, KINDS[kind].size, outside.size
    longs, address, i64, carray = c.longs, c.address, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()

    def finish(given: Any, t: Any, panel: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _OF_BACKWARD)
        rows, size, cells, gates, grad, grad_cell, of_state = a[1], a[2], a[6], a[7], a[8], a[9], a[10]
        bias, of_size, first = a[11] + i64(number()) * size * 16, (size + COLUMNS - 1) // COLUMNS, panel * COLUMNS
        for b in range(top, bottom):
            at, through = t * rows + b, sums + (b - top) * PANEL_ROW
            if t < 0:
                copy(COLUMNS, through, of_state + (b * of_size + panel) * PANEL_ROW)
            else:
                for place in range(first, min(size, first + COLUMNS), LANES):
                    cell(
                        gates + (at * 4 * size + 4 * place) * size_of, cells + (at * size + place) * 4,
                        cells + ((at + rows) * size + place) * 4, grad + (at * size + place) * outer_size,
                        through + (place - first) * 4, grad_cell + (b * size + place) * 4, bias + 16 * place,
                    )  # fmt: skip

    def soon(given: Any, t: Any, panel: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _OF_BACKWARD)
        rows, size, cells, gates, grad, grad_cell = a[1], a[2], a[6], a[7], a[8], a[9]
        first = panel * COLUMNS
        n = min(size - first, COLUMNS)
        for b in range(top, bottom):
            at = t * rows + b
            if t >= 0:
                ask(gates + (at * 4 * size + 4 * first) * size_of, 4 * n * size_of)
                ask(cells + (at * size + first) * 4, 4 * n)
                ask(cells + ((at + rows) * size + first) * 4, 4 * n)
                ask(grad + (at * size + first) * outer_size, n * outer_size)
                ask(grad_cell + (b * size + first) * 4, 4 * n)

    def finish_inputs(given: Any, t: Any, panel: Any, top: Any, bottom: Any, sums: Any) -> None:
        a = longs(given, _OF_BACKWARD)
        rows, width, first = a[1], a[3], panel * COLUMNS
        for b in range(top, bottom):
            at = a[12] + ((t * rows + b) * width + first) * outer_size
            convert(min(width - first, COLUMNS), sums + (b - top) * PANEL_ROW, at)

    multiply_all, finish_at, soon_at, finish_inputs_at = product(kind), hook(finish), hook(soon), hook(finish_inputs)

    @c.entry
    def backward(given: Any) -> None:
        a, at_a = carray(given, _OF_BACKWARD), address(given)
        steps, rows, size, width, panels, packed = a[0], a[1], a[2], a[3], a[4], a[5]
        gates, of_state, inputs, at_once = a[7], a[10], a[12], a[14]
        of_size, stride, groups = (size + COLUMNS - 1) // COLUMNS, 4 * size * size_of, size * size_of
        thread, threads = i64(number()), i64(count())
        sums = a[13] + thread * at_once * rows * PANEL_ROW
        # The product of a step's gradients, then the cells of the step before it. The last step's come from no product.
        for t in range(steps - 1, -2 if of_state else -1, -1):
            now, used = gates + t * rows * stride, groups if t < steps - 1 else i64(0)
            multiply_all(
                rows, now + rows * stride, stride, packed, groups, used, 1, 0, of_size, size, sums, PANEL_ROW, 0,
                finish_at, soon_at, at_a, t, thread, threads,
            )  # fmt: skip
            barrier()
            if inputs and t >= 0 and t % at_once == 0:
                multiply_all(
                    min(at_once, steps - t) * rows, now, stride, packed + of_size * groups * PANEL_ROW, groups, groups,
                    1, 0, panels, width, sums, PANEL_ROW, 0, finish_inputs_at, 0, at_a, t, thread, threads,
                )  # fmt: skip

    return backward


def _weight_gradients(kind: str) -> int:
    c, multiply, pair, group_at = compiler(), multiplier(kind), beside(kind), group_of(kind)
    neighbours, parts_of_one, size_of, run, _ = KINDS[kind]
    of_run = run * size_of // 4  # groups
    ask, floats, (parts, is_kept), gate_of = fetching(), c.floats, _dropping(), _gate()
    turned_gates, most = layout(kind), rows_of(kind)
    cached = second_cache() // (4 if kind == "fp32" else 2)
    lay_out, place, stride_of, step_of = (
        turned_gates.lay_out,
        turned_gates.place,
        turned_gates.stride,
        turned_gates.step,
    )
    u32, f32, i64, carray = c.numba.uint32, c.numba.float32, c.numba.int64, c.numba.carray
    number, count, barrier = openmp.team()

    @c.function
    def add(n: Any, sums_at: Any, out_at: Any, more: Any) -> None:
        sums, out = floats(sums_at, n), floats(out_at, n)
        for j in range(n):
            out[j] = (out[j] if more else f32(0)) + sums[j]

    @c.function
    def add_kept(
        n: Any, sums_at: Any, out_at: Any, more: Any, first: Any, scale: Any, kept: Any, low: Any, high: Any
    ) -> None:
        sums, out = floats(sums_at, n), floats(out_at, n)
        for j in range(n):
            old = out[j] if more else f32(0)
            out[j] = old + (sums[j] * scale if is_kept(first + u32(j), kept, low, high) else f32(0))

    @c.entry
    def weight_gradients(given: Any) -> None:
        a = carray(given, 17)
        all_rows, width, state_at, size, padded = a[0], a[1], a[2], a[3], a[4]
        scale, kept, low, high = parts(a[5], a[6])
        turned, packed, of_inputs, of_state, at_once, of_zeros = a[9], a[10], a[12], a[13], a[14], a[15]
        gates, columns = 4 * padded, state_at + padded
        panels, tiles = (state_at + size + COLUMNS - 1) // COLUMNS, (gates + most - 1) // most
        parts_of_gates = (gates + AT_ONCE - 1) // AT_ONCE
        thread, threads = i64(number()), i64(count())
        sums = a[11] + thread * SUMS
        for begin in range(0, all_rows, at_once):
            rows = min(at_once, all_rows - begin)
            raw, both = a[7] + begin * gates * size_of, a[8] + begin * columns * size_of
            groups = (rows + run - 1) // run * of_run
            for part in range(parts_of_gates * thread // threads, parts_of_gates * (thread + 1) // threads):
                lay_out(gates, raw, rows, groups, part, sums, turned)
            # Rows behind the last, up to a whole run, are that one again: their other factors are zeros.
            pairs = groups // parts_of_one
            for p in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                r = neighbours * p
                one, other = (
                    both + min(r, rows - 1) * columns * size_of,
                    both + min(r + 1, rows - 1) * columns * size_of,
                )
                for panel in range(panels):
                    first = panel * COLUMNS
                    n, at = min(columns - first, COLUMNS), packed + (panel * groups + group_at(r)) * PANEL_ROW
                    pair(n, one + first * size_of, other + first * size_of, at, PART)
            barrier()
            # Panels that stay in a core's cache while gates come from memory.
            together = max(1, cached // (groups * PANEL_ROW))
            begin_tile, stop_tile = tiles * thread // threads, tiles * (thread + 1) // threads
            for task in range((panels + together - 1) // together * (stop_tile - begin_tile)):
                tile, start = begin_tile + task % (stop_tile - begin_tile), task // (stop_tile - begin_tile) * together
                top, bottom = tile * most, min(gates, (tile + 1) * most)
                for panel in range(start, min(panels, start + together)):
                    first, stop = panel * COLUMNS, min(state_at + size, (panel + 1) * COLUMNS)
                    skip = min(max(of_zeros - begin, 0) // run * of_run, groups - of_run) if first >= state_at else 0
                    of_x, at_h = min(max(width - first, 0), stop - first), min(max(state_at, first), stop)
                    for q in range(top, bottom):
                        n = gate_of(q, size)
                        if n >= 0:
                            ask(of_inputs + (n * width + first) * 4, of_x * 4)
                            ask(of_state + (n * size + at_h - state_at) * 4, (stop - at_h) * 4)
                    multiply(
                        bottom - top, place(turned, groups, top, skip), stride_of(groups), step_of(groups),
                        packed + (panel * groups + skip) * PANEL_ROW, stop - first, groups - skip, sums, PANEL_ROW, 0,
                        place(turned, groups, top + most, 0), LINE,
                    )  # fmt: skip
                    for q in range(top, bottom):
                        n, row = gate_of(q, size), sums + (q - top) * PANEL_ROW
                        if n >= 0:
                            add(of_x, row, of_inputs + (n * width + first) * 4, begin > 0)
                            at = n * size + at_h - state_at
                            add_kept(
                                stop - at_h, row + (at_h - first) * 4, of_state + at * 4, begin > 0, u32(at),
                                scale, kept, low, high,
                            )  # fmt: skip
            barrier()

    return weight_gradients
