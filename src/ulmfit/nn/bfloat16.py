"""An LSTM layer in training in bfloat16 on processors with such products but no tiles (AVX-512 BF16).

oneDNN's own layer reaches 60 % of such a processor's products there. Here each step is one product of inputs and hidden
state side by side, the backward pass one product a step and one for all weights; what is between them is in float32.
A gate is rounded once, after its sum, so that gradients are as close to float32's as oneDNN's are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ulmfit.nn.processor import cpu_casts_to_bfloat16, cpu_has_tiles, cpu_multiplies_bfloat16, onednn_has

_MOST_ROWS = 96  # beyond, oneDNN's layer is as fast
_STEPS_TO_PACK = 32  # fewer take less time than to lay out transposed weights


def is_worth_it(rnn: nn.Module, x: Tensor) -> bool:
    """Whether `lstm` trains on `x` (B, T, I) faster than `rnn` does under autocast."""
    return (
        isinstance(rnn, nn.LSTM)
        and x.device.type == "cpu"
        and 0 < x.size(0) <= _MOST_ROWS
        and x.size(1) > 0
        and torch.is_grad_enabled()
        and cpu_casts_to_bfloat16()
        and not torch.compiler.is_compiling()
        and cpu_multiplies_bfloat16()
        and not cpu_has_tiles()
        and onednn_has("_linear_pointwise")
    )


def lstm(
    rnn: nn.Module, weight_hh: Tensor, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `rnn` returns for `x` (B, T, I) and `state` with `weight_hh` (4 H, H) for its own; differentiable once.

    Outputs (B, T, H) and hidden state are in bfloat16, the cells (1, B, H) in float32.
    """
    with torch.autocast("cpu", enabled=False):
        if state is None:
            h = c = x.new_zeros(x.size(0), weight_hh.size(1))
        else:
            h, c = state[0][0], state[1][0]
        bias = rnn.get_parameter("bias_ih_l0") + rnn.get_parameter("bias_hh_l0")
        output, c = _Layer.apply(x.transpose(0, 1), h, c, rnn.get_parameter("weight_ih_l0"), weight_hh, bias)  # type: ignore[no-untyped-call]
        return output.transpose(0, 1), (output[-1:], c[None])


def _packed(weight: Tensor, rows: int) -> Tensor:
    """`weight` (O, I) as oneDNN lays it out for `rows`: once for all steps."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def _times(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, I) -> (B, O)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _signed(sigmoid: Tensor) -> Tensor:
    """tanh(x) of sigmoid(2 x), in place. torch's own tanh takes six times as long as its sigmoid on AMD."""
    return sigmoid.mul_(2).sub_(1)


class _Layer(torch.autograd.Function):
    """x (T, B, I), h and c (B, H), weights (4 H, I) and (4 H, H), bias (4 H) -> outputs (T, B, H) and the last cells.

    Gates are in torch's order: input, forget, cell, output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        (steps, rows, width), size = x.shape, weight_hh.size(1)
        weight = torch.empty(4 * size, width + size, dtype=torch.bfloat16)
        weight[:, :width], weight[:, width:] = weight_ih, weight_hh
        bias = bias.detach().clone()
        cell = slice(2 * size, 3 * size)
        weight[cell] *= 2  # tanh(x) = 2 sigmoid(2 x) - 1; in bfloat16 doubling and halving are exact
        bias[cell] *= 2
        packed, bias = _packed(weight, rows), bias.bfloat16()
        weight[cell] /= 2
        both = torch.empty(steps + 1, rows, width + size, dtype=torch.bfloat16)  # inputs beside the state before them
        both[:steps, :, :width], both[0, :, width:] = x, h
        cells = torch.empty(steps + 1, rows, size)
        cells[0] = c
        kept = torch.empty(steps, rows, 4 * size, dtype=torch.bfloat16)
        squashed = torch.empty(steps, rows, size, dtype=torch.bfloat16)
        gates, new = torch.empty(rows, 4 * size), torch.empty(rows, size)
        i, f, g, o = gates.chunk(4, 1)
        outputs = both[1:, :, width:]
        each = zip(both, cells, cells[1:], kept, squashed, outputs, strict=False)
        for inputs, before, after, gates_kept, new_kept, output in each:
            gates.copy_(_times(inputs, packed, bias)).sigmoid_()
            _signed(g)
            gates_kept.copy_(gates)
            torch.mul(f, before, out=after).addcmul_(i, g)
            _signed(torch.mul(after, 2, out=new).sigmoid_())
            new_kept.copy_(new)
            output.copy_(new.mul_(o))
        ctx.save_for_backward(both, cells, kept, squashed, weight)
        ctx.types = [each.dtype for each in (x, h, c, weight_ih, weight_hh, bias)]
        return outputs.contiguous(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_cells: Tensor) -> tuple[Tensor | None, ...]:
        both, cells, kept, squashed, weight = ctx.saved_tensors
        steps, rows, size = squashed.shape
        width = weight.size(1) - size
        learns = ctx.needs_input_grad[0]  # else what reads `x` in the weights has no part in what follows
        back = weight if learns else weight[:, width:]
        packed = _packed(back.t(), rows) if steps >= _STEPS_TO_PACK else None
        grad_x = torch.empty(steps, rows, width, dtype=torch.bfloat16) if learns else None
        raw = torch.empty(steps, rows, 4 * size, dtype=torch.bfloat16)  # gradients before sigmoid and tanh
        gates, slopes = torch.empty(rows, 4 * size), torch.empty(rows, 4 * size)
        i, f, g, o = gates.chunk(4, 1)
        of_i, of_f, of_g, of_o = slopes.chunk(4, 1)
        dh, tanh, part, other = (torch.empty(rows, size) for _ in range(4))
        dc, through = grad_cells.float().clone(), torch.zeros(rows, size, dtype=torch.bfloat16)
        grad_bias = torch.zeros(4 * size)
        each = list(zip(range(steps), grad, cells, kept, squashed, raw, strict=False))
        for t, of_output, before, gates_kept, new_kept, raw_kept in reversed(each):
            gates.copy_(gates_kept)
            tanh.copy_(new_kept)
            dh.copy_(of_output).add_(through)
            torch.mul(dh, o, out=part)
            dc.add_(part).addcmul_(part.mul_(tanh), tanh, value=-1)
            torch.addcmul(gates, gates, gates, value=-1, out=slopes)
            of_i.mul_(torch.mul(dc, g, out=part))
            of_f.mul_(torch.mul(dc, before, out=part))
            of_o.mul_(torch.mul(dh, tanh, out=part))
            torch.mul(dc, i, out=part)
            torch.addcmul(part, torch.mul(part, g, out=other), g, value=-1, out=of_g)
            raw_kept.copy_(slopes)
            grad_bias += slopes.sum(0)
            dc.mul_(f)
            through = torch.mm(raw_kept, back) if packed is None else _times(raw_kept, packed)
            if grad_x is not None:
                grad_x[t], through = through[:, :width], through[:, width:]
        flat = raw.view(steps * rows, 4 * size)
        grad_weight = torch.mm(flat.t(), both[:steps].view(steps * rows, -1))
        found = (grad_x, through, dc, grad_weight[:, :width], grad_weight[:, width:], grad_bias)
        return tuple(None if one is None else one.to(dtype) for one, dtype in zip(found, ctx.types, strict=True))
