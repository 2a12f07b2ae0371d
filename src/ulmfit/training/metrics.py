"""Exact figures over all tokens and documents, whatever the batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

# torchmetrics.text.Perplexity counts in float32, which stops at 2**24 tokens.


class TokenLoss(Metric):
    """Mean negative log-likelihood per token in nats, from a float64 sum and an int64 count."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: float | Tensor) -> None:
        """Add the summed negative log-likelihood of `count` tokens."""
        self.total += total.to(self.total.device, torch.float64)
        # A number is added as it is: as a tensor it would be copied to the GPU, which waits.
        self.count += count.to(self.count.device, torch.int64) if isinstance(count, Tensor) else int(count)

    def compute(self) -> Tensor:
        """Mean in nats."""
        return self.total / self.count

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> TokenLoss:
        # Lightning converts the whole module under precision=bf16-true; the sum must stay float64.
        super()._apply(fn, [*exclude_state, "total"])
        self.total = self.total.to(self.device)
        self._defaults["total"] = self._defaults["total"].to(self.device)  # type: ignore[union-attr]
        return self


class TokenPerplexity(TokenLoss):
    """exp of `TokenLoss`."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Perplexity per token; infinite above exp(709)."""
        mean = float(super().compute())
        return torch.tensor(math.exp(mean) if mean < 709 else math.inf, dtype=torch.float64)


def classifier_metrics(classes: int, prefix: str) -> MetricCollection:
    """Accuracy (share of documents right) and macro F1."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
        },
        prefix=prefix,
    )


def confusion_matrix(classes: int) -> MulticlassConfusionMatrix:
    """(C, C) counts, rows are true classes."""
    return MulticlassConfusionMatrix(classes)
