"""Our side of each case. A function prepares, warms up, and returns what is measured again and again."""

from __future__ import annotations

import inspect
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import material

Settings = dict[str, Any]
Measure = Callable[[], dict[str, Any]]


class Unavailable(Exception):
    """This version cannot do it."""


def timed_process(command: list[str], **options: Any) -> dict[str, Any]:
    """Seconds and peak memory (MB) of a command.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, **options)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {(done.stderr or done.stdout)[-500:]}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000  # KB on Linux
    return {"seconds": seconds, "work": 1, "memory_mb": memory, "output": done.stdout}


def import_package(folder: Path, settings: Settings) -> Measure:
    return lambda: timed_process([sys.executable, "-c", "import ulmfit"])


def show_help(folder: Path, settings: Settings) -> Measure:
    return lambda: timed_process([sys.executable, "-m", "ulmfit", "--help"])


def tokenise(folder: Path, settings: Settings) -> Measure:
    from ulmfit.data.cache import build_token_cache
    from ulmfit.text.tokenizer import Tokenizer

    texts = material.articles(folder, settings["bytes"])
    size = sum(len(text.encode()) for text in texts) / 1e6

    def measure() -> dict[str, Any]:
        tokenizer = Tokenizer.load(material.SHIPPED)  # one that has read nothing: it learns words as it goes
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            started = time.perf_counter()
            built = build_token_cache(
                texts, tokenizer, Path(cache), "bench", workers=settings["threads"], progress=False
            )
            return {"seconds": time.perf_counter() - started, "work": size, "tokens": len(built.tokens)}

    return measure


def lm_loader(folder: Path, settings: Settings) -> Measure:
    from ulmfit.data.cache import TokenCache, build_token_cache
    from ulmfit.data.streams import LMStream
    from ulmfit.text.tokenizer import Tokenizer

    cache = folder / "loader"
    texts = material.articles(folder, settings["bytes"])
    build_token_cache(texts, Tokenizer.load(material.SHIPPED), cache, "bench", workers=1, progress=False)
    (built,) = cache.iterdir()

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        stream = LMStream(TokenCache.open(built), settings["batch_size"], settings["bptt"], shuffle=True)
        batches = sum(1 for _ in stream)
        return {"seconds": time.perf_counter() - started, "work": batches}

    return measure


def make_full(folder: Path, settings: Settings) -> Measure:
    """Not a case: the language model of full size that both sides start from, with random weights."""
    import ulmfit

    texts = material.articles(folder, 4_000_000)
    words = ["tokenizer.vocab_size=15000", "tokenizer.sample_chars=2000000", "trainer.accelerator=cpu"]
    learner = ulmfit.language_model_learner(
        ulmfit.TextData.from_lists(texts), init="scratch", model="awd_lstm_base", config=words, progress=False
    )
    learner.save(folder / "full")
    return lambda: {"seconds": 0.0, "work": 1}


def bundle_of(folder: Path, settings: Settings) -> Path:
    """The language model that a case starts from."""
    return folder / "full" if settings.get("shape") == "full" else material.SHIPPED


def _words(settings: Settings) -> list[str]:
    return [
        f"trainer.accelerator={settings['device']}",
        f"trainer.precision={settings['precision']}",
        f"trainer.matmul_precision={settings.get('matmul_precision', 'highest')}",
        f"trainer.threads={settings['threads']}",
        f"trainer.cuda_graphs={settings.get('cuda_graphs', True)}",
    ]


def stop_clock(started: float, settings: Settings) -> dict[str, Any]:
    """Seconds since `started`, once all work is done, and on a GPU the most memory that torch has taken of it."""
    if settings["device"] == "cpu":
        return {"seconds": time.perf_counter() - started}
    import torch

    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "memory_mb": torch.cuda.max_memory_reserved() / 1e6}


def steps_clock(encoder: Any, settings: Settings) -> Callable[[float], float]:
    """A function of the time before a training: when the first step began that counts.

    Processes that waited for the other side got their memory taken, and what a training keeps is allocated once.
    """
    begun: list[float] = []
    untimed = settings.get("untimed", 0)
    if not untimed:
        return lambda before: before
    encoder.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    return lambda before: begun[untimed - settings["steps"]]


def timed_tokens(settings: Settings) -> int:
    return int(settings["batch_size"] * settings["bptt"] * (settings["steps"] - settings.get("untimed", 0)))


def _lm_learner(folder: Path, settings: Settings) -> Any:
    import ulmfit

    rows, bptt, steps = settings["batch_size"], settings["bptt"], settings["steps"]
    # A text of fewer than 32 steps would get fewer rows.
    texts = material.articles(folder, 10 * rows * bptt * max(32, steps))
    learner = ulmfit.language_model_learner(
        ulmfit.TextData.from_lists(texts, valid_fraction=0.0),
        init=str(bundle_of(folder, settings)),
        config=_words(settings),
        progress=False,
        batch_size=rows,
        bptt=bptt,
        random_bptt=False,
        max_steps=steps,
    )
    learner.unfreeze()
    return learner


def lm_step(folder: Path, settings: Settings) -> Measure:
    learner = _lm_learner(folder, settings)
    started = steps_clock(learner.model.encoder, settings)

    def measure() -> dict[str, Any]:
        before = time.perf_counter()
        learner.fit_one_cycle(1, 1e-3)
        return {
            **stop_clock(started(before), settings),
            "work": timed_tokens(settings),
            "flop": training_flop(learner.model.encoder.architecture, decoder=True),
            "loss": round(learner.history["train_loss_step"][-1][1], 3),
        }

    measure()
    return measure


def profile(folder: Path, settings: Settings) -> Measure:
    """Not a case: what the GPU does in a language model's step, kernel by kernel, after CUDA graphs are made."""
    import torch
    from lightning import Callback
    from torch.profiler import ProfilerActivity

    steps, warm = settings["steps"], settings["steps"] // 2
    learner = _lm_learner(folder, settings)
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
    clock = {"began": 0.0, "ended": 0.0}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == warm:
                torch.cuda.synchronize()
                profiler.start()
                clock["began"] = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == steps - 1:
                torch.cuda.synchronize()
                clock["ended"] = time.perf_counter()
                profiler.stop()

    def measure() -> dict[str, Any]:
        from ulmfit.training import engine

        module, data = learner._parts(learner.config.stage.lm)
        engine.fit(
            module, data, learner.config.stage.lm, learner.config.trainer, learner.config.logger, None,
            ("valid_loss", "min"), "profile", [Watch()],
        )  # fmt: skip
        count = steps - warm
        kernels: dict[str, list[float]] = {}
        for event in profiler.events():
            took = kernels.setdefault(event.name, [0.0, 0])
            took[0] += event.device_time_total / count
            took[1] += 1 / count
        listed = sorted(((us, calls, name) for name, (us, calls) in kernels.items() if us > 0), reverse=True)
        return {"step_us": 1e6 * (clock["ended"] - clock["began"]) / count, "kernels": listed}

    return measure


