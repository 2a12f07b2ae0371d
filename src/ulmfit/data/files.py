"""Bytes and lines of text files: decompressed by content, decoded strictly, line ends unified.

Everything streams in pieces of one megabyte, so a corpus of any size is read in constant memory. What could take more
is refused: files that unpack to hundreds of times their size, and lines longer than any text.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ulmfit.config import LONGEST_DOCUMENT
from ulmfit.data.unpacking import XZ, Zstandard
from ulmfit.errors import DataError, did_you_mean

CHUNK = 1 << 20
# Text shrinks to a fifth or a tenth, machine-made logs to a fiftieth; bombs to a thousandth and less.
MOST_EXPANSION = 250
HARMLESS_BYTES = 1 << 26  # up to here a file may unpack however it likes
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

# Recognised by their first bytes, so a compressed file under a plain name is read as well.
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b\x08", b"1AY&SY", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_NOT_TEXT = {b"PK\x03\x04": "a zip archive or spreadsheet", b"%PDF": "a PDF", b"PAR1": "a parquet file"}


def require_path(path: Path) -> Path:
    """`path` itself. Raises DataError naming the nearest existing name when there is no such file or folder."""
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # a name too long, a folder one may not look into, a NUL character
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{str(path)[:200]!r} cannot be looked for ({reason}); give the path of a file or folder"
        ) from None
    if path.is_symlink():
        raise DataError(f"{path} is a link to {path.readlink()}, which is not there")
    parent = path.parent
    if not parent.is_dir():
        missing = parent
        while not missing.parent.is_dir() and missing.parent != missing:
            missing = missing.parent
        names = [item.name for item in missing.parent.iterdir()] if missing.parent.is_dir() else []
        raise DataError(f"There is no folder {missing} (asked for {path}){did_you_mean(missing.name, names)}")
    names = sorted(item.name for item in parent.iterdir() if not item.name.startswith("."))
    hint = did_you_mean(path.name, names)
    if not hint and names:
        more = ", ..." if len(names) > 8 else ""
        hint = f"; that folder holds {', '.join(names[:8])}{more}"
    raise DataError(f"There is no file or folder {path}{hint}")


def data_suffix(path: Path) -> str:
    """The lower-case suffix of a data file without that of its compression: `.csv` for `train.CSV.bz2`."""
    name = path.name.lower()
    for compressed in COMPRESSED_SUFFIXES:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def data_stem(path: Path) -> str:
    """The lower-case name of a data file without its suffixes: `train` for `train.csv.bz2`."""
    name = path.name.lower()
    for compressed in COMPRESSED_SUFFIXES:
        name = name.removesuffix(compressed)
    return Path(name).stem


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror or error})") from error


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    """The decompressed bytes behind `raw`: gzip, bzip2, xz and, where a module for it is installed, Zstandard."""
    head = raw.read(16)
    raw.seek(0)
    if head.startswith(_GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if head.startswith(b"BZh") and head[4:10] == _BZIP2:
        return cast(BinaryIO, bz2.BZ2File(raw))
    if head.startswith(_XZ):
        return cast(BinaryIO, XZ(raw))
    if head.startswith(_ZSTD):
        return _zstd(raw, path)
    for magic, kind in _NOT_TEXT.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {kind}, not a text file; save it as CSV (or give a parquet file that suffix)")
    return raw


def _zstd(raw: BinaryIO, path: Path) -> BinaryIO:
    for name in ("compression.zstd", "zstandard", "pyzstd"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if name == "zstandard":
            return cast(BinaryIO, Zstandard(raw, module))
        return cast(BinaryIO, module.open(raw, "rb"))
    raise DataError(f"{path} is compressed with Zstandard, which needs `pip install zstandard` (or compress it as .gz)")


def _read(stream: BinaryIO, path: Path, size: int) -> bytes:
    try:
        return stream.read(size)
    except Exception as error:  # every compression module has errors of its own
        raise DataError(f"{path} cannot be read to its end ({error}); fetch or compress it again") from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file in pieces.

    Raises:
        DataError: a compressed file that is damaged, or a decompression bomb.
    """
    with _open(path) as raw:
        stream = _unpacked(raw, path)
        total = 0
        while chunk := _read(stream, path, CHUNK):
            total += len(chunk)
            refuse_bomb(path, total, raw.tell())
            yield chunk


