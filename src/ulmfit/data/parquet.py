"""Parquet files (an optional extra), which may hold far more text than they have bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ulmfit.config import DatasetConfig
from ulmfit.data.files import refuse_bomb, refuse_long
from ulmfit.data.rows import Row, Source, check_columns, clean_label, join_columns, text_columns
from ulmfit.errors import DataError

_TEXTS = ("string", "large_string", "binary", "large_binary")  # can keep their dictionary


def parquet_file(path: Path, texts: Sequence[str] = ()) -> Any:
    """An open file; columns named in `texts` keep the dictionary they are stored with.

    Raises:
        DataError: it is not a parquet file, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} is a parquet file, which needs `pip install 'ulmfit[parquet]'`") from None
    try:
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=list(texts) or None)
        _ = file.schema_arrow.names  # which may be no text
        return file
    except Exception as error:  # pyarrow raises its own, and Python's of many kinds
        raise DataError(f"{path} is not a readable parquet file ({_first_line(error)})") from None


def read_parquet(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    """Rows of a parquet file. Raises DataError with the row of what cannot be used."""
    columns = text_columns(config)
    wanted = [*columns, *([config.label] if labelled else [])]
    check_columns(wanted, list(parquet_file(source.path).schema_arrow.names), str(source.path))
    total = 0
    for row, cells in enumerate(_cells(source.path, list(dict.fromkeys(wanted))), 1):
        where = f"{source.path}, row {row},"
        label = clean_label(cells[config.label], where) if labelled else None
        text = join_columns([cells[name] for name in columns], where)
        refuse_long(len(text), config.max_document_chars, where)
        total += len(text)
        refuse_bomb(source.path, total)
        yield text, label


def _cells(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows one by one: a text that a small file repeats a million times must not be unpacked a million times at once.

    Raises:
        DataError: the file is damaged, or says itself that it is a decompression bomb.
    """
    schema = parquet_file(path).schema_arrow
    file = parquet_file(path, [name for name in columns if str(schema.field(name).type) in _TEXTS])
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    refuse_bomb(path, sum(group.total_byte_size for group in groups))
    batches = file.iter_batches(batch_size=4096, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            for cells in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                yield dict(zip(columns, cells, strict=True))
        except Exception as error:
            raise DataError(f"{path} cannot be read to its end ({_first_line(error)}); write it again") from None


def _values(array: Any) -> Iterable[Any]:
    """The cells of a column as Python has them: all at once, which is faster, if they cannot become large."""
    import pyarrow.compute

    if hasattr(array, "dictionary") and str(array.dictionary.type) in _TEXTS:
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(array.dictionary)).as_py() or 0
        if longest * len(array) < 1 << 26:
            values: list[Any] = array.to_pylist()
            return values
    return (cell.as_py() for cell in array)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
