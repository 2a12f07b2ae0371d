"""`ulmfit report`: one table from many runs; runs that differ only in their seed also as mean and spread."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ulmfit.config import ReportConfig, TrainConfig
from ulmfit.errors import DataError, UsageError, did_you_mean
from ulmfit.tasks.run_folder import (
    TRAINER_WITH_EFFECT,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_OF_DATASET,
    read_record,
    unreadable,
)
from ulmfit.whole_file import whole_file

# Columns and their decimals.
FIGURES = {"perplexity": 2, "bits_per_character": 4, "valid_error_%": 2, "test_error_%": 2, "test_macro_f1": 4}
_SEED = re.compile(r"-seed-?\d+$")
# Where two data sets differ in their name, these say nothing more.
_PLACES = (*WITHOUT_EFFECT_OF_DATASET, "format", "text", "label", "encoding", "delimiter")

Row = dict[str, Any]


def run(config: ReportConfig) -> dict[str, Any]:
    """Print the table or write it as .csv or .md; returns the rows.

    A setting is a column if it has several values among the runs that it concerns.

    Raises:
        DataError: no finished run below `config.runs`, or files that cannot be read.
        UsageError: `config.output` of another kind, `config.sort` that is no column.
    """
    if config.output is not None and Path(config.output).suffix not in (".csv", ".md"):
        raise UsageError(f"output is '{config.output}', expected a name that ends in .csv or .md")
    runs = sorted(
        path.parent for path in Path(config.runs).rglob("config.yaml") if (path.parent / "metrics.json").is_file()
    )
    if not runs:
        raise DataError(f"there is no finished run in {config.runs}, expected folders written by 'ulmfit train'")
    settings = {run: _concerning(run, _flat(read_record(run / "config.yaml"))) for run in runs}
    differing = _differing(list(settings.values()))
    rows = [_row(run, Path(config.runs), settings[run], differing) for run in runs]
    rows += _summaries(rows, differing)
    used = {name for row in rows for name, value in row.items() if value is not None}
    columns = [name for name in ("run", "seed", *differing, *FIGURES, "seconds") if name in used]
    if config.sort:
        if config.sort not in columns:
            hint = did_you_mean(config.sort, columns)
            raise UsageError(f"sort is '{config.sort}', expected one of the columns {', '.join(columns)}{hint}")
        rows.sort(key=lambda row: (row.get(config.sort) is None, _order(row.get(config.sort))))
    _emit(columns, rows, config.output)
    return {"rows": rows}


def _row(run: Path, root: Path, settings: dict[str, Any], differing: list[str]) -> Row:
    metrics = read_record(run / "metrics.json")
    row: Row = {"run": str(run.relative_to(root)), "seed": settings.get("seed")}
    row |= {name: settings.get(name) for name in differing}
    try:
        return row | _figures(metrics)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise unreadable(run / "metrics.json") from error


def _figures(metrics: dict[str, Any]) -> Row:
    lm = metrics.get("lm", metrics)
    found = {"perplexity": lm.get("valid_perplexity"), "bits_per_character": lm.get("valid_bits_per_character")}
    if "valid_accuracy" in metrics:
        found["valid_error_%"] = 100 * (1 - metrics["valid_accuracy"])
    if "test" in metrics:
        found |= {"test_error_%": 100 * metrics["test"]["error"], "test_macro_f1": metrics["test"]["macro_f1"]}
    row: Row = {name: round(float(value), FIGURES[name]) for name, value in found.items() if value is not None}
    row["seconds"] = round(metrics.get("seconds", 0))
    return row


def _summaries(rows: list[Row], differing: list[str]) -> list[Row]:
    """One row for each group of runs that differ only in their seed: mean ± standard deviation of the sample."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_SEED.sub("", row["run"])].append(row)
    result = []
    for name, members in groups.items():
        if len(members) < 2:
            continue
        summary: Row = {"run": f"{name} (mean of {len(members)} seeds)"}
        summary |= {setting: members[0][setting] for setting in differing}
        for column, decimals in FIGURES.items():
            values = [row[column] for row in members if column in row]
            if len(values) == len(members):
                summary[column] = f"{statistics.mean(values):.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"
        summary["seconds"] = round(statistics.mean(row["seconds"] for row in members))
        result.append(summary)
    return result


def _concerning(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this run's stage used."""
    stage = settings.get("stage.name")
    hidden = [name for name in WITHOUT_EFFECT if name != "seed"]
    if stage == "classifier":
        hidden.append("stage.lm")
    elif stage != "all":
        hidden.append("stage.classifier")
    if _had_parent(run):
        hidden.append("model")
        if stage == "classifier" or settings.get("stage.lm.vocabulary") == "keep":
            hidden.append("tokenizer")

    def concerns(name: str) -> bool:
        if name.startswith("trainer."):
            return name.removeprefix("trainer.") in TRAINER_WITH_EFFECT
        return not any(name == section or name.startswith(f"{section}.") for section in hidden)

    return {name: value for name, value in settings.items() if concerns(name)}


def _had_parent(run: Path) -> bool:
    """Whether the run's first stage started from a bundle, which then decided network and tokenizer."""
    for path in (run / "bundle" / "bundle.json", run / "lm" / "bundle" / "bundle.json"):
        if path.is_file():
            provenance = read_record(path).get("provenance")
            return isinstance(provenance, dict) and provenance.get("parent", "scratch") != "scratch"
    return False


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """Names with several values among the runs that have them, in the order of the configuration."""
    values: dict[str, set[str]] = {name: set() for name in _flat(asdict(TrainConfig()))}
    for one in settings:
        for name, value in one.items():
            values.setdefault(name, set()).add(json.dumps(value))
    several_sets = len(values["dataset.name"]) > 1
    hidden = {f"dataset.{name}" for name in _PLACES} if several_sets else set()
    return [name for name, found in values.items() if len(found) > 1 and name != "seed" and name not in hidden]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _emit(columns: list[str], rows: list[Row], output: str | None) -> None:
    cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    if output is not None and output.endswith(".csv"):
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([columns, *cells])
        text = buffer.getvalue()
    else:
        widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
        lines = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in [columns, *cells]]
        rule = ["-" * w for w in widths]
        text = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]) + "\n"
    if output is None:
        print(text, end="")
        return
    with whole_file(Path(output)) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{len(rows)} rows written to {output}")
