"""Ids of documents word by word: words met before are looked up by their raw bytes, without rules or SentencePiece.

A text is segmented as its words between spaces are, each alone: no piece of our models holds SentencePiece's sign for a
space but at its start. And nearly all text rules look at one word. Where one may look at more, the line or document is
read in the plain way: rules over the text, then the pieces of each marked word. The ids are the same.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulmfit.text.compiled_words import CompiledWords, compiled_words
from ulmfit.text.corpus import portions
from ulmfit.text.rules import NEWLINE, Rules
from ulmfit.text.word_block import BEGIN, Block
from ulmfit.text.word_memory import LINE_AND_BREAK, WORD
from ulmfit.text.word_table import MOST_IDS, NO_WORD, Ids, Positions, WordTable, id_type, ranges

_BLOCK_CHARS = 150_000  # worked on at a time, so that the arrays stay in the processor's cache
_FEW_CHARS = 1_500  # less is read faster in the plain way
_LARGE = 1 << 23  # bytes of a document that is read in the plain way, where the arrays would take more memory
_LONG_WORDS = 24  # bytes a word from which on looking up is slower
_KEPT_WORDS, _KEPT_CHARS = 1 << 14, 64  # outside of the table: how many, and of which length

_CHECKED = 4_000  # pieces on which loops and SentencePiece are compared before they are trusted
_CHANGED = "\ufb01\xb2\xbd\u2460\u200b\x7f\x01\xad\u3000\xa0\uff21\u2122\u0130\u01c5\xdf\xe9e\u0301A\ufeff\u2028\t"
_Part = tuple[int, int, Ids]  # ids, and the range of others in whose place they stand
_ENDS = ",.;:!?)'\""


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
        self._pieces, self._vocab_size, self._dtype = pieces, len(pieces), id_type(len(pieces))
        self._space: list[int] = processor.encode(" ")[:1]
        self._known: dict[str, list[int]] = {}  # marked words
        self._others: dict[str, list[int]] = {}  # raw words that have no place in the table
        self._end_ids = _end_ids(processor, pieces)
        self._table: WordTable | None = None
        self._compiled: CompiledWords | None = None
        self._lock = threading.Lock()

    # -- the plain way -------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the begin marker."""
        marked = self._rules.apply(text)
        return self._of_marked(marked.split(" ")) if marked else []

    def _of_marked(self, words: list[str]) -> list[int]:
        known = self._known
        try:
            return list(chain.from_iterable([known[word] for word in words]))
        except KeyError:
            found = {word: known.get(word, []) for word in words}
            new = [word for word, ids in found.items() if not ids]
            segmented = dict(zip(new, self._segment(new), strict=True))
            self._known = _with(known, segmented)
            found.update(segmented)
            return list(chain.from_iterable([found[word] for word in words]))

    def _whole(self, texts: Sequence[str], threads: int) -> list[Ids]:
        """As `encode`, for words that are long or seldom."""
        marked = [self._rules.apply(text) for text in texts]
        words = [text.split(" ") for text in marked]
        found = iter(
            self._processor.encode([*chain.from_iterable(words)], return_type="numpy", num_threads=threads)
            if words
            else []
        )
        space, whole = np.array(self._space, self._dtype), []
        for text, parts in zip(marked, words, strict=True):
            ids = [each if len(each) else space for each in islice(found, len(parts))]
            whole.append(np.concatenate(ids).astype(self._dtype) if text else space[:0])
        return whole

    def _segment(self, marked: list[str], threads: int = 1) -> list[list[int]]:
        encode = self._processor.encode
        # A list costs SentencePiece as much as 50 words, for its threads.
        segmented = encode(marked, num_threads=threads) if len(marked) > 50 else [encode(word) for word in marked]
        return [ids or self._space for ids in segmented]  # between two spaces stands the empty word

    def compile(self) -> bool:
        """Read many documents by compiled loops from now on; whether they can be had, else arrays stay."""
        if self._compiled is None:
            self._compiled = compiled_words(
                self._processor, self._pieces, self._rules, self._begin, self._space[0], self._end_ids, WordTable
            )
            if self._compiled is not None and not self._agrees():
                self._compiled = None
        return self._compiled is not None

    def _agrees(self) -> bool:
        """Whether the model's pieces, as words, become the same by loops: there are other kinds of models."""
        words = [piece.replace("\u2581", "") for piece in self._pieces[:_CHECKED]]
        # What a model that normalises would change; ours do not, for that is done in `rules`.
        words += [word for char in _CHANGED for word in (char, f"a{char}b")]
        text = " ".join(words).replace("\0", "")
        found, _ = _put_in(*self._by_loops([text.encode()], 1))
        ids: list[int] = found[1:].tolist()
        return ids == self._of_marked(self._rules.mark(text).split(" "))

    # -- many documents ------------------------------------------------------------------------------------------

    def documents(self, texts: Sequence[str], threads: int = 1) -> tuple[Ids, Positions]:
        """All ids, each document behind the begin marker, and (D,) how many each document has."""
        blocks = [self._read(block, threads) for block in portions(texts, _BLOCK_CHARS)]
        if len(blocks) == 1:
            return blocks[0]
        return (
            np.concatenate([np.empty(0, self._dtype), *(ids for ids, _ in blocks)]),
            np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in blocks)]),
        )

    def _read(self, texts: list[str], threads: int) -> tuple[Ids, Positions]:
        if sum(map(len, texts)) < _FEW_CHARS:
            read = [np.array([self._begin, *self.encode(text)], self._dtype) for text in texts]
            return np.concatenate(read), np.array([len(ids) for ids in read])
        raw = [self._rules.normalised_utf8(text) for text in texts]
        better_whole = _not_for_blocks if self._compiled else _better_whole
        apart = [i for i, document in enumerate(raw) if better_whole(document)]
        for i in apart:
            raw[i] = b""
        ids, begins, instead = self._by_loops(raw, threads) if self._compiled else self._by_arrays(raw, threads)
        for i, whole in zip(apart, self._whole([texts[i] for i in apart], threads), strict=True):
            instead.append((int(begins[i]) + 1, int(begins[i]) + 2, whole))
        return _put_in(ids, begins, sorted(instead, key=lambda part: part[0]))

    def _by_loops(self, raw: list[bytes], threads: int) -> tuple[Ids, Positions, list[_Part]]:
        """The ids of all documents, (D,) where each begins there, and what to put in, in order."""
        assert self._compiled is not None
        read = self._compiled.read(raw)
        texts = [read.text(entry) for entry in range(len(read.left))]
        kinds = read.left[:, 3]
        words = self._segmented([texts[entry] for entry in np.flatnonzero(kinds == WORD)], threads)
        self._remember(words, range(len(words.distinct)))
        of_words = iter(words.which)
        parts: list[_Part] = []
        for at, kind, text in zip(read.left[:, 0].tolist(), kinds.tolist(), texts, strict=True):
            ids = words.lists[next(of_words)] if kind == WORD else self._of_span(text, kind == LINE_AND_BREAK)
            parts.append((at, at, np.array(ids, self._dtype)))
        return read.ids, read.begins, parts

    def _by_arrays(self, raw: list[bytes], threads: int) -> tuple[Ids, Positions, list[_Part]]:
        """As `_by_loops`."""
        block = Block.of(raw, self._end_ids, self._rules.config)
        ids, offsets = self._by_word(block, threads)
        parts = [
            (int(offsets[first]), int(offsets[stop]), np.array(self._of_span(*block.text(first, stop)), self._dtype))
            for first, stop in block.odd
        ]
        return ids, offsets[block.begins], parts

    def _of_span(self, text: str, broken: bool) -> list[int]:
        return self._of_marked((self._rules.mark(text) + NEWLINE * broken).split(" "))

    def _by_word(self, block: Block, threads: int) -> tuple[Ids, Positions]:
        """The ids of all words, one after the other, and (N + 1,) where those of each begin."""
        with self._lock:
            table = self._table = self._table or WordTable(self._vocab_size, self._begin)
            rows, missing = table.find(block.low, block.high)
            rows[block.begins] = table.begin
            missing = missing[block.low[missing] != BEGIN]
            counts = table.counts(rows)
            new = self._segmented(block.raw(missing), threads)
            counts[missing] = new.counts[new.which]
            counts[block.marks] += 1
            offsets = np.zeros(len(counts) + 1, np.int64)
            np.cumsum(counts, out=offsets[1:])
            ids = table.ids(rows, offsets[:-1], counts)
            if len(missing):  # only now, for a new word may replace one of this block
                self._learn(table, block, missing, new)
        ids[ranges(offsets[missing], new.counts[new.which])] = new.of_occurrences()
        ids[offsets[block.marks + 1] - 1] = block.mark_ids
        return ids, offsets

    def _segmented(self, words: list[str], threads: int) -> _Segmented:
        distinct: dict[str, int] = {}
        which = [distinct.setdefault(word, len(distinct)) for word in words]
        others = self._others
        known = distinct.keys() & others.keys()
        new = [word for word in distinct if word not in known] if known else list(distinct)
        marked = self._rules.mark_words(" ".join(new)).split(" ") if new else []
        ids = self._segment(marked, threads)
        if known:
            segmented = iter(ids)
            ids = [others[word] if word in known else next(segmented) for word in distinct]
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), self._dtype, int(counts.sum()))
        return _Segmented(np.array(which, np.int64), list(distinct), ids, counts, flat)

    def _learn(self, table: WordTable, block: Block, missing: Positions, new: _Segmented) -> None:
        place = np.empty(len(new.counts), np.int64)
        place[new.which] = missing
        fit = (new.counts <= MOST_IDS) & (block.low[place] != NO_WORD)
        place = place[fit]
        table.add(block.low[place], block.high[place], new.counts[fit], new.ids[np.repeat(fit, new.counts)])
        self._remember(new, np.flatnonzero(~fit))

    def _remember(self, new: _Segmented, which: Iterable[int]) -> None:
        self._others = _with(self._others, {new.distinct[i]: new.lists[i] for i in which})


