"""Small files that would become large ones: refused with a sentence, or read in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ulmfit.bundle import read_info
from ulmfit.config import DatasetConfig, TokenizerConfig
from ulmfit.data import files
from ulmfit.data.sources import iter_texts, read_table
from ulmfit.errors import BundleError, DataError, UlmfitError, did_you_mean
from ulmfit.fastai_weights import read_fastai_checkpoint
from ulmfit.tasks.run_folder import read_record
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training.checkpoints import WholeFiles

PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def zstd(content: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").compress(content)
    return packed


@pytest.mark.parametrize("suffix", [*PACKERS, "zst"])
@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl"])
def test_a_decompression_bomb_is_refused(
    suffix: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "HARMLESS_BYTES", 1 << 17)
    header = b"text,label\n" if name == "d.csv" else b""
    line = {"d.csv": b"all work,and no play\n", "d.jsonl": b'{"text": "all work"}\n', "d.txt": b"all work\n"}[name]
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes((PACKERS | {"zst": zstd})[suffix](header + line * (2**19 // len(line))))
    with pytest.raises(DataError, match=r"unpacks to more than 250 times its size, as .* bombs do; unpack it"):
        read_table(path)
    with pytest.raises(DataError, match="unpacks to more than 250 times"):
        for _ in iter_texts(DatasetConfig(train=str(path), valid_fraction=0), "lm"):
            pass


def test_text_that_shrinks_as_text_does_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HARMLESS_BYTES", 1 << 10)
    words = " ".join(f"{i * i} of {i}" for i in range(20_000))
    for suffix, pack in PACKERS.items():
        path = tmp_path / f"d.txt.{suffix}"
        path.write_bytes(pack(words.encode()))
        assert read_table(path).texts == [words]


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    """The same bomb, below what is harmless: it streams."""
    path = tmp_path / "d.txt.gz"
    path.write_bytes(gzip.compress((b"all work and no play " * 500 + b"\n") * 4000, 1))  # 42 MB
    tracemalloc.start()
    try:
        count = sum(1 for _ in iter_texts(DatasetConfig(train=str(path), valid_fraction=0), "lm"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4000
    assert peak < 12 << 20


def test_xz_may_not_ask_for_any_amount_of_memory(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    path = tmp_path / "d.txt.xz"
    path.write_bytes(lzma.compress(b"all work and no play\n", filters=filters))
    with pytest.raises(DataError, match=r"cannot be read to its end \(Memory usage limit exceeded\)"):
        read_table(path)


def test_several_streams_in_one_file(tmp_path: Path) -> None:
    """As parallel compressors write them, with padding between those of xz."""
    packers = dict(PACKERS)
    if importlib.util.find_spec("zstandard"):
        packers["zst"] = zstd
    for suffix, pack in packers.items():
        path = tmp_path / f"d.txt.{suffix}"
        path.write_bytes(pack(b"one\n") + (bytes(8) if suffix == "xz" else b"") + pack(b"two\n"))
        assert read_table(path).texts == ["one", "two"], suffix
        path.write_bytes(pack(b"one\n" * 999)[:-9])
        with pytest.raises(DataError, match="cannot be read to its end"):
            read_table(path)


LONG: dict[str, tuple[str, str, str]] = {
    "line": ("d.txt", "a b\n" + "x" * 2000 + "\n", "d.txt, line 2, is longer than 1,000 characters"),
    "line without end": ("d.txt", "x " * 1_000_000, "d.txt, line 1, is longer"),
    "JSON line": ("d.jsonl", json.dumps({"text": "x" * 2000, "label": "a"}), "d.jsonl, line 1, is longer"),
    "quoted text": ("d.csv", 'text,label\na,b\n"' + "x\n" * 2000, "d.csv has a text from line 3 on that is longer"),
    "header": ("d.csv", "x" * 2000 + ",label\n", "d.csv, line 1, is longer"),
    "article": ("d.txt", " = A = \n" + "x y\n" * 2000, "the article that goes on at line 250 is longer"),
    "fastText": ("d.txt", "__label__a " + "x" * 2000, "d.txt, line 1, is longer"),
    "file of a class": ("f/a/1.txt", "x\n" * 2000, "1.txt is longer"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_document_of_any_length_is_refused(name: str, tmp_path: Path) -> None:
    file, content, sentence = LONG[name]
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    if file.startswith("f/"):
        (tmp_path / "f" / "b").mkdir()
        (tmp_path / "f" / "b" / "1.txt").write_text("b")
        path = tmp_path / "f"
    config = DatasetConfig(train=str(path), max_document_chars=1000, valid_fraction=0)
    with pytest.raises(DataError, match=sentence) as caught:
        for _ in iter_texts(config, "train"):
            pass
    assert "set dataset.max_document_chars higher" in str(caught.value)


def test_a_document_of_a_million_words_is_none(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "word " * 1_000_000 + ",a\n")
    assert [len(text) for text in read_table(path).texts] == [5_000_000]


def test_a_text_that_parquet_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of one text and a million references to it take a few kilobytes."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "HARMLESS_BYTES", 1 << 24)
    path = tmp_path / "d.parquet"
    indices = pyarrow.array([0] * 100_000, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 10_000]))  # 1 GB unpacked
    parquet.write_table(pyarrow.table({"text": texts}), path)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="unpacks to more than 250 times its size"):
            read_table(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20
    assert pyarrow.total_allocated_bytes() - before < 10 << 20
    with pytest.raises(DataError, match="row 1, is longer"):
        list(iter_texts(DatasetConfig(train=str(path), max_document_chars=1000, valid_fraction=0), "train"))


def test_parquet_that_says_itself_that_it_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "HARMLESS_BYTES", 1 << 20)
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"text": ["x" * 4_000_000]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="unpacks to more than 250 times its size"):
        read_table(path)


# ----------------------------------------------------------------------------------------------------- checkpoints


def rewritten(content: bytes, name: str, new: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint with one entry replaced."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w", compression) as archive:
        for entry in old.namelist():
            archive.writestr(entry, new if entry.endswith(name) else old.read(entry))
    return result.getvalue()


def saved(**options: Any) -> bytes:
    content = io.BytesIO()
    state = {"state_dict": {"0.encoder.weight": torch.zeros(3, 2)}, "pytorch-lightning_version": "2.6.0"}
    torch.save(state, content, **options)
    return content.getvalue()


def overlapping() -> bytes:
    """A central directory that lists the same bytes many times, as a zip quine does."""
    content = io.BytesIO(rewritten(saved(), "data/0", bytes(5000)))
    with zipfile.ZipFile(content, "a") as archive:
        (first,) = [entry for entry in archive.infolist() if entry.filename.endswith("data/0")]
        for number in range(50):
            entry = zipfile.ZipInfo(f"archive/data/{number + 1}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(entry, name, getattr(first, name))
            archive.filelist.append(entry)
        archive._didModify = True  # type: ignore[attr-defined]
    return content.getvalue()


BYTES_ASKED_FOR = b"\x80\x02cbuiltins\nbytearray\nJ" + (1 << 30).to_bytes(4, "little") + b"\x85R."
CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "compressed": lambda: rewritten(saved(), "data/0", bytes(1 << 20), zipfile.ZIP_DEFLATED),
    "overlapping": overlapping,
    "array asked for": lambda: rewritten(saved(), "data.pkl", BYTES_ASKED_FOR),
    "array asked for, old": lambda: BYTES_ASKED_FOR,
    "empty": lambda: b"",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_would_grow(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(CHECKPOINTS[name]())
    monkeypatch.setattr(torch, "load", None)  # it does not come to that
    with pytest.raises(DataError, match="is no checkpoint to go on from"):
        WholeFiles().load_checkpoint(path, map_location="cpu", weights_only=True)
    with pytest.raises(BundleError, match="is not a torch checkpoint"):
        read_fastai_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_ordinary_checkpoint_is_read(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(saved(_use_new_zipfile_serialization=zipped))
    found = WholeFiles().load_checkpoint(path, map_location="cpu", weights_only=True)
    assert found["state_dict"]["0.encoder.weight"].shape == (3, 2)


# ------------------------------------------------------------------------------------------------ records and bundles


def sparse(path: Path, size: int) -> None:
    """A file of so many zeros that takes no place on the disk."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)


