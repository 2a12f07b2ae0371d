"""Raw UTF-8 to ids, in loops that Numba compiles: words are cut out and looked up, new ones marked and segmented.

`text/rules.py` and SentencePiece say what is right. The loops do what is common, and list what they leave to them.
`compiled_words` keeps what is compiled, and compiles anew where a file that it names changes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from ulmfit.native import part, pointer, prefetch, unit
from ulmfit.text.rules import CAPITALISED, NEWLINE, UPPER
from ulmfit.text.word_block import BEGIN
from ulmfit.text.word_memory import (
    ARRAYS,
    AT_ONCE,
    COMES_BACK,
    DECIMAL,
    IS_LOWER,
    LETTER,
    LINE,
    LINE_AND_BREAK,
    LONGEST_MARKED,
    NOT_HERE,
    NUMBERS,
    PLANT,
    STARTS_CASED,
    WORD,
)
from ulmfit.text.word_table import EMPTY, HIGH_MASKS, LONGEST, LOW_MASKS, MIX_HIGH, MIX_LOW, MOST_IDS, WAYS

numba: Any = import_module("numba")

_BREAK, _BEGIN, _THRICE, _BLANKS = 1, 2, 4, 8  # what is seen of a word
_SPACE, _LINE_BREAK = 32, 10
_MAY_END = np.array([byte > 127 or chr(byte).isalpha() for byte in range(256)], np.int64)  # with a mark behind it
_CAPITALISED, _UPPER, _NEWLINE = ord(CAPITALISED), ord(UPPER), ord(NEWLINE)
_MIX_EDGE = 0x9E3779B1
_NONE, _ONE, _EIGHT = np.uint64(0), np.uint64(1), np.uint64(8)
_SPACES, _BREAKS, _LOWER = (np.uint64(byte * 0x0101010101010101) for byte in (_SPACE, _LINE_BREAK, 0x7F))
_GATHER = np.uint64(0x0102040810204080)  # multiplied by it, the lowest bits of eight bytes stand in the uppermost
_ZERO = np.float32(0)
_U8, _U16, _I32, _I64, _U64 = numba.uint8, numba.uint16, numba.int32, numba.int64, numba.uint64
_F32 = numba.float32
_pointer, _prefetch = pointer(), prefetch(for_writing=False)

# -- pieces ----------------------------------------------------------------------------------------------------------


def _follow(edges: Any, node: Any, byte: Any) -> Any:
    """The slot of an edge, or the free one where it would stand."""
    key, last = (node << 8) | byte, np.uint64(len(edges) - 1)
    slot = np.uint64((key * _MIX_EDGE) >> 7) & last
    while edges[slot] != 0 and (edges[slot] >> 32) != key:
        slot = (slot + _ONE) & last
    return slot


follow = part(_follow)


def _plant(edges: Any, piece_of: Any, spelled: Any, ends: Any, wanted: Any) -> Any:
    """The tree of those pieces of the flat `spelled` that are `wanted`; how many nodes it has."""
    nodes, start = 2, 0  # 0: no node, 1: the root
    for piece in range(len(ends)):
        if wanted[piece]:
            node = 1
            for i in range(start, ends[piece]):
                byte = np.int64(spelled[i])
                slot = follow(edges, node, byte)
                if edges[slot] == 0:
                    edges[slot] = (((node << 8) | byte) << 32) | nodes
                    nodes += 1
                node = edges[slot] & 0xFFFFFFFF
            piece_of[node] = piece
        start = ends[piece]
    return nodes


plant = part(_plant)


def _segment(
    marked: Any, size: Any, edges: Any, piece_of: Any, scores: Any, unknown_score: Any, best: Any, came: Any, piece: Any
) -> None:
    """Find the most likely pieces (Viterbi); a character that has none is piece -1.

    The sums are those of SentencePiece, in 32 bits from the left, for near-ties to be decided alike.
    """
    came[: size + 1] = -1
    best[0] = _ZERO
    at = 0
    while at < size:
        first = marked[at]
        width = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        node, stop, single = 1, at, False
        while stop < size:
            node = edges[follow(edges, node, np.int64(marked[stop]))] & 0xFFFFFFFF
            if node == 0:
                break
            stop += 1
            found = piece_of[node]
            if found >= 0:
                score = scores[found] + best[at]
                if came[stop] < 0 or score > best[stop]:
                    best[stop], came[stop], piece[stop] = score, at, found
                single = single or stop == at + width
        stop = at + width
        if not single:
            score = unknown_score + best[at]
            if came[stop] < 0 or score > best[stop]:
                best[stop], came[stop], piece[stop] = score, at, -1
        at = stop


segment = part(_segment)


def _write(marked: Any, size: Any, byte_ids: Any, came: Any, piece: Any, out: Any, at: Any) -> Any:
    """Put the pieces that were found in `out`; where they end, or -1 if there is neither a piece nor bytes."""
    count, place = 0, size
    while place > 0:
        if piece[place] >= 0:
            count += 1
        elif byte_ids[0] < 0:
            return -1
        else:
            count += place - came[place]
        place = came[place]
    end = at + count
    to, place = end, size
    while place > 0:
        before = came[place]
        if piece[place] >= 0:
            to -= 1
            out[to] = piece[place]
        else:
            for i in range(place - 1, before - 1, -1):
                to -= 1
                out[to] = byte_ids[marked[i]]
        place = before
    return end


write = part(_write)

# -- rules -----------------------------------------------------------------------------------------------------------


def _mark_case(codes: Any, count: Any, flags: Any, lower: Any, case: Any, out: Any) -> Any:
    """Code points of a word with markers of case and of the line's end into `out`; how many these are."""
    n, k, behind_letter = 0, 0, False
    while k < count:
        if case and not behind_letter and flags[codes[k]] & STARTS_CASED:
            end, capitalised, upper = k + 1, True, flags[codes[k]] & COMES_BACK != 0
            while end < count and flags[codes[end]] & LETTER:
                capitalised = capitalised and flags[codes[end]] & IS_LOWER != 0
                upper = upper and flags[codes[end]] & COMES_BACK != 0
                end += 1
            if capitalised or upper:
                out[n] = _CAPITALISED if capitalised else _UPPER
                n += 1
            for j in range(k, end):
                out[n] = lower[codes[j]] if capitalised or upper else codes[j]
                n += 1
            k, behind_letter = end, True
        else:
            behind_letter = flags[codes[k]] & LETTER != 0
            out[n] = _NEWLINE if codes[k] == _LINE_BREAK else codes[k]
            n += 1
            k += 1
    return n