def _put_in(ids: Ids, begins: Positions, parts: list[_Part]) -> tuple[Ids, Positions]:
    """`ids` with `parts`, in order, in the place of those of a range, and how many each document then has."""
    lengths = np.diff(begins, append=len(ids))
    if not parts:
        return ids, lengths
    put, done = [], 0
    for start, stop, instead in parts:
        put += [ids[done:start], instead]
        done = stop
        lengths[np.searchsorted(begins, start) - 1] += len(instead) - (stop - start)
    return np.concatenate([*put, ids[done:]]), lengths


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


def _not_for_blocks(document: bytes) -> bool:
    return not document or len(document) > _LARGE or 0 in document


def _better_whole(document: bytes) -> bool:
    """Whether the arrays of a block are not for this document, or it has hardly any spaces, as in Chinese."""
    return _not_for_blocks(document) or len(document) > _LONG_WORDS * (document.count(b" ") + 4)


def _end_ids(processor: Any, pieces: Sequence[str]) -> NDArray[np.int64]:
    """(256,) ids of the marks of punctuation which no piece joins to a letter or marker before them, else 0."""
    joined = set(re.findall(rf"[A-Za-z\x80-\U0010ffff](?<!^\u2581)([{_ENDS}])", "\n".join(pieces), re.MULTILINE))
    ids = np.zeros(256, np.int64)
    for mark in set(_ENDS) - joined:
        found = processor.piece_to_id(mark)
        if pieces[found] == mark:
            ids[ord(mark)] = found
    return ids
