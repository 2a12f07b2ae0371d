"""The dropouts of the AWD-LSTM as functions (Merity et al. 2017, sections 3 and 4); all do nothing at rate 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    return x * _mask((x.size(0), 1, x.size(2)), rate, x)


def embedding_dropout(
    tokens: Tensor, weight: Tensor, rate: float, training: bool, lookups: Lookups | None = None
) -> Tensor:
    """Look up `tokens` (B, T) in `weight` (V, E) with whole rows dropped -> (B, T, E); mask (V, 1).

    The mask is looked up with the rows, so the matrix is never copied. `lookups` of `weight` are used if given.
    """
    steps = tokens.t()  # in memory step by step, the order in which the LSTMs read
    rows = F.embedding(steps, weight) if lookups is None else lookups(steps)  # (T, B, E)
    if training and rate > 0:
        rows = rows * _mask((weight.size(0),), rate, weight)[steps].unsqueeze(-1)
    return rows.transpose(0, 1)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Each number of `x`, of any shape, by itself."""
    if not training or rate == 0 or x.device.type != "cpu":
        return F.dropout(x, rate, training)
    return x * _mask(x.shape, rate, x)


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
        bits, ctx.scale = _draw(weight.shape, rate)
        # A long document's backward pass needs the masks of all its chunks, so a byte for each weight is kept.
        ctx.mask = bits.to(torch.int8)
        scaled = weight * ctx.scale
        return _keep(scaled.bfloat16() if reduced else scaled, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _keep(grads[0].contiguous(), ctx.mask).float().mul_(ctx.scale), None, None


def _keep(x: Tensor, bits: Tensor) -> Tensor:
    """`x` where `bits` is -1, zeros where it is 0; bits as long as `x` are overwritten."""
    size = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return bits.to(size).bitwise_and_(x.view(size)).view(x.dtype)


def _draw(shape: Sequence[int], rate: float) -> tuple[Tensor, float]:
    """16-bit integers, -1 where to keep and 0 where to drop, and what makes up for it; on the CPU.

    Torch draws a float for each number there, which takes six times as long.
    """
    keep, count = max(1, round((1 - rate) * 2**15)), math.prod(shape)
    # Four 16-bit integers of each draw, halved to [-2**14, 2**14). Those to keep are made negative; their sign
    # shifted through gives all bits set, in integers of other sizes too.
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    bits = drawn[:count].bitwise_right_shift_(1).sub_(keep - 2**14).bitwise_right_shift_(15)
    return bits.view(*shape), 2**15 / keep


def _mask(shape: Sequence[int], rate: float, like: Tensor) -> Tensor:
    """Zeros with probability `rate`, else 1 / (1 - rate); of the type of `like`, on its device."""
    if like.device.type != "cpu":
        return like.new_empty(*shape).bernoulli_(1 - rate).div_(1 - rate)
    bits, scale = _draw(shape, rate)
    return bits.to(like.dtype).mul_(-scale)
