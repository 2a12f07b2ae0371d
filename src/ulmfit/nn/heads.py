"""What stands on the encoder: the tied softmax of the language model, concat pooling and the classifier's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulmfit.nn import synchronised
from ulmfit.nn.chunk_sums import ChunkSums, chunk_sums


class TiedDecoder(nn.Module):
    """Softmax layer whose matrix is the embedding's; it owns only the bias (V,)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(..., E), (V, E) -> logits (..., V)."""
        return F.linear(hidden, embedding, self.bias)


@dataclass
class ConcatPool:
    """Running concat pooling over chunks of documents (Howard & Ruder 2018, section 3.3), one row per document.

    Holds the last hidden state, the maximum and the sum seen so far, each (B, E), and the number of steps pooled (B,).
    """

    last: Tensor
    maximum: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def empty(cls, batch: int, size: int, like: Tensor) -> ConcatPool:
        zeros = torch.zeros(batch, size, device=like.device)
        return cls(
            zeros, torch.full_like(zeros, -torch.inf), zeros, torch.zeros(batch, device=like.device, dtype=torch.int64)
        )

    def __getitem__(self, rows: slice | Tensor) -> ConcatPool:
        """Some of the documents."""
        return ConcatPool(self.last[rows], self.maximum[rows], self.total[rows], self.count[rows])

    def add(self, hidden: Tensor, position: Tensor, lengths: Tensor, max_len: int) -> ConcatPool:
        """Pool a chunk: `hidden` (B, T, E) at `position` (T,) of documents of `lengths` (B,).

        The last `max_len` steps of each document count, whatever else is in the batch.
        """
        hidden = hidden.float()
        kept = kept_steps(position, lengths, max_len)
        end, ends_here = _last_steps(position, lengths)
        mask = kept.unsqueeze(-1)
        maximum = torch.maximum(self.maximum, hidden.masked_fill(~mask, -torch.inf).amax(1))
        total = self.total + hidden.masked_fill(~mask, 0).sum(1)
        rows = torch.arange(len(end), device=end.device)
        last = torch.where(ends_here, hidden[rows, end], self.last)
        return ConcatPool(last, maximum, total, self.count + kept.sum(1))

    def add_sums(
        self, hidden: Tensor, position: Tensor, lengths: Tensor, max_len: int, whole: bool
    ) -> tuple[ConcatPool, ChunkSums]:
        """`add` and the sums it comes from; all steps count if `whole`. For training on the CPU."""
        kept = None if whole else kept_steps(position, lengths, max_len)
        end, ends_here = _last_steps(position, lengths)
        sums = chunk_sums(hidden, kept, end)
        count = self.count + (hidden.size(1) if kept is None else kept.sum(1))
        maximum, last = torch.maximum(self.maximum, sums.maximum), torch.where(ends_here, sums.last, self.last)
        return ConcatPool(last, maximum, self.total + sums.total, count), sums

    def add_whole(self, hidden: Tensor) -> ConcatPool:
        """`add` without a mask, where all steps count for all documents; the last one is right once a document ends."""
        hidden = hidden.float()
        maximum, total = torch.maximum(self.maximum, hidden.amax(1)), self.total + hidden.sum(1)
        return ConcatPool(hidden[:, -1], maximum, total, self.count + hidden.size(1))

    def features(self) -> Tensor:
        """[last, max, mean] (B, 3 * E); zeros for a document without steps."""
        count = self.count[:, None]
        return torch.cat([self.last, self.maximum.masked_fill(count == 0, 0), self.total / count.clamp(min=1)], dim=1)


def kept_steps(position: Tensor, lengths: Tensor, max_len: int) -> Tensor:
    """(B, T): which steps at `position` (T,) are among the last `max_len` of documents of `lengths` (B,)."""
    return (position < lengths[:, None]) & (position >= lengths[:, None] - max_len)


def _last_steps(position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The last step of each document (B,), counted in the chunk at `position` (T,), and whether it is there (B, 1)."""
    end = lengths - 1 - position[0]
    return end.clamp(0, len(position) - 1), ((end >= 0) & (end < len(position))).unsqueeze(-1)


class ClassifierHead(nn.Module):
    """Blocks of batch norm, dropout, linear; ReLU between them (Howard & Ruder 2018, section 3.3).

    With `across_processes`, which is plain data as the dropout is, batch norm takes in training the statistics of the
    batches of all processes; all of them have to call it then.
    """

    def __init__(self, inputs: int, hidden: int, classes: int, dropout: Sequence[float] = (0.4, 0.1)) -> None:
        super().__init__()
        sizes = [inputs, hidden, classes]
        self.hidden, self.classes = hidden, classes
        self.dropout = tuple(dropout)
        self.across_processes = False
        self.norms = nn.ModuleList(nn.BatchNorm1d(n) for n in sizes[:-1])
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))

    def forward(self, features: Tensor) -> Tensor:
        """(B, 3 * E) -> logits (B, C). A training batch of one document uses the running statistics."""
        x = features.to(next(self.linears[0].parameters()).dtype)  # pooled in float32 whatever the weights
        for i, linear in enumerate(self.linears):
            if i > 0:
                x = F.relu(x)
            if self.norms:
                x = _batch_norm(self.norms[i], x, self.across_processes)
            if self.training:
                x = F.dropout(x, self.dropout[i])
            x = linear(x)
        return x

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Make each batch norm part of the linear layer after it, in place and for good; no more training then.

        Logits stay the same to rounding.
        """
        for norm, linear in zip(self.norms, self.linears, strict=True):
            assert isinstance(norm, nn.BatchNorm1d) and isinstance(linear, nn.Linear)
            assert norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight, shift = linear.weight.double(), norm.bias.double() - norm.running_mean.double() * scale
            linear.bias = nn.Parameter((weight @ shift).to(linear.weight.dtype))
            linear.weight = nn.Parameter((weight * scale).to(linear.weight.dtype))
        self.norms = nn.ModuleList()


def _batch_norm(norm: nn.Module, x: Tensor, across_processes: bool) -> Tensor:
    assert isinstance(norm, nn.BatchNorm1d)
    if norm.training and across_processes and synchronised.several_processes():
        return synchronised.batch_norm(norm, x)
    if norm.training and x.size(0) == 1:
        # The variance of one row is undefined; torch raises.
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    out: Tensor = norm(x)
    return out
