"""Language-model batches: B contiguous streams cut into windows, as views of one flat tensor."""

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


class LMStream(EpochLoader):
    """(inputs, targets) windows of B parallel streams, each (B, T) int64; targets are the inputs' next tokens.

    Row r of an epoch reads tokens [r * L, (r + 1) * L) of the documents in this epoch's order, L = (N - 1) // rows;
    consecutive batches are consecutive windows, so the hidden state carries over. With `world_size` ranks the
    rows of the global batch are dealt out in blocks; every rank has the same number of batches.

    Everything is a pure function of (seed, epoch, batch index): a resumed run sees the same windows.

    Args:
        batch_size: rows of this rank.
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
        rows = batch_size * world_size
        self.row_length = (len(cache.tokens) - 1) // rows
        if self.row_length < 1:
            raise DataError(
                f"the text has {len(cache.tokens)} tokens, too few for {rows} parallel streams; "
                "bring more text or lower stage.lm.batch_size"
            )
        self._flat: tuple[int, Tokens] | None = None

    def __len__(self) -> int:
        return len(self._lengths())

    @property
    def tokens_per_epoch(self) -> int:
        """Targets this rank predicts in an epoch."""
        return self.batch_size * self.row_length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        flat = self._ordered()
        first_row = self.rank * self.batch_size
        begin = first_row * self.row_length
        end = begin + self.batch_size * self.row_length
        inputs = flat[begin:end].reshape(self.batch_size, self.row_length)
        targets = flat[begin + 1 : end + 1].reshape(self.batch_size, self.row_length)
        borders = np.concatenate([[0], np.cumsum(self._lengths())])
        start = self._take_start()
        batches = len(borders) - 1
        for i in range(start, batches):
            window = slice(borders[i], borders[i + 1])
            # Lightning never exhausts a loader that has a length: wrap around with the last batch, not after it.
            self._next = (i + 1) % batches
            yield _tensor(inputs[:, window]), _tensor(targets[:, window])

    def tail(self) -> tuple[Tensor, Tensor] | None:
        """What `__iter__` leaves over after the last row, (1, T) each: fewer tokens than there are rows."""
        flat = self._ordered()
        begin = self.batch_size * self.world_size * self.row_length
        if begin >= len(flat) - 1:
            return None
        return _tensor(flat[None, begin:-1]), _tensor(flat[None, begin + 1 :])

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

    def _ordered(self) -> Tokens:
        """The epoch's documents one after the other. Order and direction untouched: the memory map itself."""
        if not self.shuffle and self.direction == "forward":
            return self.cache.tokens
        key = self.epoch if self.shuffle else -1
        if self._flat is None or self._flat[0] != key:
            order = np.arange(len(self.cache))
            if self.shuffle:
                order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(order)
            self._flat = (key, _gather(self.cache, order, self.direction == "backward"))
        return self._flat[1]


def _gather(cache: TokenCache, order: npt.NDArray[np.int64], backward: bool) -> Tokens:
    flat: Tokens = np.empty(len(cache.tokens), dtype=cache.tokens.dtype)
    position = 0
    for index in order:
        document = cache.document(int(index))
        end = position + len(document)
        flat[position:end] = document
        if backward:
            flat[position + 1 : end] = document[:0:-1]
        position = end
    return flat


def _tensor(window: Tokens) -> Tensor:
    return torch.from_numpy(window.astype(np.int64))
