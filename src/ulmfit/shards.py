"""Weights cut into files of a limited size, for places that do not take large ones, and joined again.

`encoder-00001-of-00004.safetensors` and so on. A shard holds whole tensors, or consecutive rows of one that alone is
over the limit; a name that stands in several shards is its rows in the order of the shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ulmfit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"encoder-(\d{5})-of-(\d{5})\.safetensors")


def shard_names(count: int) -> list[str]:
    """The files of an encoder in `count` shards, in order."""
    return [f"encoder-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def is_shard(name: str) -> bool:
    """Whether a file name is that of a shard."""
    return _NAME.fullmatch(name) is not None


def expected_shards(names: Iterable[str]) -> list[str]:
    """All shards of the set that the shards among `names` belong to; empty if there is none among them."""
    found = [match for match in map(_NAME.fullmatch, names) if match]
    return shard_names(int(found[0][2])) if found else []


def cut(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors dealt out to shards whose files are of at most `limit` bytes each.

    Raises:
        UsageError: one row of a tensor is over the limit.
    """
    # The header says of each tensor its name, type, shape and place.
    room = limit - 64 - sum(len(name.encode()) + 160 for name in tensors)
    shards: list[dict[str, Tensor]] = []
    left = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        pieces = [tensor]
        if size > room:
            rows = room * tensor.size(0) // size if tensor.dim() else 0
            if rows < 1:
                raise UsageError(f"a row of {name} does not fit into a file of {limit} bytes; raise shard_mib")
            pieces = [tensor[i : i + rows] for i in range(0, tensor.size(0), rows)]
        for piece in pieces:
            size = piece.numel() * piece.element_size()
            if size > left or not shards:
                shards.append({})
                left = room
            shards[-1][name] = piece.contiguous()
            left -= size
    return shards


def joined(shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `cut` was given.

    Raises:
        RuntimeError: rows of one tensor that differ in shape.
    """
    import torch

    pieces: dict[str, list[Tensor]] = {}
    for shard in shards:
        for name, tensor in shard.items():
            pieces.setdefault(name, []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in pieces.items()}
