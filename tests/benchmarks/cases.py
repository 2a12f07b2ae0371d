"""What is compared: one entry a case, with its goals and what each side does in one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL, FULL = "V 12,000 256/640/3 (the shipped shape)", "V 15,000 400/1152/3 (full size)"


@dataclass(frozen=True)
class Way:
    """One of our ways to do what a case asks for; each is measured against the same runs of fastai.

    Attributes:
        goal: fastai's time over ours for the same work; None: there is none.
        most: largest figure allowed, in the case's unit.
        share: the limit whose share is shown, a name that `limits.beside` knows, or on a GPU a key of `limits.measure`;
            `least_share` is its goal. Work is compared with it, or the operations ("flop") of its matrix products.
    """

    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    goal: float | None = None
    most: float | None = None
    share: str | None = None
    least_share: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        task: function of that name in `ours` and in `theirs`.
        what: what is compared, in one sentence.
        unit: of the figures shown; `per_second` says whether they are work per second, else seconds (times `scale`).
        tiny: settings for a trial, over `settings`.
        repeats: where it is not the command's.
        alone: fastai has no such thing.
        device: "cpu" or "gpu"; on a GPU it is the card's memory that is compared.
    """

    name: str
    title: str
    task: str
    what: str
    unit: str
    ways: tuple[Way, ...] = (Way(),)
    settings: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    per_second: bool = True
    scale: float = 1.0
    repeats: int | None = None
    alone: bool = False
    device: str = "cpu"


FP32, AUTO = {"precision": "32-true"}, {"precision": "auto"}
HIGH_PRODUCTS = {"matmul_precision": "high"}
HIGH = {**FP32, **HIGH_PRODUCTS}


_UNTIMED = 2  # steps: pages that are asked for the first time, and optimiser state


def _lm_step(name: str, shape: str, steps: int, goal: float, least_share: float | None) -> Case:
    return Case(
        f"lm_step_{name}",
        f"LM training, {shape}",
        "lm_step",
        f"{steps} steps of 64 x 70 tokens by the learners' fit_one_cycle, after {_UNTIMED} that are not timed, all "
        "layers, the same weights and tokens; fp32, also with torch's `high` precision of products, and our default "
        "precision, against fp32, the only one that fastai has on CPU",
        "tokens/s",
        (
            Way("fp32", FP32, goal, share="square fp32", least_share=least_share),
            Way("fp32, products of `high` precision", HIGH, goal, share="square fp32"),
            Way("default precision", AUTO, goal, share="square bf16"),
        ),
        {"shape": name, "steps": steps + _UNTIMED, "untimed": _UNTIMED, "batch_size": 64, "bptt": 70},
        {"shape": "small", "steps": 3, "untimed": 1, "batch_size": 8, "bptt": 20},
    )


def _epoch(name: str, title: str, batch_size: int, goal: float, repeats: int | None = None) -> Case:
    return Case(
        f"epoch_{name}",
        f"classifier epoch, {title}",
        "classifier_epoch",
        "one epoch of fit_one_cycle with all layers, each side's own dropouts, validation included, batches of at "
        f"most {batch_size} texts (ours also of at most 20,000 tokens), pooling over the last 1,400; fp32, and our "
        "default precision against fp32",
        "texts/s",
        (Way("fp32", FP32, goal, share="square fp32"), Way("default precision", AUTO, goal, share="square bf16")),
        {"file": name, "batch_size": batch_size, "max_len": 1400},
        {"batch_size": 16},
        repeats=repeats,
    )


def _tokenise(name: str, title: str, what: str, goal: float | None) -> Case:
    return Case(
        f"tokenise_{name}",
        f"tokenising, against {title}",
        "tokenise",
        "build_token_cache (our rules, 12,000 SentencePiece pieces, ids in a file; 64 MB of Wikipedia, none of it "
        f"twice) against parallel_tokenize with fastai's rules and {what} (strings in memory; the first 8 MB of it), "
        "as many processes or threads on either side; our first run loads compiled loops",
        "MB/s",
        (Way(goal=goal, share="SentencePiece"),),
        {"bytes": 64_000_000, "their_bytes": 8_000_000, "their_tokenizer": name},
    )


