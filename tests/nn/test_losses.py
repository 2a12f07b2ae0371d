"""Cross-entropy in chunks equals torch's, in value and gradients, without ever holding all logits; AR and TAR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.nn import fused_cross_entropy, losses, openmp
from ulmfit.nn.losses import activation_regularisation, chunked_cross_entropy, summed_cross_entropy
from ulmfit.nn.processor import cpu_has_avx2

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With torch's operations, or compiled loops where they are for these types."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        if not (cpu_has_avx2() and openmp.is_available()):
            pytest.skip("nothing is compiled on this machine")
        monkeypatch.setattr(losses, "_LEAST_TO_COMPILE", 0)
    else:
        monkeypatch.setattr(fused_cross_entropy, "is_available", lambda kind: False)
    return str(request.param)


def problem(n: int, size: int, vocab: int, seed: int = 0, scale: float = 1.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, size, generator=generator).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator).mul_(scale).requires_grad_()
    bias = torch.randn(vocab, generator=generator).requires_grad_()
    return hidden, weight, bias, torch.randint(0, vocab, (n,), generator=generator)


def torch_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), targets)


def assert_close(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < relative, f"{what}: relative error {error:.2e}"


SIZES = [(1, 1), (1, 64), (15, 16), (16, 16), (17, 16), (32, 16), (33, 16), (100, 7), (100, 1000)]


@pytest.mark.parametrize(("n", "chunk"), SIZES)
def test_value_and_gradients_at_chunk_borders(n: int, chunk: int) -> None:
    inputs = problem(n, 5, 23)
    expected = torch_loss(*inputs)
    gradients = torch.autograd.grad(expected, inputs[:3])
    actual = chunked_cross_entropy(*inputs, chunk=chunk)
    assert actual.dtype == torch.float32 and actual.shape == ()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, mine, theirs in zip("hwb", torch.autograd.grad(actual, inputs[:3]), gradients, strict=True):
        assert_close(mine, theirs, 1e-5, name)


def test_value_and_gradients_at_random_sizes() -> None:
    generator = torch.Generator().manual_seed(4)
    for seed in range(40):
        n, size, vocab, chunk = (int(torch.randint(1, top, (), generator=generator)) for top in (90, 30, 200, 100))
        inputs = problem(n, size, vocab + 1, seed)
        expected, actual = torch_loss(*inputs), chunked_cross_entropy(*inputs, chunk=chunk)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6), (n, size, vocab, chunk)
        pairs = zip(torch.autograd.grad(actual, inputs[:3]), torch.autograd.grad(expected, inputs[:3]), strict=True)
        for mine, theirs in pairs:
            assert torch.allclose(mine, theirs, atol=2e-6, rtol=1e-4), (n, size, vocab, chunk)


def test_gradients_scale_with_what_comes_after_the_loss() -> None:
    inputs = problem(20, 5, 23)
    loss, reference = chunked_cross_entropy(*inputs, chunk=8), torch_loss(*inputs)
    for mine, theirs in zip(
        torch.autograd.grad(loss * 3 + loss**2, inputs[:3]),
        torch.autograd.grad(reference * 3 + reference**2, inputs[:3]),
        strict=True,
    ):
        assert_close(mine, theirs, 1e-5, "scaled")


def test_gradients_of_reduced_hidden_states_again_and_again() -> None:
    """What a backward pass returns is a copy of what the forward pass left, in the memory's usual order."""
    hidden, weight, bias, targets = problem(20, 5, 23)
    reduced = hidden.detach().bfloat16().requires_grad_()
    expected = torch.autograd.grad(torch_loss(reduced.float(), weight, bias, targets), (reduced, weight, bias))
    for dtype in (torch.bfloat16, torch.float32):
        actual = chunked_cross_entropy(reduced, weight, bias, targets, chunk=8, dtype=dtype)
        first, again = (torch.autograd.grad(actual, (reduced, weight, bias), retain_graph=True) for _ in range(2))
        for name, mine, same, theirs in zip("hwb", first, again, expected, strict=True):
            assert mine.is_contiguous() and torch.equal(mine, same)
            assert_close(mine, theirs, 0.02, name)


def test_only_the_gradients_asked_for() -> None:
    """A frozen embedding costs no (V, E) gradient."""
    hidden, weight, bias, targets = problem(20, 5, 23)
    weight = weight.detach()
    chunked_cross_entropy(hidden, weight, bias, targets, chunk=8).backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, bias, targets)
    assert not loss.requires_grad


def test_large_logits_do_not_overflow() -> None:
    inputs = problem(20, 5, 23, scale=1e3)
    loss = chunked_cross_entropy(*inputs, chunk=8)
    assert loss.item() == pytest.approx(torch_loss(*inputs).item(), rel=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, inputs[:3]))


