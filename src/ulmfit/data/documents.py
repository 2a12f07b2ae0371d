"""Document batches for classification: similar lengths together, bounded in documents and in padded tokens.

Documents are sorted by length into buckets 3 % wide, longest first, and cut into steps, and a step into a batch for
each rank. Shuffling permutes the documents inside each bucket, moves the cuts, and shuffles the steps, so that their
number is the same in every epoch (schedules count on it) while padding stays at a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulmfit.config import TOKENS_AT_A_TIME
from ulmfit.data.loader import EpochLoader
from ulmfit.errors import DataError

Indices = npt.NDArray[np.int64]

_BUCKET_WIDTH = 1.03
_TOKENS_IN_MEMORY = 1_000_000  # of a batch, 8 bytes each


class DocumentBatch(NamedTuple):
    """B documents, padded on the right to the longest.

    Attributes:
        tokens: (B, T) int64.
        lengths: (B,) int64, tokens of each document, begin marker included.
        labels: (B,) int64, -1 where there are none.
        index: (B,) int64, positions in the documents given: restores their order.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the name of a tuple's method


@runtime_checkable
class Documents(Protocol):
    """What `TokenCache` offers: documents as views of a flat array."""

    offsets: npt.NDArray[np.int64]

    def document(self, index: int) -> npt.NDArray[Any]: ...


class DocumentBatches(EpochLoader):
    """Batches of whole documents for one rank. Every document comes exactly once per epoch over all ranks.

    A batch holds at most `batch_size` documents and at most `tokens_per_batch` tokens, padding included; a longer
    document is a batch alone.

    With `shuffle`, for training, the plan is a pure function of (seed, epoch). Every rank gets the same number of
    batches, each with at least one document, those of one step with similar lengths, so that no rank waits; W ranks
    step through what one with W times the `batch_size` would (where `tokens_per_batch` does not bind). Only if there
    are not documents enough (say 5 single-document batches on 2 ranks) may some batches exceed the bounds.

    Without, the plan is sorted by length, longest first, and the ranks get in turn the batches that one alone would
    have; a rank that comes away empty-handed has one batch without documents, so that it takes part.

    Args:
        documents: a `TokenCache`, or arrays of token ids; each starts with the begin marker, so an empty document
            is that marker alone.
        labels: class ids, one a document, or None.
        direction: "backward" reverses the pieces after the begin marker.
        chunk: (t, n): documents are read t tokens at a time, and n is the most to read at a time, padding included.

    Raises:
        DataError: no documents, or, with `shuffle`, fewer than ranks.
        ValueError: labels of another number than documents, a document without even the marker, a bound below 1.
    """

    def __init__(
        self,
        documents: Documents | Sequence[npt.NDArray[Any]],
        labels: Sequence[int] | None,
        batch_size: int,
        tokens_per_batch: int,
        shuffle: bool,
        seed: int,
        direction: str = "forward",
        pad_id: int = 0,
        rank: int = 0,
        world_size: int = 1,
        chunk: tuple[int, int] | None = None,
    ) -> None:
        if batch_size < 1 or tokens_per_batch < 1:
            raise ValueError(f"batch_size={batch_size} and tokens_per_batch={tokens_per_batch} must be at least 1")
        if direction not in ("forward", "backward"):
            raise ValueError(f"direction={direction!r}; expected 'forward' or 'backward'")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not below world_size={world_size}")
        super().__init__()
        self.documents = documents
        self._mapped = documents if isinstance(documents, Documents) else None  # asked once: it takes microseconds
        self.document_lengths: Indices = (
            np.diff(documents.offsets)
            if isinstance(documents, Documents)
            else np.array([len(document) for document in documents], dtype=np.int64)
        ).astype(np.int64)
        count = len(self.document_lengths)
        if count < (world_size if shuffle else 1):
            raise DataError(
                f"There are {count} documents, fewer than the {world_size} processes; bring more or use fewer"
            )
        if self.document_lengths.min() < 1:
            raise ValueError(f"document {int(self.document_lengths.argmin())} has no tokens, not even the begin marker")
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} documents")
        self.labels = np.full(count, -1, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.direction = direction
        self.pad_id = pad_id
        self.rank = rank
        self.world_size = world_size
        self._plan: tuple[int, list[Indices]] | None = None
        self._cuts = _Cuts(self.document_lengths, batch_size, tokens_per_batch, chunk, world_size if shuffle else 1)

    def __len__(self) -> int:
        """Batches of this rank, the same in every epoch and, with `shuffle`, on every rank."""
        return self._cuts.steps if self.shuffle else len(self.plan())

    def __iter__(self) -> Iterator[DocumentBatch]:
        plan = self.plan()
        start = self._take_start()
        for i in range(start, len(plan)):
            self._next = (i + 1) % len(plan)
            yield self._batch(plan[i])

    def plan(self) -> list[Indices]:
        """The document positions of each batch of this rank in this epoch."""
        key = self.epoch if self.shuffle else -1
        if self._plan is None or self._plan[0] != key:
            rng = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
            order, borders = self._cuts.draw(rng)
            batches = [order[a:b] for a, b in pairwise(borders)]
            if rng is None:
                dealt = batches[self.rank :: self.world_size] or [order[:0]]
            else:
                batches = [part for step in batches for part in np.array_split(step, self.world_size)]
                steps = np.arange(len(batches)).reshape(-1, self.world_size)
                steps = rng.permuted(rng.permutation(steps), axis=1)  # also who gets the longer documents
                dealt = [batches[i] for i in steps[:, self.rank]]
            self._plan = (key, dealt)
        return self._plan[1]

    def padding_share(self) -> float:
        """The share of this epoch's padded tokens on this rank that is padding."""
        lengths = [self.document_lengths[index] for index in self.plan()]
        padded = sum(int(batch.max(initial=0)) * len(batch) for batch in lengths)
        return 1 - sum(int(batch.sum()) for batch in lengths) / padded

    def _layout(self) -> dict[str, int]:
        return {
            "documents": len(self.document_lengths),
            "batch_size": self.batch_size,
            "tokens_per_batch": self.tokens_per_batch,
            "world_size": self.world_size,
            "seed": self.seed,
        }

    def _batch(self, index: Indices) -> DocumentBatch:
        lengths = self.document_lengths[index]
        tokens = np.full((len(index), int(lengths.max(initial=0))), self.pad_id, dtype=np.int64)  # (B, T)
        for row, i in enumerate(index):
            document = self._document(int(i))
            tokens[row, : len(document)] = document
            if self.direction == "backward":
                tokens[row, 1 : len(document)] = document[:0:-1]
        return DocumentBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(lengths.copy()),
            torch.from_numpy(self.labels[index]),
            torch.from_numpy(np.array(index, dtype=np.int64)),
        )

    def _document(self, index: int) -> npt.NDArray[Any]:
        if self._mapped is not None:
            return self._mapped.document(index)
        assert isinstance(self.documents, Sequence)
        return self.documents[index]


