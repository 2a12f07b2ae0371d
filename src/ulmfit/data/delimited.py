"""CSV and TSV files: delimiter, quoting and header found from the first lines, rows checked strictly."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass

from ulmfit.config import DatasetConfig
from ulmfit.data.files import read_lines, refuse_long
from ulmfit.data.rows import Row, Source, check_columns, clean_label, join_columns, text_columns
from ulmfit.errors import DataError, UsageError

_FIELD_LIMIT = 2**31 - 1  # Python's csv stops at 128 KiB a field otherwise; a C long is this small on Windows


@dataclass(frozen=True)
class Layout:
    """How a delimited file is laid out, found from its first lines."""

    delimiter: str
    quoting: int
    header: list[str]
    has_header: bool

    @staticmethod
    def of(source: Source, config: DatasetConfig) -> Layout:
        lines: list[str] = []
        for line in read_lines(source.path, config.encoding, config.max_document_chars):
            if line.strip():
                lines.append(line)
            if len(lines) == 200:
                break
        if not lines:
            raise DataError(f"{source.path} is empty; a header line and at least one row are expected")
        wanted = [*text_columns(config), *([config.label] if config.label else [])]
        default = "\t" if source.format == "tsv" else ","
        if config.delimiter is not None:
            delimiter = "\t" if config.delimiter in ("\\t", "tab") else config.delimiter
            if len(delimiter) != 1:
                raise UsageError(f"dataset.delimiter='{config.delimiter}' is not one character; use ',' ';' or '\\t'")
        else:
            # Spreadsheets of many countries write semicolons into a .csv: take what makes the columns appear.
            delimiter = default
            if not set(wanted) & set(_split(lines[0], default)):
                for other in (",", ";", "\t", "|"):
                    if set(wanted) <= set(_split(lines[0], other)):
                        delimiter = other
                        break
        quoting = csv.QUOTE_MINIMAL
        if delimiter == "\t" and any(_bare_quote(line, len(lines[0].split("\t"))) for line in lines):
            quoting = csv.QUOTE_NONE  # the usual hand-made TSV: quotes are part of the text
        first = _split(lines[0], delimiter, quoting)
        if all(name.isdigit() for name in wanted) and not set(wanted) & set(first):
            return Layout(delimiter, quoting, [str(i) for i in range(len(first))], has_header=False)
        return Layout(delimiter, quoting, [name.strip() for name in first], has_header=True)


def _split(line: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])  # type: ignore[arg-type]


def _bare_quote(line: str, columns: int) -> bool:
    """Whether a full row has a field that opens with a quote and does not close with one."""
    fields = line.split("\t")
    return len(fields) == columns and any(f.startswith('"') and (len(f) == 1 or not f.endswith('"')) for f in fields)


def read_delimited(source: Source, config: DatasetConfig, labelled: bool) -> Iterator[Row]:
    """Rows of a CSV or TSV file. Raises DataError with the line of what is malformed."""
    layout = Layout.of(source, config)
    columns = text_columns(config)
    check_columns([*columns, *([config.label] if labelled else [])], layout.header, str(source.path))
    texts = [layout.header.index(name) for name in columns]
    label_at = layout.header.index(config.label) if labelled else -1
    csv.field_size_limit(min(config.max_document_chars, _FIELD_LIMIT))
    lines = (line + "\n" for line in read_lines(source.path, config.encoding, config.max_document_chars))
    reader = csv.reader(lines, delimiter=layout.delimiter, quoting=layout.quoting, strict=True)  # type: ignore[arg-type]
    header_seen = not layout.has_header
    start = 1
    try:
        for fields in reader:
            if fields:
                if not header_seen:
                    header_seen = True
                else:
                    where = f"{source.path}, line {start},"
                    if len(fields) != len(layout.header):
                        raise DataError(
                            f"{where} has {len(fields)} fields where {len(layout.header)} are expected; put texts that"
                            f" hold {layout.delimiter!r} or line breaks in double quotes, or set dataset.delimiter"
                        )
                    label = clean_label(fields[label_at], where) if labelled else None
                    yield join_columns([fields[i] for i in texts], where), label
            start = reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):  # often a quote that is never closed
            refuse_long(1 << 62, config.max_document_chars, f"{source.path} has a text from line {start} on that")
        raise DataError(
            f"{source.path} has a row from line {start} on with unbalanced double quotes ({error})"
            "; double the quotes inside a quoted text"
        ) from None
