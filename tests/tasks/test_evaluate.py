"""`ulmfit evaluate`: figures by hand, labels in any order, language models over one stream."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest
import torch

from ulmfit.bundle import load_bundle
from ulmfit.config import EvaluateConfig
from ulmfit.data.sources import iter_texts
from ulmfit.errors import BundleError, DataError
from ulmfit.inference import Predictor
from ulmfit.nn.build import language_model_from
from ulmfit.tasks import evaluate
from ulmfit.tasks.scoring import classification_report, format_report, write_json

LABELS = ["access", "hardware", "network", "order", "security", "software"]


@pytest.fixture
def config(trained: Path, caches: Path) -> EvaluateConfig:
    config = EvaluateConfig([str(trained / "classifier" / "bundle")], cache=str(caches))
    config.dataset.limit, config.trainer.enable_progress_bar = 60, False
    return config


def rows_in(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


# ------------------------------------------------------------------------------------------------ a classifier


def test_report_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]]).numpy()
    report = classification_report(probabilities, [0, 1, 1, 0], ["a", "b", "c"])
    assert report["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert (report["accuracy"], report["error"], report["documents"]) == (0.5, 0.5, 4)
    assert report["log_loss"] == pytest.approx(-sum(map(math.log, (0.7, 0.4, 0.8, 0.3))) / 4, rel=1e-6)
    assert report["per_class"]["a"] == {"documents": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert report["per_class"]["c"] == {"documents": 0, "precision": 0, "recall": 0, "f1": 0}
    printed = format_report(report, "test").splitlines()
    assert printed[0].split() == ["test", "precision", "recall", "F1", "documents"]
    assert printed[1].split() == ["a", "0.500", "0.500", "0.500", "2"]
    assert printed[-1].startswith("accuracy 50.0% (error 50.0%), macro F1 ")


def test_macro_f1_is_the_mean_over_the_classes() -> None:
    probabilities = torch.eye(3)[[0, 0, 1, 2, 2, 2]].numpy()
    report = classification_report(probabilities, [0, 1, 1, 2, 2, 0], ["a", "b", "c"])
    assert report["macro_f1"] == pytest.approx(sum(row["f1"] for row in report["per_class"].values()) / 3, rel=1e-6)


def test_rows_and_labels_in_any_order(config: EvaluateConfig, trained: Path, tmp_path: Path) -> None:
    """A file with some of the labels only, in another order: ids come from the bundle, not from the file."""
    texts = [(f"text number {i} about {label}", label) for i, label in enumerate(LABELS[1:5] * 5)]
    random.Random(0).shuffle(texts)
    config.dataset.limit = None
    found = []
    for rows in (texts, texts[::-1]):
        config.dataset.path = rows_in(tmp_path / "rows.csv", rows)
        config.dataset.test, config.dataset.train = "rows.csv", ""
        found.append(evaluate.run(config))
    assert found[0]["confusion"] == found[1]["confusion"]
    predictions = Predictor(config.bundle).predict([text for text, _ in texts])
    expected = [[0] * 6 for _ in LABELS]
    for (_, label), prediction in zip(texts, predictions, strict=True):
        expected[LABELS.index(label)][LABELS.index(prediction.label)] += 1
    assert found[0]["confusion"] == expected
    assert found[0]["log_loss"] == pytest.approx(
        -sum(math.log(p.probabilities[label]) for (_, label), p in zip(texts, predictions, strict=True)) / 20, rel=1e-5
    )


def test_an_unknown_label(config: EvaluateConfig, tmp_path: Path) -> None:
    config.dataset.path = rows_in(tmp_path / "rows.csv", [("a", "access"), ("b", "netwerk"), ("c", "order")])
    config.dataset.test, config.dataset.train = "rows.csv", ""
    with pytest.raises(
        DataError, match=r"row 2, has the label 'netwerk', which is none of the 6 .*did you mean 'network'"
    ):
        evaluate.run(config)


def test_a_split_that_is_not_there(config: EvaluateConfig, trained: Path, tmp_path: Path) -> None:
    config.dataset.path = rows_in(tmp_path / "rows.csv", [(f"text {i}", LABELS[i % 6]) for i in range(30)])
    with pytest.raises(DataError, match=r"has no test split; set dataset\.test"):
        evaluate.run(config)
    config.bundle = [str(trained / "lm")]
    with pytest.raises(DataError, match=r"has no test split; set dataset\.test"):
        evaluate.run(config)


def test_members_of_an_ensemble_are_classifiers(config: EvaluateConfig, trained: Path) -> None:
    config.bundle.append(str(trained / "lm"))
    with pytest.raises(BundleError, match="is a language model, expected a classifier"):
        evaluate.run(config)


def test_the_newest_classifier(config: EvaluateConfig, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.bundle, config.runs = [], str(trained)
    assert evaluate.run(config)["documents"] == 60
    assert "the newest classifier" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a language model


@pytest.mark.parametrize("limit", [20, None])
def test_bits_per_character(
    config: EvaluateConfig, trained: Path, capsys: pytest.CaptureFixture[str], limit: int | None
) -> None:
    config.bundle, config.dataset.limit = [str(trained / "lm" / "bundle")], limit
    figures = evaluate.run(config)
    bundle = load_bundle(trained / "lm" / "bundle")
    texts = list(iter_texts(config.dataset, "test"))
    ids = [i for text in texts for i in (bundle.tokenizer.bos_id, *bundle.tokenizer.encode(text))]
    with torch.no_grad():
        logits = language_model_from(bundle).eval()(torch.tensor([ids[:-1]]))[0][0].double()
    nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    characters = sum(map(len, texts)) + len(texts)
    assert (figures["tokens"], figures["documents"]) == (len(ids) - 1, len(texts))
    assert figures["characters"] == characters
    exact = limit is not None  # a longer text is read as several streams, each starting without context
    assert figures["nll"] == pytest.approx(nll, rel=1e-5 if exact else 2e-3)
    assert figures["bits_per_character"] == pytest.approx(figures["nll"] / math.log(2) / characters)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"] / (len(ids) - 1)))
    assert f"{figures['bits_per_character']:.4f} bits per character" in capsys.readouterr().out


def test_perplexity_per_word_of_a_wikitext_file(
    config: EvaluateConfig, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The likelihood of the running text, spread over the words of the file and an end for each of its lines."""
    raw = " \n = One = \n \n It 's here , <unk> @-@ like . \n \n = Two = \n \n The end . \n"
    (tmp_path / "wiki.test.tokens").write_text(raw)
    config.bundle, config.dataset.limit = [str(trained / "lm" / "bundle")], None
    config.dataset.name, config.dataset.path, config.dataset.format = "wiki", str(tmp_path), "wikitext"
    config.output = str(tmp_path / "out" / "figures.json")
    figures = evaluate.run(config)
    bundle = load_bundle(trained / "lm" / "bundle")
    ids = []
    for text in ("= One =\nIt's here, <unk>-like.", "= Two =\nThe end."):
        ids += [bundle.tokenizer.bos_id, *bundle.tokenizer.encode(text)]
    with torch.no_grad():
        logits = language_model_from(bundle).eval()(torch.tensor([ids[:-1]]))[0][0].double()
    nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    assert figures["words"] == 3 + 8 + 3 + 3 + 8
    assert figures["word_perplexity"] == pytest.approx(math.exp(nll / 25), rel=1e-5)
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures
    assert f"{figures['word_perplexity']:.2f} per word of the 25 " in capsys.readouterr().out


