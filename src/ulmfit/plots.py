"""Plots for people, written as PNG: loss and rates over steps, confusion matrix, learning-rate range test."""

from __future__ import annotations

import csv
import io
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulmfit.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[int, float]]]


def read_history(folder: Path) -> Series:
    """(step, value) of everything logged in a run folder, all attempts of a resumed run together."""
    merged: dict[str, dict[int, float]] = defaultdict(dict)
    attempts = {int(path.name[8:]): path for path in (folder / "log").glob("attempt-*") if path.name[8:].isdecimal()}
    for _, attempt in sorted(attempts.items()):
        if not (attempt / "metrics.csv").is_file():
            continue
        with open(attempt / "metrics.csv", newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
            for row in csv.DictReader(file):
                try:
                    step = int(float(row["step"]))
                    values = {n: float(v) for n, v in row.items() if n and v and n not in ("step", "epoch")}
                except (KeyError, TypeError, ValueError, OverflowError):  # the process was killed at this line
                    continue
                for name, value in values.items():
                    merged[name][step] = value
    return {name: sorted(values.items()) for name, values in merged.items()}


def plot_losses(history: Series) -> Figure:
    """Training loss (smoothed and raw) and validation loss over optimiser steps."""
    figure, axes = _figure()
    steps, values = _split(history.get("train_loss_step", history.get("train_loss", [])))
    if steps:
        axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color="C0", label="training")
    steps, values = _split(history.get("valid_loss", []))
    if steps:
        axes.plot(steps, values, "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats)", title="Loss")
    if axes.lines:
        axes.legend()
    return figure


def plot_rates(history: Series) -> Figure:
    """Learning rate of each layer group over optimiser steps; group 0 is the lowest."""
    figure, axes = _figure()
    names = sorted((n for n in history if n.startswith("lr_") and n[3:].isdecimal()), key=lambda n: int(n[3:]))
    for i, name in enumerate(names):
        shade = i / max(1, len(names) - 1)
        axes.plot(*_split(history[name]), color=(0.1, 0.2 + 0.5 * shade, 0.9 - 0.7 * shade), label=f"group {i}")
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate per layer group", yscale="log")
    if names:
        axes.legend(title="lowest first", fontsize="small")
    return figure


def plot_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Counts by true (rows) and predicted (columns) class; colours are shares of the row."""
    size = min(16.0, max(4.5, 0.55 * len(classes) + 2.5))
    figure, axes = _figure((size + 0.8, size))
    totals = [max(1, sum(row)) for row in matrix]
    shares = [[n / total for n in row] for row, total in zip(matrix, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")
    ticks = range(len(classes))
    if len(classes) <= 60:  # more names than that cannot be read, and take minutes to draw
        axes.set(xticks=ticks, yticks=ticks)
        axes.set_xticklabels(classes, rotation=60, ha="right")
        axes.set_yticklabels(classes)
    if len(classes) <= 30:
        for i in ticks:
            for j in ticks:
                if matrix[i][j]:
                    colour = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(matrix[i][j]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def plot_lr_find(rates: Sequence[float], losses: Sequence[float], suggestion: float | None) -> Figure:
    """Smoothed loss against the highest group's rate, with the suggested rate marked."""
    figure, axes = _figure()
    axes.plot(rates, losses)
    if suggestion is not None:
        axes.axvline(suggestion, color="C1", linestyle="--", label=f"suggestion {suggestion:.2g}")
        axes.legend()
    axes.set(xlabel="learning rate", ylabel="loss", xscale="log", title="Learning-rate range test")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # labels in scripts that the font does not have
        figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    return path


def _figure(size: tuple[float, float] = (7.0, 4.2)) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # No pyplot: it keeps every figure alive and may look for a display.
    figure: Figure = _figure_class()(figsize=size)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


@cache
def _figure_class() -> Any:
    """Matplotlib's figure, which a notebook shows as a picture also where pyplot was never imported."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png", dpi=80, bbox_inches="tight")
            return content.getvalue()

    return NotebookFigure


def _split(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential average without the bias towards zero at the start."""
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result
