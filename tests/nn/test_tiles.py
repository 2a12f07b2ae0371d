"""Rows that are added for the processor's tiles change no output, state or gradient."""

from __future__ import annotations

import pytest
import torch

from ulmfit.config import DropoutConfig
from ulmfit.nn import awd_lstm
from ulmfit.nn import tiles as tiles_module
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.tiles import missing_rows, tiled_rows


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 1), (15, 15), (16, 16), (17, 20), (53, 56), (61, 64), (64, 64), (65, 80), (129, 144)]
)
def test_number_of_rows(rows: int, expected: int) -> None:
    assert tiled_rows(rows) == expected


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("rows", [17, 53, 64, 65])
def test_rows_are_added_only_in_bfloat16_on_tiles(rows: int, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "cpu_has_tiles", lambda: tiles)
    cpu, expected = torch.device("cpu"), tiled_rows(rows) - rows if tiles else 0
    assert missing_rows(rows, torch.float32, cpu) == 0
    assert missing_rows(rows, torch.bfloat16, cpu) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert missing_rows(rows, torch.float32, cpu) == expected


@pytest.mark.parametrize("rows", [19, 70])
def test_an_encoder_in_training_does_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        # Added rows would draw other masks of those dropouts that have one for each row.
        encoder = AWDLSTM(Architecture(50, 8, 12, 2), DropoutConfig(multiplier=0.5, input=0.0, hidden=0.0)).train()
        tokens = torch.randint(50, (rows, 9))
        with torch.autocast("cpu", torch.bfloat16):
            first, state = encoder(tokens)
            second, state = encoder(tokens, state)
        (first.float().square().sum() + second.float().square().sum()).backward()
        return second, *state[0], *state[1], *(parameter.grad for parameter in encoder.parameters())

    monkeypatch.setattr(tiles_module, "cpu_has_tiles", lambda: True)
    padded = step()
    monkeypatch.setattr(awd_lstm, "missing_rows", lambda *given: 0)
    plain = step()
    for mine, theirs in zip(padded, plain, strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine.float(), theirs.float(), rtol=0.02, atol=0.02 * float(theirs.detach().abs().max()))
