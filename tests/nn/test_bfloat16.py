"""The bfloat16 training layer for processors without tiles, beside torch's float32 LSTM and torch's own bfloat16.

Each test runs with the cell in torch's operations and with the loops that Numba compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ulmfit.config import DropoutConfig
from ulmfit.nn import bfloat16, fused_lstm
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.processor import cpu_multiplies_bfloat16

pytestmark = pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no bfloat16 products on this processor")

State = tuple[Tensor, Tensor]


@pytest.fixture(params=["torch", "numba"], autouse=True)
def cell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numba":
        pytest.importorskip("numba")
        assert fused_lstm.is_available()
        monkeypatch.setattr(bfloat16, "LEAST_SIZE_TO_COMPILE", 1)
    else:
        monkeypatch.setattr(fused_lstm, "is_available", lambda: False)
        monkeypatch.setattr(bfloat16, "_LEAST_SIZE", 1)


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "cpu_has_tiles", lambda: False)


@pytest.fixture
def used(without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of inputs and state of each layer that is read with it."""
    found: list[tuple[int, int]] = []
    original = bfloat16.lstm

    def lstm(rnn: nn.LSTM, *rest: Any) -> Any:
        found.append((rnn.input_size, rnn.hidden_size))
        return original(rnn, *rest)

    monkeypatch.setattr(bfloat16, "lstm", lstm)
    return found


def _gradients(
    call: Callable[[Tensor, State | None], tuple[Tensor, State]],
    rnn: nn.LSTM,
    x: Tensor,
    state: State | None,
    reduced: bool,
) -> list[Tensor]:
    """Outputs, state, and gradients of a loss that all of them have a part in."""
    torch.manual_seed(5)
    weights = torch.randn(x.size(0), x.size(1), rnn.hidden_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        output, (h, c) = call(x, state)
    loss = (output.float() * weights).sum() + h.float().square().sum() + c.float().sum()
    inputs = [x, *rnn.parameters(), *(state or ())]
    gradients = torch.autograd.grad(loss, [each for each in inputs if each.requires_grad])
    return [output.detach().float(), h.detach().float(), c.detach().float(), *(each.float() for each in gradients)]


def _error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp(min=1e-9))


@pytest.mark.parametrize("steps", [1, 7, 25])  # with and without transposed weights laid out for all steps
@pytest.mark.parametrize(("rows", "width", "size"), [(1, 24, 32), (5, 33, 17), (64, 32, 48)])
@pytest.mark.parametrize("with_state", [False, True])
def test_as_close_to_float32_as_torchs_own_bfloat16(
    steps: int, rows: int, width: int, size: int, with_state: bool
) -> None:
    torch.manual_seed(1)
    rnn = nn.LSTM(width, size, batch_first=True)
    x = torch.randn(rows, steps, width, requires_grad=True)
    state = tuple(torch.randn(1, rows, size, requires_grad=True) for _ in range(2)) if with_state else None
    right = _gradients(rnn, rnn, x, state, False)
    usual = _gradients(rnn, rnn, x, state, True)
    found = _gradients(lambda x, s: bfloat16.lstm(rnn, 0.0, x, s), rnn, x, state, True)
    assert [each.shape for each in found] == [each.shape for each in right]
    for name, one, other, exact in zip(range(len(right)), found, usual, right, strict=True):
        assert _error(one, exact) < max(1.5 * _error(other, exact), 0.01), name


def test_dropped_weights_get_no_gradient_and_the_others_more() -> None:
    torch.manual_seed(2)
    rnn, x = nn.LSTM(8, 64, batch_first=True), torch.randn(3, 5, 8)
    gradients = []
    for rate in (0.0, 0.5, 0.5):
        (gradient,) = torch.autograd.grad(bfloat16.lstm(rnn, rate, x, None)[0].float().sum(), rnn.weight_hh_l0)
        gradients.append(gradient)
    assert (gradients[0] == 0).float().mean() < 0.01
    zeros = [(gradient == 0) for gradient in gradients[1:]]
    assert all(0.45 < each.float().mean() < 0.55 for each in zeros)
    assert 0.4 < (zeros[0] == zeros[1]).float().mean() < 0.6  # drawn anew in each call
    assert float(gradients[1].abs().sum() / gradients[0].abs().sum()) == pytest.approx(1, abs=0.3)