def refuse_bomb(path: Path, unpacked: int, packed: int | None = None) -> None:
    """Raises DataError when a file has unpacked to so many bytes or characters that it cannot be ordinary text.

    Args:
        packed: bytes of the file that were read for that; None: all of them.
    """
    if unpacked > HARMLESS_BYTES and unpacked > MOST_EXPANSION * (packed or path.stat().st_size):
        raise DataError(
            f"{path} unpacks to more than {MOST_EXPANSION} times its size, as decompression bombs do"
            "; unpack it yourself if that is meant, and give the unpacked file"
        )


def refuse_long(length: int, longest: int, where: str) -> None:
    """Raises DataError when a line or document has more characters than the longest one allowed."""
    if length > longest:
        raise DataError(
            f"{where} is longer than {longest:,} characters, as damaged files and bombs are; cut it into several"
            ", or set dataset.max_document_chars higher if it is text"
        )


def sample_bytes(path: Path, size: int) -> tuple[bytes, int]:
    """The first `size` decompressed bytes of a file and about how many bytes on disk they take."""
    with _open(path) as raw:
        stream = _unpacked(raw, path)
        data = b""
        while len(data) < size and (chunk := _read(stream, path, size - len(data))):
            data += chunk
        return data, raw.tell()


def read_text(path: Path, encoding: str) -> Iterator[str]:
    """Decoded pieces of a file; every line end is a line feed and a byte-order mark is gone.

    Raises DataError with the byte position of what is not valid in `encoding`, and of NUL bytes.
    """
    try:
        codec = codecs.lookup(encoding).name
        "a".encode(encoding)  # a LookupError also for codecs that are not of text, such as base64
    except (LookupError, ValueError):
        message = f"dataset.encoding={encoding} is not an encoding Python knows; try utf-8, utf-16, cp1252 or gb18030"
        raise DataError(message) from None
    make = codecs.getincrementaldecoder("utf-8-sig" if codec == "utf-8" else codec)
    decoder = io.IncrementalNewlineDecoder(make("strict"), translate=True)
    wide = codec.startswith(("utf-16", "utf-32"))  # zero bytes are ordinary there
    position = 0
    chunk = b""
    try:
        for chunk in read_chunks(path):
            if not wide and (zero := chunk.find(0)) >= 0:
                raise DataError(
                    f"{path} has a NUL byte at position {position + zero}, so it is damaged or not in {encoding}"
                    "; remove it, or set dataset.encoding=utf-16 if the file is in UTF-16"
                )
            text = decoder.decode(chunk)
            if wide and "\0" in text:
                raise DataError(f"{path} has a NUL character in the text near byte {position}; remove it")
            position += len(chunk)
            if text:
                yield text
        chunk = b""
        if text := decoder.decode(b"", final=True):
            yield text
    except UnicodeDecodeError as error:
        # error.object is what the decoder had kept back plus this chunk.
        at = position - (len(error.object) - len(chunk)) + error.start
        other = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise DataError(
            f"{path} is not valid {encoding} at byte {at} (0x{error.object[error.start]:02x})"
            f"; set dataset.encoding to the encoding it was written in, for example dataset.encoding={other}"
        ) from None
    except UnicodeError as error:  # of UTF-16 and UTF-32: no byte-order mark
        raise DataError(f"{path} is not in {encoding} ({error}); set dataset.encoding to the encoding it has") from None


def read_lines(path: Path, encoding: str, longest: int = LONGEST_DOCUMENT) -> Iterator[str]:
    """The lines of a file without their ends. Only line feeds and carriage returns end a line, not U+2028 and such.

    Raises:
        DataError: as `read_text`, and for a line of more than `longest` characters.
    """
    pending: list[str] = []
    held = 0
    number = 1
    for piece in read_text(path, encoding):
        first, *rest = piece.split("\n")
        pending.append(first)
        held += len(first)
        refuse_long(held, longest, f"{path}, line {number},")
        if rest:
            yield "".join(pending)
            for line in rest:
                number += 1
                if len(line) > longest:
                    refuse_long(len(line), longest, f"{path}, line {number},")
            yield from rest[:-1]
            pending, held = [rest[-1]], len(rest[-1])
    if last := "".join(pending):
        yield last