def test_validation_figures_are_those_of_training(config: EvaluateConfig, trained: Path) -> None:
    """Training validates without the tokens that do not fill its rows: a difference in the third digit at most."""
    config.bundle, config.split = [str(trained / "lm")], "valid"
    trained_with = json.loads((trained / "lm" / "metrics.json").read_text())["valid_perplexity"]
    assert evaluate.run(config)["perplexity"] == pytest.approx(trained_with, rel=5e-3)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "metrics.json", {"größe": [1]})
    assert json.loads((tmp_path / "new" / "metrics.json").read_text("utf-8")) == {"größe": [1]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "metrics.json", {"bad": object()})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]
    assert json.loads((tmp_path / "new" / "metrics.json").read_text("utf-8")) == {"größe": [1]}


def test_what_less_precision_costs(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    exact = evaluate.run(config)
    config.precision = "int8"
    report = evaluate.run(config)
    assert report["precision"]["error_with_32"] == pytest.approx(exact["error"], abs=1e-6)
    assert report["precision"]["same_labels"] >= 0.9
    assert 0 < report["precision"]["mean_difference"] <= report["precision"]["largest_difference"] < 0.1
    assert "precision=int8 costs: with 32 bits the error is" in capsys.readouterr().out
    assert "precision" not in exact


def test_precision_of_a_language_model(config: EvaluateConfig, trained: Path) -> None:
    config.bundle = [str(trained / "lm" / "bundle")]
    exact = evaluate.run(config)
    config.precision = "int8"
    found = evaluate.run(config)
    assert found["tokens"] == exact["tokens"] and found["nll"] != exact["nll"]
    assert found["perplexity"] == pytest.approx(exact["perplexity"], rel=0.02)
