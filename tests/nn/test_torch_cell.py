"""The cell in torch's operations of the bfloat16 training layer against the equations in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ulmfit.nn import torch_cell

HALF_A_STEP = 2.0**-8  # of bfloat16, relative


def _equations(sums: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (B, 4 H), cells after the step and outputs; the sum of the cell's gate is given twice as large."""
    i, f, g, o = sums.chunk(4, 1)
    gates = torch.cat([i.sigmoid(), f.sigmoid(), (g / 2).tanh(), o.sigmoid()], 1)
    i, f, g, o = gates.chunk(4, 1)
    after = f * before + i * g
    return gates, after, o * after.tanh()


def _forward(sums: Tensor, before: Tensor, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = before.shape
    both = torch.full((2, rows, width + size), 7.0, dtype=torch.bfloat16)
    cells = torch.stack([before, torch.zeros_like(before)])
    gates = sums.clone()
    torch_cell.forward_step(both, cells)(0, gates)
    assert (both[0] == 7).all() and (both[1, :, :width] == 7).all()  # inputs stay
    assert torch.equal(cells[0], before)
    return gates, cells[1], both[1, :, width:]


@settings(deadline=None)
@given(
    rows=st.integers(1, 5), size=st.integers(1, 70), spread=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99)
)
def test_forward(rows: int, size: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = (spread * torch.randn(rows, 4 * size, generator=generator)).bfloat16()
    before = 2 * torch.randn(rows, size, generator=generator)
    gates, after, outputs = _forward(sums, before)
    right = _equations(sums.double(), before.double())
    torch.testing.assert_close(gates.double(), right[0], rtol=1.01 * HALF_A_STEP, atol=1e-6)
    torch.testing.assert_close(after.double(), right[1], rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(outputs.double(), right[2], rtol=1.01 * HALF_A_STEP, atol=3e-6)


@settings(deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 70), seed=st.integers(0, 99))
def test_backward(rows: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    sums, before = draw(rows, 4 * size).bfloat16(), draw(rows, size)
    grad, through, grad_cell, bias = draw(1, rows, size), draw(rows, size), draw(rows, size), draw(4 * size)
    grad, through = grad.bfloat16(), through.bfloat16()
    gates, after, _ = _forward(sums, before)
    raw, of_cell, of_bias = torch.zeros(1, rows, 4 * size).bfloat16(), grad_cell.clone(), bias.clone()
    torch_cell.backward_step(torch.stack([before, after]), grad, raw, of_cell, of_bias)(0, gates, through)

    x, c = sums.double().requires_grad_(), before.double().requires_grad_()
    _, new, output = _equations(x, c)
    loss = (output * (grad[0].double() + through.double())).sum() + (new * grad_cell.double()).sum()
    of_x, of_c = torch.autograd.grad(loss, [x, c])
    of_x[:, 2 * size : 3 * size] *= 2  # of the sum itself
    close = {"rtol": 0.02, "atol": 0.02}  # the gates were rounded
    torch.testing.assert_close(raw[0].double(), of_x, **close)
    torch.testing.assert_close(of_cell.double(), of_c, **close)
    torch.testing.assert_close(of_bias.double(), bias.double() + of_x.sum(0), rtol=0.02, atol=0.1)


def test_extremes() -> None:
    """What overflowed saturates, and what is not a number is not hidden from those that look for it."""
    inf, nan = float("inf"), float("nan")
    sums = torch.tensor([[inf, inf, inf, inf], [-inf, -inf, -inf, -inf], [nan, 0, 0, 0], [0, 0, nan, 0]]).bfloat16()
    before = torch.tensor([[0.5], [1e30], [0.0], [0.0]])
    gates, after, outputs = _forward(sums, before)
    assert gates[0].tolist() == [1, 1, 1, 1] and gates[1, 2] == -1
    assert gates[1, [0, 1, 3]].abs().max() < 1e-6
    assert after[0].item() == pytest.approx(1.5, rel=1e-5)
    assert after[2:].isnan().all() and outputs[2:].isnan().all()
