"""An LSTM layer in training as compiled loops: all steps in one call, on all threads.

A step is a product with weights laid out once, whose sums stay in float32 and become gates and states at once. Threads
meet once a step, which takes a microsecond. Needs the extra `fast`. The kind is that of what is kept and multiplied
(`kinds`): "fp32" needs AVX2, "bf16" AVX-512 BF16 or AMX, numbers in parts need AMX.

B texts, T steps, I inputs, H cells; gates are in torch's order: input, forget, cell, output.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ulmfit.nn import openmp, turned_gates
from ulmfit.nn.fused_loops import BLOCK, DRAWS, SUMS, kernels
from ulmfit.nn.kinds import KINDS, groups_of, whole
from ulmfit.nn.register_tiles import COLUMNS, LANES, NEIGHBOURS, panels_of
from ulmfit.nn.vectors import compiles

DTYPES = {name: torch.float32 if name == "fp32" else torch.bfloat16 for name in KINDS if name != "int8"}
_LINE = 64  # bytes in a line of the processor's cache
_LITTLE = 1 << 18  # products between two meetings of the threads that take less time than a meeting may
_compiled: set[str] = set()
_ROWS_AT_ONCE = 192  # of inputs, that are multiplied together
# Of a weight gradient's terms: a panel of so many stays in a core's cache. In float32 it is read from there faster.
_GROUPS_AT_ONCE = {"fp32": 576, "bf16": 1152, "bf16x3": 1152, "bf16x6": 1152}


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
        self.kind, self.dtype, self.parts = kind, DTYPES[kind], KINDS[kind].parts
        self.outside = DTYPES[KINDS[kind].outside]  # of what comes in and goes out
        (self.gates, self.width), self.size = weight_ih.shape, weight_hh.size(1)
        block = max(LANES, KINDS[kind].run)
        self.padded = -(-self.size // block) * block  # cells, up to a whole block of gates and a whole run
        self.state_at = whole(kind, self.width)
        self.columns = self.state_at + self.padded  # of inputs and state beside each other
        self.groups = groups_of(kind, self.columns)
        rows = 4 * self.padded or self.gates
        self.kept, self.seed = max(1, round((1 - rate) * DRAWS)), seed
        self.forward = self.panels(panels_of(rows), self.groups)
        of_back = panels_of(self.size) + panels_of(self.width)
        self.back = self.panels(of_back, groups_of(kind, rows)) if backward_too else None
        stride = self.odd_lines(self.columns) * self.dtype.itemsize
        room = COLUMNS * stride + -(-self.size * 4 // _LINE) * _LINE
        tiles = torch.empty(torch.get_num_threads(), room, dtype=torch.uint8)
        openmp.run(
            kernels(kind).prepare, weight_ih.float().contiguous(), weight_hh.float().contiguous(),
            self.gates, self.width, self.state_at, self.size, self.padded, self.kept, seed, tiles, stride,
            self.forward, 0 if self.back is None else self.back, alone=self.is_little(1),
        )  # fmt: skip

    def in_blocks(self, gates: Tensor) -> Tensor:
        """(4 H,) in torch's order -> (4 P,) as the loops have them: all gates of a block of cells, of the next."""
        padded = nn.functional.pad(gates.view(4, self.size), (0, self.padded - self.size))
        return padded.view(4, -1, LANES).transpose(0, 1).contiguous().view(-1)

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
        """Elements of a row of so many numbers, in an odd number of cache lines: rows do not push each other out."""
        line = _LINE // self.dtype.itemsize
        return (-(-numbers * self.parts // line) | 1) * line

    def put(self, x: Tensor, out: Tensor, at: int, filled: int) -> None:
        """(S, B, N) into rows (S, B, ...) of numbers of the kind, from the `at`-th on; behind them zeros to `filled`.

        Of numbers in parts, rows of `out` are next to each other.
        """
        n = x.size(-1)
        if self.parts == 1:
            out[..., at : at + n], out[..., at + n : at + filled] = x, 0
            return
        x = x.float()
        x = x if x.stride(-1) == 1 else x.contiguous()
        begin = out[..., at * self.parts :]
        openmp.run(
            kernels(self.kind).put, x.size(0), x.size(1), n, filled, x, x.stride(0) * x.itemsize,
            x.stride(1) * x.itemsize, begin, out.stride(1) * out.itemsize,
        )  # fmt: skip


def _steps_at_once(rows: int) -> int:
    """Of so many texts, steps whose inputs are multiplied together: weights are read less often."""
    return max(1, _ROWS_AT_ONCE // rows)


def forward(
    weights: Weights, bias: Tensor, both: Tensor, cells: Tensor, gates: Tensor, from_zero: bool = False
) -> Tensor:
    """Outputs (T, B, H) of all steps. P is H, up to a whole block of gates (`Weights.padded`).

    Cells behind the last are zeros. Of numbers in parts, tensors have `parts` elements for each; outputs are in
    float32.

    Args:
        bias: (4 H,) in float32.
        both: (T + 1, B, columns): inputs beside the state (P) before them, at `Weights.state_at` (zeros between
            them); the states after the first are filled in.
        cells: (T + 1, B, P) in float32; those after the first are filled in.
        gates: (T, B, 4 P), in blocks (`in_blocks`); filled in.
        from_zero: the first state is zeros, with which nothing is multiplied then.
    """
    (steps, rows, _), in_parts = gates.shape, weights.parts > 1
    ahead = _steps_at_once(rows)
    inputs = torch.empty(ahead * rows, 4 * weights.padded)
    outputs = torch.empty(steps, rows, weights.padded) if in_parts else both[1:, :, weights.state_at :]
    sums = torch.zeros(torch.get_num_threads(), rows, BLOCK)  # of no product, if the first state is zeros
    openmp.run(
        kernels(weights.kind).forward, steps, rows, weights.state_at, weights.padded, weights.groups,
        weights.forward, weights.in_blocks(bias), both, cells, gates, sums, inputs, ahead, int(from_zero), outputs,
        alone=weights.is_little(rows),
    )  # fmt: skip
    return outputs[..., : weights.size]


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
    (steps, rows, _), size, threads = gates.shape, weights.size, torch.get_num_threads()
    if weights.padded > size:
        grad = nn.functional.pad(grad, (0, weights.padded - size))
    grad = grad.contiguous()
    inputs = torch.empty(steps, rows, weights.width, dtype=weights.outside) if of_inputs else None
    state = torch.empty(rows, panels_of(size) * COLUMNS) if of_state else None
    at_once = _steps_at_once(rows)
    sums = torch.zeros(threads, at_once * rows, COLUMNS)  # of no product, before the first
    bias = torch.zeros(threads, 4 * weights.padded)
    openmp.run(
        kernels(weights.kind).backward, steps, rows, weights.padded, weights.width,
        panels_of(weights.width), weights.back, cells, gates, grad, grad_cell,
        0 if state is None else state, bias, 0 if inputs is None else inputs, sums, at_once,
        alone=weights.is_little(rows),
    )  # fmt: skip
    return None if state is None else state[:, :size], weights.from_blocks(bias.sum(0)), inputs


def weight_gradients(weights: Weights, raw: Tensor, both: Tensor, from_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Of the two matrices, in float32, from what `backward` left in `gates` and `forward` read."""
    kind, (steps, texts, _) = weights.kind, raw.shape
    rows = steps * texts
    times = max(1, -(-groups_of(kind, rows) // _GROUPS_AT_ONCE[kind]))
    at_once = whole(kind, -(-rows // times))
    groups = groups_of(kind, at_once)
    turned = torch.empty(turned_gates.room(kind, 4 * weights.padded, groups), dtype=torch.int32)
    packed = weights.panels(panels_of(weights.columns), groups)
    of_inputs = torch.empty(weights.gates, weights.width)
    of_state = torch.empty(weights.gates, weights.size)
    # More than is used, so that threads do not write into the same lines of the cache.
    sums = torch.empty(torch.get_num_threads(), SUMS // 4)
    openmp.run(
        kernels(weights.kind).weight_gradients, rows, weights.width, weights.state_at, weights.size, weights.padded,
        weights.kept, weights.seed, raw, both, turned, packed, sums, of_inputs, of_state,
        at_once, texts if from_zero else 0, alone=weights.is_little(rows),
    )  # fmt: skip
    return of_inputs, of_state
