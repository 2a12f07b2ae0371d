"""bfloat16 and int8 encoders: near float32, with states carried on, and refused where they do not work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ulmfit.errors import UsageError
from ulmfit.nn import reduced
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.processor import cpu_multiplies_bfloat16
from ulmfit.nn.reduced import Int8LSTM, reduce_precision, tokens_at_a_time

needs_bfloat16 = pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no bfloat16 units here")
PRECISIONS = [pytest.param("bf16", marks=needs_bfloat16), "int8"]


def encoders(precision: str) -> tuple[AWDLSTM, AWDLSTM]:
    """The same network with 32 bits and with fewer."""
    torch.manual_seed(0)
    exact = AWDLSTM(Architecture(50, 16, 32, 2)).eval()
    less = copy.deepcopy(exact)
    reduce_precision(less, precision)
    return exact, less


def tokens(rows: int = 7, steps: int = 9) -> Tensor:
    return torch.randint(50, (rows, steps), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 7])
def test_close_to_32_bits_and_state_carried_on(precision: str, rows: int) -> None:
    exact, less = encoders(precision)
    with torch.inference_mode():
        expected, _ = exact(tokens(rows))
        head, state = less(tokens(rows)[:, :4])
        tail, _ = less(tokens(rows)[:, 4:], state)
        found = torch.cat([head, tail], 1).float()
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


@needs_bfloat16
def test_bfloat16_result_of_a_row_does_not_depend_on_the_batch() -> None:
    _, less = encoders("bf16")
    with torch.inference_mode():
        together, _ = less(tokens())
        for row in range(len(together)):
            assert torch.allclose(less(tokens()[row : row + 1])[0][0].float(), together[row].float(), atol=2e-3)


@pytest.mark.parametrize(
    ("precision", "expected"), [("32", 4480), pytest.param("bf16", 8960, marks=needs_bfloat16), ("int8", 2240)]
)
def test_tokens_read_at_once(precision: str, expected: int) -> None:
    assert tokens_at_a_time(encoders(precision)[1]) == expected


def test_32_changes_nothing_and_auto_takes_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, same = encoders("32")
    assert torch.equal(exact(tokens())[0], same(tokens())[0])
    monkeypatch.setattr(reduced, "cpu_multiplies_bfloat16", lambda: False)
    assert encoders("auto")[1].embedding.weight.dtype == torch.float32
    monkeypatch.setattr(reduced, "cpu_multiplies_bfloat16", lambda: True)
    assert encoders("auto")[1].embedding.weight.dtype == torch.bfloat16


def test_int8_leaves_the_setting_of_the_engine_and_needs_no_float_weights() -> None:
    engine = torch.backends.quantized.engine
    _, less = encoders("int8")
    assert torch.backends.quantized.engine == engine
    assert [name for name, _ in less.named_parameters()] == ["embedding.weight"]


def test_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"precision is 'int9', expected one of 32, auto, bf16, int8; did you mean"):
        encoders("int9")
    monkeypatch.setattr(reduced, "cpu_multiplies_bfloat16", lambda: False)
    with pytest.raises(UsageError, match="no bfloat16 units; use precision=int8 or 32"):
        encoders("bf16")
    with pytest.raises(UsageError, match="works on the CPU, not on meta"):
        reduce_precision(AWDLSTM(Architecture(5, 4, 4, 1)).to("meta"), "int8")

    def missing(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(torch, "quantize_per_channel", missing)
    with pytest.raises(UsageError, match="no int8 LSTM for this processor; use precision=32"):
        Int8LSTM(nn.LSTM(4, 4, batch_first=True))
