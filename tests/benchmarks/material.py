"""What is measured on: texts from the data folder, cut to size once and handed to both sides as files."""

from __future__ import annotations

import bz2
import csv
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "src" / "ulmfit" / "samples"
SHIPPED = ROOT / "src" / "ulmfit" / "pretrained" / "en-small"


class NoData(Exception):
    """The data folder is not there."""


def data_folder() -> Path:
    """`$ULMFIT_DATA`, or where that is not set, shared/data beside the repository.

    Raises:
        NoData: it does not hold the files.
    """
    place = Path(os.environ.get("ULMFIT_DATA") or ROOT.parent / "shared" / "data")
    for name in ("trec6/train.csv", "imdb/train.csv.bz2", "wikipedia-en/part-0.txt.bz2"):
        if not (place / name).is_file():
            raise NoData(
                f"the data folder {place} holds no {name}, expected TREC-6, IMDb and English Wikipedia; set "
                "ULMFIT_DATA to a folder with trec6/, imdb/ and wikipedia-en/, or give --tiny to try it on the samples"
            )
    return place


def prepare(folder: Path, tiny: bool) -> None:
    """Write what the cases read into `folder`.

    trec.csv and imdb.csv (text, label, split), questions.csv (train, to be split by whoever trains) and
    questions-test.csv, and wiki.jsonl (an article a line, none of them twice).

    Raises:
        NoData: not `tiny`, and there is no data folder.
    """
    if tiny:
        train, test = _rows(SAMPLES / "train.csv", 300), _rows(SAMPLES / "test.csv", 60)
        reviews = train[:60], test[:20]
        found = (text for text, _ in train)
    else:
        data = data_folder()
        train, test = _rows(data / "trec6" / "train.csv"), _rows(data / "trec6" / "test.csv")
        reviews = _rows(data / "imdb" / "train.csv.bz2", 1000), _rows(data / "imdb" / "test.csv.bz2", 100)
        found = wikipedia(data, 64_000_000)
    for name, parts in (("trec", (train, test)), ("imdb", reviews)):
        rows = [(*row, split) for split, part in zip(("train", "valid"), parts, strict=True) for row in part]
        _write(folder / f"{name}.csv", ("text", "label", "split"), rows)
    _write(folder / "questions.csv", ("text", "label"), train)
    _write(folder / "questions-test.csv", ("text", "label"), test)
    with open(folder / "wiki.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(article) + "\n" for article in found)


def articles(folder: Path, size: int | None = None) -> list[str]:
    """The first articles, of together about `size` bytes; None: all."""
    return list(each_article(folder) if size is None else _up_to(each_article(folder), size))


def each_article(folder: Path) -> Iterator[str]:
    """One after the other, without holding them in memory."""
    with open(folder / "wiki.jsonl", encoding="utf-8") as file:
        yield from map(json.loads, file)


def table(folder: Path, name: str) -> dict[str, tuple[list[str], list[str]]]:
    """Texts and labels of trec.csv or imdb.csv by split."""
    found: dict[str, tuple[list[str], list[str]]] = {"train": ([], []), "valid": ([], [])}
    with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts, labels = found[row["split"]]
            texts.append(row["text"])
            labels.append(row["label"])
    return found


def questions(folder: Path, count: int) -> list[str]:
    """The first questions, those of the test set before the others."""
    rows = table(folder, "trec")
    return [*rows["valid"][0], *rows["train"][0]][:count]


def tokens_a_text(texts: list[str]) -> float:
    """Mean number of pieces, begin markers included."""
    from ulmfit.text.tokenizer import Tokenizer

    documents = Tokenizer.load(SHIPPED).documents(texts)
    return sum(map(len, documents)) / len(documents)


def shipped_architecture() -> Any:
    """Sizes of the shipped network."""
    from ulmfit.bundle import load_bundle
    from ulmfit.nn.awd_lstm import Architecture

    return Architecture(**load_bundle(SHIPPED).info.architecture)


def wikipedia(data: Path, size: int) -> Iterator[str]:
    """Articles of together `size` bytes."""

    def each() -> Iterator[str]:
        for part in sorted((data / "wikipedia-en").glob("part-*.txt.bz2")):
            with bz2.open(part, "rt", encoding="utf-8") as file:
                lines: list[str] = []
                for line in file:
                    if line.strip():
                        lines.append(line)
                    elif lines:
                        yield "".join(lines)
                        lines = []

    yield from _up_to(each(), size)


def _up_to(texts: Iterator[str], size: int) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _rows(path: Path, count: int | None = None) -> list[tuple[str, str]]:
    opened: Any = bz2.open if path.suffix == ".bz2" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in islice(csv.DictReader(file), count)]


def _write(path: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