mark_case = part(_mark_case)


def _mark(
    data: Any, start: Any, stop: Any, flags: Any, lower: Any, case: Any, elongation: Any,
    codes: Any, marked: Any, out: Any,
) -> Any:  # fmt: skip
    """A raw word with markers into `out`; where it ends there, or -1 if this is not for here."""
    count = 0
    while start < stop:
        first = np.int64(data[start])
        if first < 0x80:
            codes[count] = first
            start += 1
        elif first < 0xE0:
            codes[count] = (first & 31) << 6 | np.int64(data[start + 1]) & 63
            start += 2
        elif first < 0xF0:
            codes[count] = (first & 15) << 12 | (np.int64(data[start + 1]) & 63) << 6 | np.int64(data[start + 2]) & 63
            start += 3
        else:
            return -1
        if flags[codes[count]] & NOT_HERE:
            return -1
        count += 1
    n, run, before = 3, 0, -1
    for k in range(mark_case(codes, count, flags, lower, case, marked)):
        code = marked[k]
        run = run + 1 if code == before else 1
        before = code
        if run == 4 and elongation and not flags[code] & DECIMAL:
            return -1
        if code < 0x80:
            out[n] = code
            n += 1
        elif code < 0x800:
            out[n], out[n + 1] = 0xC0 | code >> 6, 0x80 | code & 63
            n += 2
        else:
            out[n], out[n + 1], out[n + 2] = 0xE0 | code >> 12, 0x80 | code >> 6 & 63, 0x80 | code & 63
            n += 3
    return n


mark = part(_mark)

# -- words -----------------------------------------------------------------------------------------------------------


@import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
def _trailing_zeros(context: Any, number: Any) -> Any:
    """How many zeros stand below the lowest one of 64 bits that are not all zero."""
    ir, types = import_module("llvmlite.ir"), numba.types
    return types.int64(types.uint64), lambda c, builder, s, given: builder.cttz(given[0], ir.Constant(ir.IntType(1), 1))


