"""Perplexity from exact sums: weighted by tokens, beyond 2**24 of them, without underflow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.text import Perplexity

from ulmfit.training.metrics import TokenLoss, TokenPerplexity, classifier_metrics, confusion_matrix


def test_weighted_by_tokens_not_by_batches() -> None:
    """A last window of 3 tokens counts as 3 tokens; the mean of the windows' means would be 2.5."""
    loss, perplexity = TokenLoss(), TokenPerplexity()
    for total, count in [(2.0 * 997, 997), (3.0 * 3, 3)]:
        for metric in (loss, perplexity):
            metric.update(torch.tensor(total), count)
    assert loss.compute().item() == pytest.approx(2.003, rel=1e-12)
    assert perplexity.compute().item() == pytest.approx(math.exp(2.003), rel=1e-12)


def test_equals_torchmetrics_on_ordinary_numbers() -> None:
    ours, theirs = TokenPerplexity(), Perplexity()
    for seed in range(4):
        logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(seed))
        targets = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(seed))
        ours.update(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), 21)
        theirs.update(logits, targets)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_counts_beyond_2_to_the_24() -> None:
    """torchmetrics counts in float32, which cannot tell 2**24 + 1 from 2**24: its count stands still."""
    theirs = Perplexity()
    theirs.update(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64))
    theirs.count = theirs.count - 1 + 2.0**24
    theirs.update(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64))
    assert theirs.count.item() == 2**24

    ours = TokenLoss()
    for total, count in [(2.0**26, 2**24), (4.0, 1), (4.0, 1)]:
        ours.update(torch.tensor(total), count)
    assert ours.count.item() == 2**24 + 2 and ours.count.dtype == torch.int64
    assert ours.total.item() == 2**26 + 8 and ours.total.dtype == torch.float64
    assert ours.compute().item() == 4


def test_small_updates_are_not_lost_in_a_large_sum() -> None:
    """In float32 adding 1 to 1e8 changes nothing."""
    ours = TokenLoss()
    ours.update(torch.tensor(1e8, dtype=torch.float64), 10)
    for _ in range(10):
        ours.update(torch.tensor(1.0), 1)
    assert ours.total.item() == 1e8 + 10


def test_no_infinity_where_a_probability_underflows() -> None:
    """A surprise of 200 nats among 99 certain tokens: torchmetrics takes log(0)."""
    logits = torch.zeros(1, 100, 2)
    logits[..., 1] = 200.0
    targets = torch.ones(1, 100, dtype=torch.int64)
    targets[0, 0] = 0
    theirs = Perplexity()
    theirs.update(logits, targets)
    assert math.isinf(theirs.compute().item())

    ours = TokenPerplexity()
    ours.update(F.cross_entropy(logits[0], targets[0], reduction="sum"), 100)
    assert ours.compute().item() == pytest.approx(math.exp(2), rel=1e-6)


def test_a_perplexity_beyond_float64_is_infinite_not_an_error() -> None:
    metric = TokenPerplexity()
    metric.update(torch.tensor(1000.0), 1)
    assert math.isinf(metric.compute().item())


@pytest.mark.parametrize("convert", ["half", "float"])
def test_sums_stay_exact_when_the_module_changes_precision(convert: str) -> None:
    module = torch.nn.Module()
    module.metric = TokenLoss()
    getattr(module, convert)()
    module.metric.update(torch.tensor(2.0**24 + 1, dtype=torch.float64), 2**24 + 1)
    assert module.metric.total.dtype == torch.float64
    assert module.metric.compute().item() == 1


def test_reset() -> None:
    metric = TokenLoss()
    metric.update(torch.tensor(5.0), 1)
    metric.reset()
    metric.update(torch.tensor(6.0), 3)
    assert metric.compute().item() == 2


def test_ranks_are_summed() -> None:
    assert {name: fx.__name__ for name, fx in TokenLoss()._reductions.items()} == {
        "total": "dim_zero_sum",
        "count": "dim_zero_sum",
    }


def test_classifier_metrics() -> None:
    """Accuracy is the share of documents right, F1 the mean over classes; rows of the confusion matrix are truths."""
    predicted, truth = torch.tensor([0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 1, 1])
    logits = F.one_hot(predicted, 2).float()
    metrics = classifier_metrics(2, "valid_")
    metrics.update(logits, truth)
    values = metrics.compute()
    assert values["valid_accuracy"].item() == pytest.approx(4 / 5)
    assert values["valid_macro_f1"].item() == pytest.approx((6 / 7 + 2 / 3) / 2)
    matrix = confusion_matrix(2)
    matrix.update(logits, truth)
    assert matrix.compute().tolist() == [[3, 0], [1, 1]]
