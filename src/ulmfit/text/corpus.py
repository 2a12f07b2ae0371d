"""What a tokenizer is trained on: lines of marked text, and an even sample of them in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from ulmfit.text.rules import NEWLINE, Rules

_MAX_SENTENCE_CHARS = 1000  # SentencePiece silently skips sentences of more than 4,192 bytes


def sentences(texts: Iterable[str], rules: Rules, progress: Callable[[int], None] | None) -> Iterator[str]:
    """Lines of marked text, cut at spaces to what SentencePiece accepts."""
    for count, text in enumerate(texts, start=1):
        if progress is not None and count % 1000 == 0:
            progress(count)
        for line in rules.apply(text).split(NEWLINE + " "):
            line += NEWLINE
            start = 0
            while len(line) - start > _MAX_SENTENCE_CHARS:
                cut = line.rfind(" ", start + 1, start + _MAX_SENTENCE_CHARS)
                cut = cut if cut > 0 else start + _MAX_SENTENCE_CHARS
                if line[start:cut].strip(" "):
                    yield line[start:cut]
                start = cut
                while line[start] == " ":  # ends before the line does: its last character is the newline marker
                    start += 1
            if line[start:].strip(NEWLINE + " "):
                yield line[start:]


def sample(lines: Iterable[str], max_chars: int) -> list[str]:
    """A uniform sample of about `max_chars` characters (reservoir sampling, fixed seed, order kept)."""
    kept: list[tuple[int, str]] = []
    chars = 0
    rng = random.Random(0)
    full = False
    for index, line in enumerate(lines):
        if not full:
            kept.append((index, line))
            chars += len(line)
            full = chars >= max_chars
            continue
        slot = rng.randrange(index + 1)
        if slot < len(kept):
            chars += len(line) - len(kept[slot][1])
            kept[slot] = (index, line)
            while chars > 2 * max_chars and len(kept) > 1:  # the first sentences were short ones
                slot = rng.randrange(len(kept))
                chars -= len(kept[slot][1])
                kept[slot] = kept[-1]
                kept.pop()
    return [line for _, line in sorted(kept)]


def portions(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """The texts in lists, each as soon as it holds `chars` characters."""
    portion: list[str] = []
    held = 0
    for text in texts:
        portion.append(text)
        held += len(text)
        if held >= chars:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion
