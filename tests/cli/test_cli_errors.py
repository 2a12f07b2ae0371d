"""Wrong command lines: one sentence, the right exit code, nothing written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ulmfit.errors import BundleError, DataError, UlmfitError

if TYPE_CHECKING:
    from .conftest import CommandLine

PHASES = "stage.lm.method.unfreezing.phases"

WRONG = [
    # verbs and flags
    ("trian", ["trian", "no such verb", "did you mean 'train'"]),
    ("lr-find", ["did you mean 'find_lr'"]),
    ("stage=classifier", ["expected a verb", "ulmfit train stage=classifier"]),
    ("train --foo", ["--foo", "no such option"]),
    ("train --mutlirun", ["did you mean '--multirun'"]),
    ("train --config-dir /nowhere/at/all", ["/nowhere/at/all", "no such folder"]),
    ("train --config-dir", ["--config-dir", "expected a value"]),
    ("train --cfg jobs", ["jobs", "job, hydra, all"]),
    # words that are no key=value
    ("train lm_finetune", ["expected key=value", "did you mean stage=lm_finetune"]),
    ("train trec6", ["did you mean dataset=trec6"]),
    ("train reviews.csv", ["did you mean dataset.path=reviews.csv"]),
    ("predict reviews.csv", ["did you mean input=reviews.csv"]),
    ("train =3", ["'=3'", "expected key=value"]),
    ("train ~seed", ["cannot be removed", "seed=null"]),
    # keys
    ("train datset=trec6", ["datset=trec6", "no key 'datset'", "did you mean 'dataset'"]),
    ("train epochs=5", ["stage.lm.epochs or stage.classifier.epochs"]),
    ("train optim.lr=1", ["stage.lm.optim.lr or stage.classifier.optim.lr"]),
    ("train stage.classifier.optm.lr=1", ["did you mean 'stage.classifier.optim.lr'"]),
    ("predict outptu=x", ["did you mean 'output'"]),
    ("report dataset=trec6", ["no key 'dataset'", "runs"]),
    ("train +foo=1", ["no key 'foo'", "stage"]),
    (f"train +{PHASES}.0.foo=1", [f"no key '{PHASES}.0.foo'"]),
    (f"train {PHASES}=[{{name:a,epochs:2,foo:3}}]", ["no key 'foo'", "epochs", PHASES]),
    (f"train {PHASES}=[{{name:a,epochs:x}}]", ["epochs=x", "a whole number", PHASES]),
    ("train hydra.foo=1", ["hydra.foo"]),
    # group options
    ("train dataset=trec7", ["trec7", "did you mean 'trec6'"]),
    ("train stage=classifer", ["did you mean 'classifier'"]),
    ("train tokenizer=word", ["tokenizer=word", "bpe, unigram"]),
    ("train model=awd_lstm", ["model=awd_lstm", "did you mean 'awd_lstm_"]),
    ("train logger=tensorbord", ["did you mean 'tensorboard'"]),
    ("train --multirun +sweep=seed", ["sweep", "seeds"]),
    ("train trainer=tpupod", ["expected one of auto, cpu, ddp, ddp_multinode, gpu"]),
    ("train experiment=imdb100", ["did you mean 'imdb_100'"]),
    ("train callbacks@stage.classifier.method=[gradual,cosin]", ["did you mean 'cosine'"]),
    ("train stage=lm_finetune callbacks@stage.classifier.method=last", ["callbacks@stage.classifier.method", "stage"]),
    ("train dataset=", ["dataset=", "expected one of"]),
    ("train dataset=trec6,imdb", ["--multirun"]),
    # types
    ("train seed=abc", ["seed=abc", "a whole number"]),
    ("train seed=1.5", ["seed=1.5", "a whole number"]),
    ("train seed=", ["seed=", "a whole number"]),
    ("train seed=null", ["seed=null", "a whole number"]),
    ("train seed=1,2", ["seed=1,2", "--multirun"]),
    ("train -m init=a,'b'c", ["init=a,'b'c", "cannot be read", "quotes"]),
    ("train --multirun seed=1,x", ["seed=1,x", "a whole number"]),
    ("train debug=maybe", ["debug=maybe", "true or false"]),
    ("train stage.lm.optim.lr=fast", ["stage.lm.optim.lr=fast", "a number"]),
    ("train stage.lm.optim=adam", ["stage.lm.optim=adam", "betas", "stage.lm.optim.NAME=VALUE"]),
    ("train stage.lm.optim.betas=[a,b]", ["stage.lm.optim.betas", "=a"]),
    ("train dataset=csv", ["dataset.path", "a file or folder"]),
    # values
    ("train stage.classifier.dropout.weight=1.5", ["stage.classifier.dropout.weight=1.5", "from 0 to below 1"]),
    ("train stage.classifier.optim.lr=0", ["stage.classifier.optim.lr=0", "above 0"]),
    ("train stage.lm.optim.lr=nan", ["stage.lm.optim.lr=nan", "above 0"]),
    ("train stage.lm.optim.lr=inf", ["stage.lm.optim.lr=inf", "above 0"]),
    ("train stage.lm.epochs=-1", ["stage.lm.epochs=-1", "at least 1"]),
    ("train stage.lm.batch_size=0", ["stage.lm.batch_size=0", "at least 1"]),
    ("train stage.lm.method.schedule.name=slr", ["slr", "stlr, one_cycle", "did you mean 'stlr'"]),
    ("train stage.lm.method.unfreezing.mode=phases", [PHASES, "at least one phase"]),
    ("train stage.lm.method.discriminative.mode=slice", ["discriminative.lowest=null", "mode=slice"]),
    ("train stage.lm.direction=sideways", ["sideways", "forward, backward"]),
    ("train stage.classifier.optim.betas=[0.9]", ["[0.9]", "two numbers"]),
    ("train tokenizer.character_coverage=0.5", ["character_coverage=0.5", "from 0.98 to 1"]),
    ("train tokenizer.max_piece_length=513", ["max_piece_length=513", "from 1 to 512"]),
    ("train tokenizer.kind=word", ["tokenizer.kind=word", "unigram, bpe"]),
    ("train tokenizer.rules.unicode=nfd", ["unicode=nfd", "nfc, nfkc, none"]),
    ("train model.num_layers=65", ["model.num_layers=65", "from 1 to 64"]),
    ("train model.hidden_dim=0", ["model.hidden_dim=0", "at least 1"]),
    ("train dataset.max_document_chars=0", ["max_document_chars=0", "from 1"]),
    ("train dataset.format=xlsx", ["dataset.format=xlsx", "csv"]),
    ("train logger.log_every=0", ["logger.log_every=0", "at least 1"]),
    ("train trainer.precision=fp16", ["trainer.precision=fp16", "16-mixed"]),
    ("train trainer.num_nodes=0", ["trainer.num_nodes=0", "at least 1"]),
    ("train dataset.valid_fraction=0.6 dataset.test_fraction=0.6", ["dataset.valid_fraction=0.6", "test_fraction"]),
    ("train dataset.text=[]", ["dataset.text=[]", "at least one column"]),
    ("train tokenizer.vocab_size=100", ["tokenizer.vocab_size=100", "300", "byte_fallback"]),
    ("train trainer.devices=0", ["trainer.devices=0", "trainer=cpu"]),
    ("train trainer.devices=some", ["trainer.devices=some", "auto"]),
    ("train trainer.max_time=8h", ["8h", "DD:HH:MM:SS"]),
    ("find_lr start=1 end=0.1", ["start=1", "end=0.1"]),
    ("evaluate split=tset", ["tset", "did you mean 'test'"]),
    ("generate top_p=0", ["top_p=0", "above 0 to 1"]),
]


@pytest.mark.parametrize(("line", "parts"), WRONG, ids=[line for line, _ in WRONG])
def test_one_sentence_and_exit_code_2(ulmfit: CommandLine, tmp_path: Path, line: str, parts: list[str]) -> None:
    assert ulmfit(*line.split()) == 2
    assert ulmfit.err.startswith("ulmfit: ")
    assert ulmfit.err.count("\n") == 1
    assert ulmfit.out == ""
    assert "Traceback" not in ulmfit.err
    for part in parts:
        assert part in ulmfit.err
    assert ulmfit.configs == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("datset: {name: x}\n", ["no key 'datset'", "experiment/wrong.yaml", "did you mean 'dataset"]),
        ("dataset: {nme: x}\n", ["no key 'dataset.nme'", "did you mean 'dataset.name'"]),
        ("seed: abc\n", ["seed=abc", "experiment/wrong.yaml", "a whole number"]),
        ("stage: {lm: {optim: {betas: 0.9}}}\n", ["stage.lm.optim.betas", "a list of numbers"]),
        ("stage: {lm: {method: {unfreezing: {phases: [{nme: x}]}}}}\n", ["no key 'nme'", "name"]),
        ("defaults: [override /dataset: trec7]\n", ["dataset=trec7", "did you mean 'trec6'"]),
        ("dataset: {path: '${oc.env:NOT_THERE_AT_ALL}'}\n", ["dataset.name", "NOT_THERE_AT_ALL", "not set"]),
        ("dataset: {path: '${dataset.pth}'}\n", ["'dataset.pth'", "does not exist"]),
        ("dataset: {name: [\n", ["not valid YAML", "wrong.yaml"]),
        ("stage: {lm: {dropout: {weight: 2}}}\n", ["stage.lm.dropout.weight=2", "below 1"]),
    ],
)
def test_wrong_configuration_file(ulmfit: CommandLine, tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "wrong.yaml").write_text("# @package _global_\n" + content, encoding="utf-8")
    assert ulmfit("train", "experiment=wrong", "--config-dir", str(tmp_path)) == 2
    assert ulmfit.err.count("\n") == 1
    for part in parts:
        assert part in ulmfit.err


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/last.ckpt")


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (UlmfitError("the loss is not a number"), 1, ["the loss is not a number"]),
        (DataError("x.csv has no column 'text'"), 2, ["x.csv has no column 'text'"]),
        (BundleError("no bundle in x"), 2, ["no bundle in x"]),
        (disk_full(), 1, ["disk is full", "runs/x/last.ckpt", "runs="]),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), 1, ["disk is full"]),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), 1, ["permission denied (/srv/x)"]),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), 1, ["out of GPU memory", "batch_size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["out of memory", "batch_size"]),
        (MemoryError(), 1, ["out of memory"]),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 1, ["'wandb' is missing"]),
        (ValueError("odd\nthing"), 1, ["ValueError: odd thing", "--debug"]),
        (KeyboardInterrupt(), 130, ["interrupted", "repeat: ulmfit train seed=3"]),
        (SystemExit(4), 4, []),
    ],
)
def test_failures_of_tasks(ulmfit: CommandLine, error: BaseException, code: int, parts: list[str]) -> None:
    def fail(config: Any) -> None:
        raise error

    ulmfit.behaviour = fail
    assert ulmfit("train", "seed=3") == code
    assert ulmfit.err.count("\n") == (1 if parts else 0)
    assert "Traceback" not in ulmfit.err
    for part in parts:
        assert part in ulmfit.err


@pytest.mark.parametrize(
    ("words", "knobs"),
    [
        ("train stage=lm_pretrain", ["stage.lm.batch_size", "stage.lm.bptt", "stage.lm.optim.accumulate"]),
        ("train stage=classifier", ["stage.classifier.tokens_per_batch", "max_len", "stage.classifier.optim.accum"]),
        ("train", ["stage.lm.batch_size", "stage.classifier.batch_size"]),
        ("find_lr stage=classifier", ["stage.classifier.tokens_per_batch"]),
        ("evaluate", ["a smaller batch_size,"]),
        ("predict", ["a smaller batch_size,"]),
        ("generate", ["a smaller model"]),
    ],
)
@pytest.mark.parametrize("device", ["GPU memory", "memory"])
def test_out_of_memory_names_what_to_turn(ulmfit: CommandLine, words: str, knobs: list[str], device: str) -> None:
    import torch

    def fail(config: Any) -> None:
        if device == "memory":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 8 GB")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of")

    ulmfit.behaviour = fail
    assert ulmfit(*words.split()) == 1
    assert ulmfit.err.startswith(f"ulmfit: out of {device}: set a smaller")
    assert ulmfit.err.count("\n") == 1
    for knob in knobs:
        assert knob in ulmfit.err


def test_interrupt_that_lightning_turned_into_an_exit(ulmfit: CommandLine) -> None:
    def fail(config: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904  (as Lightning does)

    ulmfit.behaviour = fail
    assert ulmfit("train") == 130
    assert "interrupted" in ulmfit.err


@pytest.mark.parametrize("words", [("train", "--debug"), ("--debug", "train"), ("train", "debug=true")])
def test_debug_shows_the_traceback(ulmfit: CommandLine, words: tuple[str, ...]) -> None:
    def fail(config: Any) -> None:
        raise ValueError("odd")

    ulmfit.behaviour = fail
    assert ulmfit(*words) == 1
    assert "Traceback" in ulmfit.err
    assert ulmfit.err.strip().splitlines()[-1].startswith("ulmfit: ValueError: odd")
    assert ulmfit.configs[0].debug is True


def test_broken_pipe_is_silent(ulmfit: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("ulmfit.cli.os.dup2", lambda a, b: None)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    ulmfit.behaviour = fail
    assert ulmfit("generate") == 0
    assert ulmfit.err == ""


def test_other_ranks_say_who_they_are(ulmfit: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ulmfit("train", "seed=abc") == 2
    assert ulmfit.err.startswith("ulmfit (rank 1): seed=abc")
