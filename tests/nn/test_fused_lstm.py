"""The compiled layers against the equations in double precision, on the numbers as they round them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ulmfit.nn import fused_loops, fused_lstm, openmp, vectors
from ulmfit.nn.fused_loops import BLOCK
from ulmfit.nn.kinds import KINDS

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="loops are compiled on Linux alone")


# Relative, of a sum of products: float32's own, that of numbers in two parts (2^-17 for each product, where they cancel
# more of the sum; a product of parts that is missing changes 2^-9), and of what is rounded to 8 bits.
BOUNDS = {"fp32": 1e-5, "bf16x6": 1e-5, "bf16x3": 3e-4, "bf16": 0.02}


def in_parts(weights: fused_lstm.Weights, x: Tensor) -> Tensor:
    """(S, B, N), whole runs, in numbers of the layer's kind."""
    out = torch.empty(*x.shape[:2], x.size(2) * weights.parts, dtype=weights.dtype)
    weights.put(x, out, 0, x.size(2))
    return out


class Layer:
    """Weights, inputs and what the compiled loops make of them."""

    def __init__(
        self, kind: str, rows: int, steps: int, width: int, size: int, seed: int, rate: float = 0.0,
        from_zero: bool = False,
    ) -> None:  # fmt: skip
        dtype = fused_lstm.DTYPES[KINDS[kind].outside]
        torch.manual_seed(seed)
        self.rnn = nn.LSTM(width, size)
        self.x = torch.randn(steps, rows, width).to(dtype)
        self.h, self.c = torch.randn(rows, size).to(dtype) * (not from_zero), torch.randn(rows, size)
        self.bias = (self.rnn.bias_ih_l0 + self.rnn.bias_hh_l0).detach()
        self.weights = fused_lstm.Weights(
            kind, self.rnn.weight_ih_l0.data, self.rnn.weight_hh_l0.data, rate, 7 * seed + 1
        )
        parts, at = self.weights.parts, self.weights.state_at
        self.both = torch.full((steps + 1, rows, self.weights.columns * parts), 7.0, dtype=self.weights.dtype)
        self.weights.put(self.x, self.both[:steps], 0, at)
        self.weights.put(self.h[None], self.both[:1], at, self.weights.padded)
        self.inputs = self.both[..., : at * parts].clone()
        self.cells = torch.full((steps + 1, rows, self.weights.padded), 7.0)
        self.cells[0] = self.behind(self.c)
        self.gates = torch.empty(steps, rows, 4 * self.weights.padded * parts, dtype=self.weights.dtype)
        self.outputs = fused_lstm.forward(self.weights, self.bias, self.both, self.cells, self.gates, from_zero)

    def activations(self) -> Tensor:
        """Gates (T, B, 4 P) as the forward pass leaves them: those of numbers in parts are float32, block by block."""
        if self.weights.parts == 1:
            return self.gates
        blocks = self.gates.view(torch.float32).view(*self.gates.shape[:2], -1, BLOCK * self.weights.parts // 2)
        return blocks[..., :BLOCK].flatten(-2)

    def behind(self, cells: Tensor) -> Tensor:
        """Zeros behind (..., H), up to a whole block."""
        return nn.functional.pad(cells, (0, self.weights.padded - cells.size(-1)))

    def right(self, weight_hh: Tensor | None = None) -> tuple[nn.LSTM, tuple[Tensor, Tensor, Tensor]]:
        """The layer in double precision with weights rounded as ours are, and its inputs, all to differentiate."""
        twin = nn.LSTM(self.rnn.input_size, self.rnn.hidden_size).double()
        twin.load_state_dict(self.rnn.state_dict())
        with torch.no_grad():
            twin.weight_ih_l0.copy_(self.rnn.weight_ih_l0.to(self.x.dtype))
            twin.weight_hh_l0.copy_((self.rnn.weight_hh_l0 if weight_hh is None else weight_hh).to(self.x.dtype))
        x, h, c = (each.double().requires_grad_() for each in (self.x, self.h[None], self.c[None]))
        return twin, (x, h, c)


def _error(found: Tensor, right: Tensor, terms: int = 1) -> float:
    """Relative; where terms cancel, to what could have been."""
    return float((found.double() - right).norm() / right.norm().clamp(min=0.2 * (terms * right.numel()) ** 0.5))


shapes = given(
    rows=st.integers(1, 20), steps=st.integers(1, 5), width=st.integers(1, 140), size=st.integers(1, 140),
    seed=st.integers(0, 99), from_zero=st.booleans(),
)  # fmt: skip


@settings(deadline=None)
@shapes
def test_forward(kind: str, rows: int, steps: int, width: int, size: int, seed: int, from_zero: bool) -> None:
    layer = Layer(kind, rows, steps, width, size, seed, from_zero=from_zero)
    twin, (x, h, c) = layer.right()
    outputs, (_, last) = twin(x, (h, c))
    near = {"rtol": BOUNDS[kind], "atol": BOUNDS[kind] / 2}  # states are rounded
    torch.testing.assert_close(layer.outputs.double(), outputs.detach(), **near)
    torch.testing.assert_close(layer.cells[-1, :, :size].double(), last[0].detach(), **near)
    assert torch.equal(layer.both[..., : layer.inputs.size(-1)], layer.inputs) and (layer.inputs[-1] == 7).all()


def test_one_step_is_exact_to_the_rounding_of_its_results(kind: str) -> None:
    """Sums are in float32: only what is kept is rounded."""
    layer = Layer(kind, 23, 1, 130, 70, 3)
    rtol, atol = {"bf16": (1.01 * 2**-8, 3e-6), "bf16x3": (2e-5, 2e-5)}.get(kind, (3e-6, 3e-6))
    twin, (x, h, c) = layer.right()
    outputs, (_, last) = twin(x, (h, c))
    torch.testing.assert_close(layer.cells[1, :, :70].double(), last[0].detach(), rtol=atol, atol=atol)
    torch.testing.assert_close(layer.outputs.double(), outputs.detach(), rtol=rtol, atol=atol)
    sums = x[0] @ twin.weight_ih_l0.t() + h[0] @ twin.weight_hh_l0.t() + layer.bias.double()
    i, f, g, o = sums.detach().chunk(4, 1)
    gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
    found = layer.weights.from_blocks(layer.activations()[0])
    torch.testing.assert_close(found.double(), gates, rtol=rtol, atol=atol)


@settings(deadline=None)
@shapes
def test_gradients(kind: str, rows: int, steps: int, width: int, size: int, seed: int, from_zero: bool) -> None:
    layer = Layer(kind, rows, steps, width, size, seed, from_zero=from_zero)
    grad, grad_cell = torch.randn(steps, rows, size).to(layer.x.dtype), torch.randn(rows, size)
    of_cell = layer.behind(grad_cell)
    gates = layer.gates.clone()
    of_state, of_bias, of_x = fused_lstm.backward(layer.weights, layer.cells, gates, grad, of_cell, True, True)
    of_ih, of_hh = fused_lstm.weight_gradients(layer.weights, gates, layer.both, from_zero)
    twin, given_ = layer.right()
    outputs, (_, last) = twin(given_[0], given_[1:])
    loss = (outputs * grad.double()).sum() + (last[0] * grad_cell.double()).sum()
    right = torch.autograd.grad(loss, [*given_, *twin.parameters()])
    assert of_x is not None and of_state is not None
    # Of a gate near 1, rounding changes 1 - it by more than its own share; of many cells, that averages out.
    bound = BOUNDS[kind] * (4 if kind == "bf16" and rows * steps * size <= 20 else 1)
    for name, found, exact in zip(
        ("x", "h", "c", "weight_ih", "weight_hh", "bias"), (of_x, of_state, of_cell[:, :size], of_ih, of_hh, of_bias),
        right, strict=False,
    ):  # fmt: skip
        assert _error(found, exact.view(found.shape), rows * steps) < bound, name
    for of_inputs, of_first in ((False, True), (True, False), (False, False)):
        again_cell, again_raw = layer.behind(grad_cell), layer.gates.clone()
        again_state, again_bias, again_x = fused_lstm.backward(
            layer.weights, layer.cells, again_raw, grad, again_cell, of_inputs, of_first
        )
        assert torch.equal(again_raw, gates) and torch.equal(again_cell, of_cell) and torch.equal(again_bias, of_bias)
        assert (again_state is None) != of_first and (again_x is None) != of_inputs
        assert not of_first or torch.equal(_no_none(again_state), of_state)
        assert not of_inputs or torch.equal(_no_none(again_x), of_x)


def _no_none(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 7, 70])
def test_weight_gradients_in_parts(kind: str, from_zero: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of many rows are added up in parts that fit a core's cache."""
    layer = Layer(kind, 13, 8, 33, 70, 1, 0.3, from_zero)
    raw = in_parts(layer.weights, torch.randn(8, 13, 4 * layer.weights.padded))
    whole = fused_lstm.weight_gradients(layer.weights, raw, layer.both, from_zero)
    monkeypatch.setitem(fused_lstm._GROUPS_AT_ONCE, kind, at_once)
    for found, right in zip(fused_lstm.weight_gradients(layer.weights, raw, layer.both, from_zero), whole, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropped_weights(kind: str, rate: float) -> None:
    """Each pass drops the same ones, so many as it should, others with another seed, and keeps the mean."""
    width, size = 33, 250
    ones = torch.ones(4 * size, size)
    layer = Layer(kind, 3, 2, width, size, 1, rate)
    all_ones = [
        in_parts(layer.weights, torch.ones(steps, 3, n))
        for steps, n in ((2, 4 * layer.weights.padded), (3, layer.weights.columns))
    ]
    of_state = fused_lstm.weight_gradients(layer.weights, *all_ones)[1]
    kept = of_state > 0
    assert kept.float().mean() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / kept.numel()) ** 0.5)
    torch.testing.assert_close(of_state[kept], torch.full_like(of_state[kept], 6 / (1 - rate)), rtol=1e-3, atol=0)
    # The forward pass with a state that picks one column, and the backward pass with a gradient that picks one row.
    dropped = torch.where(kept, layer.rnn.weight_hh_l0.data / (1 - rate), torch.zeros(()))
    twin, (x, h, c) = layer.right(dropped)
    torch.testing.assert_close(layer.outputs.double(), twin(x, (h, c))[0].detach(), rtol=0.02, atol=0.01)
    grad = torch.randn(2, 3, size).to(layer.x.dtype)
    of_h = _no_none(
        fused_lstm.backward(
            layer.weights, layer.cells, layer.gates, grad, layer.behind(torch.zeros(3, size)), False, True
        )[0]
    )
    (right,) = torch.autograd.grad((twin(x, (h, c))[0] * grad.double()).sum(), h)
    assert _error(of_h, right[0]) < 0.02
    other = fused_lstm.Weights(kind, layer.rnn.weight_ih_l0.data, ones, rate, 2)
    another = fused_lstm.weight_gradients(other, *all_ones)[1] > 0
    agree = (kept == another).float().mean()
    assert agree == pytest.approx(rate**2 + (1 - rate) ** 2, abs=0.01)


