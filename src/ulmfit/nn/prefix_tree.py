"""The steps of documents that begin alike, each beginning once: what a network has to read of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PrefixTree(NamedTuple):
    """N nodes in the order of their T steps; each stands for all documents that are alike up to it.

    All are int32.

    Attributes:
        starts: (T + 1,) the first node of each step, and N.
        tokens: (N,)
        parents: (N,) which node of the step before it goes on from, counted from that step's first; 0 in the first.
        end_starts: (T + 1,) the first of `ends` of each step, and their number.
        ends: (B, 2) node, counted from its step's first, and document that ends there.
    """

    starts: Tensor
    tokens: Tensor
    parents: Tensor
    end_starts: Tensor
    ends: Tensor

    def parts(self, most: int) -> Iterator[PrefixTree]:
        """Trees of some steps each, with at most `most` nodes or a single step, to be read one after the other."""
        starts, end_starts = self.starts.tolist(), self.end_starts.tolist()
        first, steps = 0, len(starts) - 1
        while first < steps:
            stop = max(first + 1, bisect_right(starts, starts[first] + most) - 1)
            nodes, ends = (slice(each[first], each[stop]) for each in (starts, end_starts))
            yield PrefixTree(
                self.starts[first : stop + 1] - starts[first], self.tokens[nodes], self.parents[nodes],
                self.end_starts[first : stop + 1] - end_starts[first], self.ends[ends],
            )  # fmt: skip
            first = stop


def prefix_tree(tokens: Tensor, lengths: Tensor) -> PrefixTree:
    """Of right-padded `tokens` (B, T), at least 0, of documents of `lengths` (B,) up to T."""
    steps = tokens.size(1)
    shifted = torch.where(torch.arange(steps) < lengths[:, None], tokens + 1, 0)
    # Sorted, rows that begin alike come one behind the other.
    order = torch.tensor(sorted(range(len(tokens)), key=shifted.tolist().__getitem__))
    shifted, ended = shifted[order], lengths[order]
    new = shifted > 0
    new[1:] &= (shifted[1:] != shifted[:-1]).cumsum(1) > 0
    node = new.cumsum(0) - 1  # (B, T) of each document at each step, counted in the step
    before = F.pad(node[:, :-1], (1, 0))
    by_step = new.t()
    rows = ended.argsort(stable=True)
    rows = rows[ended[rows] > 0]
    ends = torch.stack([node[rows, ended[rows] - 1], order[rows]], dim=1)
    return PrefixTree(
        _starts(new.sum(0)), (shifted.t()[by_step] - 1).int(), before.t()[by_step].int(),
        _starts(torch.bincount(ended[rows] - 1, minlength=steps)), ends.int(),
    )  # fmt: skip


def _starts(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()
