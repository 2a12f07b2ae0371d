"""Where an LSTM layer in training is read by compiled loops (`fused_lstm`), and their gradients.

In bfloat16 on processors with such products (AVX-512 BF16, AMX), in float32 on those with AVX2: oneDNN's own layers
reach 60 (with tiles 30) and 80 % of what such processors multiply. Needs Numba.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ulmfit.nn import fused_lstm
from ulmfit.nn.matrix_tiles import kind_of_floats
from ulmfit.nn.processor import cpu_casts_to_bfloat16, cpu_has_avx2, cpu_multiplies_bfloat16
from ulmfit.nn.vectors import LEAST_SIZE_TO_COMPILE


def kind_for(rnn: nn.Module, x: Tensor) -> str | None:
    """The kind of loops (`kinds`) that read `x` (B, T, I) faster than `rnn` does, if there are such.

    Validation in float32 takes them if training has: alone it would rarely last as long as they are compiled.
    """
    if not isinstance(rnn, nn.LSTM) or rnn.hidden_size < LEAST_SIZE_TO_COMPILE or x.size(0) == 0 or x.size(1) == 0:
        return None
    bfloat16 = torch.is_autocast_enabled("cpu")
    floats = x.dtype == torch.float32 and rnn.get_parameter("weight_hh_l0").dtype == torch.float32
    kind = kind_on(x.device, bfloat16, floats, x.size(0))
    if kind is None or not (bfloat16 or rnn.training or fused_lstm.is_compiled(kind)):
        return None
    return kind if fused_lstm.is_available(kind) else None


def reads_in_bfloat16(rnns: Iterable[nn.Module], device: torch.device) -> bool:
    """Whether all `rnns` are read by loops in bfloat16, for which any number of rows will do."""
    return (
        kind_on(device, torch.is_autocast_enabled("cpu"), False, 1) == "bf16"
        and all(isinstance(rnn, nn.LSTM) and rnn.hidden_size >= LEAST_SIZE_TO_COMPILE for rnn in rnns)
        and fused_lstm.is_available("bf16")
    )


def kind_on(device: torch.device, bfloat16: bool, floats: bool, rows: int) -> str | None:
    """The kind of loops for products of `rows` in bfloat16, or of `floats`, if the device is a processor with such."""
    if device.type != "cpu" or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    if bfloat16:
        return "bf16" if cpu_casts_to_bfloat16() and cpu_multiplies_bfloat16() else None
    return kind_of_floats(rows) if floats and cpu_has_avx2() else None


def lstm(
    kind: str, rnn: nn.Module, rate: float, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `rnn` returns for `x` (B, T, I) and `state`, `rate` of its (4 H, H) weights dropped.

    Outputs (B, T, H) and hidden state are of `kind`, the cells (1, B, H) in float32. Differentiable once.
    """
    weight_ih, weight_hh, *biases = (
        rnn.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    with torch.autocast("cpu", enabled=False):
        h, c = (None, None) if state is None else (state[0][0], state[1][0])
        output, c = _FusedLayer.apply(  # type: ignore[no-untyped-call]
            kind, x.transpose(0, 1), h, c, weight_ih, weight_hh, biases[0] + biases[1], rate
        )
        # A copy, as a view of all outputs would keep them as long as the state is carried on.
        return output.transpose(0, 1), (output[-1:].clone(memory_format=torch.contiguous_format), c[None])


class _FusedLayer(torch.autograd.Function):
    """x (T, B, I), h and c (B, H) or None, weights (4 H, I) and (4 H, H), bias (4 H) -> outputs (T, B, H), last cells.

    None stands for zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, kind: str, x: Tensor, h: Tensor | None, c: Tensor | None, weight_ih: Tensor, weight_hh: Tensor,
        bias: Tensor, rate: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (steps, rows, _), size = x.shape, weight_hh.size(1)
        seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) if rate > 0 else 0
        weights = fused_lstm.Weights(kind, weight_ih, weight_hh, rate, seed, any(ctx.needs_input_grad))
        both = torch.empty(steps + 1, rows, weights.columns * weights.parts, dtype=weights.dtype)
        weights.put(x, both[:steps], 0, weights.state_at)
        weights.put((x.new_zeros(rows, size) if h is None else h)[None], both[:1], weights.state_at, weights.padded)
        cells = torch.empty(steps + 1, rows, weights.padded)
        cells[0], cells[0, :, :size] = 0, 0 if c is None else c
        gates = torch.empty(steps, rows, 4 * weights.padded * weights.parts, dtype=weights.dtype)
        outputs = fused_lstm.forward(weights, bias.float(), both, cells, gates, h is None)
        del weights.forward  # the backward pass has no need of it
        ctx.save_for_backward(both, cells, gates)
        ctx.done = False
        given = (x, h, c, weight_ih, weight_hh, bias)
        ctx.weights, ctx.types, ctx.from_zero = weights, [None if e is None else e.dtype for e in given], h is None
        return outputs, cells[-1, :, :size].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_cells: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.done:  # what the first backward pass needed is overwritten
            raise RuntimeError("gradients of a compiled LSTM layer can be computed once for each forward pass")
        ctx.done = True
        both, cells, gates = ctx.saved_tensors
        weights: fused_lstm.Weights = ctx.weights
        grad_c = nn.functional.pad(grad_cells.float(), (0, weights.padded - weights.size)).clone(
            memory_format=torch.contiguous_format
        )
        # Nothing learns from the gradient of inputs whose part below is frozen, nor of a state that is given.
        _, of_x, of_h, of_c, *_ = ctx.needs_input_grad
        through, grad_bias, grad_x = fused_lstm.backward(
            weights, cells, gates, grad.to(weights.outside), grad_c, of_x, of_h
        )
        grad_weights = fused_lstm.weight_gradients(weights, gates, both, ctx.from_zero)
        found = (grad_x, through, grad_c[:, : weights.size] if of_c else None, *grad_weights, grad_bias)
        typed = (None if one is None else one.to(dtype) for one, dtype in zip(found, ctx.types, strict=True))
        return None, *typed, None
