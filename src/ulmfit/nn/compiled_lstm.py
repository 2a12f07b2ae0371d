"""LSTM layers at work in bfloat16 or with 8-bit factors as compiled loops; needs the extra `fast` and AVX-512.

B texts, T steps, I inputs, H cells. What comes out for a text is the same to the last bit in any batch.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ulmfit.nn import openmp, reading_loops
from ulmfit.nn.processor import cpu_has_tiles, cpu_multiplies_bfloat16
from ulmfit.nn.register_tiles import COLUMNS, NEIGHBOURS, panels_of
from ulmfit.nn.vectors import compiles


@cache
def is_available(kind: str) -> bool:
    """Whether layers of this kind, "bf16" or "int8", can be had, and are faster than torch's."""
    if cpu_has_tiles() or not cpu_multiplies_bfloat16():
        return False
    return compiles(reading_loops.bfloat16 if kind == "bf16" else reading_loops.int8)


class CompiledLSTM(nn.Module):
    """A layer in eval mode; `forward` is that of `nn.LSTM`. Its weights are laid out once and not saved."""

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.width, self.hidden_size = rnn.input_size, rnn.hidden_size
        self._bias = (rnn.get_parameter("bias_ih_l0") + rnn.get_parameter("bias_hh_l0")).detach().float()

    def _begin(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(B, H) of the state before the first step, in float32; the cells are changed in place."""
        if state is None:
            return torch.zeros(x.size(0), self.hidden_size), torch.zeros(x.size(0), self.hidden_size)
        h, c = state[0][0].float().contiguous(), state[1][0].float().clone(memory_format=torch.contiguous_format)
        return h, c

    def _sums(self, rows: int) -> Tensor:
        return torch.empty(rows, panels_of(4 * self.hidden_size) * COLUMNS)


class CompiledBFloat16LSTM(CompiledLSTM):
    """Weights, inputs and states in bfloat16; sums, gates and cells in float32."""

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__(rnn)
        weights = torch.cat([rnn.get_parameter("weight_ih_l0"), rnn.get_parameter("weight_hh_l0")], 1)
        self._packed = _laid_out(weights.detach().bfloat16(), "bf16")

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, I) -> outputs (B, T, H) and the state ((1, B, H), (1, B, H)), the cells in float32."""
        rows, steps, width = x.shape
        h, c = self._begin(x, state)
        pairs, end = self._packed.size(1), width + self.hidden_size
        both = torch.empty(steps + 1, rows, 2 * pairs, dtype=torch.bfloat16)
        both[:steps, :, :width], both[0, :, width:end] = x.transpose(0, 1), h
        both[:, :, end:] = 0
        openmp.run(
            reading_loops.bfloat16(), steps, rows, width, self.hidden_size, pairs, self._packed,
            self._bias, both, c, self._sums(rows), torch.empty_like(c),
        )  # fmt: skip
        return both[1:, :, width:end].transpose(0, 1), (both[-1:, :, width:end].contiguous(), c[None])


class CompiledInt8LSTM(CompiledLSTM):
    """Weights in 8 bits with a scale for each row; inputs and states in 8 bits of each text's largest in that step."""

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__(rnn)
        self._x, self._scale_x = _quantised(rnn.get_parameter("weight_ih_l0").detach())
        self._h, self._scale_h = _quantised(rnn.get_parameter("weight_hh_l0").detach())

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, I) -> outputs (B, T, H) and the state ((1, B, H), (1, B, H)), in float32."""
        rows, steps, _ = x.shape
        h, c = self._begin(x, state)
        x = x.transpose(0, 1).contiguous()
        outputs = torch.empty(steps, rows, self.hidden_size)
        reduced_x = torch.zeros(steps * rows, self._x.size(1), NEIGHBOURS["int8"], dtype=torch.int8)
        reduced_h = torch.zeros(rows, self._h.size(1), NEIGHBOURS["int8"], dtype=torch.int8)
        openmp.run(
            reading_loops.int8(), steps, rows, self.width, self.hidden_size, x, outputs, c,
            self._x, self._h, self._scale_x, self._scale_h, self._bias, reduced_x, reduced_h,
            torch.empty(steps * rows, 2), torch.empty(rows, 2), self._sums(rows), self._sums(rows), h,
            self._sums(torch.get_num_threads()),
        )  # fmt: skip
        return outputs.transpose(0, 1), (outputs[-1:].clone() if steps else h[None], c[None])


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(4 H, I) -> unsigned bytes around 128 as the loops read them, and (4 H,) what a unit of each row is worth."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    shifted = (weight.float() / scale[:, None]).round() + 128
    return _laid_out(shifted.to(torch.uint8), "int8"), scale


def _laid_out(weight: Tensor, kind: str) -> Tensor:
    """(4 H, I) -> (panels, groups, columns, neighbours), with zeros for what is not there."""
    columns, inputs = weight.shape
    neighbours = NEIGHBOURS[kind]
    panels, groups = panels_of(columns), -(-inputs // neighbours)
    padded = weight.new_zeros(panels * COLUMNS, groups * neighbours)
    padded[:columns, :inputs] = weight
    return padded.view(panels, COLUMNS, groups, neighbours).transpose(1, 2).contiguous()
