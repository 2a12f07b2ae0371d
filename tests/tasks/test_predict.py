"""`ulmfit predict`: a JSON line for every text, in order."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ulmfit.config import PredictConfig
from ulmfit.errors import BundleError, DataError, UsageError
from ulmfit.inference import Predictor
from ulmfit.tasks import predict
from ulmfit.validation import validate

TEXTS = ["My laptop does not start", "Größe 📦 包裹", "", 'a, b \\ "c"\tand so on', "x" * 4000]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts bytes on standard input."""

    def put(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))

    return put


@pytest.fixture
def config(trained: Path) -> PredictConfig:
    return PredictConfig([str(trained / "classifier" / "bundle")], threads=1)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_standard_input(config: PredictConfig, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    typed("\n".join(TEXTS).encode() + b"\n")
    assert predict.run(config) == {"documents": len(TEXTS)}
    out, err = capsys.readouterr()
    found = lines_of(out)
    assert [line["text"] for line in found] == TEXTS
    assert "包裹" in out  # readable, not escaped
    expected = Predictor(config.bundle).predict(TEXTS)
    for line, prediction in zip(found, expected, strict=True):
        assert line["label"] == prediction.label == max(line["probabilities"], key=line["probabilities"].get)
        assert line["probability"] == line["probabilities"][line["label"]]
        assert line["probabilities"] == pytest.approx(prediction.probabilities, abs=2e-6)
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert err == ""


@pytest.mark.parametrize(
    ("content", "texts"),
    [(b"one", ["one"]), (b"one\r\ntwo\r\n", ["one", "two"]), (b"\xef\xbb\xbfone\n\n", ["one", ""])],
)
def test_line_ends_and_byte_order_mark(
    config: PredictConfig, typed: Any, capsys: pytest.CaptureFixture[str], content: bytes, texts: list[str]
) -> None:
    typed(content)
    predict.run(config)
    assert [line["text"] for line in lines_of(capsys.readouterr().out)] == texts


def test_input_of_any_length_streams_through(
    config: PredictConfig, typed: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_CHUNK", 2)
    typed("\n".join(TEXTS).encode())
    assert predict.run(config)["documents"] == 5
    assert [line["text"] for line in lines_of(capsys.readouterr().out)] == TEXTS


def test_a_file(config: PredictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.input, config.text = str(tmp_path / "in.csv"), ["title", "body"]
    Path(config.input).write_text('id,title,body\n1,My,"laptop\ndoes"\n2,,nothing\n', encoding="utf-8")
    predict.run(config)
    assert [line["text"] for line in lines_of(capsys.readouterr().out)] == ["My\nlaptop\ndoes", "nothing"]
    config.output = str(tmp_path / "new" / "out.jsonl")
    assert predict.run(config) == {"documents": 2}
    out, err = capsys.readouterr()
    assert out == ""
    assert f"2 predictions written to {config.output}" in err
    assert [line["text"] for line in lines_of(Path(config.output).read_text("utf-8"))] == [
        "My\nlaptop\ndoes",
        "nothing",
    ]
    assert [path.name for path in Path(config.output).parent.iterdir()] == ["out.jsonl"]


def test_an_ensemble(
    config: PredictConfig, trained_backward: Path, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config.bundle.append(str(trained_backward))
    typed(b"My laptop does not start\n")
    predict.run(config)
    (line,) = lines_of(capsys.readouterr().out)
    expected = Predictor([config.bundle[0], trained_backward / "classifier" / "bundle"]).predict_one(TEXTS[0])
    assert line["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)


def test_the_newest_classifier(trained: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    typed(b"My laptop does not start\n")
    predict.run(PredictConfig(runs=str(trained)))
    out, err = capsys.readouterr()
    assert len(lines_of(out)) == 1
    assert f"Using {trained / 'classifier' / 'bundle'}" in err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the input holds no text, expected at least one line"),
        (b"good\nGr\xf6\xdfe\n", "standard input is not UTF-8"),
    ],
)
def test_wrong_input(config: PredictConfig, typed: Any, tmp_path: Path, content: bytes, sentence: str) -> None:
    config.output = str(tmp_path / "out.jsonl")
    typed(content)
    with pytest.raises(DataError, match=sentence):
        predict.run(config)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing(config: PredictConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="no text was given; pipe lines to this command or name a file"):
        predict.run(config)
    config.input = str(tmp_path / "no.csv")
    with pytest.raises(DataError, match=r"no\.csv"):
        predict.run(config)
    config.bundle = [str(trained / "lm")]
    with pytest.raises(BundleError, match="is a language model, expected a classifier"):
        predict.run(config)


def test_int8_predicts_nearly_the_same(config: PredictConfig, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config.precision = "int8"
    typed("\n".join(TEXTS).encode())
    predict.run(config)
    expected = Predictor(config.bundle).probabilities(TEXTS)
    found = [list(line["probabilities"].values()) for line in lines_of(capsys.readouterr().out)]
    assert abs(expected - found).max() < 0.1


def test_a_precision_that_does_not_exist(config: PredictConfig) -> None:
    config.precision = "int4"
    with pytest.raises(UsageError, match=r"precision=int4: expected one of 32, auto, bf16, int8; did you mean"):
        validate(config)