@pytest.mark.parametrize("target", [-1, 23])
def test_a_target_that_is_no_piece(target: int) -> None:
    hidden, weight, bias, targets = problem(20, 5, 23)
    targets[17] = target
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|is no piece"):
        chunked_cross_entropy(hidden, weight, bias, targets, chunk=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Products in the autocast type, softmax and sums in float32, as close to float32 as torch's own autocast."""
    inputs = problem(300, 16, 500)
    expected = torch_loss(*inputs)
    gradients = torch.autograd.grad(expected, inputs[:3])
    with torch.autocast("cpu", dtype):
        actual = chunked_cross_entropy(*inputs, chunk=128)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=5e-3)
    for name, mine, theirs in zip("hwb", torch.autograd.grad(actual, inputs[:3]), gradients, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, 2e-2 if dtype == torch.bfloat16 else 4e-3, name)


def test_half_precision_gradients_do_not_underflow() -> None:
    """softmax / N lies below the smallest float16 (6e-8) for an ordinary batch; the loss scale must come first."""
    hidden, weight, bias, targets = problem(6000, 8, 3000, scale=0.05)
    expected = torch.autograd.grad(torch_loss(hidden, weight, bias, targets), (hidden, weight))
    half = hidden.detach().half().requires_grad_()
    loss = chunked_cross_entropy(half, weight, bias, targets, dtype=torch.float16)
    loss_scale = 2.0**16  # what a gradient scaler multiplies by before the backward pass
    got = torch.autograd.grad(loss * loss_scale, (half, weight))
    assert got[0].dtype == torch.float16
    assert_close(got[0].float() / loss_scale, expected[0], 1e-2, "hidden")
    assert_close(got[1] / loss_scale, expected[1], 1e-2, "weight")


def test_no_matrix_of_all_logits_exists(largest_tensor: Any, way: str) -> None:
    n, size, vocab, chunk = 512, 4, 1000, 32
    inputs = problem(n, size, vocab)
    with largest_tensor() as plain:
        torch_loss(*inputs).backward()
    assert plain.numel == n * vocab
    with largest_tensor() as chunked:
        chunked_cross_entropy(*inputs, chunk=chunk).backward()
    # Loops lay out rows and columns, also those of the matrix, in panels of 64, and numbers in up to three parts.
    assert chunked.numel == chunk * vocab if way == "torch" else chunked.numel <= 3 * 64 * (vocab + 63)
    with largest_tensor() as summed, torch.no_grad():
        summed_cross_entropy(*inputs, chunk=chunk)
    assert summed.numel == chunk * vocab


def test_summed_cross_entropy() -> None:
    inputs = problem(33, 5, 23)
    total = summed_cross_entropy(*inputs, chunk=8)
    expected = F.cross_entropy(F.linear(*inputs[:3]).double(), inputs[3], reduction="sum")
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


class TestActivationRegularisation:
    dropped = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    raw = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))

    def test_formula(self) -> None:
        """AR on the dropped, TAR on the raw outputs."""
        ar, tar = self.dropped.pow(2).mean(), (self.raw[:, 1:] - self.raw[:, :-1]).pow(2).mean()
        for alpha, beta in [(2.0, 1.0), (2.0, 0.0), (0.0, 1.0), (0.0, 0.0)]:
            penalty = activation_regularisation(self.dropped, self.raw, alpha, beta)
            assert penalty.item() == pytest.approx(float(alpha * ar + beta * tar), rel=1e-6)

    def test_a_single_step_has_no_difference(self) -> None:
        penalty = activation_regularisation(self.dropped[:, :1], self.raw[:, :1], 0.0, 1.0)
        assert penalty.item() == 0

    def test_mask_leaves_out_padding(self) -> None:
        """As if the documents had been given one by one, weighted by their tokens."""
        lengths = [5, 2, 1]
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        rows = torch.cat([self.dropped[i, :n] for i, n in enumerate(lengths)])
        steps = torch.cat([self.raw[i, 1:n] - self.raw[i, : n - 1] for i, n in enumerate(lengths)])
        penalty = activation_regularisation(self.dropped, self.raw, 2.0, 1.0, mask)
        assert penalty.item() == pytest.approx(float(2 * rows.pow(2).mean() + steps.pow(2).mean()), rel=1e-5)

    def test_nothing_but_padding_is_zero(self) -> None:
        mask = torch.zeros(3, 5, dtype=torch.bool)
        assert activation_regularisation(self.dropped, self.raw, 2.0, 1.0, mask).item() == 0

    def test_squares_are_float32_whatever_the_activations(self) -> None:
        big = torch.full((2, 3, 4), 300.0, dtype=torch.float16)  # 300 ** 2 overflows float16
        penalty = activation_regularisation(big, big, 1.0, 0.0)
        assert penalty.dtype == torch.float32 and penalty.item() == pytest.approx(90_000, rel=1e-3)
