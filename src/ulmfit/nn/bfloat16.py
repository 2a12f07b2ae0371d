"""An LSTM layer in training in bfloat16 on processors with such products but no tiles (AVX-512 BF16).

oneDNN's own layer reaches 60 % of such a processor's products there. Here each step is one product of inputs and hidden
state side by side, the backward pass one product a step, one for all inputs and one for all weights. What is between
them is computed in float32, by `fused_cell` where Numba is installed, else by `torch_cell`. A gate is rounded once,
after its sum, so that gradients are as close to float32's as oneDNN's are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ulmfit.nn import fused_cell, torch_cell
from ulmfit.nn.processor import cpu_casts_to_bfloat16, cpu_has_tiles, cpu_multiplies_bfloat16, onednn_has

_MOST_ROWS = 192  # hardly more were measured
_LEAST_SIZE = 400  # smaller layers are read no slower by oneDNN than with the cell in torch's operations
_STEPS_TO_PACK = 24  # fewer take less time than to lay out transposed weights


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
        and (rnn.hidden_size >= _LEAST_SIZE or fused_cell.is_available())
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
        step = _cell().forward_step(both, cells)
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
        step = _cell().backward_step(cells, grad.bfloat16(), raw, grad_c, grad_bias)
        for t in reversed(range(steps)):
            step(t, gates[t], through)
            through = torch.mm(raw[t], back) if packed is None else _times(raw[t], packed)
        flat = raw.view(steps * rows, 4 * size)
        # Nothing learns from the gradient of inputs whose part below is frozen.
        grad_x = torch.mm(flat, weight[:, :width]).view(steps, rows, width) if ctx.needs_input_grad[0] else None
        grad_weight = torch.mm(flat.t(), both[:steps].view(steps * rows, -1))
        found = (grad_x, through, grad_c, grad_weight[:, :width], grad_weight[:, width:], grad_bias)
        return tuple(None if one is None else one.to(dtype) for one, dtype in zip(found, ctx.types, strict=True))


def _cell() -> ModuleType:
    return fused_cell if fused_cell.is_available() else torch_cell
