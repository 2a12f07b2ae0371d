"""A bounded table of words and their ids in flat arrays, asked and filled for many words at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST = 16  # bytes of a word that has a key: the bytes themselves, so that no two words share one
MOST_IDS = 7  # of a word in the table, whose rows hold the number of ids in their last column
_IDS = MOST_IDS + 1
_BITS = 19  # 2**19 rows: 16 MB with ids of 16 bits
WAYS = 4  # places where a word may stand
NO_WORD = np.uint64(0xFE)  # the low half of a key that is never put in: such bytes are not UTF-8
EMPTY = np.uint64(0xFD)  # that of the empty word; zeros are a free row
_MASKS = np.array([(1 << 8 * length) - 1 for length in range(9)], dtype=np.uint64)
LOW_MASKS = _MASKS[np.minimum(np.arange(LONGEST + 2), 8)]
HIGH_MASKS = _MASKS[np.clip(np.arange(LONGEST + 2) - 8, 0, 8)]
MIX_LOW, MIX_HIGH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
PADDING = b"\xfe" * 24  # what must follow the last word for `keys`

Ids = NDArray[Any]  # uint16 or uint32
Positions = NDArray[np.int64]
Keys = NDArray[np.uint64]


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def keys(data: NDArray[np.uint8], starts: Positions, lengths: Positions) -> tuple[Keys, Keys]:
    """(N,) the first and the next eight bytes of words, zeros behind their end; for longer words, too.

    Words hold no zero byte. `data` has a multiple of eight bytes and ends with `PADDING`.
    """
    eights = data.view("<u8")
    index = starts >> 3
    shift = ((starts & 7) << 3).astype(np.uint64)
    back = np.uint64(64) - shift  # shifted by 64 bits, a number is zero in numpy
    first, second, third = eights[index], eights[index + 1], eights[index + 2]
    low = (first >> shift) | (second << back)
    high = (second >> shift) | (third << back)
    bounded = np.minimum(lengths, LONGEST + 1)
    low &= LOW_MASKS[bounded]
    high &= HIGH_MASKS[bounded]
    low[bounded == 0] = EMPTY
    return low, high


def ranges(starts: Positions, counts: Positions) -> Positions:
    """`counts[i]` numbers from `starts[i]` on, one after the other for all i."""
    return _spread(starts - np.cumsum(counts) + counts, counts)


def _spread(shifts: Positions, counts: Positions) -> Positions:
    spread: Positions = np.repeat(shifts, counts)
    spread += np.arange(len(spread))
    return spread


class WordTable:
    """Ids by key. A word stands in one of four places; if all are taken, it replaces one of the words there.

    Attributes:
        begin: the row of the begin marker, which has no key, after those of words.
        flat_words, flat_ids: the rows as numbers of 64 bits, the key first, and as ids, the number of them last.
    """

    def __init__(self, vocab_size: int, begin_id: int, bits: int = _BITS) -> None:
        self._bits, self.begin = bits, 1 << bits
        # A row is a key, ids, and how many they are: beside each other in memory, for what takes time is to fetch it.
        id_bytes = np.dtype(id_type(vocab_size)).itemsize
        self._words = np.zeros((self.begin + 1, 2 + id_bytes), np.uint64)
        self._ids = self._words.view(id_type(vocab_size))[:, -_IDS:]
        self.flat_words, self.flat_ids = self._words.reshape(-1), self._words.view(id_type(vocab_size)).reshape(-1)
        self._width, self._id_width, self._first = 2 + id_bytes, (2 + id_bytes) * 8 // id_bytes, 16 // id_bytes
        self._ids[self.begin, [0, MOST_IDS]] = begin_id, 1
        self._turn = 0

    def find(self, low: Keys, high: Keys) -> tuple[Positions, Positions]:
        """(N,) the row of each word, and the indices of those that have none."""
        rows = self._home(low, high)
        missing = np.flatnonzero(~self._stands(rows, low, high))
        low, high, home = low[missing], high[missing], rows[missing]
        for way in range(1, WAYS):
            place = home ^ way
            found = self._stands(place, low, high)
            rows[missing[found]] = place[found]
            left = ~found
            missing, low, high, home = missing[left], low[left], high[left], home[left]
        return rows, missing

    def _stands(self, rows: Positions, low: Keys, high: Keys) -> NDArray[np.bool_]:
        place = rows * self._width
        found: NDArray[np.bool_] = self.flat_words[place] == low
        place += 1
        found &= self.flat_words[place] == high
        return found

    def counts(self, rows: Positions) -> Positions:
        """(N,) how many ids the words in `rows` have."""
        return self.flat_ids[rows * self._id_width + (self._id_width - 1)].astype(np.int64)

    def ids(self, rows: Positions, starts: Positions, counts: Positions) -> Ids:
        """The ids of the words in `rows`, `counts` of them from `starts` on in what is returned.

        Where `counts` is more than a row has, what stands there is without meaning.
        """
        return self.flat_ids.take(_spread(rows * self._id_width + self._first - starts, counts), mode="clip")

    def add(self, low: Keys, high: Keys, counts: Positions, ids: Ids) -> None:
        """Put words in that are not there, each once, with `counts` (at most `MOST_IDS`) of the flat `ids` each."""
        words = np.zeros((len(low), self._width), np.uint64)
        words[:, 0], words[:, 1] = low, high
        of_ids = words.view(self._ids.dtype)[:, -_IDS:]
        of_ids[:, :MOST_IDS][np.arange(MOST_IDS) < counts[:, None]] = ids
        of_ids[:, MOST_IDS] = counts
        home = self._home(low, high)
        for way in range(WAYS + 1):
            if way < WAYS:
                place = home ^ way
                wanted = np.flatnonzero(self._ids[place, MOST_IDS] == 0)
            else:
                self._turn += 1  # the next word to be replaced elsewhere
                place = home ^ (self._turn % WAYS)
                wanted = np.arange(len(home))
            place, first = np.unique(place[wanted], return_index=True)  # of two words for one place, one
            taken = wanted[first]
            self._words[place] = words[taken]
            left = np.ones(len(home), np.bool_)
            left[taken] = False
            home, words = home[left], words[left]

    def _home(self, low: Keys, high: Keys) -> Positions:
        mixed = high * MIX_HIGH
        mixed ^= low
        mixed *= MIX_LOW
        mixed >>= np.uint64(64 - self._bits)
        home: Positions = mixed.astype(np.int64)
        return home
