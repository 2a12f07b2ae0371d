"""Batch normalisation over the rows of all processes that train together, so that they compute what one would."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """Each process has a loss of its own, so the gradient of a sum they share is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def several_processes() -> bool:
    """Whether this is one of several processes that can reach each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batch_norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """What `norm` in training mode makes of the rows (B, F) of all processes together -> this one's (B, F).

    All processes have to call it; they may have different numbers of rows. torch's SyncBatchNorm needs a GPU.
    """
    rows = x.double()  # so that the variance may come from sums in one exchange
    ones = torch.ones(1, dtype=rows.dtype, device=x.device)
    sums: Tensor = _SumOverProcesses.apply(torch.cat([rows.sum(0), rows.square().sum(0), x.size(0) * ones]))  # type: ignore[no-untyped-call]
    count = sums[-1]
    mean, square = (sums[:-1] / count).view(2, -1)
    variance = (square - mean.square()).clamp(min=0)
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    if count == 1:  # the variance of one row is undefined
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    else:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked += 1
    normal: Tensor = ((rows - mean) * torch.rsqrt(variance + norm.eps)).to(x.dtype)
    return torch.addcmul(norm.bias, normal, norm.weight)
