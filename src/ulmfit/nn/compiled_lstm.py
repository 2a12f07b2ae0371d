"""LSTM layers at work as compiled loops: in bfloat16, in parts of it, or with 8-bit factors. Need AVX-512 and Numba.

B texts, T steps, N rows of all steps together, I inputs, H cells. What comes out for a text is the same to the last
bit in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulmfit.nn import matrix_tiles, openmp, reading_loops
from ulmfit.nn.intrinsics import CELLS
from ulmfit.nn.kinds import KINDS, groups_of
from ulmfit.nn.prefix_tree import PrefixTree, prefix_tree
from ulmfit.nn.processor import cpu_multiplies_bfloat16
from ulmfit.nn.reading_loops import AHEAD, SCRATCH
from ulmfit.nn.register_tiles import COLUMNS, NEIGHBOURS
from ulmfit.nn.vectors import compiles

State = list[tuple[Tensor, Tensor]]
_ROWS_A_CALL = 8192  # bounds the memory that reading long documents takes


@cache
def is_available(kind: str) -> bool:
    """Whether layers of this kind can be had, and are faster than torch's."""
    if not (matrix_tiles.multiplies(kind) if KINDS[kind].parts > 1 else cpu_multiplies_bfloat16()):
        return False
    return compiles(lambda: reading_loops.layer(kind))


