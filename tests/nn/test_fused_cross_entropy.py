"""Cross-entropy as a compiled loop, against double precision on the numbers as it rounds them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ulmfit.config import DropoutConfig
from ulmfit.nn import fused_cross_entropy, fused_layer, fused_lstm
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.fused_cross_entropy import Found, cross_entropy
from ulmfit.nn.kinds import KINDS
from ulmfit.nn.models import LanguageModel

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="loops are compiled on Linux alone")


# What is multiplied for gradients is rounded to.
ROUNDING = {"fp32": 1e-5, "bf16x6": 1e-5, "bf16x3": 3e-4, "bf16": 2**-8}


def problem(kind: str, n: int, size: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, size, generator=generator) for rows in (n, vocab))
    dtype = fused_lstm.DTYPES[KINDS[kind].outside]
    hidden, weight = (each.to(dtype).float() for each in (hidden, 2 * size**-0.5 * weight))
    return hidden, weight, torch.randn(vocab, generator=generator), torch.randint(0, vocab, (n,), generator=generator)


def assert_right(found: Found, kind: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    """The loss comes from sums in float32; of what is multiplied for the gradients, each is rounded once more."""
    h, w, b = (each.double() for each in (hidden, weight, bias))
    logits = F.linear(h, w, b)
    assert found.total.dtype == torch.float64
    exact = F.cross_entropy(logits, targets, reduction="sum")
    assert found.total.item() == pytest.approx(
        exact.item(), rel=2e-5 if kind == "bf16x3" else 2e-6, abs=2e-4 if kind == "bf16x3" else 1e-5
    )
    terms = logits.softmax(1) - F.one_hot(targets, len(w))
    size = terms.abs() + 0.01  # what errors are in proportion to
    parts = ((terms @ w, size @ w.abs()), (terms.t() @ h, size.t() @ h.abs()), (terms.sum(0), size.sum(0)))
    for name, one, (right, bound) in zip(("hidden", "weight", "bias"), found[1:], parts, strict=True):
        assert one is not None and one.shape == right.shape
        rounding = 1e-5 if name == "bias" and kind == "bf16" else ROUNDING[kind]
        assert ((one.double() - right).abs() <= rounding * bound).all(), name


@settings(deadline=None)
@given(
    n=st.integers(1, 40), size=st.integers(1, 140), vocab=st.integers(2, 700), chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_value_and_gradients(kind: str, n: int, size: int, vocab: int, chunk: int, seed: int) -> None:
    inputs = problem(kind, n, size, vocab, seed)
    assert_right(cross_entropy(kind, *inputs, True, True, True, chunk), kind, *inputs)


def test_at_a_usual_size(kind: str) -> None:
    inputs = problem(kind, 1200, 100, 3001, 0)
    assert_right(cross_entropy(kind, *inputs, True, True, True), kind, *inputs)


def test_only_what_is_asked_for(kind: str) -> None:
    inputs = problem(kind, 50, 30, 200, 1)
    whole = cross_entropy(kind, *inputs, True, True, True, 16)
    for wanted in ((False, False, False), (True, False, False), (False, True, False), (False, False, True)):
        found = cross_entropy(kind, *inputs, *wanted, 16)
        assert torch.equal(found.total, whole.total)
        for asked, one, other in zip(wanted, found[1:], whole[1:], strict=True):
            assert (one is not None) == asked
            assert one is None or other is None or torch.equal(one, other)


def test_the_number_of_threads_changes_nothing_but_the_order_of_the_biass_sum(kind: str, threads: None) -> None:
    inputs, found = problem(kind, 70, 130, 900, 2), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(cross_entropy(kind, *inputs, True, True, True, 33))
    for other in found[1:]:
        for one, two in zip(found[0][:-1], other[:-1], strict=True):
            assert one is not None and two is not None and torch.equal(one, two)
        torch.testing.assert_close(found[0].grad_bias, other.grad_bias, rtol=1e-5, atol=1e-5)


def test_reduced_hidden_states(kind: str) -> None:
    """Their gradient is of their type."""
    hidden, *others = problem("bf16", 20, 30, 200, 3)
    found, whole = (cross_entropy(kind, h, *others, True, False, False) for h in (hidden.bfloat16(), hidden))
    assert found.grad_hidden is not None and whole.grad_hidden is not None
    assert found.grad_hidden.dtype == torch.bfloat16 and torch.equal(found.total, whole.total)
    assert torch.equal(found.grad_hidden, whole.grad_hidden.bfloat16())


def test_extremes(kind: str) -> None:
    """Large logits do not overflow, what cannot be is 0, and what is not a number is not hidden."""
    hidden, weight, bias, targets = problem(kind, 6, 4, 600, 4)
    bias[7], targets[0] = 1e30, 7
    found = cross_entropy(kind, hidden, weight, bias, targets, True, True, True)
    assert found.total.item() == pytest.approx(5e30, rel=1e-6)
    assert found.grad_bias is not None and found.grad_bias[7].item() == 5.0
    bias[7] = float("-inf")
    found = cross_entropy(kind, hidden[1:], weight, bias, targets[1:], True, True, True)
    assert found.total.isfinite() and found.grad_bias is not None and found.grad_bias[7].abs() < 1e-30
    hidden[1, 2] = float("nan")
    found = cross_entropy(kind, hidden, weight, bias, targets, True, True, True)
    assert found.total.isnan() and found.grad_hidden is not None
    assert found.grad_hidden[1].isnan().all() and found.grad_hidden[2:].isfinite().all()


def test_language_models_use_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def spied(kind: str, *given: object) -> Found:
        used.append(kind)
        return cross_entropy(kind, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(fused_cross_entropy, "cross_entropy", spied)
    monkeypatch.setattr(fused_layer, "kind_of_floats", lambda rows: kind)
    torch.manual_seed(0)
    model = LanguageModel(AWDLSTM(Architecture(9000, 128, 128, 1), DropoutConfig(multiplier=0.0)))
    tokens = torch.randint(0, 9000, (3, 9))
    for enough, precise in ((True, [kind]), (False, [])):
        monkeypatch.setattr(fused_layer, "cpu_has_avx2", lambda enough=enough: enough)
        monkeypatch.setattr(fused_layer, "cpu_multiplies_bfloat16", lambda enough=enough: enough)
        used.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            model.loss(tokens[:, :-1], tokens[:, 1:]).cross_entropy.backward()
        assert used == precise


def test_with_avx2_alone(passes_with_avx2_alone: Callable[[str, str], None]) -> None:
    """On a processor with longer registers, too, the tiles of shorter ones are right."""
    passes_with_avx2_alone(__file__, "fp32 and (value or usual or asked or threads or extremes)")


def test_without_tiles(passes_without_tiles: Callable[[str, str], None]) -> None:
    """On a processor with AMX, too, the vectors of one without are right."""
    passes_without_tiles(__file__, "bf16 and not bf16x and (value or threads or extremes)")
