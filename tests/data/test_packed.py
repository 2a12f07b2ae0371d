"""A corpus packed in files of limited size is the same on the other side, or one sentence says what is wrong."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ulmfit.config import TokenizerConfig
from ulmfit.data import packed as module
from ulmfit.data.cache import build_token_cache, cache_path
from ulmfit.data.packed import MANIFEST, pack, packed_key, unpack
from ulmfit.errors import DataError
from ulmfit.text.tokenizer import Tokenizer

TEXTS = [f"the cat number {i} sat on the mat and the dog number {i * 7} ran away" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=330))


@pytest.fixture(scope="module")
def caches(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    for key, texts in (("train", TEXTS), ("valid", TEXTS[:20])):
        build_token_cache(texts, tokenizer, folder, key, workers=1, progress=False)
    return {key: cache_path(folder, key, tokenizer) for key in ("train", "valid")}


@pytest.fixture
def packed(tokenizer: Tokenizer, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In small blocks, so that there are several parts."""
    monkeypatch.setattr(module, "_BLOCK", 2_000)
    pack(tmp_path / "packed", tokenizer, caches, 2_500, "novels", "CC0")
    return tmp_path / "packed"


def test_the_same_on_the_other_side(
    packed: Path, tokenizer: Tokenizer, caches: dict[str, Path], tmp_path: Path
) -> None:
    there = unpack(packed, tmp_path / "there")
    assert there.tokenizer.pieces == tokenizer.pieces
    assert (there.dataset, there.licence) == ("novels", "CC0")
    assert there.valid is not None
    for split, cache in (("train", there.train), ("valid", there.valid)):
        for name in ("tokens.bin", "offsets.bin", "meta.json"):
            (there_too,) = (tmp_path / "there").glob(f"*/{split}/{name}")
            assert there_too.read_bytes() == (caches[split] / name).read_bytes()
        assert cache.characters == sum(map(len, TEXTS if split == "train" else TEXTS[:20]))
    assert len(list(packed.glob("train.tokens-*.xz"))) > 1
    sizes = {path.name: path.stat().st_size for path in packed.iterdir() if path.suffix == ".xz"}
    assert max(sizes.values()) <= 2_500
    manifest = json.loads((packed / MANIFEST).read_text())
    assert {name: about["bytes"] for name, about in manifest["files"].items() if name.endswith(".xz")} == sizes
    whole = b"".join(lzma.decompress(path.read_bytes()) for path in sorted(packed.glob("train.tokens-*.xz")))
    assert np.array_equal(np.frombuffer(whole, np.uint16), there.train.tokens)  # with xz alone, too


def test_unpacked_once(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "there")
    for part in packed.glob("*.xz"):
        part.unlink()
    assert len(unpack(packed, tmp_path / "there").train) == 400
    assert [path.name for path in (tmp_path / "there").iterdir()] == [packed_key(packed)[:32]]


def test_without_validation(tokenizer: Tokenizer, caches: dict[str, Path], tmp_path: Path) -> None:
    pack(tmp_path / "packed", tokenizer, {"train": caches["train"]}, 1_000_000)
    assert unpack(tmp_path / "packed", tmp_path / "there").valid is None


def change(folder: Path, alter: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    manifest = json.loads((folder / MANIFEST).read_text())
    alter(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def lie(manifest: dict) -> None:  # type: ignore[type-arg]
    manifest["arrays"]["train/tokens.bin"]["bytes"] = 10


def escape(manifest: dict) -> None:  # type: ignore[type-arg]
    manifest["arrays"]["train/tokens.bin"]["parts"].append("../x")
    manifest["files"]["../x"] = {"bytes": 1, "sha256": ""}


def first_part(folder: Path) -> Path:
    return folder / "train.tokens-000.xz"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: first_part(f).unlink(), "lacks train.tokens-000.xz; copy all files"),
        (lambda f: first_part(f).write_bytes(first_part(f).read_bytes()[:-9]), "does not match its checksum"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "tokenizer.model does not match its checksum"),
        (lambda f: (f / MANIFEST).unlink(), "holds no manifest.json, expected a folder written by 'ulmfit pack'"),
        (lambda f: (f / MANIFEST).write_text("[]"), "is not a list of packed files"),
        (lambda f: (f / MANIFEST).write_text("[" * 100_000), "is not a list of packed files"),
        (lambda f: change(f, lambda m: m.update(format_version=9)), "written by another version"),
        (lambda f: change(f, lambda m: m["arrays"].pop("train/meta.json")), "not those of a corpus"),
        (lambda f: change(f, lambda m: m["files"].pop("train.meta-000.xz")), "not those of its arrays"),
        (lambda f: change(f, escape), "not those of its arrays"),
        (lambda f: change(f, lie), "unpacks to more than it should"),
        (lambda f: change(f, lambda m: m.update(fingerprint="x")), "another tokenizer than manifest.json says"),
        (shutil.rmtree, "holds no manifest.json"),
    ],
)
def test_damage(packed: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(packed)
    with pytest.raises(DataError, match=sentence):
        unpack(packed, tmp_path / "there")
    assert not list((tmp_path / "there").glob(".*.partial"))


def test_ids_beyond_the_vocabulary(tokenizer: Tokenizer, caches: dict[str, Path], tmp_path: Path) -> None:
    cache = shutil.copytree(caches["train"], tmp_path / "train")
    tokens = np.fromfile(cache / "tokens.bin", np.uint16)
    tokens[7] = 60_000
    (cache / "tokens.bin").write_bytes(tokens.tobytes())
    pack(tmp_path / "packed", tokenizer, {"train": cache}, 1_000_000)
    with pytest.raises(DataError, match=r"ids beyond the \d+ of its tokenizer"):
        unpack(tmp_path / "packed", tmp_path / "there")


def test_output_and_part_size(tokenizer: Tokenizer, caches: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    with pytest.raises(DataError, match="holds something already, expected a new or empty folder"):
        pack(tmp_path / "used", tokenizer, caches, 1_000_000)
    with pytest.raises(DataError, match="part_mb is too small"):
        pack(tmp_path / "new", tokenizer, caches, 100)
