"""One reader for each file format: a file in, rows of (text, label) out, streamed.

Labels are `None` where they were not asked for. Whitespace-only texts come out as empty strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ulmfit.config import DatasetConfig
from ulmfit.data.delimited import Layout, read_delimited
from ulmfit.data.files import data_suffix, read_lines, read_text, refuse_long, require_path
from ulmfit.data.parquet import parquet_file, read_parquet
from ulmfit.data.rows import (
    UNLABELLED_NAMES,
    Row,
    Source,
    check_columns,
    clean_label,
    clean_text,
    join_columns,
    text_columns,
)
from ulmfit.data.wikitext import raw_articles, running_text
from ulmfit.errors import DataError

UNLABELLED_FORMATS = ("text", "wikipedia", "wikitext")
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "",  # by content
    ".text": "",
    ".ft": "",
    ".tokens": "",
    ".raw": "",
}
_LABEL_PREFIX = "__label__"
_LABEL = re.compile(_LABEL_PREFIX + r"([^ \t]*)[ \t]?\s*")
_TITLE = re.compile(r"\s*= ?[^=\s].*[^=\s] ?=\s*|\s*= ?[^=\s] ?=\s*")


def detect_format(path: Path, config: DatasetConfig) -> str:
    """The format of a file by its suffix, or by its first line for `.txt` and unknown suffixes."""
    known = SUFFIXES.get(data_suffix(path), "")
    if known:
        return known
    for line in read_lines(path, config.encoding, config.max_document_chars):
        if line.strip():
            if line.startswith(_LABEL_PREFIX):
                return "fasttext"
            return "wikipedia" if _TITLE.fullmatch(line) else "text"
    return "text"


def read_rows(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    """Rows of one source in file order.

    Args:
        labelled: whether labels are wanted; then a missing column or an empty label is an error.

    Raises:
        DataError: whatever is wrong with the file, in one sentence with file and line.
    """
    if source.format == "huggingface":
        from ulmfit.data.huggingface import read_huggingface

        yield from read_huggingface(source, config, labelled)
        return
    require_path(source.path)
    readers = {
        "csv": read_delimited,
        "tsv": read_delimited,
        "jsonl": _read_jsonl,
        "parquet": read_parquet,
        "folder": _read_folder,
        "fasttext": _read_fasttext,
        "text": _read_plain,
        "wikipedia": _read_wikipedia,
        "wikitext": _read_wikitext,
    }
    yield from readers[source.format](source, config, labelled)


def column_names(source: Source, config: DatasetConfig) -> list[str] | None:
    """The columns of a source, or None for formats that have none."""
    if source.format in ("csv", "tsv"):
        return Layout.of(source, config).header
    if source.format == "jsonl":
        for _, record in _json_records(source, config):
            return list(record)
        return []
    if source.format == "parquet":
        return list(parquet_file(source.path).schema_arrow.names)
    if source.format == "huggingface":
        from ulmfit.data.huggingface import huggingface_columns

        return huggingface_columns(source)
    return None


def has_labels(source: Source, config: DatasetConfig) -> bool:
    """Whether labels can be read from a source with this configuration."""
    if not config.label or source.format in UNLABELLED_FORMATS:
        return False
    if source.format == "folder":
        return any(label is not None for label, _ in folder_files(source.path))
    names = column_names(source, config)
    return names is None or config.label in names


def _lines(source: Source, config: DatasetConfig) -> Iterator[str]:
    return read_lines(source.path, config.encoding, config.max_document_chars)


def _json_records(source: Source, config: DatasetConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(source, config), 1):
        if not line.strip():
            continue
        where = f"{source.path}, line {number},"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            raise DataError(f"{where} is not valid JSON ({error}); one object a line is expected") from None
        if not isinstance(record, dict):
            kind = "list" if isinstance(record, list) else type(record).__name__
            raise DataError(f"{where} holds a {kind} where one JSON object a line is expected")
        yield where, record


def _read_jsonl(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    columns = text_columns(config)
    wanted = [*columns, *([config.label] if labelled else [])]
    for where, record in _json_records(source, config):
        check_columns(wanted, list(record), where.rstrip(","))
        label = clean_label(record[config.label], where) if labelled else None
        yield join_columns([record[name] for name in columns], where), label


def folder_files(folder: Path) -> list[tuple[str | None, Path]]:
    """(class, file) pairs of a folder of classes, or (None, file) when the files lie in it directly.

    Sub-folders of unlabelled text (`unsup`, as in the original IMDb download) are no class.
    """
    classes = [d for d in visible(folder) if d.is_dir() and d.name.lower() not in UNLABELLED_NAMES]
    if not classes:
        return [(None, file) for file in visible(folder) if file.is_file()]
    return [(d.name, file) for d in classes for file in visible(d) if file.is_file()]


def visible(folder: Path) -> list[Path]:
    """What lies in a folder in natural order (part-2 before part-10), without hidden names."""
    items = [item for item in folder.iterdir() if not item.name.startswith((".", "__"))]
    return sorted(items, key=lambda item: natural_order(item.name))


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that counts digits as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_folder(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    files = folder_files(source.path)
    if labelled and files and files[0][0] is None:
        raise DataError(
            f"{source.path} has no folder for each class; a file is expected at {source.path}/CLASS/NAME.txt"
        )
    for label, path in files:
        yield clean_text(_whole(path, config).strip("\n"), str(path)), label if labelled else None


def _whole(path: Path, config: DatasetConfig) -> str:
    pieces: list[str] = []
    length = 0
    for piece in read_text(path, config.encoding):
        pieces.append(piece)
        length += len(piece)
        refuse_long(length, config.max_document_chars, str(path))
    return "".join(pieces)


def _read_fasttext(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    for number, line in enumerate(_lines(source, config), 1):
        if not line.strip():
            continue
        labels: list[str] = []
        rest = line.lstrip()
        start = 0
        while found := _LABEL.match(rest, start):
            labels.append(found[1])
            start = found.end()
        rest = rest[start:]
        if labelled:
            where = f"{source.path}, line {number},"
            if len(labels) != 1:
                has = f"{len(labels)} labels" if labels else "no label"
                raise DataError(f"{where} has {has} where one `{_LABEL_PREFIX}NAME` at its start is expected")
            yield clean_text(rest, where), clean_label(labels[0], where)
        else:
            yield clean_text(rest, str(source.path)), None


def _read_plain(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    _no_labels(source, labelled)
    for line in _lines(source, config):
        yield (line if line.strip() else ""), None


def _read_wikipedia(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    """Articles: a `= Title =` line after a blank one starts the next.

    The WikiText token files, where blank lines also stand between paragraphs, read the same way. A file
    without titles is cut at every blank line. Lines are stripped and blank ones left out.
    """
    _no_labels(source, labelled)
    titled: bool | None = None
    article: list[str] = []
    length = 0
    after_blank = True
    for number, line in enumerate(_lines(source, config), 1):
        line = line.strip()
        if not line:
            after_blank = True
            continue
        is_title = after_blank and _TITLE.fullmatch(line) is not None
        if titled is None:
            titled = is_title
        if article and after_blank and (is_title or not titled):
            yield "\n".join(article), None
            article, length = [], 0
        article.append(line)
        length += len(line) + 1
        if length > config.max_document_chars:
            refuse_long(length, config.max_document_chars, f"{source.path}: the article that goes on at line {number}")
        after_blank = False
    if article:
        yield "\n".join(article), None


def _read_wikitext(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    """Articles of a token file as running text."""
    _no_labels(source, labelled)
    for article in raw_articles(_lines(source, config)):
        yield running_text(article), None


def _no_labels(source: Source, labelled: bool) -> None:
    if labelled:
        raise DataError(
            f"{source.path} is plain text without labels, but labels are needed here"
            "; give a file with a label column, `__label__NAME text` lines, or a folder for each class"
        )
