"""Reading step by step equals `nn.LSTM`, and is only done where nothing is lost by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ulmfit.nn import stepwise


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (1, 7), (2, 40), (5, 1), (6, 5)])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_lstm(rows: int, steps: int, with_state: bool) -> None:
    torch.manual_seed(0)
    rnn = nn.LSTM(6, 10, batch_first=True)
    x = torch.randn(rows, steps, 6)
    state = (torch.randn(1, rows, 10), torch.randn(1, rows, 10)) if with_state else None
    kept = None if state is None else [part.clone() for part in state]
    with torch.inference_mode():
        assert stepwise.is_worth_it(rnn, x)
        expected, (h, c) = rnn(x, state)
        found, (h2, c2) = stepwise.lstm(rnn, x, state)
    for mine, theirs in ((found, expected), (h2, h), (c2, c)):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-6)
    assert state is None or all(torch.equal(a, b) for a, b in zip(state, kept or [], strict=True))


def test_not_for_gradients_other_types_or_much_to_read() -> None:
    rnn = nn.LSTM(6, 10, batch_first=True)
    assert not stepwise.is_worth_it(rnn, torch.randn(1, 3, 6))  # gradients are on
    with torch.no_grad():
        assert not stepwise.is_worth_it(rnn, torch.randn(8, 20, 6))
        assert not stepwise.is_worth_it(rnn, torch.randn(1, 1000, 6))
        assert not stepwise.is_worth_it(rnn, torch.randn(1, 3, 6).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not stepwise.is_worth_it(rnn, torch.randn(1, 3, 6))
