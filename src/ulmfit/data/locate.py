"""Finding the files of each split: names given in the configuration win, else they are recognised by name."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ulmfit.config import DatasetConfig
from ulmfit.data.files import data_stem, data_suffix, require_path
from ulmfit.data.huggingface import PREFIX, is_saved_dataset, open_huggingface
from ulmfit.data.readers import (
    SUFFIXES,
    UNLABELLED_FORMATS,
    detect_format,
    folder_files,
    natural_order,
    visible,
)
from ulmfit.data.rows import UNLABELLED_NAMES, Source
from ulmfit.errors import DataError, UsageError, did_you_mean
from ulmfit.validation import FORMATS

SPLITS = ("train", "valid", "test", "unlabelled")
SAMPLES = Path(__file__).resolve().parent.parent / "samples"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "dev", "val"),
    "test": ("test",),
    "unlabelled": UNLABELLED_NAMES,
}
_SHARD = r"[-_.]?\d+(?:[-_]of[-_]\d+)?"


@dataclass(frozen=True)
class Located:
    """The sources of each split, in reading order; empty where there are none."""

    train: tuple[Source, ...] = ()
    valid: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    unlabelled: tuple[Source, ...] = ()

    def of(self, split: str) -> tuple[Source, ...]:
        """Sources of a split by its name."""
        found: tuple[Source, ...] = getattr(self, split)
        return found


def locate(config: DatasetConfig) -> Located:
    """Where each split is read from.

    `dataset.path` may be a file (it is then the training data, split by fractions), a folder with `train.*` and so
    on, `train/CLASS/*.txt`, `CLASS/*.txt`, numbered parts, a data set written by Hugging Face's `save_to_disk`,
    `hf:NAME`, or None: the sample data, or names relative to the working directory where some are given.
    An empty name (`dataset.test=""`) switches a split off.

    Raises:
        DataError: a file or folder that is not there, or no telling which file is meant.
        UsageError: an unknown `dataset.format`.
    """
    if config.format not in FORMATS:
        raise UsageError(
            f"dataset.format={config.format} is not one of {', '.join(FORMATS)}{did_you_mean(config.format, FORMATS)}"
        )
    if config.format == "packed":
        raise DataError(
            f"{config.path} is packed for pre-training and holds no text, so only stage=lm_pretrain reads it; "
            "set dataset to the text itself"
        )
    given = {split: getattr(config, split) for split in SPLIT_NAMES}
    if config.path is None:
        if not any(given.values()):
            base = SAMPLES
        else:
            return _only_given(Path(), given, config)
    elif config.path.startswith(PREFIX):
        return _huggingface(config.path, given)
    else:
        base = _require_data(config, Path(config.path).expanduser())
    if base.is_file():
        found = _only_given(base.parent, given, config)
        if given["train"] or given["train"] == "":
            return found
        return Located((_file(base, config, "train"),), found.valid, found.test, found.unlabelled)
    if not base.is_dir():
        raise DataError(f"{base} is neither a file nor a folder; give data that can be read more than once")
    if config.format == "huggingface" or is_saved_dataset(base):
        return _huggingface(str(base), given)
    sources = {
        split: _given(base, name, config, split) if name is not None else _by_name(base, config, split)
        for split, name in given.items()
    }
    if not sources["train"] and given["train"] is None:
        sources["train"] = _everything_else(base, config, sources)
    if not any(sources.values()):
        raise DataError(
            f"{base} holds no data file: train.csv (or .tsv, .jsonl, .parquet, .txt; compressed or not), numbered parts"
            ", or a folder for each class are expected; set dataset.train to the name it has"
        )
    return Located(**sources)


def _require_data(config: DatasetConfig, path: Path) -> Path:
    """As `require_path`; of a data set that can be fetched the error says how."""
    try:
        return require_path(path)
    except DataError as error:
        from ulmfit.data.published import PUBLISHED

        if config.name not in PUBLISHED:
            raise
        raise DataError(
            f"{error}; 'ulmfit download dataset={config.name}' fetches it, ULMFIT_DATA says where it lies already"
        ) from None


def _only_given(base: Path, given: dict[str, str | None], config: DatasetConfig) -> Located:
    return Located(**{split: _given(base, name, config, split) if name else () for split, name in given.items()})


def _given(base: Path, name: str, config: DatasetConfig, split: str) -> tuple[Source, ...]:
    """The sources a name, path or glob in the configuration stands for."""
    if not name:
        return ()
    path = base / Path(name).expanduser()
    if path.exists() or not glob.has_magic(name):
        return _path(require_path(path), config, split)
    pattern = os.path.join(glob.escape(str(base)), Path(name).expanduser())
    matches = sorted(glob.glob(pattern, recursive=True), key=natural_order)
    if not matches:
        names = ", ".join(item.name for item in visible(base)[:8]) if base.is_dir() else "nothing"
        raise DataError(f"dataset.{split}={name} matches no file in {base}, which holds {names}")
    return tuple(source for match in matches for source in _path(Path(match), config, split))


def _path(path: Path, config: DatasetConfig, split: str) -> tuple[Source, ...]:
    if path.is_file():
        return (_file(path, config, split),)
    if is_saved_dataset(path):
        return _huggingface(str(path), {"train": None}).train
    files = folder_files(path)
    if not files:
        raise DataError(f"{path} is an empty folder; data files or a folder for each class are expected in it")
    if files[0][0] is not None:
        return (Source(path, "folder"),)
    data = [file for _, file in files if data_suffix(file) in SUFFIXES]
    if not data:
        raise DataError(
            f"{path} holds {files[0][1].name} but no data file (such as .csv or .txt); name the file to read"
        )
    if split == "unlabelled" and path.name.lower() in UNLABELLED_NAMES and all(data_suffix(f) == ".txt" for f in data):
        return (Source(path, "folder"),)  # one document a file, as beside the class folders
    return tuple(_file(file, config, split) for file in data)


def _file(path: Path, config: DatasetConfig, split: str) -> Source:
    known = SUFFIXES.get(data_suffix(path), "")
    # The unlabelled text often has another format than the labelled rows beside it.
    if config.format in ("auto", "folder", "huggingface") or (split == "unlabelled" and known != config.format):
        return Source(path, detect_format(path, config))
    return Source(path, config.format)


def _by_name(base: Path, config: DatasetConfig, split: str) -> tuple[Source, ...]:
    names = "|".join(SPLIT_NAMES[split])
    exact = re.compile(f"(?:{names})", re.IGNORECASE)
    last_word = re.compile(f".*[-_.](?:{names})", re.IGNORECASE)  # reviews_train.csv, wiki.train.tokens
    shard = re.compile(f"(?:{names}){_SHARD}", re.IGNORECASE)
    items = visible(base)
    folders = [item for item in items if item.is_dir() and exact.fullmatch(item.name)]
    files = [item for item in items if item.is_file() and data_suffix(item) in SUFFIXES]
    found = [item for item in files if exact.fullmatch(data_stem(item))] + folders
    found = found or [item for item in files if last_word.fullmatch(data_stem(item))]
    if len(found) > 1:
        listed = " and ".join(item.name for item in found)
        raise DataError(f"{base} holds {listed}, each of which may be the {split} split; set dataset.{split} to one")
    if not found:
        found = [item for item in files if shard.fullmatch(data_stem(item))]
    if not found and split == "unlabelled":  # the original IMDb download keeps it inside train/
        found = [base / "train" / name for name in UNLABELLED_NAMES if (base / "train" / name).is_dir()]
    return tuple(source for item in found for source in _path(item, config, split))


def _everything_else(base: Path, config: DatasetConfig, taken: dict[str, tuple[Source, ...]]) -> tuple[Source, ...]:
    """Training data under no usual name: folders of classes, the one data file, or numbered parts."""
    used = {source.path for sources in taken.values() for source in sources}
    others = [item for item in visible(base) if item not in used]
    files = [item for item in others if item.is_file() and data_suffix(item) in SUFFIXES]
    if not files:
        reserved = {name for names in SPLIT_NAMES.values() for name in names}
        classes = [d for d in others if d.is_dir() and d.name.lower() not in reserved and any(visible(d))]
        return (Source(base, "folder"),) if len(classes) > 1 and not used else ()
    stems = {re.sub(_SHARD + "$", "", data_stem(item)) for item in files}
    if len(files) > 1 and len(stems) > 1:
        if any(taken.values()):
            return ()  # a folder of test files, say, with something beside them
        listed = ", ".join(item.name for item in files[:8])
        raise DataError(f"{base} holds {listed} and it is unclear which is for training; set dataset.train")
    return tuple(_file(item, config, "train") for item in files)


def _huggingface(path: str, given: dict[str, str | None]) -> Located:
    splits = open_huggingface(path)

    def source(split: str) -> tuple[Source, ...]:
        name = given.get(split)
        if name is None:
            name = next((known for known in SPLIT_NAMES[split] if known in splits), "")
        return (Source(Path(path), "huggingface", name),) if name else ()

    found = Located(source("train"), source("valid"), source("test"), source("unlabelled"))
    if not any((found.train, found.valid, found.test, found.unlabelled)):
        raise DataError(f"{path} has the splits {', '.join(splits)}, none of which is train; set dataset.train to one")
    return found


def is_plain_text(sources: tuple[Source, ...]) -> bool:
    """Whether a split is in a format that never has labels."""
    return bool(sources) and all(source.format in UNLABELLED_FORMATS for source in sources)


def check_split(split: str) -> None:
    """Raises UsageError for a name that is no split and not `lm`."""
    if split not in (*SPLITS, "lm"):
        raise UsageError(f"There is no split '{split}'; expected one of {', '.join((*SPLITS, 'lm'))}")


def drawn_share(found: Located, config: DatasetConfig, split: str) -> float:
    """The share of the training rows that becomes this split; 0 when it has files of its own or is switched off."""
    if config.valid_fraction + config.test_fraction >= 1:
        raise UsageError(
            f"dataset.valid_fraction={config.valid_fraction} and dataset.test_fraction={config.test_fraction} leave"
            " nothing to train on; their sum must be below 1"
        )
    if split not in ("valid", "test") or found.of(split) or not found.train or getattr(config, split) == "":
        return 0.0
    return config.valid_fraction if split == "valid" else config.test_fraction


def has_split(config: DatasetConfig, split: str) -> bool:
    """Whether the data set has this split, in files or to be drawn from the training rows."""
    check_split(split)
    found = locate(config)
    return bool(found.of(split)) or drawn_share(found, config, split) > 0


def held_out(found: Located, config: DatasetConfig) -> list[str]:
    """The splits a language model is judged on, whose documents its unlabelled text must not hold."""
    names = ["valid"] if config.lm_use_test else ["valid", "test"]
    return [name for name in names if found.of(name) or drawn_share(found, config, name)]


def source_files(source: Source) -> list[Path]:
    """The files on disk that a source is read from."""
    if source.format == "folder":
        return [path for _, path in folder_files(source.path)]
    if source.path.is_dir():  # written by Hugging Face's save_to_disk
        return sorted(path for path in source.path.rglob("*") if path.is_file())
    return [source.path]
