"""What the compiled loops of `text/word_loops.py` know and work in, and how it is handed to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 512  # words cut out before they are looked up, so that look-ups do not wait for one another
LONGEST_MARKED = 512  # bytes of a word that is marked and segmented by the loops
MOST_MARKED = 4 * LONGEST_MARKED + 8  # bytes it may have with markers: a letter and the marker before it
LETTER, STARTS_CASED, IS_LOWER, COMES_BACK, DECIMAL, NOT_HERE = 1, 2, 4, 8, 16, 32  # what is known of a code point
WORD, LINE, LINE_AND_BREAK = 0, 1, 2  # what the loops leave to others
READ, PLANT = 0, 1  # what they are asked for
NUMBERS, ARRAYS = 10, 29  # of `arguments`, at most

Array = NDArray[Any]


class Numbers(NamedTuple):
    """The first of the arguments.

    Attributes:
        what: `READ`.
        size: bytes of the data without padding.
        space_id, begin_id: of the empty word, and before each document.
        case, elongation, repetition: which rules hold.
        width, id_width: of a row of the table, in numbers of 64 bits and in ids.
        shift: bits of a product that are too many for the number of a row.
    """

    what: int
    size: int
    space_id: int
    begin_id: int
    case: bool
    elongation: bool
    repetition: bool
    width: int
    id_width: int
    shift: int


class Known(NamedTuple):
    """What words become.

    Attributes:
        edges: int64, of the tree of pieces, hashed: (node, byte) in the upper half of a number, in the lower the node
            that it leads to.
        piece_of: (nodes,) int32, the piece that ends at a node, or -1.
        scores: (V + 1,) float32, last that of a character that no piece has.
        byte_ids: (256,) int64, the pieces of single bytes; -1 in a model that has none.
        end_ids: (256,) int64, of the marks of punctuation looked up on their own, else 0.
        flags, lower: (65,536,) uint8 and uint16, by code point.
    """

    edges: Array
    piece_of: Array
    scores: Array
    byte_ids: Array
    end_ids: Array
    flags: Array
    lower: Array


class Memory(NamedTuple):
    """What one thread works in.

    Attributes:
        words, ids: rows of a `WordTable` as numbers of 64 bits, and as ids.
        turn: (1,) int64, the next word to be replaced elsewhere.
        starts, stops, lengths: int64, in bytes, of words that are cut out, behind the last two of those before; the
            length has the line break behind a word, and has no mark.
        marks: int64, id of the mark at its end, or 0.
        lows, highs: uint64, the key.
        seen: uint8.
        homes: int64, the row where it may first stand.
        codes, marked_codes, marked: of one word its code points (int64), those with markers, and these as UTF-8
            (uint8), which starts with U+2581.
        best, came, piece: by byte of it, the best segmentation that ends there: its score, where its last piece began,
            and which that is.
    """

    words: Array
    ids: Array
    turn: Array
    starts: Array
    stops: Array
    lengths: Array
    marks: Array
    lows: Array
    highs: Array
    seen: Array
    homes: Array
    codes: Array
    marked_codes: Array
    marked: Array
    best: Array
    came: Array
    piece: Array

    @classmethod
    def around(cls, words: Array, ids: Array) -> Memory:
        """For rows of a table."""
        of_words = [np.zeros(AT_ONCE + 2, kind) for kind in (*["i8"] * 4, *["u8"] * 2, "u1", "i8")]
        of_word = [np.zeros(MOST_MARKED + 1, kind) for kind in ("i8", "i8", "u1", "f4", "i4", "i4")]
        of_word[2][:3] = list("\u2581".encode())  # SentencePiece puts it before each word
        return cls(words, ids, np.zeros(1, np.int64), *of_words, *of_word)


def arguments(numbers: Sequence[int], arrays: Sequence[Array]) -> NDArray[np.int64]:
    """`NUMBERS` numbers, then where each array is and how many numbers it holds. The arrays must outlive it."""
    given = np.zeros(NUMBERS + 2 * ARRAYS, np.int64)
    given[: len(numbers)] = numbers
    given[NUMBERS : NUMBERS + 2 * len(arrays)] = [n for array in arrays for n in (array.ctypes.data, array.size)]
    return given
