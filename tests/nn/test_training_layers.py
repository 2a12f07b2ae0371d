"""Our LSTM layers in training, beside torch's float32 LSTM and torch's own bfloat16.

In bfloat16 with oneDNN's products and the cell in torch's operations; in bfloat16 and float32 as compiled loops, on
processors with tiles in bfloat16 that add up to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import needs
import pytest
import torch
from torch import Tensor, nn

from ulmfit.config import DropoutConfig
from ulmfit.nn import bfloat16, fused_layer, fused_lstm, matrix_tiles, openmp
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture

State = tuple[Tensor, Tensor]


class Kind:
    """One of the ways."""

    def __init__(self, name: str) -> None:
        self.compiled, self.name = name != "torch", name
        self.reduced = name in ("torch", "bf16")

    def lstm(self, rnn: nn.LSTM, rate: float, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        return fused_layer.lstm(self.name, rnn, rate, x, state) if self.compiled else bfloat16.lstm(rnn, rate, x, state)

    def is_worth_it(self, rnn: nn.Module, x: Tensor) -> bool:
        return fused_layer.kind_for(rnn, x) == self.name if self.compiled else bfloat16.is_worth_it(rnn, x)

    def precision(self) -> AbstractContextManager[Any]:
        """In which it is used."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.reduced)


