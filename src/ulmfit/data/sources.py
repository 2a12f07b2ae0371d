"""Text and labels of a data set: in memory for a classifier, streamed for a language model.

    splits = load_splits(DatasetConfig(path="reviews.csv"))      # Splits(train, valid, test, unlabelled)
    for text in iter_texts(config, "lm"): ...                    # any size, constant memory

Formats are read by `readers.py`, files found by `locate.py`, splits drawn by
`splits.py`. No torch here; pandas,
pyarrow and Hugging Face `datasets` are imported only when such data is given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from ulmfit.config import DatasetConfig
from ulmfit.data.content import content_key, total_bytes, total_chars
from ulmfit.data.locate import (
    SPLITS,
    Located,
    check_split,
    drawn_share,
    held_out,
    is_plain_text,
    locate,
    source_files,
)
from ulmfit.data.readers import has_labels, read_rows
from ulmfit.data.rows import Row, Source
from ulmfit.data.splits import limited, low_shot, stratified_parts, text_key, threshold_part
from ulmfit.data.tables import Splits, Table, table_from_frame, table_from_lists
from ulmfit.errors import DataError

log = logging.getLogger(__name__)

# Unlabelled files up to this size are split exactly; of larger ones each document is placed by its hash alone.
EXACT_SPLIT_BYTES = 8 << 20


def load_splits(config: DatasetConfig) -> Splits:
    """Read a data set into memory and split it.

    Splits that have no file are drawn from the training rows by `valid_fraction` and `test_fraction`, stratified by
    class; then `limit` and `train_size` choose among the rows. The rows that `train_size` leaves out are not
    returned here, but the language model reads them (see `iter_texts`).

    Raises:
        DataError: for files that are missing, empty or malformed, a missing column or label, or only one class.
    """
    found = locate(config)
    parts = _train_parts(found, config)
    train = parts.get("train")
    if train is not None and train.labels is not None:
        if len(set(train.labels)) < 2:
            raise DataError(
                f"{train.name} has only the class '{train.labels[0]:.60}', but a classifier needs two or more"
                f"; check {'dataset.label' if config.limit is None else 'dataset.label and dataset.limit'}"
            )
        if config.train_size is not None:
            train = train.take(low_shot(train.texts, train.labels, config.train_size, config.train_seed))
    tables = {split: parts.get(split) or _own(found, config, split) for split in ("valid", "test", "unlabelled")}
    splits = Splits(train, **tables)
    for split in SPLITS:
        if (table := splits.of(split)) is not None:
            _warn_about_empty(table, split)
    return splits


def iter_texts(config: DatasetConfig, split: str) -> Iterator[str]:
    """Documents for a language model, without the empty ones, in bounded memory wherever the format allows.

    `train`, `valid`, `test` and `unlabelled` hold the documents of `load_splits`. `lm` is all training text, whatever
    `train_size` says of labels, then the unlabelled text without the documents that also stand in validation or
    test, then test if `lm_use_test`.

    Only labelled files that are to be split, limited or sampled are held in memory.

    Raises:
        DataError: as `load_splits`, but for labels; files are looked for at once, and read as the iterator advances.
    """
    check_split(split)
    found = locate(config)
    if split != "lm":
        if not found.of(split) and not drawn_share(found, config, split):
            raise DataError(f"The data set {config.name} has no {split} split; set dataset.{split} to its file")
        return _without_empty(_texts(found, config, split))
    if not found.train and not found.unlabelled:
        raise DataError(f"The data set {config.name} has no text to train on; set dataset.train or dataset.unlabelled")
    return _without_empty(_lm_texts(found, replace(config, train_size=None)))


def read_table(
    path: str | Path,
    text: str | Sequence[str] = ("text",),
    label: str | None = None,
    format: str = "auto",
    encoding: str = "utf-8",
    delimiter: str | None = None,
) -> Table:
    """One file in any format as it is: every row, no splitting. Without `label` the texts alone, as for prediction.

    Raises:
        DataError: as `load_splits`, except that one class is enough.
    """
    columns = [text] if isinstance(text, str) else list(text)
    config = DatasetConfig(text=columns, label=label or "", format=format, encoding=encoding, delimiter=delimiter)
    only = replace(config, train=str(path), valid="", test="", unlabelled="")
    sources = locate(only).train
    return _table(sources, config, str(path), labelled=label is not None)


# ------------------------------------------------------------------------------------------------ in memory


def _table(sources: Sequence[Source], config: DatasetConfig, name: str, labelled: bool) -> Table:
    texts: list[str] = []
    labels: list[str] = []
    for source in sources:
        before = len(texts)
        for text, label in read_rows(source, config, labelled):
            texts.append(text)
            labels.append(label or "")
        if len(texts) == before:
            raise DataError(f"{source.path} is empty: it holds no row; give a file with text, or leave the name out")
    return Table(texts, labels if labelled else None, name)


def _named(sources: Sequence[Source]) -> str:
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{sources[0].path}{more}"


def _labels_wanted(sources: tuple[Source, ...], config: DatasetConfig) -> bool:
    return bool(config.label) and not is_plain_text(sources)


def _train_parts(found: Located, config: DatasetConfig, labelled: bool | None = None) -> dict[str, Table]:
    """The training rows and what is drawn from them, each limited."""
    if not found.train:
        return {}
    labelled = _labels_wanted(found.train, config) if labelled is None else labelled
    if not labelled and config.limit is not None and not _exact(found):  # a trial on a large corpus stays small
        names = [name for name in ("valid", "test") if drawn_share(found, config, name)]
        streamed = {name: list(_texts(found, config, name)) for name in ("train", *names)}
        return {name: Table(texts, None, _named(found.train)) for name, texts in streamed.items() if texts}
    table = _table(found.train, config, _named(found.train), labelled)
    valid, test = drawn_share(found, config, "valid"), drawn_share(found, config, "test")
    if labelled or _exact(found):
        places = stratified_parts(table.texts, table.labels, config.split_seed, valid, test)
    else:
        places = [threshold_part(text, config.split_seed, valid, test) for text in table.texts]
    parts = {}
    for part in ("train", "valid", "test"):
        if rows := [i for i, place in enumerate(places) if place == part]:
            parts[part] = _limited(table.take(rows), config)
    return parts


def _own(found: Located, config: DatasetConfig, split: str) -> Table | None:
    """A split that has files of its own."""
    sources = found.of(split)
    if not sources:
        return None
    if split == "unlabelled" or not _labels_wanted(sources, config):
        texts = list(islice(_stream(sources, config), config.limit))
        if not texts:
            raise DataError(
                f"{_named(sources)} is empty: it holds no text; give a file with text, or leave the name out"
            )
        return Table(texts, None, _named(sources))
    return _limited(_table(sources, config, _named(sources), labelled=True), config)


def _limited(table: Table, config: DatasetConfig) -> Table:
    if config.limit is None or config.limit >= len(table):
        return table
    if table.labels is None:
        return table.take(range(config.limit))
    return table.take(limited(table.texts, table.labels, config.limit, config.split_seed))


def _warn_about_empty(table: Table, split: str) -> None:
    if empty := sum(not text for text in table.texts):
        kept = "the language model leaves them out" if split == "unlabelled" else "they are kept as empty texts"
        log.warning("%s: %d of %d documents of the %s split are empty; %s", table.name, empty, len(table), split, kept)


# ------------------------------------------------------------------------------------------------ streamed


def _exact(found: Located) -> bool:
    if any(source.format == "huggingface" for source in found.train):
        return True
    return sum(path.stat().st_size for source in found.train for path in source_files(source)) <= EXACT_SPLIT_BYTES


def _stream(sources: Iterable[Source], config: DatasetConfig) -> Iterator[str]:
    rows: Iterator[Row] = chain.from_iterable(read_rows(source, config, labelled=False) for source in sources)
    return (text for text, _ in rows)


def _texts(found: Located, config: DatasetConfig, split: str) -> Iterator[str]:
    own = found.of(split)
    drawn = {name: drawn_share(found, config, name) for name in ("valid", "test")}
    sources = own or found.train
    splitting = not own or (split == "train" and any(drawn.values()))
    low = split == "train" and config.train_size is not None
    if splitting or config.limit is not None or low:
        # Which rows are chosen depends on the labels, where there are any.
        labelled = split != "unlabelled" and all(has_labels(source, config) for source in sources)
        if labelled and split in ("valid", "test") and own:
            yield from (_own(found, config, split) or Table([], None)).texts
            return
        if labelled or (splitting and _exact(found)):
            table = _train_parts(found, config, labelled).get(split)
            if table is not None and table.labels is not None and low and config.train_size is not None:
                table = table.take(low_shot(table.texts, table.labels, config.train_size, config.train_seed))
            yield from table.texts if table is not None else ()
            return
    texts = _stream(sources, config)
    if splitting:
        seed, valid, test = config.split_seed, drawn["valid"], drawn["test"]
        texts = (text for text in texts if threshold_part(text, seed, valid, test) == split)
    yield from islice(texts, config.limit)


def _lm_texts(found: Located, config: DatasetConfig) -> Iterator[str]:
    if found.train:
        yield from _texts(found, config, "train")
    if found.unlabelled:
        # Text the model is later judged on must not be trained on by way of the unlabelled rows.
        judged = {text_key(text) for name in held_out(found, config) for text in _texts(found, config, name) if text}
        dropped = 0
        for text in _texts(found, config, "unlabelled"):
            if judged and text_key(text) in judged:
                dropped += 1
            else:
                yield text
        if dropped:
            log.info("%d unlabelled documents also stand in validation or test and are left out", dropped)
    if config.lm_use_test and (found.test or drawn_share(found, config, "test")):
        yield from _texts(found, config, "test")


def _without_empty(texts: Iterator[str]) -> Iterator[str]:
    empty = 0
    for text in texts:
        if text:
            yield text
        else:
            empty += 1
    if empty:
        log.info("%d empty documents were left out", empty)


__all__ = [
    "Splits",
    "Table",
    "content_key",
    "iter_texts",
    "load_splits",
    "read_table",
    "table_from_frame",
    "table_from_lists",
    "total_bytes",
    "total_chars",
]
