"""An embedding that is looked up several times before a backward pass, with one gradient for all of them.

Torch makes a matrix of the embedding's size for the gradient of each lookup and adds them up: for the 20 chunks of a
long document that takes longer than anything else around the LSTM layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Lookups:
    """Rows of `weight` (V, E); differentiable once."""

    def __init__(self, weight: Tensor) -> None:
        self._found = _Found()
        self._weight: Tensor = _Collect.apply(weight, self._found)  # type: ignore[no-untyped-call]

    def __call__(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., E)."""
        rows: Tensor = _Lookup.apply(self._weight, tokens, self._found)  # type: ignore[no-untyped-call]
        return rows


class _Found:
    """The gradient (V, E) of the lookups that a backward pass has come to; refers to nothing that refers to it."""

    gradient: Tensor | None = None


class _Collect(torch.autograd.Function):
    """The weight itself; its backward pass comes when those of all lookups are done."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, found: _Found) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.found = found
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: None) -> tuple[Tensor | None, None]:
        gradient, ctx.found.gradient = ctx.found.gradient, None
        return gradient, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, found: _Found) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.found, ctx.rows = found, weight.size(0)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (tokens,), grad, found = ctx.saved_tensors, grads[0].reshape(-1, grads[0].size(-1)), ctx.found
        if found.gradient is None:
            found.gradient = grad.new_zeros(ctx.rows, grad.size(1))
        found.gradient.index_add_(0, tokens.reshape(-1), grad)
        return None, None, None
