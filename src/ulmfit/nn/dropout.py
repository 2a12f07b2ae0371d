"""The dropouts of the AWD-LSTM as functions (Merity et al. 2017, sections 3 and 4); all do nothing at rate 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.nn.lookup import Lookups
from ulmfit.nn.processor import cpu_casts_to_bfloat16


def variational_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """One mask for all time steps: (B, T, H) -> (B, T, H), mask (B, 1, H), new for each call."""
    if not training or rate == 0:
        return x
    mask = x.new_empty(x.size(0), 1, x.size(2)).bernoulli_(1 - rate).div_(1 - rate)
    return x * mask


def embedding_dropout(
    tokens: Tensor, weight: Tensor, rate: float, training: bool, lookups: Lookups | None = None
) -> Tensor:
    """Look up `tokens` (B, T) in `weight` (V, E) with whole rows dropped -> (B, T, E); mask (V, 1).

    The mask is looked up with the rows, so the matrix is never copied. `lookups` of `weight` are used if given.
    """
    steps = tokens.t()  # in memory step by step, the order in which the LSTMs read
    rows = F.embedding(steps, weight) if lookups is None else lookups(steps)  # (T, B, E)
    if training and rate > 0:
        keep = torch.empty(weight.size(0), device=weight.device, dtype=weight.dtype).bernoulli_(1 - rate).div_(1 - rate)
        rows = rows * keep[steps].unsqueeze(-1)
    return rows.transpose(0, 1)


def weight_dropout(weight: Tensor, rate: float, training: bool) -> Tensor:
    """DropConnect on a hidden-to-hidden matrix: single entries, inverted scaling, a new mask for each call.

    On a CPU under autocast, the copy has autocast's type already.
    """
    if not training or rate == 0 or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return F.dropout(weight, rate, training)
    dropped: Tensor = _MaskedWeight.apply(weight, rate, cpu_casts_to_bfloat16())  # type: ignore[no-untyped-call]
    return dropped


class _MaskedWeight(torch.autograd.Function):
    """`F.dropout` for millions of weights on the CPU, where drawing floats or booleans takes most of its time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rate: float, reduced: bool) -> Tensor:
        keep = max(1, round((1 - rate) * 2**15))
        # Four 16-bit integers of each draw, halved to [-2**14, 2**14). Those to keep are made negative; their sign
        # shifted through gives all bits set, in integers of other sizes too.
        drawn = torch.empty(-(-weight.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        bits = drawn[: weight.numel()].bitwise_right_shift_(1).sub_(keep - 2**14).bitwise_right_shift_(15)
        bits = bits.view(weight.shape)
        # A long document's backward pass needs the masks of all its chunks, so a byte for each weight is kept.
        ctx.mask, ctx.scale = bits.to(torch.int8), 2**15 / keep
        scaled = weight * ctx.scale
        return _keep(scaled.bfloat16() if reduced else scaled, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _keep(grads[0].contiguous(), ctx.mask).float().mul_(ctx.scale), None, None


def _keep(x: Tensor, bits: Tensor) -> Tensor:
    """`x` where `bits` is -1, zeros where it is 0; bits as long as `x` are overwritten."""
    size = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return bits.to(size).bitwise_and_(x.view(size)).view(x.dtype)
