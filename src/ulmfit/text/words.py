"""Ids of documents word by word: words met before are looked up by their raw bytes, without rules or SentencePiece.

A text is segmented as its words between spaces are, each alone: no piece of our models holds SentencePiece's sign for a
space but at its start. And nearly all text rules look at one word. Documents where another rule may have something to
do are found, and read in the plain way: rules over the text, then the pieces of each marked word. The ids are the same.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulmfit.text.rules import Rules
from ulmfit.text.word_table import (
    LONGEST,
    LOW_MASKS,
    MOST_IDS,
    NO_WORD,
    PADDING,
    Ids,
    Keys,
    Positions,
    WordTable,
    id_type,
    keys,
    ranges,
)

_SPACE, _LINE_BREAK = 32, 10
_BEGIN = 0xFF  # stands as a word before each document, for the begin marker; no UTF-8 holds it
_BLOCK_CHARS = 150_000  # worked on at a time, so that the arrays stay in the processor's cache
_FEW_CHARS = 1_500  # less is read faster in the plain way
_LARGE = 1 << 20  # bytes of a document that is read in the plain way, where the arrays would take more memory
_KEPT_WORDS, _KEPT_CHARS = 1 << 14, 64  # outside of the table: how many, and of which length

_BYTES = np.arange(256)
_ALPHANUMERIC = np.array([bytes([b]).isalnum() for b in _BYTES])  # of ASCII
_OF_WORDS = _ALPHANUMERIC | (_BYTES > 127)
_LETTERS = _OF_WORDS & ~np.array([bytes([b]).isdigit() for b in _BYTES])  # or markers
_ENDS = ",.;:!?)'\""


@dataclass
class _Block:
    """Raw documents as words (N of them), a begin marker before each document.

    Attributes:
        data: their UTF-8.
        starts, ends: (N,) where each begins and where the white space behind it stands.
        kinds: (N,) which white space that is.
        lengths: (N,) in bytes, with a line break behind it, without a punctuation mark looked up on its own.
        marks: indices of words that such a mark follows.
        mark_ids: its id.
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

    @classmethod
    def of(cls, documents: Sequence[bytes], end_ids: NDArray[np.int64]) -> _Block:
        joined = b"\xff " + b" \xff ".join(documents) + b" " + PADDING
        data = np.frombuffer(joined + b"\xfe" * (-len(joined) % 8), np.uint8)
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
        return cls(data, starts, ends, kinds, lengths, marks, mark_ids[marks], *keys(data, starts, lengths))

    def blank_runs(self) -> Positions:
        """Words within runs of white space that may be an elongation: four spaces or line breaks."""
        blank = self.starts == self.ends
        return np.flatnonzero(blank[:-2] & blank[1:-1] & blank[2:]) + 1

    def repeated(self) -> Positions:
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
        behind = data[starts[second + 1] + lengths[second]]
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


@dataclass
class _Segmented:
    """Words (M of them, D distinct ones).

    Attributes:
        which: (M,) which distinct word each is.
        distinct: the D words.
        lists: ids of each.
        counts: (D,) how many they are.
        ids: of all D words, one after the other.
    """

    which: Positions
    distinct: list[str]
    lists: list[list[int]]
    counts: Positions
    ids: Ids

    def of_occurrences(self) -> Ids:
        """The ids of all M words, one after the other."""
        starts = np.cumsum(self.counts) - self.counts
        return self.ids[ranges(starts[self.which], self.counts[self.which])]


