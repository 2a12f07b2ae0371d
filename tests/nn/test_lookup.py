"""Several lookups in an embedding give the gradient that torch's own give, in one matrix."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.lookup import Lookups
from ulmfit.nn.models import TextClassifier


def test_gradient_is_torchs() -> None:
    weight = torch.randn(11, 3, requires_grad=True)
    tokens = [torch.randint(0, 11, (4, 5)).t(), torch.tensor([[2, 2, 2]]), torch.randint(0, 11, (7, 1))]
    upstream = [torch.randn(*each.shape, 3) for each in tokens]
    (expected,) = torch.autograd.grad([F.embedding(each, weight) for each in tokens], weight, upstream)
    lookups = Lookups(weight)
    rows = [lookups(each) for each in tokens]
    for again in (True, False):  # a second backward pass starts from zeros
        (actual,) = torch.autograd.grad(rows, weight, upstream, retain_graph=again)
        assert torch.allclose(actual, expected, atol=1e-6)
    assert torch.equal(rows[0], F.embedding(tokens[0], weight))


def test_lookups_without_gradients() -> None:
    lookups = Lookups(torch.randn(11, 3))
    assert not lookups(torch.tensor([1])).requires_grad
    weight = torch.randn(11, 3, requires_grad=True)
    lookups = Lookups(weight)
    with torch.no_grad():
        lookups(torch.tensor([1]))
    lookups(torch.tensor([2])).sum().backward()
    assert weight.grad is not None and weight.grad.nonzero()[:, 0].unique().tolist() == [2]


def test_nothing_waits_for_the_garbage_collector() -> None:
    weight = torch.randn(11, 3, requires_grad=True)
    lookups = Lookups(weight)
    rows = lookups(torch.tensor([1, 2]))
    rows.sum().backward()
    gone = weakref.ref(lookups)
    gc.disable()
    try:
        del lookups, rows
        assert gone() is None
    finally:
        gc.enable()


def test_a_long_document_makes_one_gradient_of_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextClassifier(AWDLSTM(Architecture(500, 6, 8, 2)), ClassifierHead(18, 5, 2), bptt=5, max_len=100).train()
    made: list[Any] = []
    original = torch.Tensor.new_zeros

    def new_zeros(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made.append(shape)
        return original(self, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    model(torch.randint(0, 500, (2, 40)), torch.tensor([40, 37])).sum().backward()
    assert made.count((500, 6)) == 1
    assert model.encoder.embedding.weight.grad is not None
