"""What the processor multiplies natively: decides which precision is fast, and in what portions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_SECOND_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_USUAL_CACHE = 1 << 20


def cpu_multiplies_bfloat16() -> bool:
    """Whether it has bfloat16 products of its own: without them such LSTMs are slow or missing."""
    return cpu_has_tiles() or _cpu_has("_is_avx512_bf16_supported")


def cpu_has_tiles() -> bool:
    """Whether it has AMX tiles, which multiply bfloat16 and int8 several times as fast as its vectors do."""
    return _cpu_has("_is_amx_tile_supported")


def cpu_has_avx512() -> bool:
    """Whether its registers hold 16 numbers of 32 bits."""
    return _cpu_has("_is_avx512_supported")


def cpu_has_avx2() -> bool:
    """Whether they hold 8, and it multiplies and adds in one instruction."""
    return _cpu_has("_is_avx2_supported")


def cpu_multiplies_int8() -> bool:
    """Whether it adds up products of 8-bit numbers in 32 bits (VNNI), as oneDNN's kernels want it."""
    return _cpu_has("_is_vnni_supported")


@cache
def second_cache() -> int:
    """Bytes of a core's second cache, or a usual size where the system does not say (other than Linux)."""
    try:
        kilobytes = _SECOND_CACHE.read_text(encoding="ascii").strip().removesuffix("K")
    except (OSError, UnicodeError):
        return _USUAL_CACHE
    return int(kilobytes) << 10 if kilobytes.isdecimal() else _USUAL_CACHE


def cpu_casts_to_bfloat16() -> bool:
    """Whether autocast is on for the CPU, with bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def onednn_has(operator: str) -> bool:
    """Whether torch multiplies with oneDNN and has this operator of its own for that."""
    found = torch._C._get_mkldnn_enabled() and torch._C._has_mkldnn
    return bool(found) and hasattr(torch.ops.mkldnn, operator)


def _cpu_has(question: str) -> bool:
    asked = getattr(torch.cpu, question, None)  # not in every version of torch
    return bool(asked and asked())
