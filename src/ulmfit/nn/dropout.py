"""The dropouts of the AWD-LSTM as functions (Merity et al. 2017, sections 3 and 4); all do nothing at rate 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def variational_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """One mask for all time steps: (B, T, H) -> (B, T, H), mask (B, 1, H), new for each call."""
    if not training or rate == 0:
        return x
    mask = x.new_empty(x.size(0), 1, x.size(2)).bernoulli_(1 - rate).div_(1 - rate)
    return x * mask


def embedding_dropout(tokens: Tensor, weight: Tensor, rate: float, training: bool) -> Tensor:
    """Look up `tokens` (B, T) in `weight` (V, E) with whole rows dropped -> (B, T, E); mask (V, 1).

    The mask is looked up with the rows, so the matrix is never copied.
    """
    rows = F.embedding(tokens, weight)
    if not training or rate == 0:
        return rows
    keep = torch.empty(weight.size(0), device=weight.device, dtype=weight.dtype).bernoulli_(1 - rate).div_(1 - rate)
    return rows * keep[tokens].unsqueeze(-1)


def weight_dropout(weight: Tensor, rate: float, training: bool) -> Tensor:
    """DropConnect on a hidden-to-hidden matrix: single entries, inverted scaling, a new mask for each call."""
    return F.dropout(weight, rate, training)
