"""Figures of a classifier on labelled texts, and how people read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ulmfit.inference import Probabilities
from ulmfit.training.metrics import classifier_metrics, confusion_matrix
from ulmfit.whole_file import whole_file

_MATRIX_CLASSES = 100  # with more of them, nearly all of a confusion matrix is zero


def classification_report(
    probabilities: Probabilities, labels: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, error, macro F1, mean log loss, figures per class and the confusion matrix (rows are true classes)."""
    predicted, target = torch.from_numpy(probabilities), torch.tensor(labels)
    figures = classifier_metrics(len(classes), "")(predicted, target)
    matrix = confusion_matrix(len(classes))(predicted, target)  # (C, C)
    right, true, guessed = matrix.diagonal().double(), matrix.sum(1).double(), matrix.sum(0).double()
    recall, precision = right / true.clamp(min=1), right / guessed.clamp(min=1)
    f1 = 2 * right / (true + guessed).clamp(min=1)
    losses = -predicted.gather(1, target[:, None]).clamp(min=1e-12).log()
    return {
        "accuracy": float(figures["accuracy"]),
        "error": 1 - float(figures["accuracy"]),
        "macro_f1": float(figures["macro_f1"]),
        "log_loss": float(losses.mean()),
        "documents": len(labels),
        "per_class": {
            name: {
                "documents": int(true[i]),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion": matrix.tolist(),
    }


def format_report(report: dict[str, Any], title: str) -> str:
    """The report as a table."""
    width = max(12, *(len(name) for name in report["per_class"]))
    lines = [f"{title:<{width}}  precision   recall       F1  documents"]
    for name, row in report["per_class"].items():
        lines.append(
            f"{name:<{width}}  {row['precision']:>9.3f} {row['recall']:>8.3f} {row['f1']:>8.3f} {row['documents']:>10}"
        )
    lines.append(
        f"accuracy {report['accuracy']:.1%} (error {report['error']:.1%}), macro F1 {report['macro_f1']:.3f}, "
        f"{report['documents']} documents"
    )
    return "\n".join(lines)


def stored(report: dict[str, Any]) -> dict[str, Any]:
    """The report as it is written: of a large confusion matrix only what is not zero, by names of classes.

    `{"confusion": {true: {predicted: documents}}}`; `confusion_of` makes a matrix of either form.
    """
    classes = list(report["per_class"])
    if len(classes) <= _MATRIX_CLASSES:
        return report
    sparse = {
        true: {classes[i]: count for i, count in enumerate(row) if count}
        for true, row in zip(classes, report["confusion"], strict=True)
    }
    return {**report, "confusion": {true: row for true, row in sparse.items() if row}}


def confusion_of(report: dict[str, Any]) -> list[list[int]]:
    """The confusion matrix of a report from memory or from `metrics.json`; rows are true classes."""
    found = report["confusion"]
    if isinstance(found, list):
        return found
    classes = list(report["per_class"])
    return [[found.get(true, {}).get(predicted, 0) for predicted in classes] for true in classes]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all; a list of numbers is one line."""
    with whole_file(path) as partial:
        partial.write_text(_laid_out(values, "") + "\n", encoding="utf-8")


def _laid_out(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {_laid_out(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + _laid_out(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