def test_torchs_seed_decides_which_weights_are_dropped() -> None:
    rnn, x = nn.LSTM(8, 64, batch_first=True), torch.randn(3, 5, 8)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(bfloat16.lstm(rnn, 0.5, x, None)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_types_and_memory_order_are_those_of_torchs_layer() -> None:
    rnn, x = nn.LSTM(8, 16, batch_first=True), torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        usual, found = rnn(x), bfloat16.lstm(rnn, 0.0, x, None)
    assert found[0].dtype == usual[0].dtype == torch.bfloat16
    assert found[0].shape == usual[0].shape and found[1][0].shape == usual[1][0].shape
    assert found[1][1].shape == usual[1][1].shape
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(bfloat16.lstm(rnn, 0.0, x, None)[0].sum(), x)
    assert gradient.dtype == torch.float32


def test_inputs_without_gradient_leave_the_others_as_they_are() -> None:
    """Where what is below is frozen, a smaller product is enough."""
    torch.manual_seed(3)
    rnn, x = nn.LSTM(24, 32, batch_first=True), torch.randn(4, 6, 24)
    call = lambda x, s: bfloat16.lstm(rnn, 0.0, x, s)  # noqa: E731
    frozen = _gradients(call, rnn, x, None, True)
    whole = _gradients(call, rnn, x.clone().requires_grad_(), None, True)
    for one, other in zip(frozen, [*whole[:3], *whole[4:]], strict=True):
        assert _error(one, other) < 0.01


def test_the_same_numbers_again() -> None:
    torch.manual_seed(4)
    rnn, x = nn.LSTM(24, 32, batch_first=True), torch.randn(4, 40, 24, requires_grad=True)
    call = lambda x, s: bfloat16.lstm(rnn, 0.0, x, s)  # noqa: E731
    for one, other in zip(_gradients(call, rnn, x, None, True), _gradients(call, rnn, x, None, True), strict=True):
        assert torch.equal(one, other)


def test_the_encoder_trains_with_it_and_is_read_with_what_is_compiled(used: list[tuple[int, int]]) -> None:
    encoder = AWDLSTM(Architecture(20, 8, 16, 3), DropoutConfig())
    tokens = torch.randint(20, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = encoder(tokens)
        output.float().sum().backward()
        assert [size for _, size in used] == [16, 16, 8]
        encoder(tokens, [(h.detach(), c.detach()) for h, c in state])
        assert len(used) == 6
        with torch.no_grad():
            encoder.eval()
            read, _ = encoder(tokens)
            assert len(used) == (9 if fused_lstm.is_available() else 6)
    usual, _ = encoder(tokens)  # in float32
    assert len(used) == (9 if fused_lstm.is_available() else 6)
    torch.testing.assert_close(read.float(), usual, rtol=0, atol=0.02 * float(usual.abs().max()))
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_frozen_layers_are_read_without_a_graph(used: list[tuple[int, int]]) -> None:
    encoder = AWDLSTM(Architecture(20, 8, 16, 3), DropoutConfig())
    for part in encoder.layers()[:2]:
        part.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = encoder(torch.randint(20, (3, 5)))
        output.float().sum().backward()
    assert [width for width, _ in used] == ([8, 16, 16] if fused_lstm.is_available() else [16, 16])
    assert not state[0][0].requires_grad and state[1][0].requires_grad
    assert encoder.rnns[0].get_parameter("weight_ih_l0").grad is None
    assert encoder.rnns[1].get_parameter("weight_ih_l0").grad is not None


@pytest.mark.parametrize("rows", [0, bfloat16._MOST_ROWS + 1])
def test_other_batches_are_left_to_torch(without_tiles: None, rows: int) -> None:
    rnn = nn.LSTM(4, 4, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert bfloat16.is_worth_it(rnn, torch.zeros(3, 2, 4))
        # Compiled loops were as fast or faster with up to 1,024 rows.
        assert bfloat16.is_worth_it(rnn, torch.zeros(rows, 2, 4)) == (rows > 0 and fused_lstm.is_available())
    assert not bfloat16.is_worth_it(rnn, torch.zeros(3, 2, 4))


def test_small_layers_are_left_to_torch(without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "LEAST_SIZE_TO_COMPILE", 8)
    monkeypatch.setattr(bfloat16, "_LEAST_SIZE", 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert bfloat16.is_worth_it(nn.LSTM(4, 8, batch_first=True), torch.zeros(3, 2, 4))
        assert not bfloat16.is_worth_it(nn.LSTM(4, 7, batch_first=True), torch.zeros(3, 2, 4))


def test_a_small_layer_compiles_nothing(without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> bool:
        raise AssertionError("compiled for a layer that trains in no time")

    monkeypatch.setattr(bfloat16, "LEAST_SIZE_TO_COMPILE", 128)
    monkeypatch.setattr(fused_lstm, "is_available", available)
    with torch.autocast("cpu", torch.bfloat16):
        bfloat16.is_worth_it(nn.LSTM(4, 8, batch_first=True), torch.zeros(3, 2, 4))
