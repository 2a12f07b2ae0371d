"""The LSTM cell in training, forward and back, of a register full of cells at a time: see `fused_lstm`.

L cells at a time. Gates, their sums and the bias are (4, L): input, forget, cell and output. All is in float32 but what
is of the kind. Arguments are addresses.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ulmfit.nn.kinds import KINDS
from ulmfit.nn.lanes import Lanes, of_addresses
from ulmfit.nn.register_tiles import LANES


@cache
def forward_cell(kind: str) -> Any:
    """For compiled loops: cells (L,) and output (L,) of a step.

    Arguments: sums of the states (4, L) and of the inputs (4, L); bias (4, L); cells (L,) before; cells (L,) after;
    gates (4, L) of `Kind.outside`, and output (L,) of the kind, both filled in; of numbers in parts, the output also in
    float32.
    """
    parts, outside = KINDS[kind].parts, KINDS[kind].outside

    def generate(
        builder: Any, sums: Any, inputs: Any, bias: Any, before: Any, after: Any, gates: Any, output: Any, floats: Any
    ) -> None:
        v = Lanes(builder, LANES)
        half, one = v.number(0.5), v.number(1)
        inner = [
            builder.fadd(builder.fadd(v.load(inputs, index), v.load(sums, index)), v.load(bias, index))
            for index in range(4)
        ]
        (i_top, i), (f_top, f), (g_top, g), (o_top, o) = (
            v.tanh(each if index == 2 else builder.fmul(each, half)) for index, each in enumerate(inner)
        )
        # One division for all four.
        first, last = builder.fmul(i, f), builder.fmul(g, o)
        inverse = builder.fdiv(one, builder.fmul(first, last))
        of_first, of_last = builder.fmul(last, inverse), builder.fmul(first, inverse)
        of_i, of_f, of_g, of_o = (
            v.product(top, other, both)
            for top, other, both in (
                (i_top, f, of_first),
                (f_top, i, of_first),
                (g_top, o, of_last),
                (o_top, g, of_last),
            )
        )
        of_i, of_f, of_o = (v.fma(each, half, half) for each in (of_i, of_f, of_o))
        new = v.fma(of_f, v.load(before), builder.fmul(of_i, of_g))
        v.store(new, after)
        for index, each in enumerate((of_i, of_f, of_g, of_o)):
            v.store_as(outside, each, gates, index, past_caches=True)
        top, bottom = v.tanh(new)
        found = builder.fmul(of_o, builder.fdiv(top, bottom))
        v.store_as(kind, found, output)
        if parts > 1:
            v.store(found, floats)

    return of_addresses(8, generate)


@cache
def backward_cell(kind: str) -> Any:
    """For compiled loops: gradients of a cell's sums, from what the forward pass left.

    Arguments: gates (4, L) of `Kind.outside`, afterwards the gradients of their sums, of the kind; cells (L,) before
    and after the step; gradient (L,) of the output from above, of `Kind.outside`, and from the step after, in float32;
    gradient (L,) of the cells after the step, afterwards of those before it; bias (4, L), to which its gradient is
    added.
    """
    outside = KINDS[kind].outside

    def generate(
        builder: Any, gates: Any, before: Any, after: Any, grad: Any, through: Any, grad_cell: Any, bias: Any
    ) -> None:
        v = Lanes(builder, LANES)
        one = v.number(1)
        i, f, g, o = (v.load_as(outside, gates, index) for index in range(4))
        top, bottom = v.tanh(v.load(after))
        t = builder.fdiv(top, bottom)
        dh = builder.fadd(v.load_as(outside, grad), v.load(through))
        rest = builder.fsub(one, builder.fmul(t, t))
        dc = v.fma(builder.fmul(dh, o), rest, v.load(grad_cell))
        v.store(builder.fmul(dc, f), grad_cell)

        def inner(sigmoid: Any) -> Any:
            return builder.fmul(sigmoid, builder.fsub(one, sigmoid))

        found = (
            v.product(dc, g, inner(i)),
            v.product(dc, v.load(before), inner(f)),
            v.product(dc, i, builder.fsub(one, builder.fmul(g, g))),
            v.product(dh, t, inner(o)),
        )
        for index, each in enumerate(found):
            v.store_as(kind, each, gates, index)
            v.store(builder.fadd(v.load(bias, index), each), bias, index)

    return of_addresses(7, generate)