def batches_to_read(
    documents: Documents | Sequence[npt.NDArray[Any]],
    labels: Sequence[int] | None,
    direction: str,
    bptt: int,
    batch_size: int = 256,
    tokens_at_a_time: int = TOKENS_AT_A_TIME,
    rank: int = 0,
    world_size: int = 1,
) -> DocumentBatches:
    """Batches for predictions, `bptt` tokens of a document at a time: no graph is kept, so more fit side by side."""
    return DocumentBatches(
        documents,
        labels,
        batch_size=batch_size,
        tokens_per_batch=_TOKENS_IN_MEMORY,
        shuffle=False,
        seed=0,
        direction=direction,
        rank=rank,
        world_size=world_size,
        chunk=(bptt, tokens_at_a_time),
    )


class _Cuts:
    """Where steps may end in a list of documents sorted by bucket; a step is a batch on each of `world_size` ranks.

    Sizes are judged by the upper edge of a document's bucket, so the cuts fit any order inside the buckets.
    """

    def __init__(
        self,
        lengths: Indices,
        batch_size: int,
        tokens_per_batch: int,
        chunk: tuple[int, int] | None,
        world_size: int,
    ) -> None:
        self.lengths = lengths
        self.least = world_size  # documents of a step
        self.buckets = np.ceil(np.log(lengths) / np.log(_BUCKET_WIDTH) - 1e-9).astype(np.int64)
        edges = np.floor(_BUCKET_WIDTH ** np.sort(self.buckets)[::-1] + 1e-6).astype(np.int64)
        edges = np.maximum(edges, np.sort(lengths)[::-1])  # rounding
        most = tokens_per_batch // edges
        if chunk is not None:
            most = np.minimum(most, chunk[1] // np.minimum(edges, chunk[0]))
        self.capacity: Indices = np.clip(most, 1, batch_size) * world_size
        count = len(lengths)
        self.steps = self._fewest()
        self.squeezed = self.steps * world_size > count
        if self.squeezed:  # not enough documents to give every rank one: allow fuller batches instead
            self.steps = count // world_size
            while self._fewest() > self.steps:
                self.capacity = self.capacity + world_size

    def _fewest(self) -> int:
        """The number of steps when each is as full as it may be."""
        steps = start = 0
        while start < len(self.capacity):
            start += int(self.capacity[start])
            steps += 1
        return steps

    def draw(self, rng: np.random.Generator | None) -> tuple[Indices, list[int]]:
        """An order of the documents and the borders of `self.steps` steps in it.

        The last step of a full packing may be nearly empty; its gap is shared between both ends, by a random share
        when shuffling, which also keeps the same neighbours from meeting in every epoch.
        """
        count = len(self.capacity)
        if rng is None:
            order = np.argsort(-self.lengths, kind="stable")
        else:
            shuffled = rng.permutation(count)
            order = shuffled[np.argsort(-self.buckets[shuffled], kind="stable")]
        share = 0.0 if self.squeezed else 0.5 if rng is None else rng.uniform(0.25, 0.75)
        borders = self._borders(share, 1)  # those of one process, unless a rank would have nothing to do in a step
        if min(b - a for a, b in pairwise(borders)) < self.least:
            borders = self._borders(share, self.least)
        return order, borders

    def _borders(self, share: float, least: int) -> list[int]:
        """Where steps of at least `least` documents end."""
        count = len(self.capacity)
        # earliest[k]: from here on, k steps can hold the rest. Capacities rise, so positions + capacity do too.
        reach = np.arange(count) + self.capacity
        earliest = [count]
        for _ in range(self.steps):
            earliest.append(int(np.searchsorted(reach, earliest[-1])))
        borders, latest, position = [0], 0, 0
        for left in range(self.steps - 1, -1, -1):
            low = max(earliest[left], position + least)
            latest = min(latest + int(self.capacity[latest]), count - left * least)
            position = min(max(low, round(low + share * (latest - low))), position + int(self.capacity[position]))
            borders.append(position)
        return borders
