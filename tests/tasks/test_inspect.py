"""Figures, warnings and layout of `ulmfit inspect`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ulmfit.config import DatasetConfig, InspectConfig, TokenizerConfig
from ulmfit.data.sources import Splits, Table
from ulmfit.tasks.inspect import describe, format_description, run
from ulmfit.text.tokenizer import Tokenizer

SPLITS = Splits(
    train=Table(
        ["good film", "Good  film", "bad film", "", *[f"fine {i}" for i in range(20)]], ["p", "n", "n", "n", *"p" * 20]
    ),
    valid=Table(["new one"], ["p"]),
    test=Table(["BAD film", "never seen", "odd"], ["n", "p", "z"]),
    unlabelled=Table(["never  seen", "Never seen", "good film", "free"], None),
)


def test_figures() -> None:
    found = describe(SPLITS)
    train = found["splits"]["train"]
    assert train["documents"] == 24
    assert train["classes"] == {"n": 3, "p": 21}
    assert (train["empty"], train["duplicates"], train["conflicts"]) == (1, 1, 1)
    assert train["characters"]["largest"] == 10
    assert train["characters"]["total"] == sum(len(text) for text in SPLITS.train.texts)  # type: ignore[union-attr]
    assert train["tokens"] is None
    shared = {(item["in"], item["of"]): item["documents"] for item in found["overlaps"]}
    assert shared == {("train", "test"): 1, ("train", "unlabelled"): 1, ("test", "unlabelled"): 2}


def test_warnings() -> None:
    text = "\n".join(describe(SPLITS)["warnings"])
    for part in (
        "The classes are unequal: 21 training rows of 'p' and 3 of 'n'",
        "Fewer than 10 training rows: n.",
        "Labels in test that no training row has: z.",
        "Classes without a row in valid: n.",
        "1 test documents also stand in train",
        "2 unlabelled documents also stand in test; language-model fine-tuning leaves those out",
        "1 texts of train have several different labels",
        "1 documents of train are empty",
    ):
        assert part in text
    quiet = Splits(train=Table([f"t {i}" for i in range(40)], ["a", "b"] * 20))
    assert describe(quiet)["warnings"] == []


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"a good film {i} and a bad one" for i in range(300)]
    return Tokenizer.train(texts, TokenizerConfig(vocab_size=400))


def test_token_figures(tokenizer: Tokenizer) -> None:
    found = describe(SPLITS, tokenizer)["splits"]["train"]
    lengths = sorted(len(tokenizer.encode(text)) + 1 for text in SPLITS.train.texts)  # type: ignore[union-attr]
    assert found["tokens"]["total"] == sum(lengths)
    assert found["tokens"]["largest"] == lengths[-1]
    assert found["unknown_share"] == 0
    strange = describe(Splits(train=Table(["漢字 漢字", "語"], None)), tokenizer)
    assert strange["splits"]["train"]["byte_share"] > 0.5
    assert "the tokenizer does not know this kind of text" in strange["warnings"][0]


def test_layout(tokenizer: Tokenizer) -> None:
    text = format_description(describe(SPLITS, tokenizer))
    lines = text.splitlines()
    header = next(line for line in lines if "train" in line)
    assert header.split() == ["train", "valid", "test", "unlabelled"]
    assert next(line for line in lines if line.startswith("documents")).split() == ["documents", "24", "1", "3", "4"]
    # right-aligned under their headers
    assert next(line for line in lines if line.startswith("documents")).index("24") + 2 == header.index("train") + 5
    assert next(line for line in lines if line.startswith("n  ")).split() == [
        "n",
        "3",
        "(12.5%)",
        "0",
        "(0.0%)",
        "1",
        "(33.3%)",
    ]
    assert "  2 of unlabelled (50.00%) also stand in test" in lines


def test_run_on_the_sample_data(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(InspectConfig())
    assert found["name"] == "helpdesk"
    assert len(found["splits"]["train"]["classes"]) == 6
    printed = capsys.readouterr().out
    assert printed.startswith("Data set helpdesk\n")
    assert "Expected times" not in printed


def test_run_with_a_bundle(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    from ulmfit.bundle import BundleInfo, save_bundle

    shape = {"vocab_size": tokenizer.vocab_size, "embedding_dim": 8, "hidden_dim": 12, "num_layers": 2}
    save_bundle(tmp_path / "bundle", BundleInfo("language_model", shape), {}, {}, tokenizer)
    found = run(InspectConfig(dataset=DatasetConfig(limit=30), bundle=str(tmp_path / "bundle")))
    assert set(found["time"]) == {"tokens_per_second", "lm_finetune", "classifier", "predict_test"}
    assert all(seconds > 0 for seconds in found["time"].values())
    printed = capsys.readouterr().out
    assert "fine-tuning the language model, an epoch" in printed
    assert "tokens, total" in printed


def test_a_bundle_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(InspectConfig(dataset=DatasetConfig(limit=30), bundle="en-small"))
    assert found["splits"]["train"]["tokens"]["total"] > 0
    assert "tokens, total" in capsys.readouterr().out
