"""Documents as words in flat arrays, and where looking at their words one by one is not enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ulmfit.config import RulesConfig
from ulmfit.text.word_table import LONGEST, LOW_MASKS, NO_WORD, PADDING, Keys, Positions, keys, ranges

BEGIN = 0xFF  # as a word before each document, for the begin marker; no UTF-8 holds it
_SPACE, _LINE_BREAK = 32, 10

_BYTES = np.arange(256)
_ALPHANUMERIC = np.array([bytes([b]).isalnum() for b in _BYTES])  # of ASCII
_OF_WORDS = _ALPHANUMERIC | (_BYTES > 127)
_LETTERS = _OF_WORDS & ~np.array([bytes([b]).isdigit() for b in _BYTES])  # or markers


def joined(documents: Sequence[bytes]) -> tuple[NDArray[np.uint8], int]:
    """A word `BEGIN` and a text for each document, a space behind each word; and the size without the padding."""
    size = sum(map(len, documents)) + 3 * len(documents)
    begins = [b"\xff ", *[b" \xff "] * (len(documents) - 1)]
    padding = PADDING + b"\xfe" * (-(size + len(PADDING)) % 64)
    text = b"".join([*chain.from_iterable(zip(begins, documents, strict=True)), b" ", padding])
    return np.frombuffer(text, np.uint8), size


@dataclass
class Block:
    """Documents as words (N of them), a word `BEGIN` before each document.

    Attributes:
        data: their UTF-8.
        starts, ends: (N,) where each begins and where the white space behind it stands.
        kinds: (N,) which white space that is.
        lengths: (N,) in bytes, with a line break behind it, without a punctuation mark looked up on its own.
        marks: indices of words that such a mark follows.
        mark_ids: its id.
        low, high: (N,) the key of each word, in which `low` of a longer one is like no other.
        begins: (D,) the words `BEGIN`.
        odd: ranges of words on which rules may do more than on each alone: of a line, or a whole document.
    """

    data: NDArray[np.uint8]
    starts: Positions
    ends: Positions
    kinds: NDArray[np.uint8]
    lengths: Positions
    marks: Positions
    mark_ids: NDArray[np.int64]
    low: Keys
    high: Keys
    begins: Positions
    odd: list[tuple[int, int]]

    @classmethod
    def of(cls, documents: Sequence[bytes], end_ids: NDArray[np.int64], rules: RulesConfig) -> Block:
        """From normalised UTF-8 without zero bytes. `end_ids`: of the marks of punctuation, by byte; else zero."""
        data, _ = joined(documents)
        ends = np.flatnonzero(data <= _SPACE)
        kinds = data[ends]
        white = (kinds == _SPACE) | (kinds == _LINE_BREAK)
        if not white.all():
            ends, kinds = ends[white], kinds[white]
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - starts
        lengths += kinds == _LINE_BREAK
        mark_ids = end_ids[data[ends - 1]]
        marks = np.flatnonzero(mark_ids)
        marks = marks[_LETTERS[data[ends[marks] - 2]] & (kinds[marks] == _SPACE)]
        lengths[marks] -= 1
        low, high = keys(data, starts, lengths)
        begins = np.flatnonzero((low == BEGIN) & (high == 0))
        block = cls(data, starts, ends, kinds, lengths, marks, mark_ids[marks], low, high, begins, [])
        block._find_odd(rules)
        low[lengths > LONGEST] = NO_WORD  # only now: of longer words, too, the first bytes were compared
        return block

    def _find_odd(self, rules: RulesConfig) -> None:
        documents = np.append(self.begins, len(self.starts))
        if rules.elongation and len(blank := self._blank_runs()):
            at = np.unique(np.searchsorted(documents, blank, side="right"))
            self.odd = [(int(documents[i - 1]) + 1, int(documents[i])) for i in at]
        if rules.repetition and len(second := self._repeated()):
            bounds = np.union1d(np.append(documents, self.begins + 1), np.flatnonzero(self.kinds == _LINE_BREAK) + 1)
            at = np.unique(np.searchsorted(bounds, second, side="right"))
            lines = [(int(bounds[i - 1]), int(bounds[i])) for i in at]
            whole = [range(*document) for document in self.odd]
            self.odd += [line for line in lines if not any(line[0] in document for document in whole)]
            self.odd.sort()

    def text(self, first: int, stop: int) -> tuple[str, bool]:
        """Some words as they stand, and whether a line break comes after them."""
        return (
            self.data[self.starts[first] : self.ends[stop - 1]].tobytes().decode("utf-8"),
            bool(self.kinds[stop - 1] == _LINE_BREAK),
        )

    def _blank_runs(self) -> Positions:
        """Words within runs of white space that may be an elongation: four spaces or line breaks."""
        blank = self.starts == self.ends
        return np.flatnonzero(blank[:-2] & blank[1:-1] & blank[2:]) + 1

    def _repeated(self) -> Positions:
        """The second of three equal words, with false positives, without false negatives.

        Around the second there are spaces. Another white space, which does not end our words, may stand before the
        first: so it is the end of a word. The third is the start of one.
        """
        data, starts, ends, lengths = self.data, self.starts, self.ends, self.lengths
        same = self.low[1:] ^ self.low[:-1]
        same &= LOW_MASKS[np.minimum(lengths[:-1], LONGEST + 1)]
        second = np.flatnonzero((same == 0) & (lengths[:-1] > 0))
        second = second[(second > 0) & (second < len(starts) - 1)]
        spaced = (self.kinds[second] == _SPACE) & (self.kinds[second - 1] == _SPACE)
        behind = data[np.minimum(starts[second + 1] + lengths[second], len(data) - 1)]
        ends_alike = data[ends[second - 1] - 1] == data[ends[second] - 1]
        second = second[spaced & ends_alike & ~_ALPHANUMERIC[behind] & _OF_WORDS[data[starts[second]]]]
        return np.array([i for i in second if self._thrice(i)], dtype=np.int64)

    def _thrice(self, second: int) -> bool:
        word = self.data[self.starts[second] : self.ends[second]].tobytes()
        before = self.data[max(0, self.ends[second - 1] - len(word)) : self.ends[second - 1]].tobytes()
        start = self.starts[second + 1]
        return word == before and word == self.data[start : start + len(word)].tobytes()

    def raw(self, indices: Positions) -> list[str]:
        """Some of the words."""
        if not len(indices):
            return []
        lengths = self.lengths[indices] + 1
        words = self.data[ranges(self.starts[indices], lengths)]
        words[np.cumsum(lengths) - 1] = _SPACE
        return words[:-1].tobytes().decode("utf-8").split(" ")
