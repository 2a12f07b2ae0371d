"""What a classifier's training needs of a chunk of hidden states, in one operation: concat pooling, AR and TAR.

As operations of their own with their gradients, they are 60 passes and keep three copies in float32 for the backward
pass. For the CPU, where such passes over a few hundred tokens are a hundredth of a step and long documents need memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkSums(NamedTuple):
    """Of the steps that count: for each document, and for all of them together. In float32.

    Attributes:
        maximum: (B, E), -inf where no step counts.
        total: (B, E), sum.
        last: (B, E), the state at the step asked for.
        squares: scalar, sum of squares.
        moves: scalar, sum of squares of the differences between neighbouring steps.
    """

    maximum: Tensor
    total: Tensor
    last: Tensor
    squares: Tensor
    moves: Tensor


def chunk_sums(hidden: Tensor, kept: Tensor | None, last: Tensor) -> ChunkSums:
    """Sums over `hidden` (B, T, E); differentiable once.

    Args:
        kept: (B, T) bool, the steps that count; None: all.
        last: (B,) int64, a step of each document.
    """
    return ChunkSums(*_ChunkSums.apply(hidden, kept, last))  # type: ignore[no-untyped-call]


def _weights(kept: Tensor | None) -> Tensor | None:
    """(B, T) bool -> (T, B, 1): ones where a step counts; booleans would be converted number by number."""
    return None if kept is None else kept.t().unsqueeze(-1).float()


def _steps(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """(B, T, E) -> (T, B, E) in float32, which is how LSTMs leave them in memory; zeros where a step does not count."""
    x = hidden.detach().transpose(0, 1).float()
    return x if weights is None else x * weights


def _moves(x: Tensor, weights: Tensor | None) -> Tensor:
    """(T, B, E) -> (T - 1, B, E), zeros where one of both steps does not count."""
    moves = x[1:] - x[:-1]
    return moves if weights is None else moves.mul_(weights[1:] * weights[:-1])


class _ChunkSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kept: Tensor | None, last: Tensor) -> tuple[Tensor, ...]:
        weights = _weights(kept)
        x = _steps(hidden, weights)
        maximum = (x if weights is None else x.masked_fill(weights == 0, -torch.inf)).amax(0)
        ctx.save_for_backward(hidden, weights, last, maximum)
        rows = torch.arange(len(last), device=last.device)
        # (A norm's sum is less exact.)
        squares, moves = (part.square().sum() for part in (x, _moves(x, weights)))
        return maximum, x.sum(0), hidden.detach()[rows, last].float(), squares, moves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        hidden, weights, last, maximum = ctx.saved_tensors
        of_maximum, of_total, of_last, of_squares, of_moves = grads
        x = _steps(hidden, weights)
        largest = (x == maximum).float()
        grad = x.mul(2 * of_squares).add_(of_total)
        moves = _moves(x, weights).mul_(2 * of_moves)
        grad[1:].add_(moves)
        grad[:-1].sub_(moves)
        if weights is not None:
            largest.mul_(weights)
            grad.mul_(weights)
        grad.addcmul_(largest, of_maximum / largest.sum(0).clamp_(min=1))  # in equal parts to steps that are alike
        grad[last, torch.arange(len(last), device=last.device)] += of_last
        return grad.to(hidden.dtype).transpose(0, 1), None, None
