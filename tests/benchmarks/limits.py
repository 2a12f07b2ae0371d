"""What this machine can do at most: matrix products at the sizes of the networks, SentencePiece, copying memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import material

Call = Callable[[], object]

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
# Those measured beside the runs: a square that takes a tenth of a second, and a step of a batch of texts.
BESIDE = {"square": (2048, 2048, 2048), "recurrent product": (256, 640, 2560)}
TEXT = "products of a text"


def measure(folder: Path, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What the processor, or with `device` the GPU, can do.

    Best of several memory layouts: GFLOP/s by "NAME fp32" and "NAME bf16"; "memory copy" in GB/s; "SentencePiece",
    alone on text that our rules have been applied to, in MB/s. On a GPU also "NAME tf32", and no text.
    """
    import torch

    if settings["device"] == "gpu":
        return _gpu

    torch.set_num_threads(settings["threads"])
    shrink, seconds = (16, 0.01) if settings["tiny"] else (1, 0.6)

    def run() -> dict[str, Any]:
        found = {}
        for kind in ("fp32", "bf16"):
            for name, (m, k, n) in PRODUCTS.items():
                m, k, n = max(1, m // shrink), k // shrink, n // shrink
                ways = _ways(m, k, n, kind)
                each = min(_best(way, seconds / len(ways)) for way in ways)
                found[f"{name} {kind}"] = round(2 * m * k * n / each / 1e9, 1)
        source = torch.zeros(2**28 // shrink // 4)
        target = torch.empty_like(source)
        encode, size = _sentencepiece(folder, settings["threads"])
        found["SentencePiece"] = round(size / _best(encode, 2 * seconds), 1)
        found["memory copy"] = round(2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9, 1)
        return found

    return run


def beside(folder: Path, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The limits `settings["names"]` as they are at the moment, for a machine whose speed drifts.

    Those of which this torch has no way on this processor are left out.

    GFLOP/s (GOP/s in int8) of the products in `BESIDE`, MB/s of SentencePiece, or how many of the questions a second
    could be read one by one if only their products took time, each in the fastest way that torch has.
    """
    import torch

    torch.set_num_threads(settings["threads"])
    shrink, seconds = (16, 0.01) if settings["tiny"] else (1, 0.4)

    def prepare(name: str) -> tuple[Call, float]:
        if name == "SentencePiece":
            return _sentencepiece(folder, settings["threads"])
        what, kind = name.rsplit(" ", 1)
        if what == TEXT:
            return _text(folder, settings["texts"], kind, seconds / 8)
        m, k, n = (size // shrink for size in BESIDE[what])
        return _fastest(_ways(m, k, n, kind), seconds / 2), 2 * m * k * n / 1e9

    prepared = {}
    for name in settings["names"]:
        with torch.inference_mode(), suppress(NotImplementedError):
            prepared[name] = prepare(name)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            return {name: amount / _best(call, seconds) for name, (call, amount) in prepared.items()}

    return run


def _sentencepiece(folder: Path, threads: int) -> tuple[Call, float]:
    """Cuts articles into pieces, without our rules; and how many MB they are."""
    from ulmfit.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(material.SHIPPED)
    texts = material.articles(folder, 4_000_000)
    marked = [tokenizer.rules.apply(text) for text in texts]
    processor = tokenizer._processor
    size = sum(len(text.encode()) for text in texts) / 1e6
    return lambda: processor.encode(marked, num_threads=threads, return_type="numpy"), size


def _text(folder: Path, count: int, kind: str, seconds: float) -> tuple[Call, float]:
    """The products with which the shipped network reads a text of the questions' mean length; and how many it is.

    A layer multiplies all its inputs at once, but its states one after the other: each needs the one before.
    """
    mean = material.tokens_a_text(material.questions(folder, count))
    steps = round(mean)
    layers = [
        [_fastest(_ways(m, k, 4 * out, kind), seconds) for m, k in ((steps, into), (1, out))]
        for into, out in material.shipped_architecture().layer_sizes()
    ]

    def read() -> None:
        for inputs, state in layers:
            inputs()
            for _ in range(steps):
                state()

    return read, steps / mean


def _fastest(ways: list[Call], seconds: float) -> Call:
    """The one that takes least time.

    Raises:
        NotImplementedError: there is none.
    """
    if not ways:
        raise NotImplementedError
    times = [_best(way, seconds) for way in ways]
    return ways[times.index(min(times))]


def _ways(m: int, k: int, n: int, kind: str) -> list[Call]:
    """A product (m, k) x (k, n) in "fp32", "bf16" or "int8"."""
    import torch

    rows, weight = torch.randn(m, k), torch.randn(n, k)
    if kind == "int8":
        return _int8_ways(rows, weight)
    rows, weight = (each.to(torch.bfloat16 if kind == "bf16" else torch.float32) for each in (rows, weight))
    return [*_layouts(rows, weight), *_onednn_ways(rows, weight)]


def _layouts(rows: Any, weight: Any) -> list[Call]:
    """`rows` (M, K) times `weight` (N, K), or its transpose: the ways that torch's own functions have."""
    import torch

    right = weight.t().contiguous()
    return [
        lambda: torch.mm(rows, right),
        lambda: torch.nn.functional.linear(rows, weight),
        lambda: torch.mm(weight, rows.t()),
    ]


def _onednn_ways(rows: Any, weight: Any) -> list[Call]:
    """A matrix times a vector, and oneDNN's own product with a weight as it lays it out."""
    import torch

    ways: list[Call] = [lambda: torch.mv(weight, rows[0])] if len(rows) == 1 else []
    with suppress(AttributeError, RuntimeError):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        multiply = torch.ops.mkldnn._linear_pointwise
        multiply(rows, packed, None, "none", [], "")  # whether this torch and this processor can
        ways.append(lambda: multiply(rows, packed, None, "none", [], ""))
    return ways


def _int8_ways(rows: Any, weight: Any) -> list[Call]:
    """With 8-bit weights, as `ulmfit.nn.reduced` packs them, by each of the libraries that torch has for it."""
    import torch

    scales = weight.abs().amax(1).double() / 127  # (N,)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*deprecated.*")
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    ways: list[Call] = []
    for engine in torch.backends.quantized.supported_engines:
        with suppress(RuntimeError):
            torch.backends.quantized.engine = engine
            packed = torch.ops.quantized.linear_prepack(quantized, None)
            ways.append(lambda packed=packed: torch.ops.quantized.linear_dynamic(rows, packed))
    return ways


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


def _gpu_seconds(call: Call, times: int = 20) -> float:
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


def _best(call: Call, seconds: float) -> float:
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
    for name in ("torch", "fastai", "spacy", "lightning", "sentencepiece", "numpy", "numba"):
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
