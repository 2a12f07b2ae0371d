"""What this machine can do at most: matrix products at the sizes of the networks, and copying memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import material

# (M, K, N) of a product (M, K) x (K, N); rows are 64 texts, or 64 x 70 tokens.
PRODUCTS = {
    "square": (4096, 4096, 4096),
    "recurrent 1152": (64, 1152, 4608),
    "input 1152": (4480, 1152, 4608),
    "weight gradient 1152": (4608, 4480, 1152),
    "decoder 15000x400": (1024, 400, 15000),
    "recurrent 640": (64, 640, 2560),
    "input 640": (4480, 640, 2560),
    "decoder 12000x256": (1024, 256, 12000),
}


def measure(folder: Path, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What the processor, or with `device` the GPU, can do.

    Best of several memory layouts: GFLOP/s by "NAME fp32" and "NAME bf16"; "memory copy" in GB/s; "SentencePiece",
    alone on text that our rules have been applied to, in MB/s. On a GPU also "NAME tf32", and no text.
    """
    import torch

    if settings["device"] == "gpu":
        return _gpu

    from ulmfit.text.tokenizer import Tokenizer

    torch.set_num_threads(settings["threads"])
    shrink, seconds = (16, 0.01) if settings["tiny"] else (1, 0.6)

    def run() -> dict[str, Any]:
        found = {}
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for name, (m, k, n) in PRODUCTS.items():
                m, k, n = max(1, m // shrink), k // shrink, n // shrink
                left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
                weight = right.t().contiguous()
                layouts: list[Callable[[], object]] = [
                    lambda a=left, b=right: torch.mm(a, b),
                    lambda a=left, b=weight: torch.nn.functional.linear(a, b),
                    lambda a=left, b=weight: torch.mm(b, a.t()),
                ]
                each = min(_best(layout, seconds / len(layouts)) for layout in layouts)
                found[f"{name} {kind}"] = round(2 * m * k * n / each / 1e9, 1)
        source = torch.zeros(2**28 // shrink // 4)
        target = torch.empty_like(source)
        tokenizer = Tokenizer.load(material.SHIPPED)
        texts = material.articles(folder, 4_000_000)
        marked = [tokenizer.rules.apply(text) for text in texts]
        processor, threads = tokenizer._processor, settings["threads"]
        each = _best(lambda: processor.encode(marked, num_threads=threads, return_type="numpy"), 2 * seconds)
        found["SentencePiece"] = round(sum(len(text.encode()) for text in texts) / each / 1e6, 1)
        found["memory copy"] = round(2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9, 1)
        return found

    return run


def _gpu() -> dict[str, Any]:
    import torch

    found = {}
    for kind, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        for name, (m, k, n) in PRODUCTS.items():
            m, k, n = (2 * m, 2 * k, 2 * n) if name == "square" else (m, k, n)
            left, right = torch.randn(m, k, device="cuda").to(dtype), torch.randn(k, n, device="cuda").to(dtype)
            weight = right.t().contiguous()
            each = min(_gpu_seconds(lambda: torch.mm(left, right)), _gpu_seconds(lambda: torch.mm(left, weight.t())))  # noqa: B023
            found[f"{name} {kind}"] = round(2 * m * k * n / each / 1e9, 1)
    source = torch.zeros(2**30 // 4, device="cuda")
    target = torch.empty_like(source)
    found["memory copy"] = round(2 * source.nbytes / _gpu_seconds(lambda: target.copy_(source)) / 1e9, 1)
    return found


def _gpu_seconds(call: Callable[[], object], times: int = 20) -> float:
    """The shortest of a few rounds, per call."""
    import torch

    best = float("inf")
    for _ in range(4):  # the first warms up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000 / times)
    return best


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call, in some seconds of calls."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Processor, memory and versions."""
    model, flags = platform.processor() or platform.machine(), set()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        lines = dict(line.split(":", 1) for line in cpus.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = lines.get("model name", model), set(lines.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    versions = {}
    for name in ("torch", "fastai", "spacy", "lightning", "sentencepiece", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0.0
    card = {}
    if device == "gpu":
        import torch

        if torch.cuda.is_available():
            seen = torch.cuda.get_device_properties(0)
            card = {"gpu": f"{seen.name}, {seen.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"}
    return {
        **card,
        "cpu": model,
        "instructions": [flag for flag in known if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(memory, 1),
        "system": platform.platform(terse=True),
        "python": sys.version.split()[0],
        "versions": versions,
    }
