"""An LSTM layer in training as compiled loops: all steps in one call, on all threads.

A step is a product with weights laid out once, whose sums stay in float32 and become gates and states at once. Threads
meet once a step, which takes a microsecond. Needs the extra `fast`. The kind is the type of what is kept and
multiplied: "fp32", which needs AVX2, or "bf16", which needs AVX-512 BF16 or AMX.

B texts, T steps, I inputs, H cells; gates are in torch's order: input, forget, cell, output.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ulmfit.nn import openmp, turned_gates
from ulmfit.nn.fused_loops import BLOCK, DRAWS, kernels
from ulmfit.nn.register_tiles import COLUMNS, LANES, NEIGHBOURS, panels_of
from ulmfit.nn.vectors import compiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LINE = 64  # bytes in a line of the processor's cache
_LITTLE = 1 << 18  # products between two meetings of the threads that take less time than a meeting may
_compiled: set[str] = set()
_ROWS_AT_ONCE = 192  # of inputs, that are multiplied together
# Of a weight gradient's terms: a panel of so many stays in a core's cache. In float32 it is read from there faster.
_GROUPS_AT_ONCE = {"fp32": 576, "bf16": 1152}


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
        self.padded = -(-self.size // LANES) * LANES  # cells, up to a whole block of gates
        self.state_at = -(-self.width // neighbours) * neighbours  # inputs, up to a whole group
        self.columns = self.state_at + self.padded  # of inputs and state beside each other
        self.groups = self.columns // neighbours
        rows = 4 * self.padded or self.gates
        self.kept, self.seed = max(1, round((1 - rate) * DRAWS)), seed
        self.forward = self.panels(panels_of(rows), self.groups)
        of_back = panels_of(self.size) + panels_of(self.width)
        self.back = self.panels(of_back, -(-rows // neighbours)) if backward_too else None
        stride = self.odd_lines(self.columns)
        tiles = torch.empty(torch.get_num_threads(), COLUMNS, stride, dtype=self.dtype)
        openmp.run(
            kernels(kind).prepare, weight_ih.float().contiguous(), weight_hh.float().contiguous(),
            self.gates, self.width, self.state_at, self.size, self.padded, self.kept, seed, tiles, stride,
            self.forward, 0 if self.back is None else self.back, alone=self.is_little(1),
        )  # fmt: skip

    def in_blocks(self, gates: Tensor) -> Tensor:
        """(4 H,) in torch's order -> (4 P,) as the loops have them: all gates of a block of cells, of the next."""
        whole = nn.functional.pad(gates.view(4, self.size), (0, self.padded - self.size))
        return whole.view(4, -1, LANES).transpose(0, 1).contiguous().view(-1)

    def from_blocks(self, gates: Tensor) -> Tensor:
        """(..., 4 P) -> (..., 4 H)."""
        of_each = gates.view(*gates.shape[:-1], -1, 4, LANES).transpose(-3, -2).flatten(-2)
        return of_each[..., : self.size].flatten(-2)

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


def _steps_at_once(rows: int) -> int:
    """Of so many texts, steps whose inputs are multiplied together: weights are read less often."""
    return max(1, _ROWS_AT_ONCE // rows)


def forward(
    weights: Weights, bias: Tensor, both: Tensor, cells: Tensor, gates: Tensor, from_zero: bool = False
) -> None:
    """All steps. P is H, up to a whole block of gates (`Weights.padded`); cells behind the last are zeros.

    Args:
        bias: (4 H,) in float32.
        both: (T + 1, B, columns): inputs beside the state (P) before them, at `Weights.state_at` (zeros between
            them); the states after the first are filled in.
        cells: (T + 1, B, P) in float32; those after the first are filled in.
        gates: (T, B, 4 P), in blocks (`in_blocks`); filled in.
        from_zero: the first state is zeros, with which nothing is multiplied then.
    """
    steps, rows, _ = gates.shape
    ahead = _steps_at_once(rows)
    inputs = torch.empty(ahead * rows, gates.size(2))
    sums = torch.zeros(torch.get_num_threads(), rows, BLOCK)  # of no product, if the first state is zeros
    openmp.run(
        kernels(weights.kind).forward, steps, rows, weights.state_at, weights.padded, weights.groups,
        weights.forward, weights.in_blocks(bias), both, cells, gates, sums, inputs, ahead, int(from_zero),
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
        grad_cell: (B, P) of the last cells, in float32; afterwards of the first.
        of_inputs, of_state: whether their gradients are wanted; otherwise None.
    """
    assert weights.back is not None
    (steps, rows, count), size, threads = gates.shape, weights.size, torch.get_num_threads()
    if weights.padded > size:
        grad = nn.functional.pad(grad, (0, weights.padded - size))
    grad = grad.contiguous()
    inputs = torch.empty(steps, rows, weights.width, dtype=weights.dtype) if of_inputs else None
    state = torch.empty(rows, panels_of(size) * COLUMNS) if of_state else None
    at_once = _steps_at_once(rows)
    sums = torch.zeros(threads, at_once * rows, COLUMNS)  # of no product, before the first
    bias = torch.zeros(threads, count)
    openmp.run(
        kernels(weights.kind).backward, steps, rows, weights.padded, weights.width,
        panels_of(weights.width), weights.back, cells, gates, grad, grad_cell,
        0 if state is None else state, bias, 0 if inputs is None else inputs, sums, at_once,
        alone=weights.is_little(rows),
    )  # fmt: skip
    return None if state is None else state[:, :size], weights.from_blocks(bias.sum(0)), inputs


def weight_gradients(weights: Weights, raw: Tensor, both: Tensor, from_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Of the two matrices, in float32, from what `backward` left in `gates` and `forward` read."""
    steps, texts, gates = raw.shape
    rows, neighbours = steps * texts, NEIGHBOURS[weights.kind]
    parts = max(1, -(-rows // (neighbours * _GROUPS_AT_ONCE[weights.kind])))
    groups = -(-rows // (neighbours * parts))
    turned = torch.empty(turned_gates.room(weights.kind, gates, groups), dtype=torch.int32)
    packed = weights.panels(panels_of(weights.columns), groups)
    of_inputs = torch.empty(weights.gates, weights.width)
    of_state = torch.empty(weights.gates, weights.size)
    # More rows than are used, so that threads do not write into the same lines of the cache.
    sums = torch.empty(torch.get_num_threads(), COLUMNS, COLUMNS)
    openmp.run(
        kernels(weights.kind).weight_gradients, rows, weights.width, weights.state_at, weights.size, weights.padded,
        weights.kept, weights.seed, raw, both, turned, packed, sums, of_inputs, of_state,
        neighbours * groups, texts if from_zero else 0, alone=weights.is_little(rows),
    )  # fmt: skip
    return of_inputs, of_state