def training_flop(shape: Any, decoder: bool) -> float:
    """Operations of the matrix products of one token's training step: forward, and twice that backward."""
    return 3 * (reading_flop(shape) + 2.0 * decoder * shape.vocab_size * shape.embedding_dim)


def reading_flop(shape: Any) -> float:
    """Operations of the matrix products with which the encoder reads a token."""
    return sum(2.0 * 4 * out * (into + out) for into, out in shape.layer_sizes())


def _classifier(folder: Path, settings: Settings, file: str, **more: Any) -> Any:
    import ulmfit

    rows = material.table(folder, file)
    return ulmfit.text_classifier_learner(
        ulmfit.TextData.from_lists(*rows["train"], valid=rows["valid"]),
        init=str(material.SHIPPED),
        config=_words(settings),
        progress=False,
        **more,
    )


def classifier_epoch(folder: Path, settings: Settings) -> Measure:
    learner = _classifier(
        folder, settings, settings["file"], batch_size=settings["batch_size"], max_len=settings["max_len"]
    )
    learner.unfreeze()
    texts = material.table(folder, settings["file"])["train"][0]
    flop = material.tokens_a_text(texts) * training_flop(learner.model.encoder.architecture, decoder=False)

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        learner.fit_one_cycle(1, 2e-3)
        clock = stop_clock(started, settings)
        accuracy = learner.metrics.get("valid_accuracy", 0.0)
        return {**clock, "work": len(texts), "accuracy": round(accuracy, 3), "flop": flop}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing has been trained yet
        learner.validate()  # warms up in less time than an epoch
    return measure


def make_classifier(folder: Path, settings: Settings) -> Measure:
    """Not a case: the untrained classifier that predicts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _classifier(folder, {**settings, "precision": "32-true"}, "trec").save(folder / "classifier")
    return lambda: {"seconds": 0.0, "work": 1}


def _predictor(folder: Path, settings: Settings) -> tuple[Any, list[str]]:
    """An untrained classifier from its bundle, and questions."""
    import torch

    import ulmfit

    precision = settings["precision"]
    options = {} if precision == "fp32" else {"precision": precision}
    if options and "precision" not in inspect.signature(ulmfit.load).parameters:
        raise Unavailable("this version predicts in fp32 only")
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(settings.get("matmul_precision", "highest"))
    return ulmfit.load(folder / "classifier", **options), material.questions(folder, settings["texts"])


def predict_many(folder: Path, settings: Settings) -> Measure:
    predictor, texts = _predictor(folder, settings)
    flop = material.tokens_a_text(texts) * reading_flop(material.shipped_architecture())

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        found = predictor.predict(texts)
        return {"seconds": time.perf_counter() - started, "work": len(found), "flop": flop}

    measure()
    return measure


def predict_one(folder: Path, settings: Settings) -> Measure:
    predictor, texts = _predictor(folder, settings)

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        for text in texts:
            predictor.predict_one(text)
        return {"seconds": time.perf_counter() - started, "work": len(texts)}

    measure()
    return measure


def end_to_end(folder: Path, settings: Settings) -> Measure:
    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            words = ["experiment=trec6", f"dataset.path={folder}", "dataset.train=questions.csv"]
            words += ["dataset.test=questions-test.csv", f"runs={place}/runs", f"cache={place}/cache"]
            words += ["trainer=auto", "trainer.accelerator=cpu", f"trainer.threads={settings['threads']}"]
            words += ["trainer.enable_progress_bar=false", f"init={material.SHIPPED}", *settings.get("words", [])]
            measured = timed_process([sys.executable, "-m", "ulmfit", "train", *words], cwd=place)
            (figures,) = Path(place).glob("runs/*/*/metrics.json")
            test = json.loads(figures.read_text(encoding="utf-8"))["test"]
            del measured["output"]
            return {**measured, "test_error": round(100 * float(test["error"]), 2)}

    return measure