@pytest.fixture(params=["torch", "bf16", "fp32", "bf16x3", "bf16x6"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    found = Kind(request.param)
    needs.products(found.name if found.compiled else "bf16")
    if not found.reduced:
        monkeypatch.setattr(fused_layer, "kind_of_floats", lambda rows: found.name)
    if found.compiled:
        pytest.importorskip("numba")
        if not openmp.is_available():
            pytest.skip("compiled loops need an OpenMP as on Linux")
        assert fused_lstm.is_available(found.name)
        monkeypatch.setattr(fused_layer, "LEAST_SIZE_TO_COMPILE", 1)
    else:
        monkeypatch.setattr(fused_lstm, "is_available", lambda kind: False)
        monkeypatch.setattr(bfloat16, "_LEAST_SIZE", 1)
    return found


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "cpu_has_tiles", lambda: False)


@pytest.fixture
def used(kind: Kind, without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of inputs and state of each layer that is read with it."""
    found: list[tuple[int, int]] = []
    module: Any = fused_layer if kind.compiled else bfloat16
    original = module.lstm

    def lstm(*given: Any) -> Any:
        rnn = next(each for each in given if isinstance(each, nn.LSTM))
        found.append((rnn.input_size, rnn.hidden_size))
        return original(*given)

    monkeypatch.setattr(module, "lstm", lstm)
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
    kind: Kind, steps: int, rows: int, width: int, size: int, with_state: bool
) -> None:
    torch.manual_seed(1)
    rnn = nn.LSTM(width, size, batch_first=True)
    x = torch.randn(rows, steps, width, requires_grad=True)
    state = tuple(torch.randn(1, rows, size, requires_grad=True) for _ in range(2)) if with_state else None
    right = _gradients(rnn, rnn, x, state, False)
    usual = _gradients(rnn, rnn, x, state, True)
    found = _gradients(lambda x, s: kind.lstm(rnn, 0.0, x, s), rnn, x, state, kind.reduced)
    assert [each.shape for each in found] == [each.shape for each in right]
    for name, one, other, exact in zip(range(len(right)), found, usual, right, strict=True):
        of_floats = 2e-5 if kind.name == "bf16x3" else 3e-6
        bound = max(1.5 * _error(other, exact), 0.01) if kind.reduced else of_floats
        assert _error(one, exact) < bound, name


def test_gradients_once_for_each_forward_pass(kind: Kind) -> None:
    """Compiled loops write them over what they are made of, and say so instead of giving others the second time."""
    rnn, x = nn.LSTM(8, 16, batch_first=True), torch.randn(3, 5, 8)
    loss = kind.lstm(rnn, 0.0, x, None)[0].float().sum()
    (first,) = torch.autograd.grad(loss, rnn.weight_hh_l0, retain_graph=True)
    if kind.compiled:
        with pytest.raises(RuntimeError, match="once for each forward pass"):
            torch.autograd.grad(loss, rnn.weight_hh_l0)
    else:
        assert torch.equal(torch.autograd.grad(loss, rnn.weight_hh_l0)[0], first)


def test_dropped_weights_get_no_gradient_and_the_others_more(kind: Kind) -> None:
    torch.manual_seed(2)
    rnn, x = nn.LSTM(8, 64, batch_first=True), torch.randn(3, 5, 8)
    gradients = []
    for rate in (0.0, 0.5, 0.5):
        (gradient,) = torch.autograd.grad(kind.lstm(rnn, rate, x, None)[0].float().sum(), rnn.weight_hh_l0)
        gradients.append(gradient)
    assert (gradients[0] == 0).float().mean() < 0.01
    zeros = [(gradient == 0) for gradient in gradients[1:]]
    assert all(0.45 < each.float().mean() < 0.55 for each in zeros)
    assert 0.4 < (zeros[0] == zeros[1]).float().mean() < 0.6  # drawn anew in each call
    assert float(gradients[1].abs().sum() / gradients[0].abs().sum()) == pytest.approx(1, abs=0.3)


def test_torchs_seed_decides_which_weights_are_dropped(kind: Kind) -> None:
    rnn, x = nn.LSTM(8, 64, batch_first=True), torch.randn(3, 5, 8)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(kind.lstm(rnn, 0.5, x, None)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_types_and_memory_order_are_those_of_torchs_layer(kind: Kind) -> None:
    rnn, x = nn.LSTM(8, 16, batch_first=True), torch.randn(3, 5, 8)
    with kind.precision():
        usual, found = rnn(x), kind.lstm(rnn, 0.0, x, None)
    assert found[0].dtype == usual[0].dtype == (torch.bfloat16 if kind.reduced else torch.float32)
    assert found[0].shape == usual[0].shape and found[1][0].shape == usual[1][0].shape
    assert found[1][1].shape == usual[1][1].shape
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(kind.lstm(rnn, 0.0, x, None)[0].sum(), x)
    assert gradient.dtype == torch.float32


def test_inputs_without_gradient_leave_the_others_as_they_are(kind: Kind) -> None:
    """Where what is below is frozen, a smaller product is enough."""
    torch.manual_seed(3)
    rnn, x = nn.LSTM(24, 32, batch_first=True), torch.randn(4, 6, 24)
    call = lambda x, s: kind.lstm(rnn, 0.0, x, s)  # noqa: E731
    frozen = _gradients(call, rnn, x, None, kind.reduced)
    whole = _gradients(call, rnn, x.clone().requires_grad_(), None, kind.reduced)
    for one, other in zip(frozen, [*whole[:3], *whole[4:]], strict=True):
        assert _error(one, other) < 0.01


def test_the_same_numbers_again(kind: Kind) -> None:
    torch.manual_seed(4)
    rnn, x = nn.LSTM(24, 32, batch_first=True), torch.randn(4, 40, 24, requires_grad=True)
    call = lambda x, s: kind.lstm(rnn, 0.0, x, s)  # noqa: E731
    for one, other in zip(
        _gradients(call, rnn, x, None, kind.reduced), _gradients(call, rnn, x, None, kind.reduced), strict=True
    ):
        assert torch.equal(one, other)


def test_the_encoder_trains_with_it_and_is_read_with_what_is_compiled(
    kind: Kind, used: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = AWDLSTM(Architecture(20, 8, 16, 3), DropoutConfig())
    tokens = torch.randint(20, (3, 9))
    with kind.precision():
        output, state = encoder(tokens)
        output.float().sum().backward()
        assert [size for _, size in used] == [16, 16, 8]
        encoder(tokens, [(h.detach(), c.detach()) for h, c in state])
        assert len(used) == 6
        with torch.no_grad():
            encoder.eval()
            read, _ = encoder(tokens)
            assert len(used) == (9 if kind.compiled else 6)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(fused_lstm, "is_available", lambda kind: False)
        usual, _ = encoder(tokens)  # in float32, torch's
    assert len(used) == (9 if kind.compiled else 6)
    torch.testing.assert_close(read.float(), usual, rtol=0, atol=0.02 * float(usual.abs().max()))
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_frozen_layers_are_read_without_a_graph(kind: Kind, used: list[tuple[int, int]]) -> None:
    encoder = AWDLSTM(Architecture(20, 8, 16, 3), DropoutConfig())
    for part in encoder.layers()[:2]:
        part.requires_grad_(False)
    with kind.precision():
        output, state = encoder(torch.randint(20, (3, 5)))
        output.float().sum().backward()
    assert [width for width, _ in used] == ([8, 16, 16] if kind.compiled else [16, 16])
    assert not state[0][0].requires_grad and state[1][0].requires_grad
    assert encoder.rnns[0].get_parameter("weight_ih_l0").grad is None
    assert encoder.rnns[1].get_parameter("weight_ih_l0").grad is not None


@pytest.mark.parametrize("rows", [0, bfloat16._MOST_ROWS + 1])
def test_other_batches_are_left_to_torch(kind: Kind, without_tiles: None, rows: int) -> None:
    rnn = nn.LSTM(4, 4, batch_first=True)
    with kind.precision():
        assert kind.is_worth_it(rnn, torch.zeros(3, 2, 4))
        # Compiled loops were as fast or faster with up to 1,024 rows.
        assert kind.is_worth_it(rnn, torch.zeros(rows, 2, 4)) == (rows > 0 and kind.compiled)
        assert not kind.is_worth_it(rnn, torch.zeros(3, 0, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=not kind.reduced):
        assert not kind.is_worth_it(rnn, torch.zeros(3, 2, 4))
    with torch.autocast("cpu", torch.float16):
        assert not kind.is_worth_it(rnn, torch.zeros(3, 2, 4))
    if not kind.reduced:
        assert not kind.is_worth_it(rnn.double(), torch.zeros(3, 2, 4, dtype=torch.float64))


def test_small_layers_are_left_to_torch(kind: Kind, without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layer, "LEAST_SIZE_TO_COMPILE", 8)
    monkeypatch.setattr(bfloat16, "_LEAST_SIZE", 8)
    with kind.precision():
        assert kind.is_worth_it(nn.LSTM(4, 8, batch_first=True), torch.zeros(3, 2, 4))
        assert not kind.is_worth_it(nn.LSTM(4, 7, batch_first=True), torch.zeros(3, 2, 4))


def test_a_small_layer_compiles_nothing(kind: Kind, without_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def available(kind: str) -> bool:
        raise AssertionError("compiled for a layer that trains in no time")

    monkeypatch.setattr(fused_layer, "LEAST_SIZE_TO_COMPILE", 128)
    monkeypatch.setattr(fused_lstm, "is_available", available)
    with kind.precision():
        kind.is_worth_it(nn.LSTM(4, 8, batch_first=True), torch.zeros(3, 2, 4))


def test_reading_alone_in_float32_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation or a prediction is over sooner; within a training, what it has compiled is used."""
    asked: list[str] = []
    monkeypatch.setattr(fused_lstm, "is_available", lambda kind: not asked.append(kind))
    monkeypatch.setattr(fused_lstm, "is_compiled", lambda kind: False)
    monkeypatch.setattr(fused_layer, "cpu_has_avx2", lambda: True)
    monkeypatch.setattr(fused_layer, "kind_of_floats", lambda rows: "fp32")
    rnn = nn.LSTM(4, 200, batch_first=True).eval()
    assert fused_layer.kind_for(rnn, torch.zeros(3, 9, 4)) is None and not asked
    monkeypatch.setattr(fused_lstm, "is_compiled", lambda kind: kind == "fp32")
    assert fused_layer.kind_for(rnn, torch.zeros(3, 9, 4)) == "fp32"


def test_processors_without_such_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lstm, "is_available", lambda kind: True)
    rnn, x = nn.LSTM(4, 200, batch_first=True), torch.zeros(3, 9, 4)
    for avx2 in (True, False):
        monkeypatch.setattr(fused_layer, "cpu_has_avx2", lambda avx2=avx2: avx2)
        assert fused_layer.kind_for(rnn, x) == ("fp32" if avx2 else None)
    for enough in (True, False):
        monkeypatch.setattr(fused_layer, "cpu_multiplies_bfloat16", lambda enough=enough: enough)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused_layer.kind_for(rnn, x) == ("bf16" if enough else None)
            assert fused_layer.reads_in_bfloat16([rnn], x.device) is enough
            assert not fused_layer.reads_in_bfloat16([rnn, nn.LSTM(4, 5)], x.device)
        assert not fused_layer.reads_in_bfloat16([rnn], x.device)


def test_float32_is_multiplied_in_parts_where_tiles_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many as torch's setting for the precision of such products asks for."""
    before = torch.get_float32_matmul_precision()
    try:
        for tiles, precision, name in (
            (True, "highest", "bf16x6"), (True, "high", "bf16x3"), (True, "medium", "bf16x3"), (False, "high", "fp32"),
        ):  # fmt: skip
            monkeypatch.setattr(matrix_tiles, "multiplies", lambda kind, tiles=tiles: tiles)
            torch.set_float32_matmul_precision(precision)
            assert fused_layer.kind_of_floats() == name
    finally:
        torch.set_float32_matmul_precision(before)


def test_few_rows_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in parts are longer, and reading them is what takes the time then."""
    monkeypatch.setattr(matrix_tiles, "multiplies", lambda kind: True)
    monkeypatch.setattr(fused_lstm, "is_available", lambda kind: True)
    monkeypatch.setattr(fused_layer, "cpu_has_avx2", lambda: True)
    rnn = nn.LSTM(4, 200, batch_first=True)
    for precision, least, name in (("highest", 32, "bf16x6"), ("high", 4, "bf16x3")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        found = [fused_layer.kind_for(rnn, torch.zeros(rows, 9, 4)) for rows in (1, least - 1, least, 100)]
        assert found == ["fp32", "fp32", name, name]


def test_where_torch_does_not_say_what_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises an error after `torch.backends.mkldnn.matmul.fp32_precision` was set, for one."""

    def refused() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(matrix_tiles, "multiplies", lambda kind: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refused)
    assert fused_layer.kind_of_floats() == "bf16x6"


@needs.numba
def test_three_parts_are_as_precise_as_float32() -> None:
    """Errors of outputs and gradients beside those of torch's float32, against double precision."""
    needs.products("bf16x6")
    torch.manual_seed(6)
    rnn = nn.LSTM(200, 300, batch_first=True)
    x = torch.randn(24, 30, 200, requires_grad=True)
    floats = _gradients(rnn, rnn, x, None, False)
    found = _gradients(lambda x, s: fused_layer.lstm("bf16x6", rnn, 0.0, x, s), rnn, x, None, False)
    twin = nn.LSTM(200, 300, batch_first=True).double()
    twin.load_state_dict(rnn.state_dict())
    output, (h, c) = twin(double := x.detach().double().requires_grad_())
    torch.manual_seed(5)
    weights = torch.randn(24, 30, 300)
    loss = (output * weights).sum() + h.square().sum() + c.sum()
    gradients = torch.autograd.grad(loss, [double, *twin.parameters()])
    for ours, torchs, right in zip(
        found, floats, [*(each.detach() for each in (output, h, c)), *gradients], strict=True
    ):
        errors = [float((each.double() - right).norm() / right.norm()) for each in (ours, torchs)]
        assert errors[0] < 1.1 * errors[1] and errors[0] < 1e-6
