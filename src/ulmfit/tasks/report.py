"""`ulmfit report`: one table from many runs; runs that differ only in their seed also as mean and spread."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from ulmfit.config import ReportConfig
from ulmfit.errors import DataError, UsageError, did_you_mean

_SEED = re.compile(r"-seed-?\d+$")
_HIDDEN = ("runs", "cache", "debug", "seed")  # settings that say nothing about a result, or have a column


def run(config: ReportConfig) -> dict[str, Any]:
    """Print the table or write it as .csv or .md; returns the rows.

    Raises:
        DataError: no finished run below `config.runs`.
    """
    runs = sorted(
        path.parent for path in Path(config.runs).rglob("config.yaml") if (path.parent / "metrics.json").is_file()
    )
    if not runs:
        raise DataError(f"there is no finished run in {config.runs}, expected folders written by 'ulmfit train'")
    settings = {run: _flat(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))) for run in runs}
    differing = _differing(list(settings.values()))
    rows = [_row(run, Path(config.runs), settings[run], differing) for run in runs]
    rows += _summaries(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if config.sort:
        if config.sort not in columns:
            raise UsageError(
                f"sort is '{config.sort}', expected one of the columns {', '.join(columns)}{did_you_mean(config.sort, columns)}"
            )
        rows.sort(key=lambda row: (row.get(config.sort) is None, _order(row.get(config.sort))))
    _emit(columns, rows, config.output)
    return {"rows": rows}


def _row(run: Path, root: Path, settings: dict[str, Any], differing: list[str]) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"run": str(run.relative_to(root)), "seed": settings.get("seed")}
    row |= {name: settings.get(name) for name in differing}
    language_model = metrics.get("lm", metrics)
    if "valid_perplexity" in language_model:
        row["perplexity"] = round(language_model["valid_perplexity"], 3)
    accuracy = metrics.get("best_valid_accuracy", metrics.get("valid_accuracy"))
    if accuracy is not None:
        row["valid_error_%"] = round(100 * (1 - accuracy), 2)
    if "test" in metrics:
        row["test_error_%"] = round(100 * metrics["test"]["error"], 2)
        row["test_macro_f1"] = round(metrics["test"]["macro_f1"], 4)
    row["seconds"] = metrics.get("seconds")
    return row


def _summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each group of runs that differ only in their seed: mean, and standard deviation behind a sign."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[_SEED.sub("", row["run"])].append(row)
    result = []
    for name, members in groups.items():
        if len(members) < 2:
            continue
        summary: dict[str, Any] = {"run": f"{name} (mean of {len(members)} seeds)"}
        for column in ("perplexity", "valid_error_%", "test_error_%", "test_macro_f1"):
            values = [row[column] for row in members if column in row]
            if len(values) == len(members):
                summary[column] = f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"
        result.append(summary)
    return result


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one if name not in _HIDDEN)
    return [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _emit(columns: list[str], rows: list[dict[str, Any]], output: str | None) -> None:
    cells = [[_shown(row.get(name)) for name in columns] for row in rows]
    if output is not None and output.endswith(".csv"):
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([columns, *cells])
        text = buffer.getvalue()
    else:
        widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
        lines = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in [columns, *cells]]
        rule = ["-" * w for w in widths]
        text = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]) + "\n"
    if output is None:
        print(text, end="")
        return
    path = Path(output)
    if path.suffix not in (".csv", ".md"):
        raise UsageError(f"output is '{output}', expected a name that ends in .csv or .md")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    print(f"{len(rows)} rows written to {path}")


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
