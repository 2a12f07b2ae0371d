"""An LSTM layer in training in bfloat16 on processors with such products but no tiles (AVX-512 BF16).

For machines without Numba (with it, `fused_layer` is faster): oneDNN's own layer reaches 60 % of such a processor's
products there. A step is one product of inputs and hidden state side by side, the backward pass one product a step, one
for all inputs and one for all weights, and what is between them is computed in float32 by `torch_cell`. Gradients are
as close to float32's as oneDNN's are, or closer.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ulmfit.nn import torch_cell
from ulmfit.nn.dropout import weight_dropout
from ulmfit.nn.processor import cpu_casts_to_bfloat16, cpu_has_tiles, cpu_multiplies_bfloat16, onednn_has

_LEAST_SIZE, _MOST_ROWS = 400, 192  # smaller layers are read no slower by oneDNN; hardly more was measured
_STEPS_TO_PACK = 24  # fewer take less time than to lay out transposed weights


def is_worth_it(rnn: nn.Module, x: Tensor) -> TypeGuard[nn.LSTM]:
    """Whether `lstm` reads `x` (B, T, I) faster than `rnn` does under autocast, in training."""
    return (
        isinstance(rnn, nn.LSTM)
        and x.device.type == "cpu"
        and x.size(0) > 0
        and x.size(1) > 0
        and cpu_casts_to_bfloat16()
        and not torch.compiler.is_compiling()
        and cpu_multiplies_bfloat16()
        and not cpu_has_tiles()
        and torch.is_grad_enabled()
        and rnn.hidden_size >= _LEAST_SIZE
        and x.size(0) <= _MOST_ROWS
        and onednn_has("_linear_pointwise")
        and onednn_has("_reorder_linear_weight")
    )


def lstm(
    rnn: nn.LSTM, rate: float, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `rnn` returns for `x` (B, T, I) and `state`, `rate` of its (4 H, H) weights dropped.

    Outputs (B, T, H) and hidden state are in bfloat16, the cells (1, B, H) in float32. Differentiable once.
    """
    weight_ih, weight_hh, *biases = (
        rnn.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    matrix = weight_dropout(weight_hh, rate, True)
    with torch.autocast("cpu", enabled=False):
        if state is None:
            h = c = x.new_zeros(x.size(0), weight_hh.size(1))
        else:
            h, c = state[0][0], state[1][0]
        output, c = _Layer.apply(  # type: ignore[no-untyped-call]
            x.transpose(0, 1), h, c, weight_ih, matrix, biases[0] + biases[1]
        )
        return output.transpose(0, 1), (output[-1:], c[None])


def _packed(weight: Tensor, rows: int) -> Tensor:
    """`weight` (O, I) as oneDNN lays it out for `rows`: once for all steps."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def _times(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, I) -> (B, O)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


class _Layer(torch.autograd.Function):
    """x (T, B, I), h and c (B, H), weights (4 H, I) and (4 H, H), bias (4 H) -> outputs (T, B, H), last cells."""

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
        gates = [torch.empty(0)] * steps  # (B, 4 H) of each step
        step = torch_cell.forward_step(both, cells)
        for t, inputs in enumerate(both[:steps].unbind()):
            gates[t] = _times(inputs, packed, bias)
            step(t, gates[t])
        ctx.save_for_backward(both, cells, weight, *gates)
        ctx.types = [each.dtype for each in (x, h, c, weight_ih, weight_hh, bias)]
        return both[1:, :, width:].contiguous(), cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_cells: Tensor) -> tuple[Tensor | None, ...]:
        both, cells, weight, *gates = ctx.saved_tensors
        (rows, size), steps = cells.shape[1:], len(gates)
        width = weight.size(1) - size
        back = weight[:, width:]
        packed = _packed(back.t(), rows) if steps >= _STEPS_TO_PACK else None
        raw = torch.empty(steps, rows, 4 * size, dtype=torch.bfloat16)  # gradients before sigmoid and tanh
        grad_c, grad_bias = grad_cells.float().clone(), torch.zeros(4 * size)
        through = torch.zeros(rows, size, dtype=torch.bfloat16)
        step = torch_cell.backward_step(cells, grad.bfloat16(), raw, grad_c, grad_bias)
        for t in reversed(range(steps)):
            step(t, gates[t], through)
            through = torch.mm(raw[t], back) if packed is None else _times(raw[t], packed)
        flat = raw.view(steps * rows, 4 * size)
        # Nothing learns from the gradient of inputs whose part below is frozen.
        grad_x = torch.mm(flat, weight[:, :width]).view(steps, rows, width) if ctx.needs_input_grad[0] else None
        grad_weight = torch.mm(flat.t(), both[:steps].view(steps * rows, -1))
        found = (grad_x, through, grad_c, grad_weight[:, :width], grad_weight[:, width:], grad_bias)
        return tuple(None if one is None else one.to(dtype) for one, dtype in zip(found, ctx.types, strict=True))