class Words:
    """Ids of raw texts, word by word.

    Args:
        processor: SentencePiece's.
        rules: applied to documents and words.
        pieces: all of the model.
        begin: id before each document.
    """

    def __init__(self, processor: Any, rules: Rules, pieces: Sequence[str], begin: int) -> None:
        self._processor, self._rules, self._begin = processor, rules, begin
        self._vocab_size, self._dtype = len(pieces), id_type(len(pieces))
        self._space: list[int] = processor.encode(" ")[:1]
        self._known: dict[str, list[int]] = {}  # marked words
        self._others: dict[str, list[int]] = {}  # raw words that have no place in the table
        self._end_ids = _end_ids(processor, pieces)
        self._table: WordTable | None = None
        self._lock = threading.Lock()

    # -- the plain way -------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the begin marker."""
        marked = self._rules.apply(text)
        if not marked:
            return []
        words, known = marked.split(" "), self._known
        try:
            return list(chain.from_iterable([known[word] for word in words]))
        except KeyError:
            found = {word: known.get(word, []) for word in words}
            new = [word for word, ids in found.items() if not ids]
            segmented = dict(zip(new, self._segment(new), strict=True))
            self._known = _with(known, segmented)
            found.update(segmented)
            return list(chain.from_iterable([found[word] for word in words]))

    def _segment(self, marked: list[str], threads: int = 1) -> list[list[int]]:
        encode = self._processor.encode
        # A list costs SentencePiece as much as 50 words, for its threads.
        segmented = encode(marked, num_threads=threads) if len(marked) > 50 else [encode(word) for word in marked]
        return [ids or self._space for ids in segmented]  # between two spaces stands the empty word

    # -- many documents ------------------------------------------------------------------------------------------

    def documents(self, texts: Sequence[str], threads: int = 1) -> tuple[Ids, Positions]:
        """All ids, each document behind the begin marker, and (D,) how many each document has."""
        blocks = [self._read(block, threads) for block in _blocks(texts)]
        if len(blocks) == 1:
            return blocks[0]
        return (
            np.concatenate([np.empty(0, self._dtype), *(ids for ids, _ in blocks)]),
            np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in blocks)]),
        )

    def _read(self, texts: list[str], threads: int) -> tuple[Ids, Positions]:
        if sum(map(len, texts)) < _FEW_CHARS:
            read = [self._plain(text) for text in texts]
            return np.concatenate(read), np.array([len(ids) for ids in read])
        raw = [self._rules.normalised_utf8(text) for text in texts]
        plain = {i for i, document in enumerate(raw) if not document or len(document) > _LARGE or 0 in document}
        if len(plain) == len(raw):
            ids, offsets = np.empty(0, self._dtype), np.zeros(len(raw) + 1, np.int64)
        else:
            ids, offsets, more = self._by_word([b"" if i in plain else raw[i] for i in range(len(raw))], threads)
            plain.update(more.tolist())
        lengths = np.diff(offsets)
        parts, done = [], 0
        for i in sorted(plain):
            parts += [ids[done : offsets[i]], self._plain(texts[i])]
            lengths[i] = len(parts[-1])
            done = offsets[i + 1]
        return np.concatenate([*parts, ids[done:]]) if plain else ids, lengths

    def _plain(self, text: str) -> Ids:
        return np.array([self._begin, *self.encode(text)], self._dtype)

    def _by_word(self, documents: Sequence[bytes], threads: int) -> tuple[Ids, Positions, Positions]:
        """All ids, (D + 1,) where each document begins, and which documents are wrong: they need the plain way."""
        block = _Block.of(documents, self._end_ids)
        begins = np.flatnonzero((block.low == _BEGIN) & (block.high == 0))
        odd = [np.empty(0, np.int64)]
        if self._rules.config.repetition:
            odd.append(block.repeated())
        block.low[block.lengths > LONGEST] = NO_WORD
        if self._rules.config.elongation:
            odd.append(block.blank_runs())
        plain = np.unique(np.searchsorted(begins, np.concatenate(odd), side="right") - 1)
        with self._lock:
            table = self._table = self._table or WordTable(self._vocab_size, self._begin)
            rows, missing = table.find(block.low, block.high)
            rows[begins] = table.begin
            missing = missing[block.low[missing] != _BEGIN]
            counts = table.counts(rows)
            new = self._segmented(block.raw(missing), threads)
            counts[missing] = new.counts[new.which]
            counts[block.marks] += 1
            ends = np.cumsum(counts)
            starts = ends - counts
            ids = table.ids(rows, starts, counts)
            if len(missing):  # only now, for a new word may replace one of this block
                self._learn(table, block, missing, new)
        ids[ranges(starts[missing], new.counts[new.which])] = new.of_occurrences()
        ids[ends[block.marks] - 1] = block.mark_ids
        return ids, np.append(starts[begins], len(ids)), plain

    def _segmented(self, words: list[str], threads: int) -> _Segmented:
        distinct: dict[str, int] = {}
        which = [distinct.setdefault(word, len(distinct)) for word in words]
        others = self._others
        new = [word for word in distinct if word not in others]
        marked = self._rules.apply_to_words(" ".join(new)).split(" ") if new else []
        ids = self._segment(marked, threads)
        if len(new) < len(distinct):
            by_word = dict(zip(new, ids, strict=True))
            ids = [by_word.get(word) or others[word] for word in distinct]
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), self._dtype, int(counts.sum()))
        return _Segmented(np.array(which, np.int64), list(distinct), ids, counts, flat)

    def _learn(self, table: WordTable, block: _Block, missing: Positions, new: _Segmented) -> None:
        place = np.empty(len(new.counts), np.int64)
        place[new.which] = missing
        fit = (new.counts <= MOST_IDS) & (block.low[place] != NO_WORD)
        place = place[fit]
        table.add(block.low[place], block.high[place], new.counts[fit], new.ids[np.repeat(fit, new.counts)])
        self._others = _with(self._others, {new.distinct[i]: new.lists[i] for i in np.flatnonzero(~fit)})


def _with(known: dict[str, list[int]], words: dict[str, list[int]]) -> dict[str, list[int]]:
    """`known` and `words` in bounded memory: all anew if it is full, and no long words."""
    short = {word: ids for word, ids in words.items() if len(word) <= _KEPT_CHARS}
    if len(known) + len(short) > _KEPT_WORDS:
        known = {}  # whoever reads the old one may go on
    known.update(islice(short.items(), _KEPT_WORDS))
    return known


def fits(processor: Any, pieces: Sequence[str]) -> bool:
    """Whether the model segments a text as its words: no piece crosses a space, and no space is changed."""
    space, word = processor.encode(" ")[:1], processor.encode("a")
    return (
        not any("\u2581" in piece[1:] for piece in pieces)
        and processor.encode("") == []
        and processor.encode("  a a  ") == [*space, *space, *word, *word, *space, *space]
    )


def _end_ids(processor: Any, pieces: Sequence[str]) -> NDArray[np.int64]:
    """(256,) ids of the marks of punctuation which no piece joins to a letter or marker before them, else 0."""
    joined = set(re.findall(rf"[A-Za-z\x80-\U0010ffff](?<!^\u2581)([{_ENDS}])", "\n".join(pieces), re.MULTILINE))
    ids = np.zeros(256, np.int64)
    for mark in set(_ENDS) - joined:
        found = processor.piece_to_id(mark)
        if pieces[found] == mark:
            ids[ord(mark)] = found
    return ids


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    chars = 0
    for text in texts:
        block.append(text)
        chars += len(text)
        if chars >= _BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block