def test_draws_of_neighbours_and_of_neighbouring_seeds_have_nothing_to_do_with_each_other(kind: str) -> None:
    size, rate = 128, 0.5
    matrix = torch.ones(4 * size, size)
    raw, both = (
        in_parts(fused_lstm.Weights(kind, matrix, matrix, 0.0, 0), torch.ones(steps, 1, n * size))
        for steps, n in ((1, 4), (2, 2))
    )
    masks = []
    for seed in (0, 1, 2, 1 << 32, 2 << 32, -1):
        weights = fused_lstm.Weights(kind, matrix, matrix, rate, seed)
        masks.append((fused_lstm.weight_gradients(weights, raw, both)[1] > 0).float() - 0.5)
    bound = 5 * 0.25 / masks[0].numel() ** 0.5
    for i, mask in enumerate(masks):
        flat = mask.flatten()
        for lag in (1, 2, 16, size, 2 * size):
            assert abs(float((flat[lag:] * flat[:-lag]).mean())) < bound, (i, lag)
        for other in masks[:i]:
            assert abs(float((mask * other).mean())) < bound
            assert abs(float((flat[1:] * other.flatten()[:-1]).mean())) < bound
        assert mask.mean(0).abs().max() < 0.3 and mask.mean(1).abs().max() < 0.3


