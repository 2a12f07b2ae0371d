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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