CASES = [
    Case(
        "import",
        "import",
        "import_package",
        "`import ulmfit` against `from fastai.text.all import *`, each in a fresh process",
        "s",
        (Way(most=0.5),),
        per_second=False,
    ),
    Case(
        "help",
        "`ulmfit --help`",
        "show_help",
        "`python -m ulmfit --help` in a fresh process; fastai has no command line",
        "s",
        (Way(most=0.5),),
        per_second=False,
        alone=True,
    ),
    _tokenise("words", "fastai's word tokenizer", "its default tokenizer, spaCy's", 30),
    _tokenise("pieces", "fastai's SentencePiece", "its SentencePieceTokenizer on the same pieces", None),
    Case(
        "lm_loader",
        "LM loader",
        "lm_loader",
        "from tokens to a shuffled epoch of 64 x 70 batches: TokenCache.open and LMStream (ids in a file) against "
        "LMDataLoader (ids in memory), construction included",
        "batches/s",
        (Way(goal=100),),
        {"bytes": 30_000_000, "batch_size": 64, "bptt": 70},
        {"batch_size": 8, "bptt": 20},
    ),
    _lm_step("full", FULL, 6, 1.2, 0.9),
    _lm_step("small", SMALL, 8, 1.5, None),
    _epoch("trec", "TREC-6 (5,452 + 500 short texts)", 64, 3),
    _epoch("imdb", "1,000 + 100 IMDb reviews (long)", 32, 2, repeats=2),
    Case(
        "predict",
        "batch prediction, short texts",
        "predict_many",
        "probabilities of 1,500 TREC questions from strings: Predictor.predict against learn.get_preds on dls.test_dl "
        "(fp32), batches of each side's own size (256 and 64); ours reads once what texts of a batch begin with alike, "
        "a fifth of these tokens, while the limit is with all of them",
        "texts/s",
        (
            Way("fp32", {"precision": "fp32"}, 3, share="square fp32"),
            Way("fp32, products of `high` precision", {"precision": "fp32", **HIGH_PRODUCTS}, 3, share="square fp32"),
            Way("bf16", {"precision": "bf16"}, 6, share="square bf16"),
            Way("int8", {"precision": "int8"}, 6, share="recurrent product int8"),
        ),
        {"texts": 1500},
        {"texts": 40},
    ),
    Case(
        "latency",
        "prediction of a single text",
        "predict_one",
        "50 TREC questions one by one from string to label: Predictor.predict_one against learn.predict (fp32)",
        "ms",
        (
            Way("fp32", {"precision": "fp32"}, 10, most=5.0, share="products of a text fp32"),
            Way("bf16", {"precision": "bf16"}, 10, most=5.0, share="products of a text bf16"),
            Way("int8", {"precision": "int8"}, 10, most=5.0, share="products of a text int8"),
        ),
        {"texts": 50},
        {"texts": 5},
        per_second=False,
        scale=1000,
    ),
    Case(
        "end_to_end",
        "CSV to TREC-6 test error",
        "end_to_end",
        "fresh processes from train.csv and test.csv to the test error, both from the shipped weights and pieces: "
        "`ulmfit train experiment=trec6 stage.lm.epochs=2 stage.classifier.epochs=8` against the recipe of "
        "fastai's text tutorial (language model 1 + 10 epochs, classifier 1 + 1 + 1 + 2 with gradual unfreezing)",
        "s",
        (Way(goal=3),),
        {"batch_size": 64, "words": ["stage.lm.epochs=2", "stage.classifier.epochs=8"]},
        {"words": ["stage.lm.epochs=1", "stage.classifier.epochs=1"]},
        per_second=False,
        repeats=1,
    ),
]
NAMES = [case.name for case in CASES]


def _gpu_lm(name: str, rows: int, steps: int, mixed: bool, ways: tuple[Way, ...]) -> Case:
    side = "mixed precision, to_fp16()" if mixed else "fp32, its default"
    return Case(
        f"gpu_lm_{name}",
        f"LM training, {FULL}, {rows} rows, fastai in {side}",
        "lm_step",
        f"{steps} steps of {rows} x 70 tokens by the learners' fit_one_cycle, all layers, the same weights and tokens; "
        f"fastai in {side}, its batches made beforehand and the same in each run (in fp32 cuDNN multiplies in "
        "TF32, as torch has it unless told otherwise)",
        "tokens/s",
        ways,
        {"shape": "full", "steps": steps, "batch_size": rows, "bptt": 70, "mixed": mixed},
        {"steps": 8, "batch_size": 8, "bptt": 20, "shape": "small"},
        device="gpu",
    )


_BF16 = Way("bf16, the default", AUTO, 3, share="square bf16")
GPU_CASES = [
    _gpu_lm("fp32", 64, 400, False, (_BF16, Way("fp32", FP32, share="square tf32"))),
    _gpu_lm("mixed", 64, 200, True, (_BF16,)),
    _gpu_lm("wide", 256, 100, True, (_BF16,)),
    Case(
        "gpu_single_kernels",
        f"LM training, {FULL}, 64 rows, bf16 without CUDA graphs",
        "lm_step",
        "as above, each kernel started by itself",
        "tokens/s",
        (Way(settings={**AUTO, "cuda_graphs": False}, share="square bf16"),),
        {"shape": "full", "steps": 200, "batch_size": 64, "bptt": 70},
        {"steps": 8, "batch_size": 8, "bptt": 20, "shape": "small"},
        repeats=2,
        alone=True,
        device="gpu",
    ),
]
GPU_NAMES = [case.name for case in GPU_CASES]
