"""Reversible text rules: case, elongation and repetition become markers, so that one piece serves many spellings.

The idea of such markers is fastai's (`xxup`, `xxmaj`, `xxrep`, `xxwrep`). Here a marker is one code point out of
"Combining Diacritical Marks Extended", which SentencePiece may merge with the word it precedes ("The" can become
one piece, a rare name falls back to marker + lower-case pieces). Code points of that range in a user's own text
are escaped first, so nobody can type a marker. `invert(apply(text)) == text` for every text, except for what
`unicode` and `html` normalise away on purpose.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from typing import Literal

from ulmfit.config import RulesConfig
from ulmfit.errors import UsageError, did_you_mean

# Script "Inherited": SentencePiece lets these join a word of any script (private-use characters would not).
CAPITALISED = "\u1ab0"  # Word -> marker + word
UPPER = "\u1ab1"  # WORD -> marker + word
ELONGATED = "\u1ab2"  # soooo -> so + marker + 4 + marker
REPEATED = "\u1ab3"  # very very very -> marker + 3 + marker + very
NEWLINE = "\u1ab4"  # line break -> marker + space
ESCAPE = "\u1ab5"  # a marker typed by a user -> escape + letter
MARKERS = CAPITALISED + UPPER + ELONGATED + REPEATED + NEWLINE + ESCAPE

_LONGEST_RUN = 10_000  # characters one marker stands for at most, so that a generated text stays bounded too
ESCAPED = MARKERS + "\u2581"  # U+2581 is SentencePiece's own sign for a space
_TO_ESCAPE = {ord(c): ESCAPE + chr(ord("a") + i) for i, c in enumerate(ESCAPED)}
_FROM_ESCAPE = {chr(ord("a") + i): c for i, c in enumerate(ESCAPED)}
_HAS_ESCAPED = re.compile(f"[{ESCAPED}]")
_LEFT_OVER = re.compile(f"{ESCAPE}([a-{chr(ord('a') + len(ESCAPED) - 1)}])|[{MARKERS}]")
_BREAK_TAG = re.compile(r"<br\s*/?>", re.IGNORECASE)
_LONG_REFERENCE = re.compile(r"&#[0-9]{500,};?")
# The patterns over whole texts start with what `re` skips ahead to fastest; what is rare is told apart afterwards.
# Repeats are bounded because `re` needs memory for each; what is longer becomes several matches.
_ELONGATION = re.compile(rf"(.)\1\1\1\1{{0,{_LONGEST_RUN - 4}}}", re.DOTALL)  # faster than \1{{3,}}
_REPETITION = re.compile(rf"(?<!\S)([^\W_]+)(?: \1){{2,{_LONGEST_RUN - 1}}}(?!\w)")
_WORD_TWICE = re.compile(r" (?=([^ ]+) \1)")
_INVERT_ELONGATION = re.compile(rf"(.){ELONGATED}(\d+){ELONGATED}", re.DOTALL)
_INVERT_REPETITION = re.compile(rf"{REPEATED}(\d+){REPEATED}([^\W_]+)")
_INVERT_CASE = re.compile(rf"{CAPITALISED}(.)|{UPPER}([^\W\d_]+)", re.DOTALL)
_UNICODE_FORMS: dict[str, Literal["NFC", "NFKC"] | None] = {"nfc": "NFC", "nfkc": "NFKC", "none": None}


@lru_cache(maxsize=1)
def cased_starts() -> str:
    """All letters that a word with a marker of case may start with."""
    return "".join(c for c in map(chr, range(0x10000)) if c.isupper() and c.isalnum() and _has_lower_case(c))


@lru_cache(maxsize=1)
def _cased_word() -> re.Pattern[str]:
    """Words (group 1) that start with an upper-case letter whose lower-case form leads back to it.

    Scripts beyond U+FFFF are left out: `re` looks up the others in a table, which is ten times faster.
    """
    ranges: list[list[int]] = []
    for code in map(ord, cased_starts()):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    letters = "".join(f"{chr(a)}-{chr(b)}" if b > a else chr(a) for a, b in ranges)
    return re.compile(rf"([{letters}](?<![^\W\d_].)[^\W\d_]*)")


def _has_lower_case(letter: str) -> bool:
    return len(letter.lower()) == 1 and letter.lower().upper() == letter


def _mark_case(word: str) -> str:
    lower = word.lower()
    if lower[0].upper() + lower[1:] == word:
        return CAPITALISED + lower
    if lower.upper() == word and len(lower) == len(word):
        return UPPER + lower
    return word


def _escape(text: str) -> str:
    return text if text.isascii() or not _HAS_ESCAPED.search(text) else text.translate(_TO_ESCAPE)


def _mark_elongation(match: re.Match[str]) -> str:
    char = match[1]
    if char.isdecimal() or char in MARKERS:
        return match[0]
    return f"{char}{ELONGATED}{len(match[0])}{ELONGATED}"


def _mark_repetition(match: re.Match[str]) -> str:
    word, count = match[1], match[0].count(" ") + 1
    most = _LONGEST_RUN // len(word)
    if most < 3:
        return match[0]
    full, rest = divmod(count, most)
    marked = [f"{REPEATED}{most}{REPEATED}{word}"] * full
    marked += [f"{REPEATED}{rest}{REPEATED}{word}"] if rest > 2 else [word] * rest
    return " ".join(marked)


def _may_repeat(text: str) -> bool:
    """Whether some word stands three times in a row; cheap, and without false negatives."""
    return any(text.endswith(match[1], 0, match.start()) for match in _WORD_TWICE.finditer(text))


def _read_html(text: str) -> str:
    """Line breaks for `<br>` with the white space around it, characters for entities."""
    if "<" in text:
        first, *others = _BREAK_TAG.split(text)
        if others:
            *middle, last = others
            text = "\n".join([first.rstrip(), *(part.strip() for part in middle), last.lstrip()])
    if "&" in text:
        try:
            text = html.unescape(text)
        except ValueError:  # Python reads no number of thousands of digits; HTML says what such a reference becomes
            text = html.unescape(_LONG_REFERENCE.sub("\ufffd", text))
    return text


class Rules:
    """Apply and invert the rules switched on in `config`.

    Raises:
        UsageError: if `config.unicode` is not one of nfc, nfkc, none.
    """

    def __init__(self, config: RulesConfig | None = None) -> None:
        self.config = config or RulesConfig()
        if self.config.unicode not in _UNICODE_FORMS:
            raise UsageError(
                f"tokenizer.rules.unicode is '{self.config.unicode}', expected one of {', '.join(_UNICODE_FORMS)}"
                f"{did_you_mean(self.config.unicode, _UNICODE_FORMS)}"
            )
        self._form = _UNICODE_FORMS[self.config.unicode]

    def normalise(self, text: str) -> str:
        """The part that is not undone: HTML breaks and entities, unusable code points, Unicode form, line ends."""
        return text if self._is_normal(text) else self.normalised_utf8(text).decode("utf-8")

    def normalised_utf8(self, text: str) -> bytes:
        """`normalise(text)` as UTF-8."""
        if not self._is_normal(text):
            if self.config.html:
                text = _read_html(text)
            if self._form is not None and not text.isascii():
                text = unicodedata.normalize(self._form, text)
            if "\r" in text:
                text = text.replace("\r\n", "\n").replace("\r", "\n")
        # A lone surrogate cannot be written as UTF-8. (No Unicode form joins "?" to what follows it.)
        return text.encode("utf-8", "replace")

    def _is_normal(self, text: str) -> bool:
        return text.isascii() and "\r" not in text and not (self.config.html and ("<" in text or "&" in text))

    def apply(self, text: str) -> str:
        """Text with markers, ready for SentencePiece."""
        return self.mark(self.normalise(text))

    def mark(self, text: str) -> str:
        """Markers in a normalised text."""
        text = _escape(text)
        if self.config.repetition and _may_repeat(text):
            text = _REPETITION.sub(_mark_repetition, text)
        return self._mark_each(text).replace("\n", NEWLINE + " ")

    def mark_words(self, words: str) -> str:
        """As `mark`, for single words with a space between two; each may have a line break at its end.

        All rules but repetition, and elongation of white space, look at one word alone.
        """
        return self._mark_each(_escape(words)).replace("\n", NEWLINE)

    def _mark_each(self, text: str) -> str:
        if self.config.case:
            parts = _cased_word().split(text)  # text between words, word, text between words, ...
            parts[1::2] = map(_mark_case, parts[1::2])
            text = "".join(parts)
        if self.config.elongation:
            text = _ELONGATION.sub(_mark_elongation, text)
        return text

    def invert(self, text: str) -> str:
        """The text a reader would see: exactly `normalise(original)` for `apply(original)`.

        Stray markers, which only a generated text can hold, disappear.
        """
        text = text.replace(NEWLINE + " ", "\n")
        text = _INVERT_ELONGATION.sub(lambda m: m[1] * _run(m[2], 1), text)
        text = _INVERT_CASE.sub(lambda m: m[1].upper() if m[1] else m[2].upper(), text)
        text = _INVERT_REPETITION.sub(lambda m: " ".join([m[2]] * _run(m[1], len(m[2]))), text)
        return _LEFT_OVER.sub(lambda m: _FROM_ESCAPE[m[1]] if m[1] else "", text)


def _run(digits: str, length: int) -> int:
    """The number a marker holds, bounded so that so many times `length` characters stay within `_LONGEST_RUN`."""
    return min(int(digits[:9]), max(1, _LONGEST_RUN // length))
