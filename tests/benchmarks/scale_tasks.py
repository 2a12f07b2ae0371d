"""What is measured of one size: each function runs in a process of its own, through `worker.py`."""

from __future__ import annotations

import json
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import material

Settings = dict[str, Any]
Measure = Callable[[], dict[str, Any]]

ROWS, BPTT = 64, 70


def _text(folder: Path, size: int) -> Iterator[str]:
    """Articles of together `size` bytes, over and over where there are not so many."""
    while True:
        for article in material.each_article(folder):
            yield article
            size -= len(article.encode())
            if size <= 0:
                return


def build(folder: Path, settings: Settings) -> Measure:
    """Text to token cache."""
    from ulmfit.data.cache import build_token_cache
    from ulmfit.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(material.SHIPPED)
    place, size = folder / f"scale-{settings['bytes']}", settings["bytes"]

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        built = build_token_cache(
            _text(folder, size), tokenizer, place, "scale", workers=settings["threads"], progress=False
        )
        return {"seconds": time.perf_counter() - started, "work": size, "tokens": len(built.tokens)}

    return measure


def read(folder: Path, settings: Settings) -> Measure:
    """Token cache to a shuffled epoch of language-model batches."""
    from ulmfit.data.cache import TokenCache
    from ulmfit.data.streams import LMStream

    (place,) = (folder / f"scale-{settings['bytes']}").iterdir()

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        cache = TokenCache.open(place)
        batches = sum(1 for _ in LMStream(cache, ROWS, BPTT, shuffle=True))
        return {"seconds": time.perf_counter() - started, "work": len(cache.tokens), "batches": batches}

    return measure


def limited_build(folder: Path, settings: Settings) -> Measure:
    """`build` where the process may hold only so much more than it holds already."""
    from ulmfit.data.cache import build_token_cache
    from ulmfit.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(material.SHIPPED)

    def measure() -> dict[str, Any]:
        limit = _limit_memory(settings["headroom_mb"])
        started = time.perf_counter()
        built = build_token_cache(
            _text(folder, settings["bytes"]), tokenizer, folder / "limited", "limited", workers=1, progress=False
        )
        return {
            "seconds": time.perf_counter() - started,
            "work": 1,
            "limit_mb": limit,
            "cache_mb": round(built.tokens.nbytes / 1e6),
        }

    return measure


def limited_read(folder: Path, settings: Settings) -> Measure:
    """`read` of a cache larger than what the process may hold; the cache of `limited_build`, written several times."""
    import numpy as np

    from ulmfit.data.cache import TokenCache
    from ulmfit.data.streams import LMStream

    (place,) = (folder / "limited").iterdir()
    times = settings["times"]
    if times > 1:
        small = TokenCache.open(place)
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        big = folder / "limited-times"
        big.mkdir()
        steps = np.arange(times)[:, None] * len(small.tokens)
        offsets = np.concatenate([[0], (small.offsets[None, 1:] + steps).ravel()]).astype(np.int64)
        offsets.tofile(big / "offsets.bin")
        with open(big / "tokens.bin", "wb") as file:
            for _ in range(times):
                small.tokens.tofile(file)
        meta |= {"tokens": len(small.tokens) * times, "documents": len(offsets) - 1}
        (big / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        place = big

    def measure() -> dict[str, Any]:
        limit = _limit_memory(settings["headroom_mb"])
        started = time.perf_counter()
        cache = TokenCache.open(place)
        batches = sum(1 for _ in LMStream(cache, ROWS, BPTT, shuffle=True))
        return {
            "seconds": time.perf_counter() - started,
            "work": batches,
            "limit_mb": limit,
            "cache_mb": round(cache.tokens.nbytes / 1e6),
        }

    return measure


def _limit_memory(headroom_mb: float) -> int:
    """Let this process hold so much more than now; returns the whole in MB. Files mapped for reading do not count."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = int(status["VmData"].split()[0]) * 1024
    limit = int(held + headroom_mb * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return round(limit / 1e6)


def make_network(folder: Path, settings: Settings) -> Measure:
    """Not measured: a small language model, a classifier on it, and documents of the lengths asked for."""
    import ulmfit
    from ulmfit.config import ModelConfig

    learner = ulmfit.language_model_learner(
        ulmfit.TextData.from_lists(material.articles(folder, 1_000_000)),
        init="scratch",
        model=ModelConfig(64, 128, 2),
        config=["tokenizer.vocab_size=4000", "trainer.accelerator=cpu"],
        progress=False,
    )
    learner.save(folder / "network")
    tokenizer = learner.tokenizer
    for length in settings["lengths"]:
        text = "".join(_text(folder, 8 * length))  # more than enough
        text = text[: round(len(text) * length / len(tokenizer.encode(text)))]
        (folder / f"document-{length}.txt").write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _learner(folder, settings, "some text").save(folder / "classifier")
    return lambda: {"seconds": 0.0, "work": 1}


def _document(folder: Path, settings: Settings) -> str:
    return (folder / f"document-{settings['tokens']}.txt").read_text(encoding="utf-8")


def _learner(folder: Path, settings: Settings, text: str) -> Any:
    """A classifier's learner on two documents."""
    import ulmfit

    return ulmfit.text_classifier_learner(
        ulmfit.TextData.from_lists([text, text + " Again."], ["a", "b"], valid_fraction=0.0),
        init=str(folder / "network"),
        config=["trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.threads={settings['threads']}"],
        progress=False,
    )


def predict(folder: Path, settings: Settings) -> Measure:
    """One prediction for a document."""
    import torch

    import ulmfit

    torch.set_num_threads(settings["threads"])
    text = _document(folder, settings)
    predictor = ulmfit.load(folder / "classifier")
    assert isinstance(predictor, ulmfit.Predictor)
    predictor.predict_one("warm up")

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        predictor.predict_one(text)
        return {"seconds": time.perf_counter() - started, "work": settings["tokens"]}

    return measure


def train(folder: Path, settings: Settings) -> Measure:
    """A training step for a document: half of an epoch on two, what a fit does before and after included."""
    learner = _learner(folder, settings, _document(folder, settings))
    learner.unfreeze()

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        learner.fit_one_cycle(1, 1e-3)
        return {"seconds": (time.perf_counter() - started) / 2, "work": settings["tokens"]}

    return measure
