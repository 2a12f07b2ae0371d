"""Which of the processor's instructions make bfloat16 worth it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ulmfit.nn import processor
from ulmfit.nn.processor import cpu_has_tiles, cpu_multiplies_bfloat16, second_cache


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("vectors", [True, False])
def test_bfloat16_needs_tiles_or_vectors(tiles: bool, vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors, raising=False)
    assert cpu_has_tiles() is tiles
    assert cpu_multiplies_bfloat16() is (tiles or vectors)


def test_neither_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, question, raising=False)
    assert not cpu_has_tiles() and not cpu_multiplies_bfloat16()


@pytest.mark.parametrize("content", [b"2048K\n", b"", b"2M\n", b"\xff", None])
def test_size_of_the_second_cache(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system says nothing that can be read, a usual size."""
    if content is not None:
        (tmp_path / "size").write_bytes(content)
    monkeypatch.setattr(processor, "_SECOND_CACHE", tmp_path / "size")
    second_cache.cache_clear()
    assert second_cache() == (2 << 20 if content == b"2048K\n" else 1 << 20)
    monkeypatch.undo()
    second_cache.cache_clear()
    assert second_cache() >= 1 << 16