def test_the_number_of_threads_changes_nothing_but_the_order_of_the_biass_sum(kind: str, threads: None) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        layer = Layer(kind, 13, 4, 150, 160, 5, 0.3)
        grad = torch.randn(4, 13, 160).to(layer.x.dtype)
        of_state, of_bias, of_x = fused_lstm.backward(
            layer.weights, layer.cells, layer.gates, grad, torch.zeros(13, 160), True, True
        )
        both = fused_lstm.weight_gradients(layer.weights, layer.gates, layer.both)
        found.append((layer.outputs, layer.cells, layer.gates, _no_none(of_state), _no_none(of_x), *both, of_bias))
    for other in found[1:]:
        for one, two in zip(found[0][:-1], other[:-1], strict=True):
            assert torch.equal(one, two)
        torch.testing.assert_close(found[0][-1], other[-1])


def test_extremes(kind: str) -> None:
    """What overflows saturates, and what is not a number is not hidden from those that look for it."""
    layer = Layer(kind, 4, 1, 4, 16, 0)
    inf, nan = float("inf"), float("nan")
    layer.cells[0] = torch.tensor([[0.5], [1e30], [0.0], [0.0]])
    layer.both[0, :2], layer.both[0, 2, 0], layer.both[0, 3] = 0, nan, 0
    for value, gate, cell in ((inf, 1.0, 1.5), (-inf, 0.0, -0.0)):
        bias = torch.full((64,), value)
        fused_lstm.forward(layer.weights, bias, layer.both, layer.cells, layer.gates)
        assert layer.activations()[0, 0, :16].float().sub(gate).abs().max() < 1e-6
        assert layer.cells[1, 0, :16].sub(cell).abs().max() < 1e-5
    outputs = fused_lstm.forward(layer.weights, torch.zeros(64), layer.both, layer.cells, layer.gates)
    assert layer.cells[1, 2, :16].isnan().all() and outputs[0, 2].isnan().all()
    assert layer.cells[1, 3].isfinite().all()


