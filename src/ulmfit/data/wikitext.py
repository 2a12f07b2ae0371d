"""WikiText token files (Merity et al. 2016): articles as running text, and the number of words of published figures.

Their words stand apart with spaces, ` @-@ ` is a hyphen inside a word, ` @,@ ` and ` @.@ ` separate digits, rare words
are `<unk>`, and a line is a heading (` = Title = `, ` = = Section = = `), a paragraph or blank.

Published perplexities spread the likelihood over the words of the file and one end-of-line token for each of its lines,
blank ones included. Running text leaves blank lines out and loses next to nothing by it: they stand around headings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_HEADING = re.compile(r"((?:= )+)(.*?)((?: =)+)")
_TITLE = re.compile(r"\s*= (?!=).*[^=\s] =\s*")
_INSIDE = re.compile(r" @([-,.])@ ")
_CLOSING = frozenset(",.;:!?)]}%…") | {"..", "...", "...."}
_OPENING = frozenset("([{$£€¥₹#")
_CONTRACTION = re.compile(r"['’]\w+(?:['’]\w+)*")  # don 't, Boulter 's, O 'Brien
_JOINED = frozenset("—")  # an em dash touches both its neighbours
_YEARS = re.compile(r"(?<=\d) – (?=\d)")  # 2000 – 2005


def detokenise(line: str) -> str:
    """A line of a token file as it would be printed.

    The words themselves stay, `<unk>` too. What spaces alone cannot tell is guessed as Wikipedia would have it:
    quotation marks open and close in turn, an apostrophe without a partner behind an s is a possessive.
    """
    line = " ".join(line.split())
    heading = _HEADING.fullmatch(line)
    if heading and heading[1].count("=") == heading[3].count("="):
        signs = heading[1].count("=")
        return f"{'=' * signs} {detokenise(heading[2])} {'=' * signs}"
    line = _YEARS.sub("–", _INSIDE.sub(r"\1", line))
    parts: list[str] = []
    glued = True  # whether the next word follows without a space
    opened = {'"': False, "'": False}
    words = line.split(" ")
    apostrophes = words.count("'")
    for word in words:
        before, after = not glued, True
        if word in _CLOSING:
            before = False
        elif word in _OPENING:
            after = False
        elif word in _JOINED:
            before = after = False
        elif word in opened:
            possessive = word == "'" and not opened[word] and apostrophes % 2 == 1 and "".join(parts[-1:]).endswith("s")
            apostrophes -= word == "'"
            if possessive or opened[word]:
                before = False
            else:
                after = False
            opened[word] ^= not possessive
        elif _CONTRACTION.fullmatch(word):
            before = False
        if before and parts:
            parts.append(" ")
        parts.append(word)
        glued = not after
    return "".join(parts)


def raw_articles(lines: Iterable[str]) -> Iterator[list[str]]:
    """Lines of a token file by article, none left out. A title stands between blank lines, which other lines may not.

    Blank lines before the first title belong to its article.
    """
    article: list[str] = []
    begun = False
    after_blank = True
    for line in lines:
        title = after_blank and _TITLE.fullmatch(line) is not None
        if title and begun:
            yield article
            article = []
        article.append(line)
        begun = begun or bool(line.strip())
        after_blank = not line.strip()
    if begun:
        yield article


def running_text(article: Iterable[str]) -> str:
    """An article as one document: its lines that are not blank, detokenised."""
    return "\n".join(detokenise(line) for line in article if line.strip())


def words_and_ends(article: Iterable[str]) -> int:
    """Tokens of an article as published perplexities count them: words, and an end for every line, blank or not."""
    return sum(len(line.split()) + 1 for line in article)
