"""Rows that are added for the processor's tiles change no output, state or gradient."""

from __future__ import annotations

import pytest
import torch

from ulmfit.config import DropoutConfig
from ulmfit.nn import awd_lstm
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.tiles import tiled_rows, whole_tiles


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 1), (15, 15), (16, 16), (17, 20), (53, 56), (61, 64), (64, 64), (65, 80), (129, 144)]
)
def test_number_of_rows(rows: int, expected: int) -> None:
    assert tiled_rows(rows) == expected


@pytest.mark.parametrize("rows", [17, 53, 64, 65])
def test_only_rows_are_added_and_only_in_bfloat16(rows: int) -> None:
    x, state = torch.randn(rows, 3, 4), (torch.randn(1, rows, 5), torch.randn(1, rows, 5))
    same, same_state = whole_tiles(x, state)
    assert same is x and same_state is state
    with torch.autocast("cpu", torch.bfloat16):
        more, more_state = whole_tiles(x, state)
        assert whole_tiles(x, None)[1] is None
    assert more.shape == (tiled_rows(rows), 3, 4) and torch.equal(more[:rows], x)
    assert more_state is not None
    for part, before in zip(more_state, state, strict=True):
        assert part.shape == (1, tiled_rows(rows), 5) and torch.equal(part[:, :rows], before)
    assert whole_tiles(x.bfloat16(), None)[0].shape == more.shape


@pytest.mark.parametrize("rows", [19, 70])
def test_an_encoder_in_training_does_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        encoder = AWDLSTM(Architecture(50, 8, 12, 2), DropoutConfig(multiplier=0.5)).train()
        tokens = torch.randint(50, (rows, 9))
        with torch.autocast("cpu", torch.bfloat16):
            first, state = encoder(tokens)
            second, state = encoder(tokens, state)
        (first.float().square().sum() + second.float().square().sum()).backward()
        return second, *state[0], *state[1], *(parameter.grad for parameter in encoder.parameters())

    padded = step()
    monkeypatch.setattr(awd_lstm, "whole_tiles", lambda x, state: (x, state))
    plain = step()
    for mine, theirs in zip(padded, plain, strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine.float(), theirs.float(), rtol=0.02, atol=0.02 * float(theirs.abs().max()))
