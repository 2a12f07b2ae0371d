"""An LSTM layer in training in bfloat16 as compiled loops: all steps in one call, on all threads.

A step is a product with weights laid out once, whose sums stay in float32, and one pass over the gates. Threads meet
twice a step, which takes a microsecond. Needs the extra `fast` and AVX-512 BF16.

B texts, T steps, I inputs, H cells; gates are in torch's order: input, forget, cell, output.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ulmfit.nn import openmp
from ulmfit.nn.fused_loops import DRAWS, kernels
from ulmfit.nn.register_tiles import COLUMNS, panels_of
from ulmfit.nn.vectors import compiles

_LINE = 32  # bfloat16 numbers in a line of the processor's cache


@cache
def is_available() -> bool:
    """Whether Numba is there and compiles the layer on this machine."""
    return compiles(kernels)


class Weights:
    """Matrices (4 H, I) and (4 H, H) in bfloat16 as the loops read them; of the second, `rate` dropped (DropConnect).

    Which are dropped follows from `seed` (64 bits) alone, so that the backward pass needs no mask.
    """

    def __init__(self, weight_ih: Tensor, weight_hh: Tensor, rate: float, seed: int, backward_too: bool = True) -> None:
        (self.gates, self.width), self.size = weight_ih.shape, weight_hh.size(1)
        self.pairs = (self.width + self.size + 1) // 2  # of inputs and state beside each other
        self.kept, self.seed = max(1, round((1 - rate) * DRAWS)), seed
        self.forward = _panels(panels_of(self.gates), self.pairs)
        self.back = _panels(panels_of(self.size) + panels_of(self.width), self.gates // 2) if backward_too else None
        stride = _odd_lines(2 * self.pairs)
        tiles = torch.empty(torch.get_num_threads(), COLUMNS, stride, dtype=torch.bfloat16)
        openmp.run(
            kernels().prepare, weight_ih.float().contiguous(), weight_hh.float().contiguous(),
            self.gates, self.width, self.size, self.kept, seed, tiles, stride,
            self.forward, 0 if self.back is None else self.back,
        )  # fmt: skip


def forward(weights: Weights, bias: Tensor, both: Tensor, cells: Tensor, gates: Tensor) -> None:
    """All steps.

    Args:
        bias: (4 H,) in float32.
        both: (T + 1, B, 2 pairs) in bfloat16: inputs beside the state before them (and a zero if I + H is odd); the
            states after the first are filled in.
        cells: (T + 1, B, H) in float32; those after the first are filled in.
        gates: (T, B, 4 H) in bfloat16; filled in.
    """
    steps, rows, _ = gates.shape
    sums = torch.empty(rows, panels_of(weights.gates) * COLUMNS)
    openmp.run(
        kernels().forward, steps, rows, weights.width, weights.size, weights.pairs,
        weights.forward, bias, both, cells, gates, sums,
    )  # fmt: skip


def backward(
    weights: Weights, cells: Tensor, gates: Tensor, grad: Tensor, grad_cell: Tensor, of_inputs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients before sigmoid and tanh (T, B, 4 H) in bfloat16; of the first state, bias and inputs (T, B, I).

    Args:
        cells, gates: as after `forward`.
        grad: (T, B, H) of the outputs, in bfloat16.
        grad_cell: (B, H) of the last cells, in float32; afterwards of the first.
        of_inputs: whether their gradients are wanted (in bfloat16); otherwise None.
    """
    assert weights.back is not None
    steps, rows, count = gates.shape
    raw, grad = torch.empty_like(gates), grad.contiguous()
    inputs = torch.empty(steps, rows, weights.width, dtype=torch.bfloat16) if of_inputs else None
    panels = panels_of(weights.size) + of_inputs * panels_of(weights.width)
    through = torch.zeros(rows, panels * COLUMNS)
    bias = torch.zeros(torch.get_num_threads(), count)
    openmp.run(
        kernels().backward, steps, rows, weights.size, weights.width, panels,
        weights.back, cells, gates, grad, grad_cell, raw, through, bias, raw if inputs is None else inputs,
    )  # fmt: skip
    return raw, through[:, : weights.size], bias.sum(0), inputs


def weight_gradients(weights: Weights, raw: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """Of the two matrices, in float32, from what `backward` returned and `forward` read."""
    rows = raw.size(0) * raw.size(1)
    pairs = (rows + 1) // 2
    stride = _odd_lines(2 * pairs)
    turned = torch.empty(weights.gates, stride, dtype=torch.bfloat16)
    packed = _panels(panels_of(2 * weights.pairs), pairs)
    of_inputs, of_state = torch.empty(weights.gates, weights.width), torch.empty(weights.gates, weights.size)
    sums = torch.empty(torch.get_num_threads(), COLUMNS, COLUMNS)  # more rows than are used: a page of its own for each
    openmp.run(
        kernels().weight_gradients, rows, weights.gates, weights.width, weights.size, weights.pairs,
        weights.kept, weights.seed, raw, both, turned, stride, packed, sums, of_inputs, of_state,
    )  # fmt: skip
    return of_inputs, of_state


def _panels(panels: int, pairs: int) -> Tensor:
    """Room for weights: of each 64 columns, one after the other, the pairs of each column."""
    return torch.empty(panels, pairs, COLUMNS, 2, dtype=torch.bfloat16)


def _odd_lines(numbers: int) -> int:
    """At least so many bfloat16 numbers, in an odd number of cache lines: such rows do not push each other out."""
    return (-(-numbers // _LINE) | 1) * _LINE