@import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
def _copy_row(context: Any, ids: Any, first: Any, out: Any, at: Any) -> Any:
    """Copy the ids of a row, and their number, at once."""
    ir, types = import_module("llvmlite.ir"), numba.types

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        row = ir.VectorType(ir.IntType(ids.dtype.bitwidth), MOST_IDS + 1).as_pointer()
        arrays = [context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 2)]
        places = [builder.gep(array.data, [given[i]]) for array, i in zip(arrays, (1, 3), strict=True)]
        whence, to = (builder.bitcast(place, row) for place in places)
        align = ids.dtype.bitwidth // 8
        builder.store(builder.load(whence, align=align), to, align=align)
        return context.get_dummy_value()

    return types.void(ids, types.int64, out, types.int64), generate


def _find_white(eights: Any, white: Any) -> None:
    """Bits of the bytes that end a word, 64 in a number."""
    for group in range(len(white)):
        bits = _NONE
        for k in range(8):
            number = eights[group * 8 + k]
            spaces, breaks = number ^ _SPACES, number ^ _BREAKS
            # The upper bit of each byte that is zero.
            spaces = ~(((spaces & _LOWER) + _LOWER) | spaces | _LOWER)
            breaks = ~(((breaks & _LOWER) + _LOWER) | breaks | _LOWER)
            bits |= ((((spaces | breaks) >> np.uint64(7)) * _GATHER) >> np.uint64(56)) << np.uint64(8 * k)
        white[group] = bits


find_white = part(_find_white)


def _repeats(data: Any, starts: Any, stops: Any, third: Any) -> Any:
    """Whether three words are, or begin and end, alike, so that the rule of repetition may be for their line."""
    start, at = starts[third - 1], starts[third]
    first = data[start]
    if data[stops[third - 1]] != _SPACE or data[stops[third - 2]] != _SPACE:
        return False
    if not (first > 127 or 48 <= first <= 57 or 65 <= first <= 90 or 97 <= first <= 122):
        return False
    length = stops[third - 1] - start
    if stops[third] - at < length or stops[third - 2] - starts[third - 2] < length:
        return False
    before = stops[third - 2] - length
    for i in range(length):  # noqa: SIM110
        if data[start + i] != data[at + i] or data[start + i] != data[before + i]:
            return False
    return True


repeats = part(_repeats)


def _cut(
    data: Any, eights: Any, white: Any, at: Any, size: Any, end_ids: Any, elongation: Any, repetition: Any,
    starts: Any, stops: Any, lengths: Any, marks: Any, lows: Any, highs: Any, seen: Any,
) -> Any:  # fmt: skip
    """The next words, each with its key; behind the last of them in the arrays, and where the next begins."""
    for k in range(2):
        starts[k], stops[k] = starts[k + AT_ONCE], stops[k + AT_ONCE]
    group = at >> 6
    bits = white[group] >> np.uint64(at & 63) << np.uint64(at & 63)
    w = 2
    while w < AT_ONCE + 2 and at < size:
        while bits == 0:
            group += 1
            bits = white[group]
        stop = group * 64 + _trailing_zeros(bits)
        bits &= bits - _ONE
        broken = np.int64(data[stop] == _LINE_BREAK)
        # Of an empty word and of one byte, white space stands there.
        mark_id = end_ids[data[stop - 1]] * _MAY_END[data[stop - 2]] * (1 - broken)
        length = stop - at + broken - (mark_id != 0)
        shift, bounded = np.uint64((at & 7) << 3), min(length, LONGEST + 1)
        eight = np.uint64(at >> 3)  # unsigned, an index is not looked at for being negative
        first, second, third = eights[eight], eights[eight + _ONE], eights[eight + _ONE + _ONE]
        back = np.uint64(63) - shift  # and one more: shifted by 64 at once, a number is undefined
        starts[w], stops[w], lengths[w], marks[w] = at, stop, length, mark_id
        lows[w] = (first >> shift | second << _ONE << back) & LOW_MASKS[bounded] if length else EMPTY
        highs[w] = (second >> shift | third << _ONE << back) & HIGH_MASKS[bounded]
        seen[w] = broken * _BREAK + (data[at] == BEGIN) * _BEGIN
        if at == stop:
            if elongation and starts[w - 1] == stops[w - 1] and starts[w - 2] == stops[w - 2]:
                seen[w] |= _BLANKS
        elif repetition and data[at] == data[starts[w - 1]] and repeats(data, starts, stops, w):
            seen[w] |= _THRICE
        at = stop + 1
        w += 1
    return w, at


