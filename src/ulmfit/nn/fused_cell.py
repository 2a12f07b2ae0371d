"""An LSTM's cell in training in bfloat16, compiled by Numba: one pass over the gates where torch makes a dozen.

Needs the extra `fast`. Each pass is made by one thread, for it takes less time than to wake another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("ulmfit")

_LEVELS = 11  # of the continued fraction: within 5e-7 of tanh
_LARGEST = 7.35  # beyond, tanh is 1 as exactly


@cache
def is_available() -> bool:
    """Whether Numba is there and compiles the cell on this machine."""
    if find_spec("numba") is None:
        return False
    try:
        _kernels()
    except Exception as error:  # it raises errors of many kinds for a NumPy or a processor that it does not know
        log.warning("Numba cannot compile the LSTM's cell, training goes on without: %s", str(error).partition("\n")[0])
        return False
    return True


def forward_step(both: Tensor, cells: Tensor) -> Callable[[int, Tensor], None]:
    """As that of `torch_cell`."""
    forward, _ = _kernels()
    outputs, states = _bits(both), cells.numpy()

    def step(t: int, gates: Tensor) -> None:
        forward(_bits(gates), states[t], states[t + 1], outputs[t + 1])

    return step


def backward_step(
    cells: Tensor, grad: Tensor, raw: Tensor, grad_cell: Tensor, grad_bias: Tensor
) -> Callable[[int, Tensor, Tensor], None]:
    """As that of `torch_cell`."""
    _, backward = _kernels()
    states, of_outputs, of_sums = cells.numpy(), _bits(grad.contiguous()), _bits(raw)
    of_cell, of_bias = grad_cell.numpy(), grad_bias.numpy()

    def step(t: int, gates: Tensor, through: Tensor) -> None:
        backward(_bits(gates), states[t], states[t + 1], of_outputs[t], _bits(through), of_cell, of_sums[t], of_bias)

    return step


def _bits(x: Tensor) -> Any:
    """A bfloat16 tensor as Numba can read it: NumPy has no such numbers."""
    return x.view(torch.uint16).numpy()


def _tanh_coefficients() -> tuple[list[float], list[float]]:
    """Polynomials p, q of x^2 with tanh(x) = x p / q: Lambert's continued fraction, x / (1 + x^2 / (3 + x^2 / ...))."""
    p, q = [1.0], [2.0 * _LEVELS - 1]
    for odd in range(2 * _LEVELS - 3, 0, -2):
        shifted = [0.0, *p]  # x^2 p
        p, q = q, [odd * a + b for a, b in zip_longest(q, shifted, fillvalue=0.0)]
    return [c / q[0] for c in p], [c / q[0] for c in q]


