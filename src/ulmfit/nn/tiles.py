"""Batches of a size that oneDNN's bfloat16 LSTM multiplies fast on processors with AMX tiles."""

from __future__ import annotations

import torch

from ulmfit.nn.processor import cpu_has_tiles

_FEW = 16  # rows: as many as a tile holds, any number below takes as long
_SOME = 64


def tiled_rows(rows: int) -> int:
    """The next number of rows, from `rows` on, that is fast.

    oneDNN cuts the rows into equal blocks, so for 53, 59 or 61 of them it takes five times as long as for 64.
    """
    step = 1 if rows <= _FEW else 4 if rows <= _SOME else 16
    return -(-rows // step) * step


def missing_rows(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows to add to a batch of LSTMs with weights of `dtype`; only where tiles multiply bfloat16.

    Without tiles, every number of rows is as fast as its neighbours.
    """
    if rows <= _FEW or device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    reduced = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
    return tiled_rows(rows) - rows if reduced == torch.bfloat16 and cpu_has_tiles() else 0