def test_files_of_a_bundle_have_a_largest_size(tmp_path: Path) -> None:
    sparse(tmp_path / "bundle.json", 1 << 36)
    with pytest.raises(BundleError, match=r"is not a bundle description \(it is larger than 256 MiB\)"):
        read_info(tmp_path)
    Tokenizer.train(["the cat sat"] * 9, TokenizerConfig(vocab_size=300)).save(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        whole = (tmp_path / name).read_bytes()
        sparse(tmp_path / name, 1 << 36)
        with pytest.raises(BundleError, match="it is larger than"):
            Tokenizer.load(tmp_path)
        (tmp_path / name).write_bytes(whole)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
RECORDS: dict[str, tuple[str, str]] = {
    "names for parts": ("config.yaml", LAUGHS),
    "endless": ("config.yaml", "a: &a\n  b: *a\n"),
    "deep": ("config.yaml", "[" * 1500),
    "deep JSON": ("metrics.json", '{"a":' * 50_000),
    "a date": ("config.yaml", "seed: 2020-01-01\n"),
    "numbers as names": ("config.yaml", "1: 2\n"),
    "a long number": ("metrics.json", '{"seconds": ' + "1" * 5000 + "}"),
    "a large file": ("config.yaml", "a: b\n" + "#" * (1 << 20)),
    "a list": ("metrics.json", "[1]"),
    "no text": ("metrics.json", "\x00\x01"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_hostile_records_of_runs(name: str, tmp_path: Path) -> None:
    file, content = RECORDS[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=f"{file} cannot be read"):
        read_record(tmp_path / file)


# ------------------------------------------------------------------------------------------------------ endless work


def test_suggesting_a_name_takes_no_time_with_long_ones() -> None:
    """Compared letter by letter these would take hours."""
    assert did_you_mean("x" * 1_000_000, ["y" + "x" * 1_000_000]) == ""
    assert did_you_mean("lable", ("label" for _ in range(3))) == "; did you mean 'label'?"
    assert did_you_mean("lable", (f"n{i}" * 9 for i in range(200_000))) == ""


def test_a_line_of_labels_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("__label__a " * 300_000 + "text\n__label__b\ttabbed text\n__label__c\n")
    assert read_table(path).texts == ["text", "tabbed text", ""]
    with pytest.raises(UlmfitError, match="has 300000 labels"):
        read_table(path, label="label")
