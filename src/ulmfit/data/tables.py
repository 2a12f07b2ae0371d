"""Texts with labels in memory, and making them from frames and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ulmfit.data.rows import check_columns, clean_label, clean_text, join_columns
from ulmfit.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Table:
    """Rows of one split in file order; `labels` is None where the format has none. Empty documents stay as ''."""

    texts: list[str]
    labels: list[str] | None
    name: str = "data"

    def __len__(self) -> int:
        return len(self.texts)

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.texts):
            raise DataError(
                f"{self.name} has {len(self.texts)} texts and {len(self.labels)} labels; give one label for each text"
            )

    def take(self, rows: Sequence[int]) -> Table:
        """The given rows as a new table."""
        labels = None if self.labels is None else [self.labels[i] for i in rows]
        return Table([self.texts[i] for i in rows], labels, self.name)

    def label_ids(self, classes: Sequence[str]) -> list[int]:
        """Labels as positions in `classes`.

        Raises:
            DataError: for a table without labels, or a label that is not among the classes.
        """
        if self.labels is None:
            raise DataError(f"{self.name} has no labels, but labels are needed here; set dataset.label to their column")
        ids = {name: i for i, name in enumerate(classes)}
        for row, label in enumerate(self.labels, 1):
            if label not in ids:
                raise DataError(
                    f"{self.name}, row {row}, has the label '{label:.60}', which is none of the {len(classes)} classes"
                    f" ({', '.join(classes[:20])}){did_you_mean(label, classes)}"
                )
        return [ids[label] for label in self.labels]


@dataclass(frozen=True)
class Splits:
    """The splits of a data set; None where there is none."""

    train: Table | None = None
    valid: Table | None = None
    test: Table | None = None
    unlabelled: Table | None = None

    @property
    def classes(self) -> list[str]:
        """The labels of the training rows, sorted. Raises DataError when there are none."""
        if self.train is None or self.train.labels is None:
            where = "there is no training split" if self.train is None else f"{self.train.name} has no labels"
            raise DataError(
                f"A classifier needs labelled training rows, but {where}; set dataset.train and dataset.label"
            )
        return sorted(set(self.train.labels))

    def of(self, split: str) -> Table | None:
        """A split by its name."""
        found: Table | None = getattr(self, split)
        return found


def table_from_frame(
    frame: Any, text: str | Sequence[str] = "text", label: str | None = "label", name: str = "frame"
) -> Table:
    """A pandas DataFrame (or anything with `columns` and items that iterate) as a table.

    Raises:
        DataError: a missing column, an empty or NaN label, no rows.
    """
    columns = [text] if isinstance(text, str) else list(text)
    check_columns([*columns, *([label] if label else [])], [str(c) for c in frame.columns], f"The {name}")
    by_name = {str(column): column for column in frame.columns}
    cells = [list(frame[by_name[column]]) for column in columns]
    texts = [join_columns(row, f"The {name}, row {i},") for i, row in enumerate(zip(*cells, strict=True), 1)]
    return _checked(texts, list(frame[by_name[label]]) if label else None, name)


def table_from_lists(texts: Iterable[str], labels: Iterable[Any] | None = None, name: str = "list") -> Table:
    """Texts and labels as a table.

    Raises:
        DataError: another number of labels than texts, an empty label, no rows, a single string.
    """
    if isinstance(texts, str):
        raise DataError("A single string was given where a list of texts is expected; put it in [ ]")
    clean = [clean_text(text, f"The {name}, row {i},") for i, text in enumerate(texts, 1)]
    return _checked(clean, None if labels is None else list(labels), name)


def _checked(texts: list[str], labels: list[Any] | None, name: str) -> Table:
    if not texts:
        raise DataError(f"The {name} has no rows; at least one text is expected")
    if labels is None:
        return Table(texts, None, name)
    return Table(texts, [clean_label(label, f"The {name}, row {i},") for i, label in enumerate(labels, 1)], name)
