"""`TextData`: the same rows and splits from files, frames, folders and lists."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import ulmfit
from ulmfit.config import DatasetConfig
from ulmfit.data.sources import load_splits
from ulmfit.errors import DataError, UsageError

TEXTS = [f"text number {i} about {'cats' if i % 2 else 'dogs'}" for i in range(40)]
LABELS = ["cat" if i % 2 else "dog" for i in range(40)]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("review", "stars"), *zip(TEXTS, LABELS, strict=True)])
    return path


def test_every_door_gives_the_same_splits(reviews: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    folder = tmp_path / "classes"
    for text, label in zip(TEXTS, LABELS, strict=True):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{text}.txt").write_text(text, encoding="utf-8")
    options = {"valid_fraction": 0.2, "test_fraction": 0.1, "seed": 3}
    doors = [
        ulmfit.TextData.from_csv(reviews, text="review", label="stars", **options),  # type: ignore[arg-type]
        ulmfit.TextData.from_lists(TEXTS, LABELS, **options),  # type: ignore[arg-type]
        ulmfit.TextData.from_frame(pandas.read_csv(reviews), text="review", label="stars", **options),
        ulmfit.TextData.from_folder(folder, **options),  # type: ignore[arg-type]
    ]
    rows = [
        {
            split: sorted(zip(data.table(split).texts, data.table(split).labels or [], strict=True))
            for split in ("train", "valid", "test")
        }
        for data in doors
    ]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert [len(rows[0][split]) for split in ("train", "valid", "test")] == [28, 8, 4]
    assert doors[0].classes == ["cat", "dog"]
    assert doors[0].name == "reviews"
    lm_texts = [sorted(data.texts("lm")) for data in doors]
    assert lm_texts[0] == lm_texts[1] == lm_texts[2] == lm_texts[3] == sorted(text for text, _ in rows[0]["train"])


def test_splits_that_are_given(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held out.jsonl").write_text(
        "\n".join(json.dumps({"review": text, "stars": "cat"}) for text in ("a", "b")), encoding="utf-8"
    )
    (tmp_path / "more.txt").write_text("A\nsome other text\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path.parent)  # relative to the working directory ...
    here = f"{tmp_path.name}/held out.jsonl"
    data = ulmfit.TextData.from_csv(reviews, "review", "stars", valid=here, unlabelled="more.txt")  # ... or to the file
    assert data.table("valid").texts == ["a", "b"]
    assert len(data.table("train")) == 40
    assert not data.has("test")
    assert [text for text in data.texts("lm") if "number" not in text] == ["some other text"]  # "A" is judged on

    lists = ulmfit.TextData.from_lists(TEXTS, LABELS, valid=(["a", "b"], ["cat", "cat"]), unlabelled=["A", "c", " "])
    assert lists.table("valid").texts == ["a", "b"]
    assert [text for text in lists.texts("lm") if "number" not in text] == ["c"]


def test_sample_is_the_default_of_the_command_line() -> None:
    data = ulmfit.TextData.sample()
    assert data.splits == load_splits(DatasetConfig())
    assert repr(data) == "TextData('helpdesk', 594 train, 150 valid, 246 test, 570 unlabelled, 6 classes)"


def test_unlabelled_texts_are_enough_for_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    for data in (ulmfit.TextData.from_csv(path, label=None), ulmfit.TextData.from_lists(TEXTS)):
        assert not data.labelled
        assert len(list(data.texts("lm"))) == 36
        assert len(list(data.texts("valid"))) == 4
        data.show(2)
        data.describe()
        with pytest.raises(DataError, match="has no labels, but a classifier needs one"):
            _ = data.classes
    assert "number" in capsys.readouterr().out


def test_large_data_is_not_read_at_once(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ulmfit.learner.text_data._READ_AT_ONCE", 10)
    data = ulmfit.TextData.from_csv(reviews, "review", "stars")
    assert data.has("valid")
    assert not data.has("test")
    assert next(data.texts("lm")).startswith("text number")
    assert repr(data) == "TextData('reviews', not read yet)"


def test_wrong_data_is_one_sentence(reviews: Path) -> None:
    new = ulmfit.TextData
    wrong = [
        (lambda: new.from_csv("nothing.csv"), DataError, "nothing.csv"),
        (lambda: new.from_csv(reviews, "reviews", "stars"), DataError, "did you mean 'review'"),
        (lambda: new.from_lists(TEXTS, LABELS[:-1]), DataError, "40 texts and 39 labels"),
        (lambda: new.from_lists(TEXTS, ["a"] * 40), DataError, "needs two classes"),
        (lambda: new.from_lists([]), DataError, "no rows"),
        (lambda: new.from_lists("one text"), DataError, "put it in"),
        (lambda: new.from_lists(TEXTS, LABELS, valid_fraction=1.5), UsageError, "valid_fraction=1.5"),
        (lambda: new(), UsageError, "from_ methods"),
        (lambda: new.from_lists(TEXTS, LABELS).table("tests"), UsageError, "did you mean 'test'"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
