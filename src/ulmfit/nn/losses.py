"""Softmax cross-entropy in chunks, and the activation penalties AR and TAR."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass, so that no (N, V) matrix ever exists."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        n = hidden.size(0)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        h, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=torch.float64 if hidden.device.type == "cpu" else torch.float32, device=h.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for start in range(0, n, chunk):
            rows = h[start : start + chunk]  # (C, E)
            target = targets[start : start + chunk]  # (C,)
            logits = torch.mm(rows, w.t()).float().add_(bias)  # (C, V)
            lse = torch.logsumexp(logits, dim=1)  # (C,)
            total += (lse - logits.gather(1, target[:, None])[:, 0]).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d loss / d logits = (softmax - one-hot) / N, written over the logits; the division waits for the
            # backward pass, where a gradient scaler's factor makes up for it: float16 would underflow here.
            grad = logits.sub_(lse[:, None]).exp_()
            grad[torch.arange(grad.size(0), device=grad.device), target] -= 1
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = torch.mm(grad, w)
            if grad_weight is not None:
                grad_weight += torch.mm(grad.t(), rows)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.rows = n
        return (total / n).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.rows
        return (*(None if g is None else (g.float() * scale).to(g.dtype) for g in ctx.saved_tensors), None, None, None)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int = 1024, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean cross-entropy of `softmax(hidden @ weight.T + bias)` in nats, without holding all logits.

    Args:
        hidden: (N, E). weight: (V, E). bias: (V,). targets: (N,) int64.
        chunk: rows whose logits exist at a time.
        dtype: of the matrix products; None: autocast's where it is on, else `hidden`'s.
    """
    device = hidden.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk, dtype)  # type: ignore[no-untyped-call]
    return loss


def summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of the cross-entropies in float64, for exact perplexities; no gradients."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for start in range(0, hidden.size(0), chunk):
        logits = F.linear(hidden[start : start + chunk], weight, bias).float()
        total += F.cross_entropy(logits, targets[start : start + chunk], reduction="none").double().sum().cpu()
    return total


def activation_regularisation(
    dropped: Tensor, raw: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """AR and TAR (Merity et al. 2017, section 4.6): alpha * mean(dropped^2) + beta * mean((raw[t+1] - raw[t])^2).

    Args:
        dropped, raw: last layer's outputs after and before output dropout, (B, T, E); computed in float32.
        mask: (B, T) bool, True where there is a token; None: everywhere.
    """
    penalty = torch.zeros((), device=raw.device)
    if alpha > 0:
        squares = dropped.float().pow(2)
        penalty = penalty + alpha * _mean(squares, mask)
    if beta > 0 and raw.size(1) > 1:
        steps = (raw[:, 1:].float() - raw[:, :-1].float()).pow(2)
        penalty = penalty + beta * _mean(steps, None if mask is None else mask[:, 1:] & mask[:, :-1])
    return penalty


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean()
    return (x * mask.unsqueeze(-1)).sum() / (mask.sum().clamp(min=1) * x.size(-1))