@cache
def _kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """The forward and the backward pass, compiled for this processor: 2 to 3 seconds, once in a process."""
    numba: Any = import_module("numba")
    intrinsic: Any = import_module("numba.extending").intrinsic
    ir: Any = import_module("llvmlite.ir")
    types = numba.types

    @intrinsic  # type: ignore[untyped-decorator]
    def as_float(context: Any, bits: Any) -> Any:
        return types.float32(types.uint32), lambda c, builder, s, given: builder.bitcast(given[0], ir.FloatType())

    @intrinsic  # type: ignore[untyped-decorator]
    def as_bits(context: Any, number: Any) -> Any:
        return types.uint32(types.float32), lambda c, builder, s, given: builder.bitcast(given[0], ir.IntType(32))

    # Contracting only: sums in another order, or numbers taken for finite, would be other results.
    function = numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True)
    u16, u32, f32 = numba.uint16, numba.uint32, numba.float32
    half, one, large = f32(0.5), f32(1), f32(_LARGEST)
    p, q = (tuple(f32(c) for c in each) for each in _tanh_coefficients())
    p0, p1, p2, p3, p4, p5 = p
    q0, q1, q2, q3, q4, q5 = q

    @function  # type: ignore[untyped-decorator]
    def wide(bits: Any) -> Any:
        return as_float(u32(bits) << u32(16))

    @function  # type: ignore[untyped-decorator]
    def narrow(x: Any) -> Any:
        """To the nearest bfloat16, ties to even."""
        bits = as_bits(x)
        return u16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))

    @function  # type: ignore[untyped-decorator]
    def tanh(x: Any) -> Any:
        x = -large if x < -large else (large if x > large else x)  # what is not a number stays it
        s = x * x
        top = ((((p5 * s + p4) * s + p3) * s + p2) * s + p1) * s + p0
        return x * top / (((((q5 * s + q4) * s + q3) * s + q2) * s + q1) * s + q0)

    @function  # type: ignore[untyped-decorator]
    def sigmoid(x: Any) -> Any:
        return half * tanh(half * x) + half

    # A row at a time, each part an array of its own: only so does LLVM know that it may take 16 numbers at once.
    @function  # type: ignore[untyped-decorator]
    def forward_row(i: Any, f: Any, g: Any, o: Any, before: Any, after: Any, output: Any) -> None:
        for j in range(before.shape[0]):
            of_i, of_f, of_o = sigmoid(wide(i[j])), sigmoid(wide(f[j])), sigmoid(wide(o[j]))
            of_g = tanh(half * wide(g[j]))
            c = of_f * before[j] + of_i * of_g
            after[j] = c
            i[j], f[j], g[j], o[j] = narrow(of_i), narrow(of_f), narrow(of_g), narrow(of_o)
            output[j] = narrow(of_o * tanh(c))

    @function  # type: ignore[untyped-decorator]
    def forward(gates: Any, before: Any, after: Any, outputs: Any) -> None:
        n = before.shape[1]
        width = outputs.shape[1] - n
        for b in range(gates.shape[0]):
            row = gates[b]
            i, f, g, o = row[:n], row[n : 2 * n], row[2 * n : 3 * n], row[3 * n :]
            forward_row(i, f, g, o, before[b], after[b], outputs[b, width:])

    @function  # type: ignore[untyped-decorator]
    def backward_row(
        i: Any, f: Any, g: Any, o: Any, before: Any, after: Any, grad: Any, through: Any, grad_cell: Any,
        raw_i: Any, raw_f: Any, raw_g: Any, raw_o: Any, bias_i: Any, bias_f: Any, bias_g: Any, bias_o: Any,
    ) -> None:  # fmt: skip
        for j in range(before.shape[0]):
            of_i, of_f, of_g, of_o = wide(i[j]), wide(f[j]), wide(g[j]), wide(o[j])
            dh, t = wide(grad[j]) + wide(through[j]), tanh(after[j])
            dc = grad_cell[j] + dh * of_o * (one - t * t)
            grad_cell[j] = dc * of_f
            di = dc * of_g * (of_i * (one - of_i))
            df = dc * before[j] * (of_f * (one - of_f))
            dg = dc * of_i * (one - of_g * of_g)
            do = dh * t * (of_o * (one - of_o))
            raw_i[j], raw_f[j], raw_g[j], raw_o[j] = narrow(di), narrow(df), narrow(dg), narrow(do)
            bias_i[j] += di
            bias_f[j] += df
            bias_g[j] += dg
            bias_o[j] += do

    @function  # type: ignore[untyped-decorator]
    def backward(
        gates: Any, before: Any, after: Any, grad: Any, through: Any, grad_cell: Any, raw: Any, bias: Any
    ) -> None:
        n = before.shape[1]
        for b in range(gates.shape[0]):
            row, out = gates[b], raw[b]
            backward_row(
                row[:n], row[n : 2 * n], row[2 * n : 3 * n], row[3 * n :],
                before[b], after[b], grad[b], through[b], grad_cell[b],
                out[:n], out[n : 2 * n], out[2 * n : 3 * n], out[3 * n :],
                bias[:n], bias[n : 2 * n], bias[2 * n : 3 * n], bias[3 * n :],
            )  # fmt: skip

    bits, numbers = types.Array(types.uint16, 2, "C"), types.Array(types.float32, 2, "C")
    forward.compile((bits, numbers, numbers, bits))
    backward.compile((bits, numbers, numbers, bits, bits, numbers, bits, types.Array(types.float32, 1, "C")))
    return forward, backward
