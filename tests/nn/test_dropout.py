"""The dropouts of the AWD-LSTM: which entries share a mask, how they are scaled, what eval does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.nn.dropout import embedding_dropout, variational_dropout, weight_dropout

RATE = 0.3


def test_variational_mask_is_shared_by_all_time_steps_and_by_nothing_else() -> None:
    out = variational_dropout(torch.ones(40, 7, 30), RATE, True)
    assert torch.equal(out, out[:, :1].expand_as(out))
    kept = out[:, 0] > 0
    assert torch.equal(out[:, 0][kept], torch.full_like(out[:, 0][kept], 1 / (1 - RATE)))
    assert len(torch.unique(kept, dim=0)) == 40  # another mask for each row of the batch
    assert len(torch.unique(kept, dim=1)[0]) == 30  # and each feature


@pytest.mark.parametrize(
    "call",
    [
        lambda rate, training: variational_dropout(torch.ones(50, 2, 400), rate, training)[:, 0],
        lambda rate, training: weight_dropout(torch.ones(200, 100), rate, training),
        lambda rate, training: embedding_dropout(torch.arange(20_000)[None], torch.ones(20_000, 1), rate, training),
    ],
    ids=["variational", "weight", "embedding"],
)
class TestEveryKind:
    def test_drops_the_given_share_and_keeps_the_mean(self, call: Callable[[float, bool], Tensor]) -> None:
        torch.manual_seed(0)
        out = call(RATE, True)
        assert float((out == 0).float().mean()) == pytest.approx(RATE, abs=0.015)  # 4.6 standard deviations
        assert float(out.mean()) == pytest.approx(1, abs=0.03)

    def test_each_call_draws_a_new_mask(self, call: Callable[[float, bool], Tensor]) -> None:
        assert not torch.equal(call(RATE, True), call(RATE, True))

    def test_does_nothing_in_eval_or_at_rate_zero(self, call: Callable[[float, bool], Tensor]) -> None:
        assert torch.equal(call(RATE, False), torch.ones_like(call(RATE, False)))
        assert torch.equal(call(0.0, True), torch.ones_like(call(0.0, True)))


def test_embedding_dropout_drops_a_token_everywhere_or_nowhere() -> None:
    tokens = torch.randint(0, 50, (20, 30))
    out = embedding_dropout(tokens, torch.ones(50, 4), RATE, True)
    for token in range(50):
        rows = out[tokens == token]
        assert len(torch.unique(rows)) <= 1


def test_embedding_dropout_is_a_lookup_in_the_matrix_with_dropped_rows() -> None:
    tokens = torch.randint(0, 50, (6, 9))
    weight = torch.randn(50, 4, requires_grad=True)
    reference = weight.detach().clone().requires_grad_()
    torch.manual_seed(1)
    out = embedding_dropout(tokens, weight, RATE, True)
    torch.manual_seed(1)
    mask = torch.empty(50, 1).bernoulli_(1 - RATE) / (1 - RATE)
    expected = F.embedding(tokens, reference * mask)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(weight.grad, reference.grad, atol=1e-6)


def test_embedding_dropout_never_copies_the_matrix(largest_tensor: Any) -> None:
    """fastai multiplies the whole matrix by the mask for each batch."""
    weight = torch.randn(5000, 40)
    with largest_tensor() as largest:
        embedding_dropout(torch.randint(0, 5000, (4, 10)), weight, RATE, True)
    assert largest.numel == 5000  # the mask


def test_weight_dropout_passes_no_gradient_to_dropped_entries() -> None:
    weight = torch.ones(60, 60, requires_grad=True)
    out = weight_dropout(weight, RATE, True)
    out.sum().backward()
    assert torch.equal(weight.grad, out.detach())
    assert len(torch.unique(out.detach().bool(), dim=0)) == 60  # single entries, not rows


@pytest.mark.parametrize("rate", [0.25, RATE])
def test_weight_dropout_under_autocast_is_the_same_in_fewer_bits(rate: float) -> None:
    weight = torch.randn(37, 21, requires_grad=True)  # no multiple of four entries
    upstream = torch.randn(37, 21).bfloat16()
    torch.manual_seed(0)
    exact = weight_dropout(weight, rate, True)
    (expected,) = torch.autograd.grad(exact, weight, upstream.float())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = weight_dropout(weight, rate, True)
    (gradient,) = torch.autograd.grad(reduced, weight, upstream)
    assert torch.equal(reduced, exact.bfloat16())
    assert gradient.dtype == torch.float32 and torch.equal(gradient, expected)