class CompiledLSTM(nn.Module):
    """A layer in eval mode; `forward` is that of `nn.LSTM`. Its weights are laid out once and not saved."""

    kind: ClassVar[str]
    number: ClassVar[torch.dtype]  # of what is multiplied

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.width, self.hidden_size = rnn.input_size, rnn.hidden_size
        self.row = self._filled(rnn.hidden_size)
        self.groups = [groups_of(self.kind, self._filled(n)) for n in (self.width, self.hidden_size)]
        bias = (rnn.get_parameter("bias_ih_l0") + rnn.get_parameter("bias_hh_l0")).detach().float()
        products = [self._reduced(rnn.get_parameter(name).detach()) for name in ("weight_ih_l0", "weight_hh_l0")]
        self._weights = [self._laid_out(weight) for weight, _ in products]
        factors = torch.stack([*(unit for _, unit in products), bias], 1)  # (4 H, 3)
        self._factors = self._in_panels(factors).transpose(1, 2).contiguous()

    def _filled(self, numbers: int) -> int:
        """How many there are in a row of registers, and of whole runs, that hold so many."""
        block = max(CELLS, KINDS[self.kind].run)
        return -(-numbers // block) * block

    def _in_panels(self, columns: Tensor) -> Tensor:
        """(4 H, n), gate by gate -> (panels, `COLUMNS`, n) of all gates of `CELLS` cells, with zeros to fill them."""
        gates = columns.reshape(4, self.hidden_size, -1)
        gates = F.pad(gates, (0, 0, 0, self.row - self.hidden_size))
        return gates.view(4, -1, CELLS, gates.size(2)).transpose(0, 1).reshape(-1, COLUMNS, gates.size(2))

    def _laid_out(self, weight: Tensor) -> Tensor:
        """(4 H, I) -> (panels, groups, columns, neighbours), with zeros for what is not there."""
        padded = F.pad(self._in_panels(weight), (0, self._filled(weight.size(1)) - weight.size(1)))
        panels, columns, _ = padded.shape
        parts = in_parts(padded, self.kind)  # (panels, columns, runs, parts, run)
        grouped = parts.view(panels, columns, -1, NEIGHBOURS[self.kind])
        return grouped.transpose(1, 2).contiguous()

    def _reduced(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(4 H, I) -> the same in numbers that are multiplied, and (4 H,) what their unit is worth."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, I) -> outputs (B, T, H) and the state ((1, B, H), (1, B, H)), the cells in float32."""
        rows, steps, width = x.shape
        table = x.transpose(0, 1).reshape(-1, width)
        tokens = torch.arange(rows * steps, dtype=torch.int32).view(steps, rows).t()
        output, after = read([self], table, tokens, None if state is None else [state])
        return output, after[0]


class CompiledBFloat16LSTM(CompiledLSTM):
    """Weights, inputs and states in bfloat16; sums, gates and cells in float32."""

    kind, number = "bf16", torch.bfloat16

    def _reduced(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.bfloat16(), torch.ones(len(weight))


class CompiledPartsLSTM(CompiledLSTM):
    """Weights, inputs and states in bfloat16, three of which add up to a float32 (`kinds`): no less precise."""

    kind, number = "bf16x6", torch.bfloat16

    def _reduced(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.float(), torch.ones(len(weight))


class CompiledTwoPartsLSTM(CompiledPartsLSTM):
    """Two of which do, but for the last 8 of 24 bits: less precise, and faster."""

    kind = "bf16x3"


class CompiledInt8LSTM(CompiledLSTM):
    """Weights in 8 bits with a scale for each row; inputs and states in 8 bits of each text's largest in that step."""

    kind, number = "int8", torch.int8

    def _reduced(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        unit = weight.float().abs().amax(1).clamp(min=1e-12) / 127
        return ((weight.float() / unit[:, None]).round() + 128).to(torch.uint8), unit  # unsigned, around 128


def read(layers: Sequence[CompiledLSTM], table: Tensor, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
    """What layers, one on the other, make of rows of `table` (V, I) at `tokens` (B, T), after `state`.

    Returns:
        Outputs (B, T, H) of the last layer, and the state ((1, B, H), (1, B, H)) of each.
    """
    rows, steps = tokens.shape
    before = [_padded(layer, pair) for layer, pair in zip(layers, state, strict=True)] if state is not None else None
    if steps == 0 or rows == 0:
        raise ValueError(f"{rows} rows of {steps} steps, expected some")
    last, after = _read(layers, table, tokens.t().reshape(-1).int(), _all_go_on(rows, steps), before, True, None)
    output, size = last.view(steps, rows, -1).transpose(0, 1), layers[-1].hidden_size
    number = torch.bfloat16 if layers[-1].kind == "bf16" else torch.float32
    return output[..., :size].to(number), [
        (h[None, :, : layer.hidden_size].to(number), c[None, :, : layer.hidden_size])
        for layer, (h, c) in zip(layers, after, strict=True)
    ]


def pooled(layers: Sequence[CompiledLSTM], table: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Last state, maximum and mean (B, 3 H) over all steps of right-padded `tokens` (B, T) of `lengths` (B,).

    Beginnings that documents share are read once, and those that end are left out at once.
    """
    tree = prefix_tree(tokens, lengths)
    row, size, state = layers[-1].row, layers[-1].hidden_size, None
    found = torch.zeros(len(tokens), 3, row)
    pools = torch.zeros(1, 3, row)
    pools[:, 1] = -torch.inf
    for part in tree.parts(_ROWS_A_CALL):
        counts = part.starts.diff().tolist()
        most, last = max(*counts, len(pools)), counts[-1]
        both = torch.empty(2, most, 3, row)
        both[1, : len(pools)] = pools
        steps = _Steps(part.starts, part.parents, most, last)
        pooling = _Pooling(both, found, part)
        _, state = _read(layers, table, part.tokens, steps, state, False, pooling)
        pools = both[(len(counts) - 1) % 2, :last]
    found[:, 2] /= lengths.clamp(min=1)[:, None]
    return found[:, :, :size].flatten(1)


class _Steps(NamedTuple):
    """Which rows there are at each step.

    Attributes:
        starts, parents: as in a `PrefixTree`.
        most: rows of the largest step or of the state before the first.
        last: rows of the last step.
    """

    starts: Tensor
    parents: Tensor
    most: int
    last: int


class _Pooling(NamedTuple):
    """Where states, maxima and sums are.

    Attributes:
        pools: (2, most, 3, H) of the last two steps, before the first in the second half.
        found: (B, 3, H) of the documents of `tree` that have ended.
    """

    pools: Tensor
    found: Tensor
    tree: PrefixTree


@lru_cache(64)
def _all_go_on(rows: int, steps: int) -> _Steps:
    with torch.inference_mode():
        starts = torch.arange(steps + 1, dtype=torch.int32) * rows
        return _Steps(starts, torch.arange(rows, dtype=torch.int32).repeat(steps), rows, rows)


def _padded(layer: CompiledLSTM, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """((1, B, H), (1, B, H)) -> two (B, H), in float32 and with cells that fill a register."""
    missing = layer.row - layer.hidden_size
    h, c = ((F.pad(each, (0, missing)) if missing else each)[0] for each in state)
    return h.float().contiguous(), c.float()


def _read(
    layers: Sequence[CompiledLSTM],
    table: Tensor,
    tokens: Tensor,
    steps: _Steps,
    state: State | None,
    keeps: bool,
    pooling: _Pooling | None,
) -> tuple[Tensor, State]:
    """States (N, H) of the last layer, or if it keeps none, of the last step; and the new state, two (B, H) a layer."""
    nodes, count, kind = len(tokens), len(steps.starts) - 1, layers[0].kind
    table = table.to(torch.bfloat16 if kind == "bf16" else torch.float32).contiguous()
    if kind == "bf16" and table.size(1) % CELLS:  # rows that fill registers, of those that are read alone
        table, tokens = F.pad(table[tokens], (0, -table.size(1) % CELLS)), torch.arange(nodes, dtype=torch.int32)
    x = torch.empty(nodes, layers[0].groups[0], NEIGHBOURS[kind], dtype=layers[0].number)
    x_units, scratch = torch.empty(nodes, 2), torch.empty(torch.get_num_threads(), SCRATCH)
    new: State = []
    for i, layer in enumerate(layers):
        top = i + 1 == len(layers)
        y, y_units = torch.empty(nodes, layer.groups[1], NEIGHBOURS[kind], dtype=layer.number), torch.empty(nodes, 2)
        cells = torch.empty(2, steps.most, layer.row)
        if state is None:
            h, cells[1] = torch.zeros(steps.most, layer.row), 0
        else:
            h, cells[1, : len(state[i][1])] = state[i]
        if kind == "bf16":
            h = h.bfloat16()
        states = torch.empty(nodes if keeps and top else steps.most, layer.row)
        ends: tuple[int | Tensor, ...] = (0, 0, 0, 0)
        if pooling is not None and top:
            ends = pooling.pools, pooling.found, pooling.tree.end_starts, pooling.tree.ends
        openmp.run(
            reading_loops.layer(kind), count, nodes, steps.most, layer.width, layer.hidden_size, layer.row // CELLS,
            *layer.groups, 4 * layer.row, 16 * layer.row, steps.starts, steps.parents,
            tokens, table if i == 0 else 0, table.stride(0) * table.element_size(), x, x_units, y, y_units,
            torch.empty(steps.most, *y.shape[1:], dtype=layer.number), torch.empty(steps.most, 2),
            *layer._weights, layer._factors, torch.empty(AHEAD, 4 * layer.row), scratch, h,
            h.stride(0) * h.element_size(), cells, states, 4 * layer.row * int(keeps and top), *ends,
        )  # fmt: skip
        last = states[-steps.last :] if keeps and top else states[: steps.last]
        new.append((last, cells[(count - 1) % 2, : steps.last]))
        x, x_units = y, y_units
    return states, new


def in_parts(numbers: Tensor, kind: str) -> Tensor:
    """(..., whole runs) -> (..., runs, parts, run) of numbers in parts; of others, what is given."""
    if KINDS[kind].parts == 1:
        return numbers
    rest, found = numbers.float().view(*numbers.shape[:-1], -1, KINDS[kind].run), []
    for _ in range(KINDS[kind].parts):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return torch.stack(found, -2)
