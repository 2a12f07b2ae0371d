"""Hugging Face `datasets` (an optional extra): `hf:NAME`, `hf:NAME:CONFIG`, or a folder written by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ulmfit.config import DatasetConfig
from ulmfit.data.rows import Row, Source, check_columns, clean_label, join_columns, text_columns
from ulmfit.errors import DataError, did_you_mean

PREFIX = "hf:"


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


@lru_cache(maxsize=4)
def open_huggingface(path: str) -> dict[str, Any]:
    """The splits of a data set by name; a single table is called `train`. Memory-mapped, so large ones are fine."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path} is a Hugging Face data set, which needs `pip install 'ulmfit[datasets]'`") from None
    # Before version 4 a data set could bring a script, which this switch alone decides to run.
    if hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE"):
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    try:
        if path.startswith(PREFIX):
            name, _, variant = path.removeprefix(PREFIX).partition(":")
            found = datasets.load_dataset(name, variant or None)
        else:
            found = datasets.load_from_disk(path)
    except Exception as error:  # the library raises dozens of kinds, network errors among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"The Hugging Face data set {path} cannot be loaded ({reason})") from error
    return dict(found) if hasattr(found, "keys") else {"train": found}


def _table(source: Source) -> Any:
    splits = open_huggingface(_name(source))
    if source.part not in splits:
        raise DataError(
            f"{_name(source)} has no split '{source.part}': it has {', '.join(splits)}"
            f"{did_you_mean(source.part, splits)}"
        )
    return splits[source.part]


def _name(source: Source) -> str:
    return source.path.as_posix()


def huggingface_columns(source: Source) -> list[str]:
    """The columns of one split."""
    return list(_table(source).column_names)


def fingerprint(source: Source) -> str:
    """What `datasets` itself says identifies the content."""
    return str(_table(source)._fingerprint)


def read_huggingface(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    """Rows of one split; class numbers become the names the data set gives them."""
    table = _table(source)
    columns = text_columns(config)
    where = f"{_name(source)} ({source.part})"
    wanted = [*columns, *([config.label] if labelled else [])]
    check_columns(wanted, list(table.column_names), where)
    names = getattr(table.features.get(config.label), "names", None) if labelled else None
    for number, record in enumerate(table.select_columns(list(dict.fromkeys(wanted))), 1):
        row = f"{where}, row {number},"
        label: str | None = None
        if labelled:
            value = record[config.label]
            if names is not None and isinstance(value, int):
                if not 0 <= value < len(names):
                    raise DataError(f"{row} has no label (class number {value}); use a split whose labels are public")
                value = names[value]
            label = clean_label(value, row)
        yield join_columns([record[name] for name in columns], row), label