def test_without_a_numba_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(name: str) -> ModuleType:
        raise ImportError("Numba needs NumPy 2.4 or less")  # as it says it

    caches = (vectors.compiler, fused_loops.kernels, fused_lstm.is_available)
    for each in caches:
        each.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "import_module", refused)
        patch.setenv("ULMFIT_CACHE", str(tmp_path))  # where nothing is kept that would do without it
        assert not fused_lstm.is_available("fp32")
    assert "needs NumPy 2.4 or less" in caplog.text
    for each in caches:
        each.cache_clear()
    assert fused_lstm.is_available("fp32")


def test_without_an_openmp_that_loops_can_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on macOS and Windows: nothing is compiled, and nobody is told to do anything about it."""

    def missing() -> None:
        raise AttributeError("GOMP_parallel")

    openmp.is_available.cache_clear()
    fused_lstm.is_available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(openmp, "library", missing)
        assert not fused_lstm.is_available("fp32")
    assert not caplog.text
    openmp.is_available.cache_clear()
    fused_lstm.is_available.cache_clear()
    assert fused_lstm.is_available("fp32")


def test_importing_the_layer_does_not_import_numba() -> None:
    """It takes a third of a second, which only a training that uses it should spend."""
    code = "import sys, ulmfit.nn.fused_layer; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_with_avx2_alone(passes_with_avx2_alone: Callable[[str, str], None]) -> None:
    """On a processor with longer registers, too, the tiles of shorter ones are right."""
    passes_with_avx2_alone(__file__, "fp32 and (forward or gradients or dropped or threads)")


def test_without_tiles(passes_without_tiles: Callable[[str, str], None]) -> None:
    """On a processor with AMX, too, the vectors of one without are right."""
    passes_without_tiles(__file__, "bf16 and not bf16x and (forward or gradients or dropped or threads)")
