"""Language-model batches: B contiguous streams cut into windows, read from a memory map of any size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulmfit.data.cache import TokenCache, Tokens
from ulmfit.data.loader import EpochLoader
from ulmfit.errors import DataError

_BPTT_SPREAD = 5.0  # standard deviation of random window lengths (Merity et al. 2017, section 4.1)
_SHORT_SHARE = 0.05  # share of windows drawn around bptt / 2
_SHORTEST = 5
_BLOCK = 1 << 22  # tokens brought into order at a time, all rows together


class LMStream(EpochLoader):
    """(inputs, targets) windows of B parallel streams, each (B, T) int64; targets are the inputs' next tokens.

    Row r of an epoch reads tokens [r * L, (r + 1) * L) of the documents in this epoch's order, L = (N - 1) // rows;
    consecutive batches are consecutive windows, so the hidden state carries over. With `world_size` ranks the rows
    are dealt out in blocks whose sizes differ by one at most, so the ranks together read what one alone would, batch
    by batch; every rank has the same number of batches. Fewer than `rows` tokens at the end are left out (`tail`),
    in each epoch others if documents are shuffled.

    Everything is a pure function of (seed, epoch, batch index): a resumed run sees the same windows.

    Args:
        batch_size: rows of all ranks together. A rank has none (batches of no rows) if there are more ranks.
        bptt: window length, exact unless `random_bptt`.
        random_bptt: lengths from N(bptt, 5), in 5 % of cases N(bptt / 2, 5); their number per epoch stays fixed.
        direction: "backward" reverses each document after its begin marker.
        shuffle: a new document order each epoch (training).

    Raises:
        DataError: if the text is too short for one window of two tokens in each row.
    """

    def __init__(
        self,
        cache: TokenCache,
        batch_size: int,
        bptt: int = 70,
        random_bptt: bool = False,
        direction: str = "forward",
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.cache = cache
        self.batch_size = batch_size
        self.bptt = bptt
        self.random_bptt = random_bptt
        self.direction = direction
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.rows = range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)  # of this rank
        self.row_length = (len(cache.tokens) - 1) // batch_size
        if self.row_length < 1:
            raise DataError(
                f"the text has {len(cache.tokens)} tokens, too few for {batch_size} parallel streams; "
                "bring more text or lower stage.lm.batch_size"
            )
        self._ordered: tuple[int, _Order] | None = None

    def __len__(self) -> int:
        return len(self._lengths())

    @property
    def tokens_per_epoch(self) -> int:
        """Targets this rank predicts in an epoch."""
        return len(self.rows) * self.row_length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        borders = np.concatenate([[0], np.cumsum(self._lengths())])
        batches = len(borders) - 1
        at_once = max(1, _BLOCK // (self.bptt * max(1, len(self.rows))))  # windows
        block, first, end = np.empty((0, 0), dtype=np.int64), 0, 0
        for i in range(self._take_start(), batches):
            if i >= end:
                end = min(batches, i + at_once)
                first = borders[i]
                block = self._block(int(first), int(borders[end]) + 1)
            window = block[:, borders[i] - first : borders[i + 1] - first + 1]
            # Lightning never exhausts a loader that has a length: wrap around with the last batch, not after it.
            self._next = (i + 1) % batches
            yield _tensor(window[:, :-1]), _tensor(window[:, 1:])

    def tail(self) -> tuple[Tensor, Tensor] | None:
        """What `__iter__` leaves over after the last row, (1, T) each: fewer tokens than there are rows."""
        begin, end = self.batch_size * self.row_length, len(self.cache.tokens)
        if begin >= end - 1:
            return None
        rest = self._order().read(begin, end)[None]
        return _tensor(rest[:, :-1]), _tensor(rest[:, 1:])

    def lead_in(self, steps: int) -> Tensor | None:
        """The `steps` tokens before each row but the first, (rows - 1, steps); None if there is but one row."""
        order = self._order()
        begins = [row * self.row_length for row in self.rows if row > 0]
        return _tensor(np.stack([order.read(max(0, at - steps), at) for at in begins])) if begins else None

    def _block(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of each row, (rows, end - begin)."""
        order = self._order()
        block = np.empty((len(self.rows), end - begin), dtype=self.cache.tokens.dtype)
        for i, row in enumerate(self.rows):
            block[i] = order.read(row * self.row_length + begin, row * self.row_length + end)
        return block

    def _layout(self) -> dict[str, int]:
        return {
            "tokens": len(self.cache.tokens),
            "batch_size": self.batch_size,
            "bptt": self.bptt,
            "world_size": self.world_size,
            "seed": self.seed,
        }

    def _lengths(self) -> npt.NDArray[np.int64]:
        """Window lengths of this epoch; they sum to `row_length` and their number does not depend on the epoch."""
        if not self.random_bptt:
            count = -(-self.row_length // self.bptt)
            lengths: npt.NDArray[np.int64] = np.full(count, self.bptt, dtype=np.int64)
            lengths[-1] = self.row_length - self.bptt * (count - 1)
            return lengths
        mean = self.bptt * (1 - _SHORT_SHARE / 2)
        count = min(max(1, round(self.row_length / mean)), self.row_length)
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        centre = np.where(rng.random(count) < _SHORT_SHARE, self.bptt / 2, self.bptt)
        drawn = np.maximum(rng.normal(centre, _BPTT_SPREAD), _SHORTEST)
        # Scale to the exact sum: rounding the running total spreads the small correction over all windows.
        # One token of each window is set aside, so that none is empty.
        rest = np.cumsum(drawn - 1) * ((self.row_length - count) / (drawn - 1).sum())
        lengths = 1 + np.diff(np.rint(rest).astype(np.int64), prepend=0)
        return lengths

    def _order(self) -> _Order:
        """The epoch's documents one after the other."""
        key = self.epoch if self.shuffle else -1
        if self._ordered is None or self._ordered[0] != key:
            order = None
            if self.shuffle:
                order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(len(self.cache))
            self._ordered = (key, _Order(self.cache, order, self.direction == "backward"))
        return self._ordered[1]


class _Order:
    """Documents in an order of their own, read from the memory map piece by piece, so of any size.

    Args:
        order: their indices; None: as they are.
        backward: each reversed after its begin marker.
    """

    def __init__(self, cache: TokenCache, order: npt.NDArray[np.int64] | None, backward: bool) -> None:
        self.cache, self.order, self.backward = cache, order, backward
        self.starts = cache.offsets if order is None else np.concatenate([[0], np.cumsum(cache.lengths[order])])

    def read(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of all documents one after the other."""
        if self.order is None and not self.backward:
            return self.cache.tokens[begin:end]
        out = np.empty(end - begin, dtype=self.cache.tokens.dtype)
        position = begin
        index = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while position < end:
            start, stop = int(self.starts[index]), int(self.starts[index + 1])
            upto = min(stop, end)
            document = self.cache.document(index if self.order is None else int(self.order[index]))
            if self.backward:
                document = np.concatenate([document[:1], document[:0:-1]])
            out[position - begin : upto - begin] = document[position - start : upto - start]
            position, index = upto, index + 1
        return out


def _tensor(window: Tokens) -> Tensor:
    return torch.from_numpy(window.astype(np.int64))
