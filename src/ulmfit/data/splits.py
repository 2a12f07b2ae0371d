"""Which row goes where: stratified splits, low-shot samples and trial limits, decided by content and seed alone.

A row's place comes from a hash of its normalised text, so it does not depend on the order of the file, and
rows with the same text and label land on the same side of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

from ulmfit.errors import DataError

_ONE = 1 << 64


def text_key(text: str) -> bytes:
    """16 bytes that two texts share when they differ in nothing but whitespace and case."""
    normalised = " ".join(text.casefold().split())
    return hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def row_keys(texts: Sequence[str]) -> list[bytes]:
    """`text_key` of each row; rows without text are told apart, else all of them would land on the same side."""
    return [text_key(text or f"\0{row}") for row, text in enumerate(texts)]


def position(key: bytes, seed: int, purpose: str) -> int:
    """A number in [0, 2**64), uniform over keys, different for each seed and purpose."""
    salted = f"{purpose}:{seed}:".encode() + key
    return int.from_bytes(hashlib.blake2b(salted, digest_size=8).digest(), "big")


def threshold_part(text: str, seed: int, valid_fraction: float, test_fraction: float) -> str:
    """`train`, `valid` or `test` for one text of a stream whose length nobody knows."""
    share = position(text_key(text), seed, "split") / _ONE
    if share < valid_fraction:
        return "valid"
    return "test" if share < valid_fraction + test_fraction else "train"


def stratified_parts(
    texts: Sequence[str], labels: Sequence[str] | None, seed: int, valid_fraction: float, test_fraction: float
) -> list[str]:
    """`train`, `valid` or `test` for each row; every class gives the same share (to one row) to each.

    A class of at least three rows is in all the parts asked for; texts that occur twice stay together.
    """
    parts = ["train"] * len(texts)
    keys = row_keys(texts)
    places = [position(key, seed, "split") for key in keys]
    for rows in _by_class(labels, len(texts)).values():
        rows.sort(key=lambda i: (places[i], i))
        start = 0
        for part, fraction in (("valid", valid_fraction), ("test", test_fraction)):
            if fraction <= 0:
                continue
            # Leave at least one row for training, and one for each later part.
            reserve = 1 + (part == "valid" and test_fraction > 0)
            count = min(max(1, round(len(rows) * fraction)), len(rows) - start - reserve)
            end = start + max(0, count)
            while start < end < len(rows) - reserve and keys[rows[end]] == keys[rows[end - 1]]:
                end += 1
            for i in rows[start:end]:
                parts[i] = part
            start = end
    return parts


def low_shot(texts: Sequence[str], labels: Sequence[str], size: int, seed: int) -> list[int]:
    """`size` row numbers in file order, the classes as equal as they allow; a larger size contains a smaller one.

    Raises:
        DataError: when there are fewer rows than `size`, or `size` cannot hold every class.
    """
    classes = _by_class(labels, len(texts))
    if size > len(texts):
        raise DataError(f"dataset.train_size={size} is more than the {len(texts)} training rows there are; lower it")
    if size < len(classes):
        raise DataError(f"dataset.train_size={size} cannot hold all {len(classes)} classes; raise it")
    places = [position(key, seed, "low-shot") for key in row_keys(texts)]
    for rows in classes.values():
        rows.sort(key=lambda i: (places[i], i))
    # One row of each class in turn; the classes take turns in an order the seed decides.
    turns = sorted(classes, key=lambda name: position(str(name).encode(), seed, "class"))
    chosen: list[int] = []
    depth = 0
    while len(chosen) < size:
        chosen += [classes[name][depth] for name in turns if depth < len(classes[name])][: size - len(chosen)]
        depth += 1
    return sorted(chosen)


def limited(texts: Sequence[str], labels: Sequence[str], limit: int, seed: int) -> list[int]:
    """At most `limit` row numbers in file order, every class about in proportion (files are often sorted by class)."""
    if limit >= len(texts):
        return list(range(len(texts)))
    classes = _by_class(labels, len(texts))
    places = [position(key, seed, "limit") for key in row_keys(texts)]
    ranked: list[tuple[float, int]] = []
    for rows in classes.values():
        rows.sort(key=lambda i: (places[i], i))
        ranked += [((rank + 0.5) / len(rows), i) if rank else (-1.0, i) for rank, i in enumerate(rows)]
    return sorted(i for _, i in sorted(ranked)[:limit])


def _by_class(labels: Sequence[str] | None, count: int) -> dict[Hashable, list[int]]:
    if labels is None:
        return {None: list(range(count))}
    classes: dict[Hashable, list[int]] = {name: [] for name in sorted(set(labels))}
    for i, label in enumerate(labels):
        classes[label].append(i)
    return classes
