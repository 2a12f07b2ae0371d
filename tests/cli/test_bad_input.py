"""Bad input through the real command line: one sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import builtins
import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ulmfit.cli import main
from ulmfit.tasks.scoring import confusion_of
from ulmfit.text.tokenizer import Tokenizer

ROWS = [
    (f"the {thing} on floor {i} is broken", "hardware") if i % 2 else (f"reset my {thing} password {i}", "account")
    for i, thing in enumerate(["laptop", "mail", "printer", "phone", "screen", "wiki"] * 7)
]
HEAD = "text,label\n"
CSV = HEAD + "".join(f"{text},{label}\n" for text, label in ROWS)
TINY = [
    "model=tiny",
    "init=scratch",
    "tokenizer.vocab_size=300",
    "trainer=cpu",
    "trainer.threads=1",
    "stage.lm.max_steps=2",
    "stage.lm.batch_size=4",
    "stage.lm.bptt=8",
    "stage.classifier.max_steps=2",
    "cache=.cache",
]
CLASSIFIER = ["train", "stage=classifier", *TINY]
LM = ["train", "stage=lm_finetune", *TINY]
ALL = ["train", "stage=all", *TINY]
OWN = "dataset.path=d.csv"

pytestmark = pytest.mark.usefixtures("no_pictures")

Content = str | bytes


@dataclass
class CommandLine:
    """Runs commands in `folder`, in this process; what they say and what they leave is looked at afterwards."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    bundles: Path
    code: int = 0
    out: str = ""
    err: str = ""
    before: set[Path] = field(default_factory=set)

    def write(self, files: Mapping[str, Content]) -> None:
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def copy_bundles(self) -> None:
        """`lm`, a language model, and `cls`, a classifier of the six intents of the sample data."""
        shutil.copytree(self.bundles / "lm" / "bundle", self.folder / "lm")
        shutil.copytree(self.bundles / "classifier" / "bundle", self.folder / "cls")

    def __call__(self, *words: str) -> int:
        self.before = set(self.folder.rglob("*"))
        self.code = main(words)
        self.out, self.err = self.capsys.readouterr()
        return self.code

    def new_files(self) -> set[str]:
        """What the last command left, apart from the cache."""
        names = {path.relative_to(self.folder).as_posix() for path in set(self.folder.rglob("*")) - self.before}
        return {name for name in names if not name.startswith(".cache")}

    def refused(self, code: int = 2, *parts: str, nothing_left: bool = True) -> None:
        """Asserts that the last command failed as it should."""
        lines = self.err.splitlines()
        assert self.code == code, self.err
        assert [line for line in lines if line.startswith("ulmfit: ")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        assert "--debug" not in lines[-1], "nobody thought of this error"
        assert self.out == ""
        for part in parts:
            assert part in lines[-1]
        assert not [path for path in self.folder.rglob("*") if path.name.endswith((".partial", ".old"))]
        if nothing_left:
            assert self.new_files() == set()


@pytest.fixture
def cli(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """A command line in an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ulmfit"])
    for name in ("LOCAL_RANK", "ULMFIT_DATA", "ULMFIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    capsys.readouterr()
    return CommandLine(folder, capsys, trained)


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stream)


# ----------------------------------------------------------------------------------------------- data files


def parquet(**columns: list[Any]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    content = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table(columns), content, compression="none", use_dictionary=False
    )
    return content.getvalue()


DATA: dict[str, tuple[Sequence[str], Mapping[str, Content | Callable[[], bytes]], Sequence[str]]] = {
    "missing file": ([*CLASSIFIER, "dataset.path=reviws.csv"], {"reviews.csv": CSV}, ["did you mean 'reviews.csv'"]),
    "missing folder": ([*CLASSIFIER, "dataset.path=no/d.csv"], {}, ["no folder no", "no/d.csv"]),
    "missing text column": ([*CLASSIFIER, OWN, "dataset.text=txt"], {"d.csv": CSV}, ["'txt'", "'label'", "'text'?"]),
    "missing label column": ([*CLASSIFIER, OWN, "dataset.label=lable"], {"d.csv": CSV}, ["'lable'", "mean 'label'"]),
    "missing label column, all": ([*ALL, OWN, "dataset.label=lable"], {"d.csv": CSV}, ["'lable'", "mean 'label'"]),
    "empty file": ([*CLASSIFIER, OWN], {"d.csv": ""}, ["d.csv is empty", "header"]),
    "empty file, language model": ([*LM, OWN], {"d.csv": ""}, ["d.csv is empty"]),
    "blank lines only": ([*CLASSIFIER, OWN], {"d.csv": "\n \n"}, ["d.csv is empty"]),
    "header only": ([*CLASSIFIER, OWN], {"d.csv": HEAD}, ["d.csv is empty", "no row"]),
    "header only, language model": ([*LM, OWN], {"d.csv": HEAD}, ["d.csv is empty", "no row"]),
    "one class": ([*CLASSIFIER, OWN], {"d.csv": CSV.replace("hardware", "account")}, ["only the class 'account'"]),
    "one class, all": ([*ALL, OWN], {"d.csv": CSV.replace("hardware", "account")}, ["only the class 'account'"]),
    "one row read": ([*CLASSIFIER, OWN, "dataset.limit=1"], {"d.csv": CSV}, ["dataset.limit"]),
    "no text at all": ([*LM, OWN], {"d.csv": HEAD + ",a\n ,b\n" * 20}, ["empty"]),
    "no labels": ([*CLASSIFIER, "dataset.path=d.txt"], {"d.txt": "a b\n" * 40}, ["d.txt has no labels"]),
    "no labels, all": ([*ALL, "dataset.path=d.txt"], {"d.txt": "a b\n" * 40}, ["d.txt has no labels"]),
    "latin-1": ([*LM, OWN], {"d.csv": CSV.replace("reset", "schön").encode("latin-1")}, ["utf-8", "encoding=cp1252"]),
    "utf-16": ([*CLASSIFIER, OWN], {"d.csv": CSV.encode("utf-16")}, ["dataset.encoding=utf-16"]),
    "not utf-16": ([*LM, OWN, "dataset.encoding=utf-16"], {"d.csv": CSV}, ["not in utf-16"]),
    "no encoding": ([*LM, OWN, "dataset.encoding=utf-99"], {"d.csv": CSV}, ["utf-99", "try utf-8"]),
    "no encoding of text": ([*LM, OWN, "dataset.encoding=base64"], {"d.csv": CSV}, ["base64"]),
    "NUL bytes": ([*CLASSIFIER, OWN], {"d.csv": CSV.replace("broken", "bro\0ken", 1)}, ["NUL byte at position"]),
    "utf-16 cut off": (
        [*CLASSIFIER, OWN, "dataset.encoding=utf-16"],
        {"d.csv": CSV.encode("utf-16")[:-1]},
        ["not valid utf-16"],
    ),
    "not utf-32": ([*LM, OWN, "dataset.encoding=utf-32"], {"d.csv": CSV}, ["utf-32"]),
    "a byte that cp1252 has not": (
        [*LM, OWN, "dataset.encoding=cp1252"],
        {"d.csv": CSV.encode() + b"\x81,account\n"},
        ["not valid cp1252", "0x81"],
    ),
    "not gb18030": ([*LM, OWN, "dataset.encoding=gb18030"], {"d.csv": CSV.encode() + b"\xff,a\n"}, ["gb18030", "0xff"]),
    "surrogates written as utf-8": (
        [*CLASSIFIER, OWN],
        {"d.csv": CSV.encode() + b"\xed\xa0\x80,account\n"},
        ["not valid utf-8", "0xed"],
    ),
    "NUL bytes, language model": ([*LM, "dataset.path=d.txt"], {"d.txt": "a b\0c\n" * 40}, ["NUL byte at position 3"]),
    "NUL in JSON": ([*LM, "dataset.path=d.jsonl"], {"d.jsonl": '{"text": "a\\u0000b"}\n'}, ["line 1", "NUL character"]),
    "ragged TSV": (
        [*CLASSIFIER, "dataset.path=d.tsv"],
        {"d.tsv": CSV.replace(",", "\t") + "a\tb\tc\n"},
        ["line 44", "3 fields"],
    ),
    "semicolons": ([*CLASSIFIER, OWN, "dataset.delimiter=;"], {"d.csv": CSV}, ["no column 'text'", "text,label"]),
    "JSON of one list": (
        [*CLASSIFIER, "dataset.path=d.json"],
        {"d.json": json.dumps([{"text": "a", "label": "b"}])},
        ["line 1", "list", "one JSON object a line"],
    ),
    "JSON label that is no number": (
        [*CLASSIFIER, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text": "a", "label": NaN}\n'},
        ["line 1", "no label"],
    ),
    "JSON label null": (
        [*CLASSIFIER, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text": "a", "label": null}\n'},
        ["line 1", "no label"],
    ),
    "JSON number of many digits": (
        [*CLASSIFIER, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text": "a", "label": ' + "1" * 5000 + "}\n"},
        ["line 1", "not valid JSON"],
    ),
    "JSON in JSON in JSON": (
        [*LM, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text":' * 20_000},
        ["line 1", "not valid JSON"],
    ),
    "parquet without the column": (
        [*LM, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(body=["a"])},
        ["'text'", "'body'"],
    ),
    "parquet of lists": (
        [*LM, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=[["a"], ["b"]])},
        ["row 1", "a list"],
    ),
    "parquet of bytes": (
        [*LM, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=[b"a", b"b"])},
        ["row 1", "a bytes"],
    ),
    "parquet with NaN labels": (
        [*CLASSIFIER, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=["a", "b"], label=[1.0, float("nan")])},
        ["row 2", "no label"],
    ),
    "parquet without labels": (
        [*CLASSIFIER, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=["a", "b"], label=["x", None])},
        ["row 2", "no label"],
    ),
    "parquet cut off": (
        [*LM, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=["a"] * 99)[:-30]},
        ["readable"],
    ),
    "parquet with damaged pages": (
        [*LM, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=["abc"] * 99).replace(b"\x03\x00\x00\x00abc", b"\xff\xff\xff\x7fabc")},
        ["d.parquet", "cannot be read to its end"],
    ),
    "truncated xz": ([*LM, "dataset.path=d.csv.xz"], {"d.csv.xz": lzma.compress(CSV.encode())[:-40]}, ["to its end"]),
    "gzip in the name alone": (
        [*LM, "dataset.path=d.csv.gz"],
        {"d.csv.gz": b"\x1f\x8b\x08" + bytes(99)},
        ["to its end"],
    ),
    "another encoding in a class folder": (
        [*CLASSIFIER, "dataset.path=f"],
        {"f/a/1.txt": b"sch\xf6n", "f/b/1.txt": "b", "f/a/2.txt": "a", "f/b/2.txt": "b"},
        ["f/a/1.txt", "not valid utf-8"],
    ),
    "NUL in a class folder": (
        [*CLASSIFIER, "dataset.path=f"],
        {"f/a/1.txt": "a\0", "f/b/1.txt": "b"},
        ["f/a/1.txt", "NUL byte"],
    ),
    "labels in an encyclopedia": (
        [*CLASSIFIER, "dataset.path=d.txt"],
        {"d.txt": " = Cat = \n\n the cat \n\n = Dog = \n\n the dog \n"},
        ["d.txt has no labels"],
    ),
    "encyclopedia as a table": (
        [*LM, "dataset.path=d.txt", "dataset.format=csv"],
        {"d.txt": " = Cat = \n\na\n"},
        ["'text'"],
    ),
    "a document that is too long": (
        [*LM, OWN, "dataset.max_document_chars=1000"],
        {"d.csv": CSV + "word " * 300 + ",account\n"},
        ["line 44", "longer than 1,000 characters", "dataset.max_document_chars"],
    ),
    "one row": ([*CLASSIFIER, OWN], {"d.csv": HEAD + "hello,account\n"}, ["only the class 'account'"]),
    "empty label": ([*CLASSIFIER, OWN], {"d.csv": CSV + "hello,\n"}, ["line 44", "no label"]),
    "NaN label": ([*CLASSIFIER, OWN], {"d.csv": CSV + "hello,NaN\n"}, ["line 44", "label NaN"]),
    "ragged row": ([*CLASSIFIER, OWN], {"d.csv": CSV + "a,b,c,d\n"}, ["line 44", "4 fields", "2 are expected"]),
    "open quote": ([*CLASSIFIER, OWN], {"d.csv": CSV + '"a,b\n'}, ["line 44", "quotes"]),
    "column twice": ([*CLASSIFIER, OWN], {"d.csv": "text,text,label\na,b,c\n"}, ["2 columns 'text'"]),
    "label column twice": ([*CLASSIFIER, OWN], {"d.csv": "label,text,label\na,b,c\n"}, ["2 columns 'label'"]),
    "label in the text": ([*CLASSIFIER, OWN, "dataset.text=text,label"], {"d.csv": CSV}, ["dataset.label=label"]),
    "same column twice": ([*LM, OWN, "dataset.text=text,text"], {"d.csv": CSV}, ["[text,text]", "once"]),
    "bad JSON line": (
        [*CLASSIFIER, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text": "a", "label": "b"}\n{"text":\n'},
        ["line 2", "not valid JSON"],
    ),
    "JSON lists": ([*LM, "dataset.path=d.jsonl"], {"d.jsonl": '["a"]\n'}, ["line 1", "list", "object"]),
    "JSON without the key": ([*LM, "dataset.path=d.jsonl"], {"d.jsonl": '{"body": "a"}\n'}, ["'text'", "'body'"]),
    "JSON list as text": ([*LM, "dataset.path=d.jsonl"], {"d.jsonl": '{"text": ["a"]}\n'}, ["line 1", "a list"]),
    "JSON object as label": (
        [*CLASSIFIER, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text": "a", "label": {"b": 1}}\n'},
        ["line 1", "a dict"],
    ),
    "binary file": ([*CLASSIFIER, OWN], {"d.csv": b"\x89PNG\r\n\x1a\n" + bytes(range(256))}, ["NUL byte"]),
    "spreadsheet": ([*CLASSIFIER, OWN], {"d.csv": b"PK\x03\x04" + bytes(99)}, ["zip archive or spreadsheet"]),
    "broken parquet": ([*LM, "dataset.path=d.parquet"], {"d.parquet": CSV}, ["not a readable parquet file"]),
    "truncated gzip": ([*LM, "dataset.path=d.csv.gz"], {"d.csv.gz": gzip.compress(CSV.encode())[:-40]}, ["to its end"]),
    "truncated bzip2": ([*LM, "dataset.path=d.csv.bz2"], {"d.csv.bz2": bz2.compress(CSV.encode())[:-9]}, ["its end"]),
    "folder without data": ([*CLASSIFIER, "dataset.path=f"], {"f/readme.md": "a"}, ["f holds no data file"]),
    "folder of one class": ([*CLASSIFIER, "dataset.path=f"], {"f/a/1.txt": "a"}, ["a folder for each class"]),
    "two training files": ([*LM, "dataset.path=f"], {"f/train.csv": CSV, "f/train.tsv": CSV}, ["set dataset.train"]),
    "no file": ([*LM, f"dataset.path={os.devnull}"], {}, ["neither a file nor a folder"]),
    "long name": ([*LM, f"dataset.path={'x' * 300}.csv"], {}, ["too long"]),
    "path of nothing": ([*LM, "dataset.path="], {}, ["dataset.path=''", "null for the sample data"]),
    "another format": ([*LM, OWN, "dataset.format=jsonl"], {"d.csv": CSV}, ["line 1", "not valid JSON"]),
    "long delimiter": ([*LM, OWN, "dataset.delimiter=abc"], {"d.csv": CSV}, ["'abc'", "one character"]),
    "two fastText labels": ([*CLASSIFIER, "dataset.path=d.txt"], {"d.txt": "__label__a __label__b x\n"}, ["2 labels"]),
    "no fastText label": ([*CLASSIFIER, "dataset.path=d.txt"], {"d.txt": "__label__a x\ny\n"}, ["line 2", "no label"]),
    "fewer labels than classes": ([*CLASSIFIER, OWN, "dataset.train_size=1"], {"d.csv": CSV}, ["all 2 classes"]),
    "unknown label in validation": (
        [*CLASSIFIER, "dataset.path=f"],
        {"f/train.csv": CSV, "f/valid.csv": HEAD + "x,acount\n"},
        ["f/valid.csv, row 1", "'acount'", "mean 'account'"],
    ),
    "unknown label in test": (
        [*CLASSIFIER, "dataset.path=f"],
        {"f/train.csv": CSV, "f/test.csv": HEAD + "x,acount\n"},
        ["f/test.csv, row 1", "'acount'", "mean 'account'"],
    ),
    "unknown label in test, all": (
        [*ALL, "dataset.path=f"],
        {"f/train.csv": CSV, "f/test.csv": HEAD + "x,acount\n"},
        ["f/test.csv, row 1"],
    ),
    "other column in test": (
        [*CLASSIFIER, "dataset.path=f"],
        {"f/train.csv": CSV, "f/test.csv": "body,label\nx,account\n"},
        ["f/test.csv", "'body'"],
    ),
    "validation file missing": (
        [*CLASSIFIER, "dataset.path=f", "dataset.valid=v.csv"],
        {"f/train.csv": CSV},
        ["f/v.csv"],
    ),
    "inspect": (["inspect", OWN], {"d.csv": CSV + "a,b,c\n"}, ["line 44"]),
    "find_lr": (["find_lr", "stage=classifier", *TINY, OWN], {"d.csv": HEAD}, ["no row"]),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(cli: CommandLine, name: str) -> None:
    words, files, parts = DATA[name]
    cli.write({file: content() if callable(content) else content for file, content in files.items()})
    cli(*words)
    cli.refused(2, *parts)


@pytest.mark.parametrize("target", ["d.csv", "gone.csv"])
def test_link_to_nothing(cli: CommandLine, target: str) -> None:
    (cli.folder / "d.csv").symlink_to(target)
    cli(*CLASSIFIER, OWN)
    cli.refused(2, f"d.csv is a link to {target}")


FINE: dict[str, tuple[Sequence[str], Mapping[str, Content | Callable[[], bytes]]]] = {
    "empty and whitespace documents": (
        [*CLASSIFIER, OWN],
        {"d.csv": CSV + ',account\n"  ",hardware\n" \n ",hardware\n'},
    ),
    "two rows": ([*CLASSIFIER, OWN], {"d.csv": HEAD + "hello you,a\nbye there,b\n"}),
    "a class for each document": ([*CLASSIFIER, OWN], {"d.csv": HEAD + "".join(f"hello {i},c{i}\n" for i in range(5))}),
    "too little for validation": ([*LM, OWN], {"d.csv": HEAD + "hi,a\nyo,b\n"}),
    "one word": ([*LM, "dataset.path=d.txt"], {"d.txt": "a\n"}),
    "more streams than text": ([*LM, OWN, "stage.lm.batch_size=512"], {"d.csv": CSV}),
    "more pieces than text": ([*LM, OWN, "tokenizer.vocab_size=8000"], {"d.csv": CSV}),
    "labels with odd characters": ([*CLASSIFIER, OWN], {"d.csv": CSV.replace("account", '"a/b |\t😀"')}),
    "broken surrogates": (
        [*CLASSIFIER, "dataset.path=d.jsonl"],
        {"d.jsonl": '{"text": "hi \\ud800 you", "label": "\\ud800"}\n{"text": "bye", "label": "b"}\n'},
    ),
    "mixed line ends": (
        [*CLASSIFIER, OWN],
        {"d.csv": CSV.replace("\n", "\r\n", 20).replace("broken,hardware\n", "x,hardware\r")},
    ),
    "right to left and emoji": (
        [*CLASSIFIER, OWN, "tokenizer.vocab_size=400"],
        {
            "d.csv": CSV.replace("laptop", "الحاسوب المحمول")
            .replace("mail", "👩‍👩‍👧 דואר 🇫🇷")
            .replace("account", "חשבון 🙂")
        },
    ),
    "marks of direction and of bytes": (
        [*LM, OWN],
        {"d.csv": "\ufeff" + CSV.replace("laptop", "\u202elap\u2066top\ufeff")},
    ),
    "numbers as text and label": (
        [*CLASSIFIER, "dataset.path=d.parquet"],
        {"d.parquet": lambda: parquet(text=[1, 2, None, 4], label=[0.0, 1.0, 0.0, 1.0])},
    ),
    "utf-16 that is said": ([*CLASSIFIER, OWN, "dataset.encoding=utf-16"], {"d.csv": CSV.encode("utf-16")}),
    "no label needed": ([*LM, OWN, "dataset.label=lable"], {"d.csv": CSV}),
}


@pytest.mark.parametrize("name", FINE)
def test_odd_data_that_is_fine(cli: CommandLine, name: str) -> None:
    words, files = FINE[name]
    cli.write({file: content() if callable(content) else content for file, content in files.items()})
    assert cli(*words) == 0, cli.err
    assert not [line for line in cli.err.splitlines() if "site-packages" in line or "src/ulmfit" in line], cli.err
    assert len(list(cli.folder.glob("runs/d/*/bundle/bundle.json"))) == 1
    assert not [name for name in cli.new_files() if name.endswith(".partial")]


# ------------------------------------------------------------------------------- configuration and hardware

REQUESTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "unknown key": ([*LM, OWN, "stage.lm.optm.lr=1"], ["no key 'stage.lm.optm.lr'", "stage.lm.optim.lr"]),
    "wrong type": ([*LM, OWN, "seed=x"], ["seed=x", "a whole number"]),
    "rate of zero": ([*LM, OWN, "stage.lm.optim.lr=0"], ["a number above 0"]),
    "no epochs": ([*LM, OWN, "stage.lm.epochs=0"], ["stage.lm.epochs=0", "at least 1"]),
    "seed": ([*LM, OWN, "seed=-1"], ["seed=-1", "from 0 to 4294967295"]),
    "vocabulary": ([*LM, OWN, "tokenizer.byte_fallback=false", "tokenizer.vocab_size=16"], ["from 50 to 1000000"]),
    "threads": ([*LM, OWN, "trainer.threads=100000000"], ["trainer.threads=100000000", "1024"]),
    "name above the runs": ([*LM, OWN, "dataset.name=../../up"], ["dataset.name=../../up", "without /"]),
    "name of nothing": ([*LM, OWN, "dataset.name="], ["dataset.name=''"]),
    "long name": ([*LM, OWN, f"dataset.name={'x' * 300}"], ["100 characters"]),
    "temperature": (["generate", "bundle=lm", "temperature=1e300"], ["temperature=1e+300"]),
    "few steps": (["find_lr", *TINY, OWN, "steps=3"], ["steps=3", "at least 10"]),
    "no GPU": ([*LM, OWN, "trainer=gpu"], ["trainer.accelerator is 'gpu'", "trainer=auto"]),
    "no GPU, find_lr": (["find_lr", *TINY, OWN, "trainer=gpu"], ["trainer.accelerator is 'gpu'"]),
    "no GPU, evaluate": (["evaluate", "bundle=cls", "trainer=gpu"], ["not on this machine"]),
    "no Apple GPU": ([*LM, OWN, "trainer.accelerator=mps"], ["trainer.accelerator is 'mps'"]),
    "no TPU": ([*LM, OWN, "trainer.accelerator=tpu"], ["trainer.accelerator=tpu"]),
    "numbers of CPUs": ([*LM, OWN, "trainer.devices=[0,1]"], ["trainer.devices=[0, 1]"]),
    "strategy": ([*LM, OWN, "trainer.strategy=ddpp"], ["trainer.strategy=ddpp"]),
    "strategy for GPUs": ([*LM, OWN, "trainer.strategy=fsdp"], ["trainer.strategy=fsdp", "GPU"]),
    "bfloat16": ([*LM, OWN, "trainer.precision=bf16-mixed"], ["'bf16-mixed'", "32-true"]),
    "float16": ([*LM, OWN, "trainer.precision=16-mixed"], ["'16-mixed'", "GPU"]),
    "precision": ([*LM, OWN, "trainer.precision=8"], ["trainer.precision=8", "bf16-mixed"]),
    "layer groups": (
        [
            *CLASSIFIER,
            OWN,
            "stage.classifier.method.unfreezing.mode=phases",
            "stage.classifier.method.unfreezing.phases=[{name:a,epochs:1,train_only:[99]}]",
        ],
        ["train_only=[99]", "0 (lowest) to 3"],
    ),
    "logger": ([*LM, OWN, "logger=wandb"], ["pip install 'ulmfit[wandb]'"]),
    "runs below a file": ([*LM, OWN, "runs=d.csv/runs"], ["not a directory", "d.csv/runs"]),
    "cache below a file": ([*LM, OWN, "cache=d.csv/cache"], ["not a directory", "d.csv/cache"]),
    "find_lr below a file": (["find_lr", "stage=classifier", *TINY, OWN, "runs=d.csv"], ["not a directory", "d.csv"]),
    "predictions below a file": (["predict", "bundle=cls", "input=t.txt", "output=d.csv/o"], ["d.csv"]),
    "predictions as a folder": (["predict", "bundle=cls", "input=t.txt", "output=lm"], ["output=lm is a folder"]),
    "predictions over the input": (["predict", "bundle=cls", "input=t.txt", "output=./t.txt"], ["output=./t.txt"]),
    "predictions nowhere": (["predict", "bundle=cls", "input=t.txt", "output="], ["output=''"]),
    "input of nothing": (["predict", "bundle=cls", "input="], ["input=''", "standard input"]),
    "report of nothing": (["report"], ["no finished run in runs"]),
    "report on a folder of others": (["report", "runs=cls"], ["no finished run in cls"]),
    "report on a file": (["report", "runs=d.csv"], ["no finished run in d.csv"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("ulmfit.training.trainer.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    cli.write({"d.csv": CSV, "t.txt": "my laptop does not start\n"})
    cli.copy_bundles()
    words, parts = REQUESTS[name]
    cli(*words)
    cli.refused(2, *parts)


def test_loss_that_is_no_number(cli: CommandLine) -> None:
    cli.write({"d.csv": CSV})
    cli(*LM, OWN, "stage.lm.optim.lr=1e38", "stage.lm.max_steps=40")
    cli.refused(1, "training loss became", "lower the learning rate", nothing_left=False)
    assert not list(cli.folder.rglob("bundle"))


def test_debug_shows_where_it_happened(cli: CommandLine) -> None:
    cli.write({"d.csv": HEAD})
    assert cli(*CLASSIFIER, OWN, "--debug") == 2
    assert "Traceback" in cli.err
    assert cli.err.splitlines()[-1].startswith("ulmfit: d.csv is empty")


def test_a_folder_that_was_there_stays(cli: CommandLine) -> None:
    cli.write({"d.csv": HEAD})
    (cli.folder / "runs").mkdir()
    cli(*CLASSIFIER, OWN)
    cli.refused()
    assert (cli.folder / "runs").is_dir()


# -------------------------------------------------------------------------------------------------- bundles


def truncate(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-50])


def flip(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 0xFF
    Path(path).write_bytes(content)


def describe(**values: Any) -> None:
    """Edits `cls/bundle.json`."""
    path = Path("cls/bundle.json")
    before = json.loads(path.read_text(encoding="utf-8"))
    before["checksums"].pop("bundle.json", None)  # its own; older bundles have none
    path.write_text(json.dumps(before | values), encoding="utf-8")


def put(name: str, content: Content) -> None:
    Path("cls", name).write_bytes(content if isinstance(content, bytes) else content.encode())


def sign(after: None = None) -> None:
    """Makes the checksums of `cls` fit, as someone would who wants to hide a change."""
    names = json.loads(Path("cls/bundle.json").read_text(encoding="utf-8"))["checksums"].keys() - {"bundle.json"}
    describe(checksums={name: hashlib.sha256(Path("cls", name).read_bytes()).hexdigest() for name in names})


def other_tokenizer() -> None:
    from ulmfit.config import TokenizerConfig

    Tokenizer.train([text for text, _ in ROWS], TokenizerConfig(vocab_size=300)).save(Path("cls"))
    sign()


EDITS: dict[str, tuple[Callable[[], None], Sequence[str]]] = {
    "truncated weights": (lambda: truncate("cls/encoder.safetensors"), ["encoder.safetensors", "checksum"]),
    "a byte changed": (lambda: flip("cls/head.safetensors"), ["head.safetensors", "checksum"]),
    "weights missing": (lambda: Path("cls/encoder.safetensors").unlink(), ["lacks encoder.safetensors"]),
    "tokenizer missing": (lambda: Path("cls/tokenizer.model").unlink(), ["lacks tokenizer.model"]),
    "description missing": (lambda: Path("cls/bundle.json").unlink(), ["no bundle.json"]),
    "description truncated": (lambda: truncate("cls/bundle.json"), ["not a bundle description"]),
    "description empty": (lambda: put("bundle.json", ""), ["not a bundle description"]),
    "description binary": (lambda: put("bundle.json", b"\xff\xfe\0"), ["not a bundle description"]),
    "description a list": (lambda: put("bundle.json", "[]"), ["not a bundle description"]),
    "format of the future": (lambda: describe(format_version=9), ["format 9", "update ulmfit"]),
    "labels of others": (lambda: describe(labels=["a", "b"]), ["expected (2, 50)"]),
    "other direction": (lambda: describe(direction="up"), ["direction is 'up'"]),
    "other kind": (lambda: describe(kind="language_model", labels=[], pooling={}), ["expected a classifier"]),
    "pickle for weights": (
        lambda: sign(put("head.safetensors", b"\x80\x04.")),
        ["not a safetensors file"],
    ),
    "tokenizer that does not fit": (other_tokenizer, ["300 pieces", "do not belong together"]),
    "tokenizer of garbage": (lambda: sign(put("tokenizer.model", "x")), ["not a SentencePiece model"]),
}


@pytest.mark.parametrize("name", EDITS)
def test_damaged_bundle(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuses_after(cli, monkeypatch, *EDITS[name])


def refuses_after(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, edit: Callable[[], None], parts: Sequence[str]
) -> None:
    """`predict` does not take a classifier that was edited, and says these parts of a sentence."""
    standard_input(monkeypatch, b"my laptop does not start\n")
    cli.copy_bundles()
    edit()
    cli("predict", "bundle=cls")
    cli.refused(2, *parts)


WRONG_BUNDLES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "predict": (["predict", "bundle=lm"], ["lm is a language model, expected a classifier"]),
    "ensemble": (["predict", "bundle=cls,lm"], ["lm is a language model, expected a classifier"]),
    "evaluate": (["evaluate", "bundle=cls,lm"], ["lm is a language model, expected a classifier"]),
    "generate": (["generate", "bundle=cls"], ["cls is a classifier, expected a language model"]),
    "classifier": (["train", "stage=classifier", OWN, "init=cls"], ["cls is a classifier"]),
    "lm_finetune": (["train", "stage=lm_finetune", OWN, "init=cls"], ["cls is a classifier"]),
    "lm_pretrain": (["train", "stage=lm_pretrain", OWN, "init=cls"], ["cls is a classifier"]),
    "direction": (["train", "stage=lm_finetune", OWN, "init=lm", "stage.lm.direction=backward"], ["reads forward"]),
    "predict with nothing": (["predict"], ["no classifier in runs", "bundle=PATH"]),
    "evaluate with nothing": (["evaluate"], ["no classifier in runs"]),
    "predict with a missing one": (["predict", "bundle=clss"], ["no bundle at clss"]),
    "predict with a file": (["predict", "bundle=d.csv"], ["no bundle at d.csv"]),
    "generate with a missing one": (["generate", "bundle=l"], ["no bundle at l"]),
    "train with a missing one": (["train", OWN, "init=l"], ["no bundle at l"]),
    "inspect with a missing one": (["inspect", "bundle=l"], ["no bundle at l"]),
    "find_lr with a missing one": (["find_lr", OWN, "init=l"], ["no bundle at l"]),
    "evaluate on other labels": (
        ["evaluate", "bundle=cls", OWN, "split=train"],
        ["d.csv, row 1", "'account'", "6 classes", "hardware"],
    ),
    "evaluate on a split that is not there": (["evaluate", "bundle=cls", OWN, "dataset.test="], ["no test split"]),
    "evaluate on no labels": (["evaluate", "bundle=cls", "dataset.path=t.txt", "split=train"], ["no labels"]),
}


@pytest.mark.parametrize("name", WRONG_BUNDLES)
def test_wrong_bundle(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    standard_input(monkeypatch, b"my laptop does not start\n")
    cli.write({"d.csv": CSV, "t.txt": "my laptop does not start\n" * 20})
    cli.copy_bundles()
    words, parts = WRONG_BUNDLES[name]
    cli(*words)
    cli.refused(2, *parts)


# What other versions wrote.
VERSIONS: dict[str, tuple[Callable[[], None], Sequence[str]]] = {
    "bundle of the past": (lambda: describe(format_version=0), ["cls/bundle.json has format 0", "update ulmfit"]),
    "bundle without a version": (lambda: describe(format_version=None), ["has format None"]),
    "a field of the future": (lambda: describe(quantised=True), ["holds 'quantised'"]),
    "tokenizer of the future": (lambda: tokenizer_meta(format_version=2), ["tokenizer.json has format 2", "update"]),
    "rules of the future": (lambda: tokenizer_meta(config={"rules": {"stem": True}}), ["not a tokenizer description"]),
}


def tokenizer_meta(**values: Any) -> None:
    meta = json.loads(Path("cls/tokenizer.json").read_text(encoding="utf-8")) | values
    sign(put("tokenizer.json", json.dumps(meta)))


@pytest.mark.parametrize("name", VERSIONS)
def test_other_versions(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuses_after(cli, monkeypatch, *VERSIONS[name])


def test_ensemble_of_other_labels(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, b"hello\n")
    cli.copy_bundles()
    shutil.copytree("cls", "first")
    describe(labels=["a", "b", "c", "d", "e", "f"])
    cli("predict", "bundle=first,cls")
    cli.refused(2, "cls has the labels a, b", "need the same labels")


# -------------------------------------------------------------------------------------------------- predict

INPUTS: dict[str, tuple[str, Content, Sequence[str]]] = {
    "no text column": ("in.csv", "body,x\na,b\n", ["'text'", "'body'", "in predict text"]),
    "empty table": ("in.csv", "", ["in.csv is empty"]),
    "empty text": ("in.txt", "", ["in.txt is empty"]),
    "bad JSON": ("in.jsonl", '{"text": "a"}\n{\n', ["line 2", "not valid JSON"]),
    "other encoding": ("in.txt", b"sch\xf6n\n", ["not valid utf-8"]),
    "folder": ("in/readme.md", "a", ["readme.md", "no data file"]),
    "missing": ("inn.txt", "a\n", ["in.txt", "did you mean 'inn.txt'"]),
    "broken parquet": ("in.parquet", "text", ["not a readable parquet file"]),
    "NUL bytes": ("in.txt", "a\0b\n", ["NUL byte at position 1"]),
    "ragged table": ("in.csv", "text,x\na,b,c\n", ["line 2", "3 fields"]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_input_of_predict(cli: CommandLine, name: str) -> None:
    file, content, parts = INPUTS[name]
    cli.copy_bundles()
    cli.write({file: content})
    given = "in.txt" if name == "missing" else file.partition("/")[0]
    cli("predict", "bundle=cls", f"input={given}", "output=out.jsonl")
    cli.refused(2, *parts)


@pytest.mark.parametrize(
    ("content", "terminal", "parts"),
    [
        (b"", False, ["no text", "at least one line"]),
        (b"", True, ["no text was given", "input=FILE"]),
        (b"sch\xf6n\n", False, ["standard input is not UTF-8", "line 1"]),
    ],
)
def test_standard_input_of_predict(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, content: bytes, terminal: bool, parts: list[str]
) -> None:
    standard_input(monkeypatch, content, terminal)
    cli.copy_bundles()
    cli("predict", "bundle=cls")
    cli.refused(2, *parts)


def test_blank_lines_are_texts(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, "\n \nÄ\0\r\nno end".encode())
    cli.copy_bundles()
    assert cli("predict", "bundle=cls") == 0, cli.err
    assert [json.loads(line)["text"] for line in cli.out.splitlines()] == ["", " ", "Ä\0", "no end"]


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "schön 猫"), ("ascii", "sch\\u00f6n \\u732b")])
def test_terminal_that_cannot_show_a_character(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    standard_input(monkeypatch, "schön 猫\n".encode())
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
    cli.copy_bundles()
    assert main(["predict", "bundle=cls"]) == 0
    assert main(["generate", "bundle=lm", "tokens=1", "prompt=schön 猫"]) == 0
    sys.stdout.flush()
    first, second = screen.getvalue().decode(encoding).splitlines()[:2]
    assert f'"text": "{shown}"' in first
    assert json.loads(first)["text"] == "schön 猫"
    assert second.startswith("schön 猫" if encoding == "utf-8" else "sch\\xf6n \\u732b")


def test_files_do_not_speak_to_the_terminal(cli: CommandLine) -> None:
    cli.write({"d.csv": HEAD + "a,\x1b[31mred\nb,\x1b[31mred\n"})
    cli(*CLASSIFIER, OWN)
    cli.refused(2, r"'\x1b[31mred'")


def test_long_first_row_without_a_header(cli: CommandLine) -> None:
    cli.write({"d.csv": "so much to say " * 1000 + ",a\nb,b\n"})
    cli(*CLASSIFIER, OWN)
    cli.refused(2, "no column 'text'", "so much to say", "...")
    assert len(cli.err) < 300


def test_a_column_that_tells_rows_apart_is_no_label(cli: CommandLine) -> None:
    cli.write({"d.csv": HEAD + "".join(f"hello {i},id{i}\n" for i in range(60))})
    assert cli(*CLASSIFIER, OWN, "dataset.test=") == 0, cli.err
    assert "60 documents have 60 different labels: is 'label' the right column" in cli.err


# ------------------------------------------------------------------------------- what earlier runs have left

FINISHED = [*LM, OWN]


@pytest.fixture
def run(cli: CommandLine) -> Path:
    """The folder of a finished run of `FINISHED`."""
    cli.write({"d.csv": CSV})
    assert cli(*FINISHED) == 0, cli.err
    (folder,) = (cli.folder / "runs" / "d").iterdir()
    return folder


def unfinished(run: Path, checkpoint: bytes) -> None:
    """As if the run had been interrupted and its checkpoint damaged since."""
    (run / "metrics.json").unlink()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(checkpoint)


def zip_without_weights() -> bytes:
    import torch

    content = io.BytesIO()
    torch.save({"a": 1}, content)
    return content.getvalue()


@pytest.mark.parametrize("content", [lambda: b"", lambda: b"garbage", zip_without_weights])
def test_damaged_checkpoint(cli: CommandLine, run: Path, content: Callable[[], bytes]) -> None:
    unfinished(run, content())
    cli(*FINISHED)
    cli.refused(2, "checkpoints/last.ckpt", "delete it to train from the start", nothing_left=False)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert cli(*FINISHED) == 0, cli.err


@pytest.mark.parametrize("name", ["tokens.bin", "meta.json", "tokenizer.model"])
def test_damaged_cache(cli: CommandLine, run: Path, name: str) -> None:
    shutil.rmtree(run)
    for path in cli.folder.glob(f".cache/*/*/{name}"):
        path.write_bytes(b"x")
    cli(*FINISHED)
    cli.refused(2, "is damaged", "delete the folder and run again")
    for _ in range(2):  # the caches of training and validation text
        for folder in re.findall(r"\.cache/[\w/-]+", cli.err):
            shutil.rmtree(folder)
        cli(*FINISHED)
    assert cli.code == 0, cli.err


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_figures(cli: CommandLine, run: Path, content: str) -> None:
    (run / "metrics.json").write_text(content, encoding="utf-8")
    for words in (FINISHED, ["report"]):
        cli(*words)
        cli.refused(2, "metrics.json cannot be read")


def test_a_run_without_its_bundle_is_not_finished(cli: CommandLine, run: Path) -> None:
    assert cli(*FINISHED) == 0
    assert "is finished already" in cli.err
    shutil.rmtree(run / "bundle")
    assert cli(*FINISHED) == 0
    assert "is finished already" not in cli.err
    assert (run / "bundle" / "bundle.json").is_file()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_corrected_file_is_looked_at_again(cli: CommandLine, split: str) -> None:
    """A finished run is not repeated, but its figures would be those of the old file."""
    cli.write({"f/train.csv": CSV, f"f/{split}.csv": HEAD + "the mail is broken,account\n"})
    assert cli(*CLASSIFIER, "dataset.path=f") == 0, cli.err
    cli.write({f"f/{split}.csv": HEAD + "the mail is broken,hardware\n"})
    assert cli(*CLASSIFIER, "dataset.path=f") == 0, cli.err
    assert "is finished already" not in cli.err
    assert cli(*CLASSIFIER, "dataset.path=f") == 0, cli.err
    assert "is finished already" in cli.err


# ------------------------------------------------------------------------------------------------ full disk


class SmallDisk:
    """Lets files below a folder take so many bytes altogether, then says that the disk is full."""

    def __init__(self, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.left, self.really_open = folder.resolve(), size, builtins.open
        for module in (builtins, io):  # pathlib looks at the second
            monkeypatch.setattr(module, "open", self.open)

    def open(self, file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        stream = self.really_open(file, mode, *rest, **more)
        below = not isinstance(file, int) and Path(os.fsdecode(file)).resolve().is_relative_to(self.folder)
        return Limited(stream, self) if below and set(mode) & set("wax+") else stream


class Limited:
    """An open file on a `SmallDisk`."""

    def __init__(self, stream: Any, disk: SmallDisk) -> None:
        self.stream, self.disk = stream, disk

    def write(self, content: Any) -> Any:
        self.disk.left -= len(content)
        if self.disk.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.stream.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stream.close()


CHECKPOINTS = ["trainer.checkpoint_minutes=1e-6", "stage.lm.max_steps=10"]


@pytest.mark.parametrize(
    ("place", "size", "more"),
    [
        (".cache", 100, []),  # in the tokenizer
        (".cache/tokens", 100, []),  # in the token cache
        ("runs", 100, []),  # in the configuration
        ("runs", 20_000, CHECKPOINTS),  # in a checkpoint
        ("runs", 20_000, []),  # in the weights of the bundle
    ],
)
def test_full_disk(cli: CommandLine, place: str, size: int, more: list[str]) -> None:
    cli.write({"d.csv": CSV})
    with pytest.MonkeyPatch.context() as patch:
        SmallDisk(cli.folder / place, size, patch)
        cli(*LM, OWN, *more)
    cli.refused(1, "the disk is full", "runs= and cache=", nothing_left=False)
    assert not list(cli.folder.rglob("bundle"))
    assert not list(cli.folder.rglob("last.ckpt"))
    assert not list(cli.folder.glob(".cache/tokens/*")) or place == "runs"
    assert cli(*LM, OWN, *more) == 0, cli.err  # once there is room
    assert len(list(cli.folder.glob("runs/d/*/bundle/bundle.json"))) == 1


def test_full_disk_while_predicting(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.copy_bundles()
    cli.write({"t.txt": "hello\n" * 50, "out/o.jsonl": "as it was\n"})
    SmallDisk(cli.folder / "out", 2000, monkeypatch)
    cli("predict", "bundle=cls", "input=t.txt", "output=out/o.jsonl")
    cli.refused(1, "the disk is full")
    assert (cli.folder / "out" / "o.jsonl").read_text(encoding="utf-8") == "as it was\n"


@pytest.mark.slow
@pytest.mark.cli
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("size", ["16k", "80k"])
def test_really_full_disk(cli: CommandLine, size: str) -> None:
    disk = cli.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no mounting here")
    try:
        cli.write({"d.csv": CSV})
        done = process(*LM, OWN, *CHECKPOINTS, "runs=disk/runs", cwd=cli.folder)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("ulmfit: the disk is full")
        assert "Traceback" not in done.stderr
        assert not [path for path in disk.rglob("*") if path.name == "bundle" or path.name.endswith(".partial")]
    finally:
        subprocess.run(["umount", disk], check=True)


# ------------------------------------------------------------------------- in a process, as a shell starts it


def process(*words: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ulmfit", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **more)


@pytest.mark.cli
@pytest.mark.parametrize(
    ("words", "files", "part"),
    [
        ([*CLASSIFIER, "dataset.path=x.csv"], {}, "There is no file or folder x.csv"),
        ([*CLASSIFIER, OWN], {"d.csv": CSV.replace("hardware", "account")}, "only the class"),
        (["predict", "bundle=nope"], {}, "no bundle at nope"),
        ([*LM, OWN, "seed=x"], {}, "seed=x"),
    ],
)
def test_in_a_process(tmp_path: Path, words: list[str], files: dict[str, str], part: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    done = process(*words, cwd=tmp_path, input="")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("ulmfit: ")
    assert part in line
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.cli
@pytest.mark.skipif(os.name != "posix", reason="pipes of a POSIX shell")
def test_reader_that_has_had_enough(cli: CommandLine) -> None:
    cli.copy_bundles()
    cli.write({"t.txt": "my laptop does not start\n" * 3000})
    shell = f"'{sys.executable}' -m ulmfit predict bundle=cls input=t.txt | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=cli.folder, capture_output=True, text=True, timeout=120)
    first, code = done.stdout.splitlines()
    assert json.loads(first)["text"] == "my laptop does not start"
    assert (code, done.stderr) == ("0", "")


@pytest.mark.cli
@pytest.mark.skipif(os.name != "posix", reason="descriptors of a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "code", "part"),
    [("<&-", 2, "no text was given"), (">&-", 2, "no bundle at nope"), ("2>&-", 2, None), (">/dev/full", 2, "nope")],
)
def test_closed_descriptors(tmp_path: Path, redirection: str, code: int, part: str | None) -> None:
    """Of a shell such as `cron`: an error is still one sentence."""
    words = "predict" if redirection == "<&-" else "evaluate bundle=nope"
    shell = f"'{sys.executable}' -m ulmfit {words} {redirection}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    if part is not None:
        (line,) = done.stderr.splitlines()
        assert part in line


# ------------------------------------------------------------------------------------------- folders and libraries


@pytest.fixture
def read_only(cli: CommandLine) -> Iterator[Path]:
    """A folder in which nothing can be written: for root, who may do anything, a file system of that kind."""
    folder = cli.folder / "locked"
    folder.mkdir()
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "ro,size=16k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no mounting here")
        yield folder
        subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize(
    "words",
    [
        [*LM, OWN, "runs=locked"],
        [*LM, OWN, "cache=locked"],
        ["predict", "bundle=cls", "input=t.txt", "output=locked/o.jsonl"],
        ["report", "runs=r", "output=locked/o.csv"],
    ],
    ids=["runs", "cache", "predict", "report"],
)
def test_folders_that_are_read_only(cli: CommandLine, read_only: Path, words: list[str]) -> None:
    cli.write({"d.csv": CSV, "t.txt": "hello\n", "r/a/config.yaml": "seed: 1\n", "r/a/metrics.json": '{"seconds": 1}'})
    cli.copy_bundles()
    cli(*words)
    cli.refused(1, "locked", nothing_left=False)
    assert "read-only" in cli.err or "permission denied" in cli.err
    assert list(read_only.iterdir()) == []


def test_a_read_only_bundle_is_used(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, b"hello\n")
    cli.copy_bundles()
    for path in Path("cls").iterdir():
        path.chmod(0o444)
    assert cli("predict", "bundle=cls") == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([*CLASSIFIER, "dataset.path=hf:imdb"], ["hf:imdb", "pip install 'ulmfit[datasets]'"]),
        ([*CLASSIFIER, "dataset.path=saved"], ["saved", "pip install 'ulmfit[datasets]'"]),
        (["predict", "bundle=cls", "input=saved"], ["pip install 'ulmfit[datasets]'"]),
        ([*CLASSIFIER, "dataset.path=d.parquet"], ["d.parquet", "pip install 'ulmfit[parquet]'"]),
        ([*CLASSIFIER, "dataset.path=d.csv.zst"], ["Zstandard", "pip install zstandard"]),
    ],
    ids=["hub", "saved", "predict", "parquet", "zstd"],
)
def test_libraries_that_are_not_there(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
) -> None:
    for name in ("datasets", "pyarrow", "pyarrow.parquet", "compression.zstd", "zstandard", "pyzstd"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    cli.write({"saved/dataset_dict.json": "{}", "d.parquet": "x", "d.csv.zst": b"\x28\xb5\x2f\xfd" + bytes(20)})
    cli.copy_bundles()
    cli(*words)
    cli.refused(2, *parts)


# -------------------------------------------------------------------------------------------------------- many of it


@pytest.mark.stress
def test_a_document_of_a_million_tokens(cli: CommandLine) -> None:
    """Trained on in both stages, and predicted."""
    cli.write({"d.csv": CSV + "word and word " * 250_000 + ",account\n", "t.txt": "word and " * 250_000 + "\n"})
    assert cli(*ALL, OWN) == 0, cli.err
    (bundle,) = cli.folder.glob("runs/d/*/classifier/bundle")
    assert cli("predict", f"bundle={bundle}", "input=t.txt", "output=o.jsonl") == 0, cli.err
    assert json.loads((cli.folder / "o.jsonl").read_text(encoding="utf-8"))["label"] in ("account", "hardware")


@pytest.mark.stress
def test_five_thousand_classes(cli: CommandLine) -> None:
    """The figures of all of them, in a file that can still be opened."""
    rows = [f"ticket {i} of kind {i % 5000},kind {i % 5000}\n" for i in range(15_000)]
    cli.write({"f/train.csv": HEAD + "".join(rows), "f/test.csv": HEAD + "".join(rows[:5000])})
    assert cli(*CLASSIFIER, "dataset.path=f", "dataset.valid_fraction=0") == 0, cli.err
    (path,) = cli.folder.glob("runs/f/*/metrics.json")
    assert path.stat().st_size < 2_000_000
    report = json.loads(path.read_text(encoding="utf-8"))["test"]
    assert len(report["per_class"]) == 5000
    assert sum(map(sum, confusion_of(report))) == report["documents"]
    assert cli("report") == 0
