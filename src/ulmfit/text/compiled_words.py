"""Words read by compiled loops (`text/word_loops.py`), where Numba is there and the model is one that they know."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulmfit.text.rules import ESCAPED, Rules, cased_starts
from ulmfit.text.word_block import joined
from ulmfit.text.word_memory import (
    COMES_BACK,
    DECIMAL,
    IS_LOWER,
    LETTER,
    NOT_HERE,
    STARTS_CASED,
    Letters,
    Memory,
    Model,
    Tree,
)
from ulmfit.text.word_table import Ids, Positions, WordTable, id_type

_CHECKED = 4_000  # words on which loops and SentencePiece are compared before they are trusted
log = logging.getLogger("ulmfit")


@dataclass
class Read:
    """What the loops made of documents.

    Attributes:
        ids: of all, one after the other.
        begins: (D,) where each document begins there.
        data: the text.
        left: (L, 4) what is not among the ids: place in them, start and stop in `data`, kind (`WORD`, ...).
    """

    ids: Ids
    begins: Positions
    data: NDArray[np.uint8]
    left: Positions

    def text(self, entry: int) -> str:
        """One of what is left."""
        return self.data[self.left[entry, 1] : self.left[entry, 2]].tobytes().decode("utf-8")


class CompiledWords:
    """Ids of raw words.

    Args:
        processor: SentencePiece's, of a unigram model.
        pieces: all of the model.
        rules: what words are marked by.
        begin, space: ids before each document, and of an empty word.
        end_ids: (256,) ids of the marks of punctuation that are looked up on their own, else 0.
        table: makes the memory for words.
    """

    def __init__(
        self,
        processor: Any,
        pieces: Sequence[str],
        rules: Rules,
        begin: int,
        space: int,
        end_ids: NDArray[np.int64],
        table: type[WordTable] = WordTable,
    ) -> None:
        self._table, self._begin, self._vocab_size = table, begin, len(pieces)
        edges, piece_of, wanted = _tree(processor, pieces)
        scores = np.array([processor.get_score(i) for i in range(len(pieces))], np.float32)
        bytes_ = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._only_learnt = bool((scores[wanted] < 0).all())  # a symbol that a user has defined has the score 0
        tree = Tree(
            edges,
            piece_of,
            scores,
            scores[wanted].min() - np.float32(10),  # as SentencePiece does it
            np.array(bytes_ if processor.is_byte(bytes_[0]) else [-1] * 256),
        )
        flags, lower = _code_points()
        letters = Letters(flags, lower, rules.config.case, rules.config.elongation)
        self._model = Model(tree, letters, rules.config.repetition, end_ids, space, begin)
        self._free: list[Memory] = []  # what no thread works in

    def read(self, documents: Sequence[bytes]) -> Read:
        """Ids of normalised UTF-8 without zero bytes. Several threads may read at a time."""
        data, size = joined(documents)
        out = np.empty(8 * size, id_type(self._vocab_size))
        left, begins = np.empty((size // 2 + 2, 4), np.int64), np.empty(len(documents), np.int64)
        try:
            memory = self._free.pop()
        except IndexError:
            table = self._table(self._vocab_size, self._begin)
            memory = Memory.around(table.flat_words, table.flat_ids, table.begin)
        try:
            ids, count, _ = _loops().read(data, size, self._model, memory, out, left, begins)
        finally:
            self._free.append(memory)
        return Read(out[:ids].copy(), begins, data, left[:count].copy())

    def agrees(self, processor: Any, pieces: Sequence[str]) -> bool:
        """Whether the model's own pieces, as words, become the same as by SentencePiece, which knows more kinds."""
        words = [piece.replace("\u2581", "") for piece in pieces]
        words = [word for word in words if word and word.isalpha() and word.islower()][:_CHECKED]
        read = self.read([" ".join(words).encode()])
        of_words = [i for ids in processor.encode(words) for i in ids]
        return self._only_learnt and not len(read.left) and read.ids[1:].tolist() == of_words


def _tree(processor: Any, pieces: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Edges and pieces by node (`Tree`), and (V,) which pieces are in the tree."""
    named = [i for i, piece in enumerate(pieces) if piece.startswith("<")]
    wanted = np.array([not processor.is_unused(i) for i in range(len(pieces))])
    wanted[named] &= [
        not any(is_(i) for is_ in (processor.is_control, processor.is_unknown, processor.is_byte)) for i in named
    ]
    spelled = [piece.encode() for piece in pieces]
    ends = np.cumsum([len(piece) for piece in spelled])
    flat = np.frombuffer(b"".join(spelled), np.uint8)
    nodes = int(ends[-1]) + 2
    for _ in range(2):  # once to see how many nodes there are
        edges, piece_of = np.zeros(1 << (2 * nodes).bit_length(), np.int64), np.full(nodes, -1, np.int32)
        nodes = _loops().plant(edges, piece_of, flat, ends, wanted)
    return edges, piece_of, wanted


@cache
def _code_points() -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """`Letters.flags` and `lower`."""
    text = "".join(map(chr, [*range(0xD800), *[0] * 0x800, *range(0xE000, 0x10000)]))
    lower = [char.lower() for char in text]
    flags = np.zeros(len(text), np.uint8)
    flags[[match.start() for match in re.finditer(r"[^\W\d_]", text)]] |= LETTER
    flags[[ord(char) for char in cased_starts()]] |= STARTS_CASED
    flags[[char == low for char, low in zip(text, lower, strict=True)]] |= IS_LOWER
    flags[[char == low.upper() for char, low in zip(text, lower, strict=True)]] |= COMES_BACK
    flags[[match.start() for match in re.finditer(r"\d", text)]] |= DECIMAL
    # What has another length in lower case, and the sigma, which has another form at the end of a word.
    flags[[len(low) > 1 for low in lower]] |= NOT_HERE
    flags[[*map(ord, ESCAPED), 0x3A3]] |= NOT_HERE
    return flags, np.array([ord(low[0]) for low in lower], np.uint16)


def compiled_words(processor: Any, pieces: Sequence[str], rules: Rules, *how: Any) -> CompiledWords | None:
    """As `CompiledWords`, or None where it cannot be had: without Numba, or for a model that the loops do not know."""
    if find_spec("numba") is None:
        return None
    try:
        made = CompiledWords(processor, pieces, rules, *how)
        return made if made.agrees(processor, pieces) else None
    except Exception as error:  # Numba raises errors of many kinds for a NumPy or a processor that it does not know
        log.warning("Numba cannot compile tokenising, which is slower without: %s", str(error).partition("\n")[0])
        return None


def _loops() -> Any:
    return import_module("ulmfit.text.word_loops")
