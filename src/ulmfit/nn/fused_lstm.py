"""An LSTM layer in training as compiled loops: all steps in one call, on all threads.

A step is a product with weights laid out once, whose sums stay in float32, and one pass over the gates. Threads meet
twice a step, which takes a microsecond. Needs the extra `fast`. The kind is the type of what is kept and multiplied:
"fp32", which needs AVX2, or "bf16", which needs AVX-512 BF16.

B texts, T steps, I inputs, H cells; gates are in torch's order: input, forget, cell, output.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ulmfit.nn import openmp
from ulmfit.nn.fused_loops import DRAWS, kernels
from ulmfit.nn.register_tiles import COLUMNS, NEIGHBOURS, panels_of
from ulmfit.nn.vectors import compiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LINE = 64  # bytes in a line of the processor's cache
_LITTLE = 1 << 18  # products between two meetings of the threads that take less time than a meeting may
_compiled: set[str] = set()
_GROUPS_AT_ONCE = 1152  # of a weight gradient's terms: a panel of so many stays in a core's cache


@cache
def is_available(kind: str) -> bool:
    """Whether Numba is there and compiles the layer on this machine."""
    found = compiles(lambda: kernels(kind))
    if found:
        _compiled.add(kind)
    return found


def is_compiled(kind: str) -> bool:
    """Whether that has been asked in this process, and is so: then nothing needs to be compiled."""
    return kind in _compiled


class Weights:
    """Matrices (4 H, I) and (4 H, H) as the loops read them; of the second, `rate` dropped (DropConnect).

    A decoder's (V, E) is laid out alike, beside one of (V, 0).

    Which are dropped follows from `seed` (64 bits) alone, so that the backward pass needs no mask.
    """

    def __init__(
        self, kind: str, weight_ih: Tensor, weight_hh: Tensor, rate: float, seed: int, backward_too: bool = True
    ) -> None:
        self.kind, self.dtype = kind, DTYPES[kind]
        (self.gates, self.width), self.size = weight_ih.shape, weight_hh.size(1)
        neighbours = NEIGHBOURS[kind]
        self.groups = -(-(self.width + self.size) // neighbours)  # of inputs and state beside each other
        self.columns = self.groups * neighbours
        self.kept, self.seed = max(1, round((1 - rate) * DRAWS)), seed
        self.forward = self.panels(panels_of(self.gates), self.groups)
        of_back = panels_of(self.size) + panels_of(self.width)
        self.back = self.panels(of_back, -(-self.gates // neighbours)) if backward_too else None
        stride = self.odd_lines(self.columns)
        tiles = torch.empty(torch.get_num_threads(), COLUMNS, stride, dtype=self.dtype)
        openmp.run(
            kernels(kind).prepare, weight_ih.float().contiguous(), weight_hh.float().contiguous(),
            self.gates, self.width, self.size, self.kept, seed, tiles, stride,
            self.forward, 0 if self.back is None else self.back, alone=self.is_little(1),
        )  # fmt: skip

    def is_little(self, rows: int) -> bool:
        """Whether a product with so many rows is too little to share out."""
        return rows * self.gates * self.columns < _LITTLE

    def panels(self, panels: int, groups: int) -> Tensor:
        """Room for factors: of the columns of each panel, the groups one after the other."""
        return torch.empty(panels, groups, COLUMNS, NEIGHBOURS[self.kind], dtype=self.dtype)

    def odd_lines(self, numbers: int) -> int:
        """At least so many numbers, in an odd number of cache lines: such rows do not push each other out."""
        line = _LINE // self.dtype.itemsize
        return (-(-numbers // line) | 1) * line


def forward(
    weights: Weights, bias: Tensor, both: Tensor, cells: Tensor, gates: Tensor, from_zero: bool = False
) -> None:
    """All steps.

    Args:
        bias: (4 H,) in float32.
        both: (T + 1, B, columns): inputs beside the state before them (and a zero for a pair that is not whole); the
            states after the first are filled in.
        cells: (T + 1, B, H) in float32; those after the first are filled in.
        gates: (T, B, 4 H); filled in.
        from_zero: the first state is zeros, with which nothing is multiplied then.
    """
    steps, rows, _ = gates.shape
    sums = torch.empty(rows, panels_of(weights.gates) * COLUMNS)
    openmp.run(
        kernels(weights.kind).forward, steps, rows, weights.width, weights.size, weights.groups,
        weights.forward, bias, both, cells, gates, sums, int(from_zero),
        alone=weights.is_little(rows),
    )  # fmt: skip


def backward(
    weights: Weights, cells: Tensor, gates: Tensor, grad: Tensor, grad_cell: Tensor, of_inputs: bool, of_state: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of the first state (B, H), bias and inputs (T, B, I).

    Args:
        cells: as after `forward`.
        gates: as after `forward`; afterwards gradients before sigmoid and tanh, which take as much memory.
        grad: (T, B, H) of the outputs.
        grad_cell: (B, H) of the last cells, in float32; afterwards of the first.
        of_inputs, of_state: whether their gradients are wanted; otherwise None.
    """
    assert weights.back is not None
    steps, rows, count = gates.shape
    grad = grad.contiguous()
    inputs = torch.empty(steps, rows, weights.width, dtype=weights.dtype) if of_inputs else None
    panels = panels_of(weights.size) + of_inputs * panels_of(weights.width)
    through = torch.zeros(rows, panels * COLUMNS)
    bias = torch.zeros(torch.get_num_threads(), count)
    openmp.run(
        kernels(weights.kind).backward, steps, rows, weights.size, weights.width, panels,
        weights.back, cells, gates, grad, grad_cell, through, bias, 0 if inputs is None else inputs,
        int(of_state), alone=weights.is_little(rows),
    )  # fmt: skip
    return through[:, : weights.size] if of_state else None, bias.sum(0), inputs


def weight_gradients(weights: Weights, raw: Tensor, both: Tensor, from_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Of the two matrices, in float32, from what `backward` left in `gates` and `forward` read."""
    steps, texts, _ = raw.shape
    rows, neighbours = steps * texts, NEIGHBOURS[weights.kind]
    parts = max(1, -(-rows // (neighbours * _GROUPS_AT_ONCE)))
    groups = -(-rows // (neighbours * parts))
    stride = weights.odd_lines(neighbours * groups)
    turned = torch.empty(weights.gates, stride, dtype=weights.dtype)
    packed = weights.panels(panels_of(weights.columns), groups)
    of_inputs, of_state = torch.empty(weights.gates, weights.width), torch.empty(weights.gates, weights.size)
    # More rows than are used, so that threads do not write into the same lines of the cache.
    sums = torch.empty(torch.get_num_threads(), COLUMNS, COLUMNS)
    openmp.run(
        kernels(weights.kind).weight_gradients, rows, weights.gates, weights.width, weights.size, weights.groups,
        weights.kept, weights.seed, raw, both, turned, stride, packed, sums, of_inputs, of_state,
        neighbours * groups, texts if from_zero else 0, alone=weights.is_little(rows),
    )  # fmt: skip
    return of_inputs, of_state
