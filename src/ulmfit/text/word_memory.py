"""What the compiled loops of `text/word_loops.py` know and work in; Numba passes these tuples by their fields."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 512  # words cut out before they are looked up, so that look-ups do not wait for one another
LONGEST_MARKED = 512  # bytes of a word that is marked and segmented by the loops
MOST_MARKED = 4 * LONGEST_MARKED + 8  # bytes it may have with markers: a letter and the marker before it
LETTER, STARTS_CASED, IS_LOWER, COMES_BACK, DECIMAL, NOT_HERE = 1, 2, 4, 8, 16, 32  # what is known of a code point
WORD, LINE, LINE_AND_BREAK = 0, 1, 2  # what the loops leave to others

Array = NDArray[Any]


class Tree(NamedTuple):
    """The pieces of a unigram model.

    Attributes:
        edges: int64, hashed: (node, byte) in the upper half of a number, the node it leads to in the lower.
        piece_of: (nodes,) int32, the piece that ends at a node, or -1.
        scores: (V,) float32.
        unknown_score: float32, of a character that no piece has.
        byte_ids: (256,) int64, the pieces of single bytes; -1 in a model that has none.
    """

    edges: Array
    piece_of: Array
    scores: Array
    unknown_score: np.float32
    byte_ids: Array


class Letters(NamedTuple):
    """What is known of code points below 65,536 (uint8, uint16), and which rules hold."""

    flags: Array
    lower: Array
    case: bool
    elongation: bool


class Model(NamedTuple):
    """What words become.

    Attributes:
        end_ids: (256,) int64, of the marks of punctuation looked up on their own, else 0.
        space_id, begin_id: of the empty word, and before each document.
    """

    tree: Tree
    letters: Letters
    repetition: bool
    end_ids: Array
    space_id: int
    begin_id: int


class Table(NamedTuple):
    """Rows of a `WordTable`.

    Attributes:
        words, ids: as numbers of 64 bits, and as ids; a row has `width` and `id_width` of them.
        shift: bits of a product that are too many for the number of a row.
        turn: (1,) int64, the next word to be replaced elsewhere.
    """

    words: Array
    ids: Array
    width: int
    id_width: int
    shift: np.uint64
    turn: Array


class Batch(NamedTuple):
    """Words that are cut out, behind the last two of those before.

    Attributes:
        starts, stops, lengths: int64, in bytes; the length has the line break behind a word, and has no mark.
        marks: int64, id of the mark at its end, or 0.
        lows, highs: uint64, the key.
        seen: uint8.
        homes: int64, the row where it may first stand.
    """

    starts: Array
    stops: Array
    lengths: Array
    marks: Array
    lows: Array
    highs: Array
    seen: Array
    homes: Array


class Spelling(NamedTuple):
    """One word: its code points (int64), those with markers, and these as UTF-8 (uint8), which starts with U+2581."""

    codes: Array
    marked_codes: Array
    marked: Array


class Path(NamedTuple):
    """By byte of a word, the best segmentation that ends there: its score, where its last piece began, and which."""

    best: Array
    came: Array
    piece: Array


class Memory(NamedTuple):
    """What one thread works in."""

    table: Table
    batch: Batch
    spelling: Spelling
    path: Path

    @classmethod
    def around(cls, words: Array, ids: Array, rows: int) -> Memory:
        """For `rows` rows of words, and the one of the begin marker."""
        width, id_width = len(words) // (rows + 1), len(ids) // (rows + 1)
        table = Table(words, ids, width, id_width, np.uint64(65 - rows.bit_length()), np.zeros(1, np.int64))
        of_words = [np.zeros(AT_ONCE + 2, kind) for kind in (*["i8"] * 4, *["u8"] * 2, "u1", "i8")]
        of_word = [np.zeros(MOST_MARKED + 1, kind) for kind in ("i8", "i8", "u1", "f4", "i4", "i4")]
        of_word[2][:3] = list("\u2581".encode())  # SentencePiece puts it before each word
        return cls(table, Batch(*of_words), Spelling(*of_word[:3]), Path(*of_word[3:]))
