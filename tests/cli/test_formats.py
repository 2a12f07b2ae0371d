"""The same rows in every format through the real command line: trained on and predicted, in three languages."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ulmfit.bundle import read_info
from ulmfit.cli import main

Rows = Sequence[tuple[str, str]]

LANGUAGES: dict[str, Rows] = {
    "english": [
        (f'my "{thing}", number {i}, is broken', "hardware")
        if i % 2
        else (f"I forgot the {thing} password {i}", "access")
        for i, thing in enumerate(["laptop", "printer", "phone", "screen", "mail", "wiki"] * 10)
    ],
    "german": [
        (f'Mein „{thing}“, Nr. {i}, läuft nicht: "Störung"', "Gerät")
        if i % 2
        else (f"Ich hätte gern den Schlüssel für {thing}, Größe {i}", "Zugang")
        for i, thing in enumerate(["Rechner", "Drucker", "Bildschirm", "Türöffner", "Straßenkarte", "Gerät"] * 10)
    ],
    "chinese": [
        (f"我的{thing}坏了,第{i}次不能启动。", "设备") if i % 2 else (f"我忘记了{thing}的密码,请重置{i}号帐户", "帐户")
        for i, thing in enumerate(["电脑", "打印机", "手机", "屏幕", "邮箱", "网站"] * 10)
    ],
}
TINY = [
    "model=tiny",
    "init=scratch",
    "tokenizer.vocab_size=350",
    "trainer=cpu",
    "trainer.threads=1",
    "stage.classifier.epochs=1",
    "stage.classifier.batch_size=16",
    "stage.classifier.method.unfreezing.mode=full",
]


def delimited(rows: Rows, delimiter: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([("text", "label"), *rows])
    return text.getvalue()


def write_csv(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.csv"
    path.write_text(delimited(rows, ","), encoding="utf-8")
    return path


def write_tsv(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.tsv"
    path.write_text(delimited(rows, "\t"), encoding="utf-8")
    return path


def write_gzip(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.csv.gz"
    path.write_bytes(gzip.compress(delimited(rows, ",").encode()))
    return path


def write_bzip2(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.csv.bz2"
    path.write_bytes(bz2.compress(delimited(rows, ",").encode()))
    return path


def write_jsonl(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": name}) + "\n" for t, name in rows), encoding="utf-8")
    return path


def write_parquet(folder: Path, rows: Rows) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = folder / "rows.parquet"
    texts, labels = zip(*rows, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    return path


def write_fasttext(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.txt"
    path.write_text("".join(f"__label__{label} {text}\n" for text, label in rows), encoding="utf-8")
    return path


def write_folders(folder: Path, rows: Rows) -> Path:
    for i, (text, label) in enumerate(rows):
        path = folder / "rows" / label / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return folder / "rows"


FORMATS: dict[str, Callable[[Path, Rows], Path]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "csv.gz": write_gzip,
    "csv.bz2": write_bzip2,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "fasttext": write_fasttext,
    "folders": write_folders,
}


def train_and_predict(folder: Path, data: Path) -> tuple[str, list[str]]:
    """The checksum of the classifier's weights, and the texts that were predicted."""
    runs, output = folder / "runs", folder / "predicted.jsonl"
    line = ["train", "stage=classifier", *TINY, f"dataset.path={data}", f"runs={runs}", f"cache={folder / 'cache'}"]
    assert main(line) == 0
    (bundle,) = runs.glob("rows/classifier-*/bundle")
    assert main(["predict", f"bundle={bundle}", f"input={data}", f"output={output}", "threads=1"]) == 0
    predicted = [json.loads(row) for row in output.read_text(encoding="utf-8").splitlines()]
    info = read_info(bundle)
    assert {row["label"] for row in predicted} <= set(info.labels)
    assert all(set(row["probabilities"]) == set(info.labels) for row in predicted)
    return info.checksums["encoder.safetensors"] + info.checksums["head.safetensors"], [
        row["text"] for row in predicted
    ]


@pytest.fixture(scope="module", autouse=True)
def program() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ulmfit"])
        patch.delenv("LOCAL_RANK", raising=False)
        yield


@pytest.fixture(scope="module")
def from_csv(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("csv")
    return train_and_predict(folder, write_csv(folder, LANGUAGES["german"]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_classifier(tmp_path: Path, from_csv: str, name: str) -> None:
    rows = LANGUAGES["german"]
    weights, texts = train_and_predict(tmp_path, FORMATS[name](tmp_path, rows))
    if name == "folders":  # there the rows are ordered by class
        rows = sorted(rows, key=lambda row: row[1])
    else:
        assert weights == from_csv
    assert texts == [text for text, _ in rows]


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language(tmp_path: Path, language: str) -> None:
    rows = LANGUAGES[language]
    _, texts = train_and_predict(tmp_path, write_csv(tmp_path, rows))
    assert texts == [text for text, _ in rows]
