"""An LSTM layer in training on an NVIDIA GPU: cuDNN's kernels, with weights that were changed for one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")  # as cuDNN wants them one after the other


def lstm(
    rnn: nn.Module, weight_hh: Tensor, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `rnn` returns for `x` (B, T, I) and `state` with `weight_hh` (4 H, H) for its own; differentiable.

    Under autocast all is in autocast's type; torch's own LSTM takes float16 there also when autocast is bfloat16,
    which gradients of a mean over thousands of tokens fall below.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    weights = [weight_hh if name == "weight_hh_l0" else rnn.get_parameter(name) for name in _NAMES]
    if state is None:
        zeros = x.new_zeros(1, x.size(0), weight_hh.size(1), dtype=dtype)
        state = (zeros, zeros)
    with torch.autocast("cuda", enabled=False):
        piece: Tensor = _InOnePiece.apply(dtype, *weights)  # type: ignore[no-untyped-call]
        parts = torch.split(piece, [weight.numel() for weight in weights])
        views = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        before = [part.to(dtype) for part in state]
        output, h, c = torch.lstm(x.to(dtype), before, views, True, 1, 0.0, True, False, True)
    return output, (h, c)


class _InOnePiece(torch.autograd.Function):
    """Tensors one after the other in another type: cuDNN would copy weights that lie apart, in every call."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.tensors = [(tensor.shape, tensor.dtype) for tensor in tensors]
        piece = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
        parts = torch.split(piece, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(parts), [tensor.reshape(-1) for tensor in tensors])
        return piece

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = torch.split(grads[0], [shape.numel() for shape, _ in ctx.tensors])
        return (None, *(part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.tensors, strict=True)))
