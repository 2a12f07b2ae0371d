"""`TextData`: the texts, labels and splits that a learner works on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ulmfit.config import DatasetConfig
from ulmfit.data.locate import SPLITS, drawn_share, locate
from ulmfit.data.sources import iter_texts, load_splits, total_bytes
from ulmfit.data.splits import stratified_parts, text_key
from ulmfit.data.tables import Splits, Table, table_from_frame, table_from_lists
from ulmfit.errors import DataError, UsageError, did_you_mean
from ulmfit.learner import display
from ulmfit.tasks.inspect import describe, format_description
from ulmfit.validation import validate

_READ_AT_ONCE = 256 << 20  # bytes; larger data is read when something needs all of it in memory

LabelledTexts = tuple[Iterable[str], Iterable[Any]]


class TextData:
    """Texts with or without labels, split into train, valid, test and unlabelled. Made by the `from_` methods.

        data = TextData.from_csv("reviews.csv", text="review", label="stars")
        data = TextData.from_lists(texts, labels, valid_fraction=0.2)

    Splits that are not given are drawn from the training rows, stratified by label; which row goes where depends on
    its text and `seed` alone. Unlabelled texts are for the language model.

    Attributes:
        config: where the texts are read from; None for data that was handed over in memory.
        name: what bundles made from the data say about it.
    """

    def __init__(self, splits: Splits | None = None, config: DatasetConfig | None = None, name: str = "data") -> None:
        if (splits is None) == (config is None):
            raise UsageError("TextData takes either splits or a config; use one of its from_ methods")
        self.config = config
        self.name = name if config is None else config.name
        if splits is not None:
            self.splits = splits
        elif config is not None and (total_bytes(config, "lm") or 0) <= _READ_AT_ONCE:
            _ = self.splits  # errors in the files are met here

    # ------------------------------------------------------------------------------------------------ where from

    @classmethod
    def from_config(cls, config: DatasetConfig) -> TextData:
        """As the command line reads a data set.

        Raises:
            UsageError: a value out of range.
            DataError: as `data.sources.load_splits`.
        """
        validate(config, "dataset.")
        return cls(config=config)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        text: str | Sequence[str] = "text",
        label: str | None = "label",
        valid: str | Path | None = None,
        test: str | Path | None = None,
        unlabelled: str | Path | None = None,
        valid_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 0,
        encoding: str = "utf-8",
        delimiter: str | None = None,
    ) -> TextData:
        """A file of rows: CSV, TSV, JSON lines or Parquet, compressed or not, told apart by its name.

        Args:
            text: column of the texts; several are joined by a line break.
            label: column of the labels; None: there are none, which is enough for a language model.
            valid, test, unlabelled: files of these splits, from here or relative to the folder of `path`.
            delimiter: None: by the name of the file.
            seed: decides which rows are drawn for validation and test.

        Raises:
            DataError: a missing file or column, an empty or malformed file, rows without label, only one class.
        """
        from ulmfit.hydra_config import dataset_name

        return cls.from_config(
            DatasetConfig(
                name=dataset_name(str(path), "data"),
                path=str(path),
                text=[text] if isinstance(text, str) else list(text),
                label=label or "",
                valid=_from_here(valid),
                test=_from_here(test),
                unlabelled=_from_here(unlabelled),
                valid_fraction=valid_fraction,
                test_fraction=test_fraction,
                split_seed=seed,
                encoding=encoding,
                delimiter=delimiter,
            )
        )

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        text: str | Sequence[str] = "text",
        label: str | None = "label",
        valid: str | Path | None = None,
        test: str | Path | None = None,
        unlabelled: str | Path | None = None,
        valid_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 0,
        encoding: str = "utf-8",
    ) -> TextData:
        """A folder with a folder of text files for each class (below train and test, or not), or with data files.

        `train.*`, `valid.*`, `test.*` and `unlabelled.*` are recognised by name; other names are given as arguments.

        Raises:
            DataError: as `from_csv`.
        """
        return cls.from_csv(path, text, label, valid, test, unlabelled, valid_fraction, test_fraction, seed, encoding)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        text: str | Sequence[str] = "text",
        label: str | None = "label",
        valid: Any = None,
        test: Any = None,
        unlabelled: Any = None,
        valid_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 0,
        name: str = "data",
    ) -> TextData:
        """A pandas DataFrame; `valid` and `test` are frames too, `unlabelled` is a frame or a sequence of texts.

        Raises:
            DataError: a missing column, an empty frame or label, only one class.
        """
        extra = None
        if unlabelled is not None:
            framed = hasattr(unlabelled, "columns")
            extra = table_from_frame(unlabelled, text, None) if framed else table_from_lists(unlabelled)
        tables = {
            split: None if given is None else table_from_frame(given, text, label, f"{split} frame")
            for split, given in (("train", frame), ("valid", valid), ("test", test))
        }
        return cls._from_tables(Splits(**tables, unlabelled=extra), valid_fraction, test_fraction, seed, name)

    @classmethod
    def from_lists(
        cls,
        texts: Iterable[str],
        labels: Iterable[Any] | None = None,
        valid: LabelledTexts | None = None,
        test: LabelledTexts | None = None,
        unlabelled: Iterable[str] | None = None,
        valid_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 0,
        name: str = "data",
    ) -> TextData:
        """Texts and their labels; `valid` and `test` are pairs `(texts, labels)`.

        Raises:
            DataError: another number of labels than texts, no texts, an empty label, only one class.
        """
        tables = {
            split: None if given is None else table_from_lists(*given, f"{split} list")
            for split, given in (("train", (texts, labels)), ("valid", valid), ("test", test))
        }
        extra = None if unlabelled is None else table_from_lists(unlabelled)
        return cls._from_tables(Splits(**tables, unlabelled=extra), valid_fraction, test_fraction, seed, name)

    @classmethod
    def sample(cls) -> TextData:
        """The data that ships: messages to a help desk in six intents, and unlabelled ones."""
        return cls.from_config(DatasetConfig())

    @classmethod
    def _from_tables(cls, given: Splits, valid_fraction: float, test_fraction: float, seed: int, name: str) -> TextData:
        validate(DatasetConfig(valid_fraction=valid_fraction, test_fraction=test_fraction, split_seed=seed))
        train = given.train
        assert train is not None
        shares = (0.0 if given.valid else valid_fraction, 0.0 if given.test else test_fraction)
        places = stratified_parts(train.texts, train.labels, seed, *shares)
        rows = {part: [i for i, place in enumerate(places) if place == part] for part in ("train", "valid", "test")}
        drawn = {part: train.take(chosen) for part, chosen in rows.items() if chosen}
        drawn |= {part: table for part in ("valid", "test", "unlabelled") if (table := given.of(part)) is not None}
        if train.labels is not None and len(set(train.labels)) < 2:
            raise DataError(
                f"all {len(train)} texts have the label '{train.labels[0]}', but a classifier needs two classes or "
                "more; leave the labels out if the texts are for a language model only"
            )
        return cls(Splits(**drawn), name=name)

    # ------------------------------------------------------------------------------------------------ what is in it

    @cached_property
    def splits(self) -> Splits:
        """All texts in memory, by split."""
        assert self.config is not None
        return load_splits(self.config)

    @property
    def labelled(self) -> bool:
        """Whether the training texts have labels."""
        return self.splits.train is not None and self.splits.train.labels is not None

    @property
    def classes(self) -> list[str]:
        """The labels, sorted.

        Raises:
            DataError: there are none.
        """
        if not self.labelled:
            raise DataError(
                f"the data '{self.name}' has no labels, but a classifier needs one for each training text; "
                "name their column with label= or hand them over as labels="
            )
        return self.splits.classes

    def has(self, split: str) -> bool:
        """Whether there is such a split; reads no text."""
        if self.config is None or "splits" in self.__dict__:
            return self.splits.of(split) is not None
        found = locate(self.config)
        return bool(found.of(split)) or drawn_share(found, self.config, split) > 0

    def table(self, split: str) -> Table:
        """Texts and labels of a split.

        Raises:
            UsageError: no such split.
        """
        if split not in SPLITS:
            raise UsageError(f"got split='{split}', expected one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
        table = self.splits.of(split)
        if table is None:
            there = ", ".join(name for name in SPLITS if self.has(name))
            raise UsageError(f"the data '{self.name}' has no {split} split, only {there}; choose one of these")
        return table

    def texts(self, split: str) -> Iterator[str]:
        """Documents for a language model, without empty ones; `lm` is everything that it may train on.

        That is the training and unlabelled texts, without those that validation or test hold as well.
        """
        if self.config is not None:
            return iter_texts(self.config, split)
        if split != "lm":
            return (text for text in self.table(split).texts if text)
        return self._lm_texts()

    def _lm_texts(self) -> Iterator[str]:
        yield from (text for text in self.table("train").texts if text)
        if self.splits.unlabelled is not None:
            held_out = [table for table in (self.splits.valid, self.splits.test) if table is not None]
            judged = {text_key(text) for table in held_out for text in table.texts}
            yield from (text for text in self.splits.unlabelled.texts if text and text_key(text) not in judged)

    def show(self, n: int = 5, split: str = "train") -> None:
        """Display the first `n` texts of a split."""
        table = self.table(split)
        if table.labels is None:
            display.show(display.Table(["text"], [[text] for text in table.texts[:n]]))
        else:
            display.show(display.Table(["text", "label"], list(zip(table.texts[:n], table.labels[:n], strict=True))))

    def describe(self) -> None:
        """Print counts, lengths, classes, repeated texts, leakage between splits, and what to take note of."""
        print(format_description({**describe(self.splits), "name": self.name}))

    def __repr__(self) -> str:
        if "splits" not in self.__dict__:
            return f"TextData('{self.name}', not read yet)"
        counts = ", ".join(f"{len(self.table(name))} {name}" for name in SPLITS if self.has(name))
        return f"TextData('{self.name}', {counts}{f', {len(self.classes)} classes' if self.labelled else ''})"


def _from_here(path: str | Path | None) -> str | None:
    """Absolute if such a file is in the working directory; else it is looked for beside the training file."""
    if path is None or path == "":
        return None if path is None else ""
    there = Path(path).expanduser()
    return str(there.resolve()) if there.exists() else str(path)
