"""What every reader shares: where rows come from, and how cells become texts and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulmfit.config import DatasetConfig
from ulmfit.errors import DataError, did_you_mean

Row = tuple[str, str | None]
UNLABELLED_NAMES = ("unlabelled", "unlabeled", "unsup", "unsupervised")


@dataclass(frozen=True)
class Source:
    """A file, a folder of classes, or a Hugging Face data set, and how to read it."""

    path: Path
    format: str
    part: str = ""  # Hugging Face: which split


def text_columns(config: DatasetConfig) -> list[str]:
    """`config.text` as a list, also when someone set a single name."""
    return [config.text] if isinstance(config.text, str) else list(config.text)


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA and NaT."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def cell_text(value: Any, where: str) -> str:
    """A cell as it reads; numbers and dates as Python writes them, broken surrogates as U+FFFD.

    Raises:
        DataError: a list, an object or bytes, whose Python notation nobody wants to train on.
    """
    if isinstance(value, dict | list | tuple | set | bytes):
        raise DataError(f"{where} holds a {type(value).__name__} where text is expected; choose another column")
    text = value if isinstance(value, str) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_text(value: Any, where: str) -> str:
    """A cell as a text: missing and whitespace become the empty string. Raises DataError as `cell_text`."""
    if is_missing(value):
        return ""
    text = cell_text(value, where)
    if "\0" in text:
        raise DataError(f"{where} has a NUL character in its text; remove it")
    return text if text.strip() else ""


def clean_label(value: Any, where: str) -> str:
    """A cell as a label: stripped, 1.0 as '1'. Raises DataError when it is empty or NaN, and as `cell_text`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    label = "" if is_missing(value) else cell_text(value, where).strip()
    if label in ("", "nan", "NaN"):
        given = "no label" if not label else f"the label {label}"
        raise DataError(f"{where} has {given}; give every row a label, or leave the row out")
    return label


def join_columns(cells: Sequence[Any], where: str) -> str:
    """Several text cells as one text, a line break between those that are not empty."""
    if len(cells) == 1:
        return clean_text(cells[0], where)
    return "\n".join(text for text in (clean_text(cell, where) for cell in cells) if text)


def check_columns(wanted: Iterable[str], found: Sequence[str], where: str) -> None:
    """Raises DataError naming the column that is not there, those that are, and the nearest; or one that is twice."""
    for name in wanted:
        if name not in found:
            # Without a header the first row stands here, whatever its length.
            names = ", ".join(repr(column if len(column) <= 60 else f"{column[:60]}...") for column in found[:20])
            key = f"it has {names}{', ...' if len(found) > 20 else ''}" if found else "it has no columns"
            hint = did_you_mean(name, found) or "; say which to use: dataset.text and dataset.label, in predict text"
            raise DataError(f"{where} has no column '{name}': {key}{hint}")
        if found.count(name) > 1:
            raise DataError(f"{where} has {found.count(name)} columns '{name}'; rename all but the one to use")
