"""Batches of a size that oneDNN's bfloat16 LSTM multiplies fast on processors with AMX tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 16  # rows: as many as a tile holds, any number below takes as long
_SOME = 64


def tiled_rows(rows: int) -> int:
    """The next number of rows, from `rows` on, that is fast.

    oneDNN cuts the rows into equal blocks, so for 53, 59 or 61 of them it takes five times as long as for 64.
    """
    step = 1 if rows <= _FEW else 4 if rows <= _SOME else 16
    return -(-rows // step) * step


def whole_tiles(x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """`x` (B, T, I) and `state` (each (1, B, H)), with rows of zeros added to be cut off the outputs again.

    Only where bfloat16 is multiplied on a CPU; else both are returned as they are.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x, state
    reduced = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    missing = tiled_rows(x.size(0)) - x.size(0)
    if reduced != torch.bfloat16 or missing == 0:
        return x, state
    if state is not None:
        state = (F.pad(state[0], (0, 0, 0, missing)), F.pad(state[1], (0, 0, 0, missing)))
    return F.pad(x, (0, 0, 0, 0, 0, missing)), state
