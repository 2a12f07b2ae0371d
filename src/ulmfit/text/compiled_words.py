"""Words read by compiled loops (`text/word_loops.py`), where Numba is there and the model is one that they know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulmfit import native
from ulmfit.text.rules import ESCAPED, Rules, cased_starts
from ulmfit.text.word_block import joined
from ulmfit.text.word_memory import (
    COMES_BACK,
    DECIMAL,
    IS_LOWER,
    LETTER,
    NOT_HERE,
    PLANT,
    READ,
    STARTS_CASED,
    Known,
    Memory,
    Numbers,
    arguments,
)
from ulmfit.text.word_table import Ids, Positions, WordTable, id_type

_MOST_NODES = 1 << 23  # of which the hash of an edge knows
_LOWEST = -1_000.0  # score of a piece; a symbol that a user has defined has 0
log = logging.getLogger("ulmfit")


class _UnknownKindError(Exception):
    """A model that the loops do not know."""


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
        self._loops = _loops(id_type(len(pieces)) is np.uint32)
        self._table, self._vocab_size = table, len(pieces)
        edges, piece_of, wanted = _tree(processor, pieces, self._loops)
        scores = np.array([*map(processor.get_score, range(len(pieces))), 0], np.float32)
        scores[-1] = scores[:-1][wanted].min() - np.float32(10)  # as SentencePiece does it
        if not ((scores[:-1][wanted] < 0) & (scores[:-1][wanted] > _LOWEST)).all():
            raise _UnknownKindError("its pieces have scores that training does not give")
        bytes_ = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        byte_ids = np.array(bytes_ if processor.is_byte(bytes_[0]) else [-1] * 256)
        self._known = Known(edges, piece_of, scores, byte_ids, end_ids, *_code_points())
        self._ids = (space, begin)
        self._rules = rules.config
        self._free: list[tuple[Memory, int]] = []  # what no thread works in, and its rows

    def read(self, documents: Sequence[bytes]) -> Read:
        """Ids of normalised UTF-8 without zero bytes. Several threads may read at a time."""
        data, size = joined(documents)
        white = np.empty(len(data) >> 6, np.uint64)
        left, begins = np.empty((size + 2, 4), np.int64), np.empty(len(documents), np.int64)
        out = np.empty(8 * size, id_type(self._vocab_size))
        try:
            memory, rows = self._free.pop()
        except IndexError:
            table = self._table(self._vocab_size, self._ids[1])
            memory, rows = Memory.around(table.flat_words, table.flat_ids), table.begin
        width, id_width = len(memory.words) // (rows + 1), len(memory.ids) // (rows + 1)
        rules = self._rules
        numbers = Numbers(
            READ,
            size,
            *self._ids,
            rules.case,
            rules.elongation,
            rules.repetition,
            width,
            id_width,
            65 - rows.bit_length(),
        )
        given = arguments(numbers, [data, white, left, begins, out, *self._known, *memory])
        try:
            self._loops(given.ctypes.data)
        finally:
            self._free.append((memory, rows))
        ids, count = given[:2]
        return Read(out[:ids].copy(), begins, data, left[:count].copy())


def _tree(
    processor: Any, pieces: Sequence[str], loops: Callable[[int], None]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Edges and pieces by node (`Known`), and (V,) which pieces are in the tree."""
    others = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    wanted = np.array([not any(is_one(i) for is_one in others) for i in range(len(pieces))])
    spelled = [piece.encode() for piece in pieces]
    ends = np.cumsum([len(piece) for piece in spelled])
    flat = np.frombuffer(b"".join(spelled), np.uint8)
    nodes = int(ends[-1]) + 2
    if nodes > _MOST_NODES:
        raise _UnknownKindError("its pieces are too long together")
    for _ in range(2):  # once to see how many nodes there are
        edges, piece_of = np.zeros(1 << (2 * nodes).bit_length(), np.int64), np.full(nodes, -1, np.int32)
        given = arguments([PLANT], [edges, piece_of, flat, ends, wanted])
        loops(given.ctypes.data)
        nodes = int(given[0])
    return edges, piece_of, wanted


@cache
def _code_points() -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """`Known.flags` and `lower`."""
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
    if not native.is_available():
        return None
    try:
        return CompiledWords(processor, pieces, rules, *how)
    except _UnknownKindError as error:
        log.info("compiled loops do not know this tokenizer: %s", error)
        return None
    except Exception as error:  # Numba raises errors of many kinds for a NumPy or a processor that it does not know
        log.warning("Numba cannot compile tokenising, which is slower without: %s", str(error).partition("\n")[0])
        return None


@cache
def _loops(wide: bool) -> Callable[[int], None]:
    names = ["word_loops", "word_memory", "word_block", "word_table", "rules"]
    sources = [Path(__file__).with_name(f"{name}.py") for name in names]

    def build() -> dict[str, int]:
        return {name: import_module("ulmfit.text.word_loops").entry(wide)}

    name = f"words{32 if wide else 16}"
    return native.function(native.kept(name, sources, [], build)[name])
