"""Checks of configuration values that a type cannot express: names, ranges, and values that must fit each other.

`validate(config)` is called by the command line and by the learners before any work starts. No torch, no Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ulmfit import config as c
from ulmfit.errors import UsageError, did_you_mean
from ulmfit.schema import describe, element_type, field_types, is_section, shown, unwrap


@dataclass(frozen=True)
class Choice:
    """One of a few names."""

    names: tuple[str, ...]

    def problem(self, value: Any) -> str | None:
        if value in self.names:
            return None
        return f"expected one of {', '.join(self.names)}{did_you_mean(str(value), self.names)}"


@dataclass(frozen=True)
class Range:
    """A number between `low` and `high`; an open end is not itself allowed."""

    low: float
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False

    def problem(self, value: Any) -> str | None:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return None if above and below and value != float("inf") else f"expected {self}"

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"a number above {self.low}" if self.low_open else f"at least {self.low}"
        low = f"above {self.low}" if self.low_open else f"from {self.low}"
        return f"a number {low} {'to below' if self.high_open else 'to'} {self.high}"


COUNT = Range(1)  # at least one
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, low_open=True)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, high_open=True)  # dropouts, momenta, fractions held out
SHARE = Range(0, 1, low_open=True)
THREADS = Range(1, 1024)  # many more take all memory

FILE_FORMATS = ("csv", "tsv", "jsonl", "parquet", "folder", "fasttext", "text", "wikipedia", "wikitext")
FORMATS = ("auto", *FILE_FORMATS, "huggingface", "packed")
SPLITS = ("train", "valid", "test")
PRECISIONS = ("32", "auto", "bf16", "int8")
STAGES = ("lm_pretrain", "lm_finetune", "classifier", "all")

CHECKS: dict[type[Any], dict[str, Choice | Range]] = {
    c.RulesConfig: {"unicode": Choice(("nfc", "nfkc", "none"))},
    c.TokenizerConfig: {
        "kind": Choice(("unigram", "bpe")),
        "vocab_size": Range(50, 1_000_000),
        "character_coverage": Range(0.98, 1),
        "sample_chars": COUNT,
        "max_piece_length": Range(1, 512),
        "sampling_alpha": FRACTION,
    },
    c.DatasetConfig: {
        "format": Choice(FORMATS),
        "valid_fraction": BELOW_ONE,
        "test_fraction": BELOW_ONE,
        "split_seed": NOT_NEGATIVE,
        "train_size": COUNT,
        "train_seed": NOT_NEGATIVE,
        "limit": COUNT,
        "max_document_chars": Range(1, 2**31 - 1),
    },
    c.ModelConfig: {"embedding_dim": COUNT, "hidden_dim": COUNT, "num_layers": Range(1, 64)},
    c.DropoutConfig: {
        "input": BELOW_ONE,
        "hidden": BELOW_ONE,
        "output": BELOW_ONE,
        "embedding": BELOW_ONE,
        "weight": BELOW_ONE,
        "multiplier": NOT_NEGATIVE,
    },
    c.ScheduleConfig: {
        "name": Choice(("stlr", "one_cycle", "cosine", "constant")),
        "cut_frac": FRACTION,
        "ratio": Range(1),
        "warmup": BELOW_ONE,
        "floor": FRACTION,
        "pct_start": FRACTION,
        "div": Range(1),
        "final_div": Range(1),
    },
    c.DiscriminativeConfig: {
        "mode": Choice(("factor", "authors_lm", "slice", "none")),
        "factor": POSITIVE,
        "lowest": POSITIVE,
    },
    c.PhaseConfig: {"epochs": COUNT, "train_top": COUNT, "lr_scale": POSITIVE},
    c.UnfreezingConfig: {"mode": Choice(("gradual", "authors", "chain_thaw", "last", "full", "phases"))},
    c.OptimConfig: {
        "lr": POSITIVE,
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "clip": POSITIVE,
        "accumulate": COUNT,
    },
    c.FitConfig: {
        "epochs": COUNT,
        "max_steps": COUNT,
        "batch_size": COUNT,
        "ar_alpha": NOT_NEGATIVE,
        "tar_beta": NOT_NEGATIVE,
        "patience": COUNT,
        "keep": Choice(("best", "last")),
        "valid_every": COUNT,
        "shard_mib": COUNT,
    },
    c.LMConfig: {
        "bptt": Range(2),
        "direction": Choice(("forward", "backward")),
        "vocabulary": Choice(("keep", "train")),
        "tokens_per_chunk": COUNT,
        "minutes": POSITIVE,
    },
    c.ClassifierConfig: {
        "bptt": Range(2),
        "max_len": COUNT,
        "tokens_per_batch": COUNT,
        "head_hidden": COUNT,
        "class_weights": Choice(("none", "balanced")),
        "label_smoothing": BELOW_ONE,
    },
    c.StageConfig: {"name": Choice(STAGES)},
    c.TrainerConfig: {
        "accelerator": Choice(("auto", "cpu", "gpu", "cuda", "mps", "tpu")),
        "num_nodes": COUNT,
        "precision": Choice(("auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")),
        "matmul_precision": Choice(("highest", "high", "medium")),
        "threads": THREADS,
        "checkpoint_minutes": POSITIVE,
        "timeout_minutes": POSITIVE,
    },
    c.LoggerConfig: {"log_every": COUNT},
    c.TrainConfig: {"seed": Range(0, 2**32 - 1)},
    c.PackConfig: {"part_mb": COUNT},
    c.FindLRConfig: {"start": POSITIVE, "end": POSITIVE, "steps": Range(10)},
    c.EvaluateConfig: {"split": Choice(SPLITS), "batch_size": COUNT, "precision": Choice(PRECISIONS)},
    c.PredictConfig: {"batch_size": COUNT, "precision": Choice(PRECISIONS), "threads": THREADS},
    c.GenerateConfig: {
        "tokens": COUNT,
        "samples": COUNT,
        "temperature": Range(0, 100),
        "top_k": NOT_NEGATIVE,
        "top_p": SHARE,
        "beams": NOT_NEGATIVE,
        "seed": Range(0, 2**32 - 1),
    },
}


def check_fractions(config: c.DatasetConfig) -> tuple[str, str] | None:
    if config.valid_fraction + config.test_fraction >= 1:
        return "valid_fraction", f"expected less than 1 together with test_fraction={config.test_fraction:g}"
    return None if config.text else ("text", "expected the name of at least one column")


def check_columns(config: c.DatasetConfig) -> tuple[str, str] | None:
    if config.label and config.label in config.text:
        return "label", "expected another column than those of dataset.text, where the answer would be part of the text"
    return ("text", "expected each column once") if len(set(config.text)) < len(config.text) else None


def check_path(config: c.DatasetConfig) -> tuple[str, str] | None:
    if config.path == "":
        return "path", "expected a file or folder, or null for the sample data"
    if len(config.name) > 100 or not re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", config.name):
        return "name", "expected the name of a folder, without / or \\, of 100 characters at most"
    return None


def check_input(config: c.PredictConfig) -> tuple[str, str] | None:
    if config.input == "":
        return "input", "expected a file, or null for standard input"
    if config.output == "":
        return "output", "expected a file, or null for standard output"
    if config.input and config.output and os.path.realpath(config.input) == os.path.realpath(config.output):
        return "output", "expected another file than the input, which would be lost"
    return None


def check_vocabulary(config: c.TokenizerConfig) -> tuple[str, str] | None:
    if config.byte_fallback and config.vocab_size < 300:
        return "vocab_size", "expected at least 300, because byte_fallback=true takes 256 pieces for the bytes"
    return None


def check_momentum(config: c.ScheduleConfig) -> tuple[str, str] | None:
    values = config.momentum
    if values is not None and (len(values) != 3 or any(BELOW_ONE.problem(value) for value in values)):
        return "momentum", "expected null or three numbers from 0 to below 1: [high, low, high]"
    return None


def check_betas(config: c.OptimConfig) -> tuple[str, str] | None:
    if len(config.betas) != 2 or any(BELOW_ONE.problem(beta) for beta in config.betas):
        return "betas", "expected two numbers from 0 to below 1"
    return None


def check_slice(config: c.DiscriminativeConfig) -> tuple[str, str] | None:
    if config.mode == "slice" and config.lowest is None:
        return "lowest", "expected the rate of the lowest group, because mode=slice"
    return None


def check_phases(config: c.UnfreezingConfig) -> tuple[str, str] | None:
    if config.mode == "phases" and not config.phases:
        return "phases", "expected at least one phase, such as [{name: head, epochs: 1, train_top: 1}], for mode=phases"
    if config.mode != "phases" and config.phases:
        return "phases", f"expected no phases, because mode={config.mode} makes its own; set mode=phases"
    return None


def check_phase(config: c.PhaseConfig) -> tuple[str, str] | None:
    if config.train_top is not None and config.train_only is not None:
        return "train_only", "expected null, because train_top is set; choose one of them"
    if config.train_only is not None and (not config.train_only or min(config.train_only) < 0):
        return "train_only", "expected numbers of layer groups, 0 for the lowest"
    return None


def check_head(config: c.ClassifierConfig) -> tuple[str, str] | None:
    if len(config.head_dropout) != 2 or any(BELOW_ONE.problem(value) for value in config.head_dropout):
        return "head_dropout", "expected two numbers from 0 to below 1, for the two blocks of the head"
    return None


def check_trainer(config: c.TrainerConfig) -> tuple[str, str] | None:
    devices = config.devices
    counts = devices if isinstance(devices, list) else [devices]
    if devices != "auto" and not (counts and all(type(count) is int and count >= -1 for count in counts)):
        return "devices", "expected auto, a number of devices, or a list of their numbers such as [0,2]"
    if devices == 0:
        return "devices", "expected at least 1; for the CPU set trainer=cpu"
    if config.max_time is not None and not re.fullmatch(r"\d+:\d{2}:\d{2}:\d{2}", config.max_time):
        return "max_time", "expected DD:HH:MM:SS, such as 00:08:00:00 for eight hours"
    return None


def check_publish(config: c.TrainConfig) -> tuple[str, str] | None:
    if config.publish is None or re.fullmatch(r"\w[\w.-]{0,99}", config.publish):
        return None
    return "publish", "expected the name of a folder in letters, digits, '.', '-' and '_'"


def check_minutes(config: c.LMConfig) -> tuple[str, str] | None:
    if config.minutes is not None and config.max_steps is not None:
        return "minutes", f"expected null, because max_steps={config.max_steps}; choose one of them"
    return None


def check_test_range(config: c.FindLRConfig) -> tuple[str, str] | None:
    return None if config.start < config.end else ("start", f"expected less than end={config.end:g}")


RELATIONS: list[tuple[type[Any], Callable[[Any], tuple[str, str] | None]]] = [
    (c.DatasetConfig, check_fractions),
    (c.DatasetConfig, check_columns),
    (c.DatasetConfig, check_path),
    (c.PredictConfig, check_input),
    (c.TokenizerConfig, check_vocabulary),
    (c.ScheduleConfig, check_momentum),
    (c.OptimConfig, check_betas),
    (c.DiscriminativeConfig, check_slice),
    (c.UnfreezingConfig, check_phases),
    (c.PhaseConfig, check_phase),
    (c.ClassifierConfig, check_head),
    (c.TrainerConfig, check_trainer),
    (c.TrainConfig, check_publish),
    (c.LMConfig, check_minutes),
    (c.FindLRConfig, check_test_range),
]


def type_matches(value: Any, annotation: Any) -> bool:
    """Whether a value has the declared type; a whole number is also a number, a bool is not."""
    inner, nullable = unwrap(annotation)
    if inner is Any or value is None:
        return inner is Any or nullable
    element = element_type(annotation)
    if element is not None:
        return isinstance(value, list | tuple) and all(type_matches(item, element) for item in value)
    if inner in (int, float):
        return isinstance(value, int if inner is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, inner)


def validate(config: Any, prefix: str = "") -> None:
    """Checks a configuration dataclass and all sections in it.

    Raises:
        UsageError: one sentence naming the dotted key, its value and what was expected.
    """
    cls = type(config)
    checks = {name: check for base in reversed(cls.__mro__) for name, check in CHECKS.get(base, {}).items()}
    for field in fields(config):
        value, annotation, key = getattr(config, field.name), field_types(cls)[field.name], prefix + field.name
        if not type_matches(value, annotation):
            raise UsageError(f"{key}={shown(value)}: expected {describe(annotation)}")
        if is_section(value):
            validate(value, f"{key}.")
        for index, item in enumerate(value if isinstance(value, list) else []):
            if is_section(item):
                validate(item, f"{key}.{index}.")
        problem = checks[field.name].problem(value) if value is not None and field.name in checks else None
        if problem:
            raise UsageError(f"{key}={shown(value)}: {problem}")
    for owner, relation in RELATIONS:
        found = relation(config) if isinstance(config, owner) else None
        if found:
            name, expected = found
            raise UsageError(f"{prefix}{name}={shown(getattr(config, name))}: {expected}")
