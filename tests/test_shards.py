"""An encoder in files of limited size: cut, joined, and as part of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from ulmfit.bundle import (
    ENCODER_FILE,
    FILES,
    INFO_FILE,
    LANGUAGE_MODEL,
    BundleInfo,
    load_bundle,
    read_info,
    save_bundle,
)
from ulmfit.config import TokenizerConfig
from ulmfit.errors import BundleError, UsageError
from ulmfit.shards import cut, expected_shards, is_shard, joined, shard_names
from ulmfit.text.tokenizer import Tokenizer

SHAPES = {"embedding.weight": (320, 600), "rnns.0.weight_hh_l0": (2400, 600), "rnns.0.bias_hh_l0": (2400,)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran"] * 20, TokenizerConfig(vocab_size=320))


def weights(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def write(folder: Path, tokenizer: Tokenizer, shard_mib: int | None = 1, seed: int = 0) -> Path:
    sizes = {"vocab_size": tokenizer.vocab_size, "embedding_dim": 600, "hidden_dim": 600, "num_layers": 1}
    info = BundleInfo(LANGUAGE_MODEL, sizes)
    return save_bundle(folder, info, weights(seed), {"bias": torch.zeros(320)}, tokenizer, True, shard_mib)


@pytest.fixture
def sharded(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return write(tmp_path / "bundle", tokenizer)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def seal(folder: Path, **checksums: str) -> None:
    """Writes `bundle.json` anew with other checksums of files, as someone would who wants to hide a change."""
    values = json.loads((folder / INFO_FILE).read_text())
    del values["checksums"][INFO_FILE]
    values["checksums"] |= checksums
    (folder / INFO_FILE).write_text(json.dumps(values))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=6), st.integers(2_600, 20_000)
)
def test_any_tensors_are_the_same_when_joined_and_no_file_is_over_the_limit(
    shapes: list[list[int]], limit: int
) -> None:
    tensors = {f"tensor.{i}": torch.randn(shape).half() for i, shape in enumerate(shapes)}
    shapes_fit = all(t.numel() * 2 // max(1, t.size(0) if t.dim() else 1) < limit - 1_200 for t in tensors.values())
    if not shapes_fit:
        return
    shards = cut(tensors, limit)
    assert all(len(save(shard)) <= limit for shard in shards)
    back = joined(shards)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_row_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"a row of wide does not fit .* raise shard_mib"):
        cut({"wide": torch.zeros(2, 3_000)}, 4_000)


def test_names() -> None:
    assert shard_names(2) == ["encoder-00001-of-00002.safetensors", "encoder-00002-of-00002.safetensors"]
    assert all(map(is_shard, shard_names(3)))
    assert not is_shard(ENCODER_FILE)
    assert expected_shards(["x", shard_names(3)[1]]) == shard_names(3)
    assert expected_shards([ENCODER_FILE, "README.md"]) == []


def test_exact_file_set_and_sizes(sharded: Path, tokenizer: Tokenizer) -> None:
    """2.9 MB of embedding and matrix, the matrix alone over a megabyte: by name, then by rows."""
    shards = {name for name in names(sharded) if is_shard(name)}
    assert shards == set(shard_names(len(shards)))
    assert len(shards) == 4
    assert names(sharded) == {*FILES, *shards} - {ENCODER_FILE}
    assert all((sharded / name).stat().st_size <= 1 << 20 for name in shards)
    info = read_info(sharded)
    assert sorted(info.files) == sorted(names(sharded)) == sorted(info.checksums)
    loaded = load_bundle(sharded)
    assert loaded.encoder.keys() == SHAPES.keys()
    assert all(torch.equal(loaded.encoder[name], value.half().float()) for name, value in weights().items())
    whole = load_bundle(write(sharded.parent / "whole", tokenizer, None))
    assert all(torch.equal(loaded.encoder[name], value) for name, value in whole.encoder.items())


def test_written_over_one_another(sharded: Path, tokenizer: Tokenizer) -> None:
    """No shard of an old bundle stays beside the new one's, other files do."""
    (sharded / "notes.txt").write_text("mine")
    write(sharded, tokenizer, None, seed=1)
    assert names(sharded) == {*FILES, "notes.txt"}
    write(sharded, tokenizer, 2, seed=2)
    assert names(sharded) == {*FILES, "notes.txt", *shard_names(3)} - {ENCODER_FILE}
    assert torch.equal(load_bundle(sharded).encoder["embedding.weight"], weights(2)["embedding.weight"].half().float())


def test_what_is_missing_or_changed(sharded: Path, tokenizer: Tokenizer) -> None:
    shard = sharded / shard_names(4)[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\1")
    with pytest.raises(BundleError, match=r"encoder-00003-of-00004.safetensors does not match its checksum"):
        load_bundle(sharded)
    shard.unlink()
    with pytest.raises(BundleError, match=r"lacks encoder-00003-of-00004.safetensors"):
        load_bundle(sharded)
    shard.write_bytes(content)
    load_bundle(sharded)


def test_shards_that_do_not_fit_together(sharded: Path) -> None:
    import hashlib

    shard = sharded / shard_names(4)[3]
    content = save({"rnns.0.weight_hh_l0": torch.zeros(3, 7)})
    shard.write_bytes(content)
    seal(sharded, **{shard.name: hashlib.sha256(content).hexdigest()})
    with pytest.raises(BundleError, match="do not fit together"):
        load_bundle(sharded)


@pytest.mark.parametrize("name", ["encoder-00001-of-99999.safetensors", "encoder.safetensors"])
def test_files_of_two_encoders(sharded: Path, name: str) -> None:
    seal(sharded, **{name: "0"})
    with pytest.raises(BundleError, match="checksums name files of an encoder that do not make one"):
        load_bundle(sharded)