cut = part(_cut)


def _find_homes(words_at: Any, width: Any, shift: Any, lows: Any, highs: Any, homes: Any, last: Any) -> None:
    """The upper bits of a product, which all bits of a key change; the rows are fetched meanwhile."""
    for w in range(2, last):
        mixed = ((highs[w] * MIX_HIGH) ^ lows[w]) * MIX_LOW
        homes[w] = np.int64(mixed >> shift)
        _prefetch(words_at + homes[w] * width * 8)


find_homes = part(_find_homes)


def _find(words: Any, width: Any, low: Any, high: Any, home: Any) -> Any:
    """The row of a word, or -1."""
    for way in range(WAYS):
        row = home ^ way
        key = np.uint64(row * width)
        if words[key] == low and words[key + _ONE] == high:
            return row
    return -1


find = part(_find)


def _learn(
    words: Any, width: Any, ids: Any, id_width: Any, turn: Any, low: Any, high: Any, home: Any,
    out: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Put a word with its ids in the table; if all its places are taken, in that of another."""
    row = -1
    for way in range(WAYS):
        if ids[((home ^ way) + 1) * id_width - 1] == 0:
            row = home ^ way
            break
    if row < 0:
        turn[0] += 1
        row = home ^ (turn[0] % WAYS)
    words[row * width], words[row * width + 1] = low, high
    count_at = (row + 1) * id_width - 1
    for i in range(stop - start):
        ids[count_at - MOST_IDS + i] = out[start + i]
    ids[count_at] = stop - start


learn = part(_learn)


def _leave(left: Any, count: Any, at: Any, start: Any, stop: Any, what: Any) -> Any:
    """Write down what is left to the caller; how much that is now."""
    left[4 * count], left[4 * count + 1], left[4 * count + 2], left[4 * count + 3] = at, start, stop, what
    return count + 1


leave = part(_leave)


def _array(given: Any, which: Any, kind: Any) -> Any:
    return numba.carray(_pointer(given[2 * which], kind), given[2 * which + 1])


array = part(_array)


def _read(numbers: Any, given: Any, out: Any, ids: Any) -> None:
    """Ids of documents.

    Args:
        numbers: `READ`; bytes without padding; `Numbers`. What comes back: how many ids, and entries of `left`.
        given: the places of the data, as `word_block.joined` makes it; of a number of 64 bits for 64 of its bytes; of
            what is left to the caller, (words, 4): its place in `out`, where it starts and stops in the data, and what
            it is; of where the documents begin in `out`; of `out` itself, `Known` and `Memory`.
        out: room for 8 ids a byte; of what is left it has none.
        ids: those of the table.
    """
    size, space_id, begin_id = numbers[1], numbers[2], numbers[3]
    case, elongation, repetition = numbers[4] != 0, numbers[5] != 0, numbers[6] != 0
    width, id_width, shift = numbers[7], numbers[8], np.uint64(numbers[9])
    data, eights = array(given, 0, _U8), numba.carray(_pointer(given[0], _U64), given[1] >> 3)
    white, left, begins = array(given, 1, _U64), array(given, 2, _I64), array(given, 3, _I64)
    edges, piece_of, scores, byte_ids = (
        array(given, 5, _I64),
        array(given, 6, _I32),
        array(given, 7, _F32),
        array(given, 8, _I64),
    )
    unknown_score = scores[len(scores) - 1]
    end_ids, flags, lower = array(given, 9, _I64), array(given, 10, _U8), array(given, 11, _U16)
    words, words_at, turn = array(given, 12, _U64), given[24], array(given, 14, _I64)
    starts, stops = array(given, 15, _I64), array(given, 16, _I64)
    lengths, marks = array(given, 17, _I64), array(given, 18, _I64)
    lows, highs, seen, homes = (
        array(given, 19, _U64),
        array(given, 20, _U64),
        array(given, 21, _U8),
        array(given, 22, _I64),
    )
    codes, marked_codes, marked = array(given, 23, _I64), array(given, 24, _I64), array(given, 25, _U8)
    best, came, piece = array(given, 26, _F32), array(given, 27, _I32), array(given, 28, _I32)
    find_white(eights, white)
    at = n = count = documents = np.int64(0)  # Numba takes a bare 0 for a type of its own, and compiles all twice
    document_id, document_count, document_byte, odd_document = n, n, n, False
    line_id, line_count, line_byte, odd_line = n, n, n, False
    starts[AT_ONCE:], stops[AT_ONCE:] = 0, 1  # before the first no word, and no blank
    while at < size:
        last, at = cut(
            data, eights, white, at, size, end_ids, elongation, repetition,
            starts, stops, lengths, marks, lows, highs, seen,
        )  # fmt: skip
        find_homes(words_at, width, shift, lows, highs, homes, last)
        for w in range(2, last):
            start, stop, length = starts[w], stops[w], lengths[w]
            if seen[w] & _BEGIN:
                if odd_document:
                    n, count = document_id, leave(left, document_count, document_id, document_byte, start - 1, LINE)
                elif odd_line:
                    n, count = line_id, leave(left, line_count, line_id, line_byte, start - 1, LINE)
                begins[documents] = n
                documents += 1
                out[n] = begin_id
                n += 1
                document_id, document_count, document_byte, odd_document = n, count, stop + 1, False
                line_id, line_count, line_byte, odd_line = n, count, stop + 1, False
                continue
            row = find(words, width, lows[w], highs[w], homes[w]) if length <= LONGEST else -1
            if row >= 0:
                count_at = (row + 1) * id_width - 1
                _copy_row(ids, count_at - MOST_IDS, out, n)
                n += np.int64(ids[count_at])
            else:
                end = np.int64(-1)
                if length == 0:
                    out[n] = space_id
                    end = n + 1
                elif length <= LONGEST_MARKED:
                    to = mark(data, start, start + length, flags, lower, case, elongation, codes, marked_codes, marked)
                    if to > 0:
                        segment(marked, to, edges, piece_of, scores, unknown_score, best, came, piece)
                        end = write(marked, to, byte_ids, came, piece, out, n)
                if end < 0:
                    count = leave(left, count, n, start, start + length, WORD)
                else:
                    if length <= LONGEST and end - n <= MOST_IDS:
                        learn(words, width, ids, id_width, turn, lows[w], highs[w], homes[w], out, n, end)
                    n = end
            out[n] = marks[w]
            n += marks[w] != 0
            if seen[w]:
                odd_document = odd_document or seen[w] & _BLANKS != 0
                odd_line = odd_line or seen[w] & (_THRICE | _BLANKS) != 0
            if seen[w] & _BREAK:
                if odd_line and not odd_document:
                    n, count = line_id, leave(left, line_count, line_id, line_byte, stop, LINE_AND_BREAK)
                line_id, line_count, line_byte, odd_line = n, count, stop + 1, False
    if odd_document:
        n, count = document_id, leave(left, document_count, document_id, document_byte, size - 1, LINE)
    elif odd_line:
        n, count = line_id, leave(left, line_count, line_id, line_byte, size - 1, LINE)
    numbers[0], numbers[1] = n, count


read = part(_read)


def entry(wide: bool) -> int:
    """The `unit` (address of `arguments`) -> nothing; with `wide`, ids have 32 bits.

    For `PLANT` the arrays are those of `plant`, whose result comes back in its place; else see `_read`.
    """
    of_ids = numba.uint32 if wide else numba.uint16

    def run(address: Any) -> None:
        numbers = numba.carray(_pointer(address, _I64), NUMBERS)
        given = numba.carray(_pointer(address + 8 * NUMBERS, _I64), 2 * ARRAYS)
        if numbers[0] == PLANT:
            numbers[0] = plant(
                array(given, 0, _I64),
                array(given, 1, _I32),
                array(given, 2, _U8),
                array(given, 3, _I64),
                array(given, 4, _U8),
            )
        else:
            read(numbers, given, array(given, 4, of_ids), array(given, 13, of_ids))

    return unit(run, numba.void(_I64), again=True)
