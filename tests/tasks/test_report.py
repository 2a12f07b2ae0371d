"""The table of many runs: its columns, its means, what it says of files that it cannot read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from ulmfit.config import ReportConfig, TrainConfig
from ulmfit.errors import DataError, UsageError
from ulmfit.tasks import report

Settings = Callable[..., TrainConfig]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, settings: Settings) -> Write:
    """Writes a finished run without training it."""

    def finished(
        name: str, metrics: dict[str, Any], stage: str = "classifier", parent: str | None = None, **values: Any
    ) -> Path:
        folder = tmp_path / "runs" / "helpdesk" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(settings(stage, **values))))
        (folder / "metrics.json").write_text(json.dumps({"seconds": 1.0, **metrics}))
        if parent is not None:
            (folder / "bundle").mkdir()
            (folder / "bundle" / "bundle.json").write_text(json.dumps({"provenance": {"parent": parent}}))
        return folder

    return finished


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[list[str]]]:
    """Runs the report and gives the cells that it prints."""

    def printed(**values: Any) -> list[list[str]]:
        report.run(ReportConfig(runs=str(tmp_path / "runs"), **values))
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return printed


def scores(error: float, f1: float = 0.5) -> dict[str, Any]:
    return {"test": {"error": error, "macro_f1": f1}}


def test_one_run(write: Write, table: Any) -> None:
    write("classifier-1-seed0", {"valid_accuracy": 0.91234, "seconds": 12.6, **scores(0.123456, 0.876543)})
    header, rule, row = table()
    assert header == ["run", "seed", "valid_error_%", "test_error_%", "test_macro_f1", "seconds"]
    assert all(set(cell) == {"-"} for cell in rule)
    assert row == ["helpdesk/classifier-1-seed0", "0", "8.77", "12.35", "0.8765", "13"]


def test_mean_and_spread_over_seeds(write: Write, table: Any) -> None:
    for seed, error in enumerate((0.10, 0.12, 0.17)):
        write(f"classifier-1-seed{seed}", {**scores(error), "seconds": 10 + seed}, seed=seed)
    write("classifier-2-seed0", scores(0.3), stage__classifier__epochs=9)
    rows = table()
    assert rows[0] == ["run", "seed", "stage.classifier.epochs", "test_error_%", "test_macro_f1", "seconds"]
    assert [row[1] for row in rows[2:]] == ["0", "1", "2", "0", ""]
    # mean 13; sample variance (9 + 1 + 16) / 2 = 13
    assert rows[-1] == ["helpdesk/classifier-1 (mean of 3 seeds)", "", "2", "13.00 ± 3.61", "0.5000 ± 0.0000", "11"]


def test_settings_of_another_stage_are_not_shown(write: Write, table: Any) -> None:
    write("classifier-1-seed0", scores(0.1), stage__lm__epochs=1, stage__lm__optim__lr=9.0)
    write("classifier-2-seed0", scores(0.1), stage__lm__epochs=2, stage__lm__vocabulary="train")
    assert table()[0] == ["run", "seed", "test_error_%", "test_macro_f1", "seconds"]
    write("all-1-seed0", {"lm": {"valid_perplexity": 41.237}, **scores(0.1)}, "all")
    write("lm_finetune-1-seed0", {"valid_perplexity": 50.0}, "lm_finetune", stage__classifier__epochs=77)
    header, *rows = table()
    assert header == ["run", "seed", "stage.name", "perplexity", "test_error_%", "test_macro_f1", "seconds"]
    assert {row[header.index("perplexity")] for row in rows[1:]} == {"41.24", "50.0", ""}


def test_settings_without_effect_are_not_shown(write: Write, table: Any) -> None:
    write(
        "classifier-1-seed0", scores(0.1), trainer__accelerator="gpu", logger__csv=False, trainer__checkpoint_minutes=1
    )
    write("classifier-2-seed0", scores(0.1), trainer__threads=7, cache="elsewhere", debug=True)
    write("classifier-3-seed0", scores(0.1), trainer__precision="bf16-mixed")
    assert table()[0] == ["run", "seed", "trainer.precision", "test_error_%", "test_macro_f1", "seconds"]


def test_a_parent_decides_network_and_tokenizer(write: Write, table: Any) -> None:
    other = {"model__num_layers": 9, "tokenizer__vocab_size": 999}
    write("classifier-1-seed0", scores(0.1), parent="/a/bundle")
    write("classifier-2-seed0", scores(0.1), parent="/b/bundle", init="/b/bundle", **other)
    assert table()[0] == ["run", "seed", "init", "test_error_%", "test_macro_f1", "seconds"]
    write("classifier-3-seed0", scores(0.1), parent="scratch", init="scratch")
    write("classifier-4-seed0", scores(0.1), parent="scratch", init="scratch", **other)
    shown = table()[0]
    assert [name for name in shown if "." in name] == ["tokenizer.vocab_size", "model.num_layers"]
    write("lm_finetune-5-seed0", {"valid_perplexity": 1.0}, "lm_finetune", "/a", stage__lm__vocabulary="train")
    write("lm_finetune-6-seed0", {"valid_perplexity": 1.0}, "lm_finetune", "/a", tokenizer__kind="bpe")
    assert "tokenizer.kind" not in table()[0]


def test_two_data_sets(write: Write, table: Any) -> None:
    write("classifier-1-seed0", scores(0.1))
    write("classifier-2-seed0", scores(0.1), dataset__name="trec", dataset__path="x/trec", dataset__label="kind")
    assert [name for name in table()[0] if name.startswith("dataset")] == ["dataset.name"]


def test_unfinished_runs_and_bundles_are_passed_over(write: Write, table: Any) -> None:
    write("classifier-1-seed0", scores(0.1))
    (write("classifier-2-seed0", scores(0.2)) / "metrics.json").unlink()
    assert len(table()) == 3


def test_sorted(write: Write, table: Any) -> None:
    for i, error in enumerate((0.3, 0.05, 0.12)):
        write(f"classifier-{i}-seed0", scores(error))
    write("lm_finetune-1-seed0", {"valid_perplexity": 5.0}, "lm_finetune")
    rows = table(sort="test_error_%")
    position = rows[0].index("test_error_%")
    assert [row[position] for row in rows[2:]] == ["5.0", "12.0", "30.0", ""]
    with pytest.raises(UsageError, match=r"sort is 'test_eror_%', expected one of the columns .*did you mean 'test_er"):
        table(sort="test_eror_%")


@pytest.mark.parametrize("kind", ["csv", "md"])
def test_into_a_file(write: Write, table: Any, tmp_path: Path, kind: str) -> None:
    write("classifier-1-seed0", scores(0.1))
    target = tmp_path / "new" / f"table.{kind}"
    assert table(output=str(target)) == [[f"1 rows written to {target}"]]
    text = target.read_text(encoding="utf-8")
    if kind == "csv":
        (row,) = csv.DictReader(text.splitlines())
        assert row["test_error_%"] == "10.0"
    else:
        assert text.startswith("| run ")
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_what_cannot_be_reported(write: Write, table: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no finished run in"):
        table()
    with pytest.raises(UsageError, match=r"output is 'x\.xlsx', expected a name that ends in \.csv or \.md"):
        table(output="x.xlsx")
    folder = write("classifier-1-seed0", scores(0.1))
    (folder / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.json cannot be read"):
        table()


def test_of_a_real_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = report.run(ReportConfig(runs=str(trained.parent)))["rows"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert row["run"] == trained.name
    assert row["perplexity"] == round(metrics["lm"]["valid_perplexity"], 2)
    assert row["test_error_%"] == round(100 * metrics["test"]["error"], 2)
