"""An LSTM's cell in training in bfloat16, in torch's operations; what is between them is in float32.

`fused_cell` has the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MINUS_ONE = torch.tensor(-1.0)  # numbers of Python would be converted in each call


def forward_step(both: Tensor, cells: Tensor) -> Callable[[int, Tensor], None]:
    """For each step t from 0: given the sums before sigmoid and tanh (B, 4 H), makes gates of them, and the next state.

    Gates are in torch's order: input, forget, cell, output; the sum of the cell's is given twice as large.

    Args:
        both: (T + 1, B, I + H) in bfloat16; the last H are the hidden state before each step, and after the last.
        cells: (T + 1, B, H) in float32, the cells before each step, and after the last.
    """
    rows, size = cells.shape[1:]
    gates, new = torch.empty(rows, 4 * size), torch.empty(rows, size)
    i, f, g, o = gates.chunk(4, 1)
    outputs, states = both[1:, :, -size:].unbind(), cells.unbind()

    def step(t: int, sums: Tensor) -> None:
        gates.copy_(sums).sigmoid_()
        _signed(g)
        sums.copy_(gates)
        torch.mul(f, states[t], out=states[t + 1]).addcmul_(i, g)
        outputs[t].copy_(_tanh(states[t + 1], new).mul_(o))

    return step


def backward_step(
    cells: Tensor, grad: Tensor, raw: Tensor, grad_cell: Tensor, grad_bias: Tensor
) -> Callable[[int, Tensor, Tensor], None]:
    """For each step t from the last: given its gates (B, 4 H) and what comes from the next step (B, H), fills raw[t].

    Args:
        cells: as for `forward_step`.
        grad: (T, B, H) of the outputs, in bfloat16.
        raw: (T, B, 4 H) in bfloat16, filled with the gradients before sigmoid and tanh.
        grad_cell: (B, H) in float32, of the cells after step t; afterwards of those before it.
        grad_bias: (4 H,) in float32, to which those of the step are added.
    """
    rows, size = cells.shape[1:]
    gates, slopes = torch.empty(rows, 4 * size), torch.empty(rows, 4 * size)
    i, f, g, o = gates.chunk(4, 1)
    of_i, of_f, of_g, of_o = slopes.chunk(4, 1)
    dh, tanh, part, other = (torch.empty(rows, size) for _ in range(4))
    states, of_output, of_sums = cells.unbind(), grad.unbind(), raw.unbind()

    def step(t: int, gates_kept: Tensor, through: Tensor) -> None:
        gates.copy_(gates_kept)
        _tanh(states[t + 1], tanh)
        dh.copy_(of_output[t]).add_(through)
        torch.mul(dh, o, out=part)
        grad_cell.add_(part).addcmul_(part.mul_(tanh), tanh, value=-1)
        torch.addcmul(gates, gates, gates, value=-1, out=slopes)
        of_i.mul_(torch.mul(grad_cell, g, out=part))
        of_f.mul_(torch.mul(grad_cell, states[t], out=part))
        of_o.mul_(torch.mul(dh, tanh, out=part))
        torch.mul(grad_cell, i, out=part)
        torch.addcmul(part, torch.mul(part, g, out=other), g, value=-1, out=of_g)
        of_sums[t].copy_(slopes)
        grad_bias.add_(slopes.sum(0))
        grad_cell.mul_(f)

    return step


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """Hyperbolic tangent; torch's own takes six times as long as its sigmoid on AMD."""
    return _signed(torch.add(x, x, out=out).sigmoid_())


def _signed(sigmoid: Tensor) -> Tensor:
    """tanh(x) of sigmoid(2 x), in place."""
    return torch.add(_MINUS_ONE, sigmoid, alpha=2, out=sigmoid)
