"""Softmax cross-entropy and its gradients as a compiled loop, in chunks whose logits are all that exists of them.

Products are tiles in registers, as in `fused_lstm`; logits, softmax and all sums are in float32. What is multiplied is
of one of the kinds in `kinds`. N positions, E features, V pieces.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ulmfit.nn import openmp
from ulmfit.nn.fused_lstm import Weights
from ulmfit.nn.kinds import groups_of, whole
from ulmfit.nn.register_tiles import COLUMNS, LANES, panels_of
from ulmfit.nn.softmax_cells import LOWEST
from ulmfit.nn.softmax_loops import SCRATCH, entry
from ulmfit.nn.vectors import compiles

CHUNK = 320  # rows whose logits exist at a time: whole tiles, as many for each of two threads


@cache
def is_available(kind: str) -> bool:
    """Whether Numba is there and compiles the loop on this machine."""
    return compiles(lambda: entry(kind))


class Found(NamedTuple):
    """The loss, a sum over all rows in float64, and those of its gradients that were asked for.

    Attributes:
        total: ().
        grad_hidden: (N, E) in the type of the hidden states.
        grad_weight: (V, E) in float32, a view of numbers that lie across.
        grad_bias: (V,) in float32.
    """

    total: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def cross_entropy(
    kind: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, of_hidden: bool, of_weight: bool,
    of_bias: bool, chunk: int = CHUNK,
) -> Found:  # fmt: skip
    """The sum of -log softmax(hidden @ weight.T + bias)[targets], and its gradients.

    Args:
        kind: of `KINDS`, but "int8".
        hidden: (N, E). weight: (V, E) in float32. bias: (V,). targets: (N,) int64.
        of_hidden, of_weight, of_bias: which gradients are wanted.
        chunk: rows whose logits exist at a time.

    Raises:
        IndexError: for a target that is no piece; loops would write beside the row.
    """
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        wrong = next(t for t in targets.tolist() if not 0 <= t < len(weight))
        raise IndexError(f"the target {wrong} is no piece, expected 0 to {len(weight) - 1}")
    (n, size), vocab = hidden.shape, weight.size(0)
    panels, threads = panels_of(vocab), torch.get_num_threads()
    weights = Weights(kind, weight, weight.new_empty(vocab, 0), 0.0, 0, of_hidden)
    x = torch.empty(1, n, weights.columns * weights.parts, dtype=weights.dtype)
    weights.put(hidden[None], x, 0, weights.columns)
    x, whole_n = x[0], whole(kind, n)  # positions are multiplied in whole runs, the last with zeros
    turned = torch.empty(1, size, weights.odd_lines(whole_n), dtype=weights.dtype)
    weights.put(hidden.t()[None], turned, 0, whole_n)
    turned, chunk = turned[0], min(n, whole(kind, chunk))
    logits = torch.empty(panels, chunk, COLUMNS)
    grads = torch.empty(chunk, panels * COLUMNS * weights.parts, dtype=weights.dtype)
    # In float32 gradients lie as logits do, and take their place.
    packed = weights.panels(panels, groups_of(kind, chunk)) if of_weight and kind != "fp32" else logits
    if weights.parts > 1 and of_weight:
        packed.zero_()  # what zeros of a run are multiplied with must be numbers
    found = torch.empty(n, 2)
    of_states = torch.empty(chunk, panels_of(size) * COLUMNS)
    of_weights = torch.empty(size, panels * COLUMNS) if of_weight else None
    of_biases = torch.zeros(threads, panels * COLUMNS)
    parts = torch.full((chunk, 2, -(-panels // LANES) * LANES), LOWEST)  # largest logits of panels, and sums
    parts[:, 1] = 0
    scratch = torch.empty(threads, SCRATCH)
    bias = nn.functional.pad(bias.float(), (0, panels * COLUMNS - vocab), value=LOWEST).contiguous()
    targets = targets.int()
    grad_hidden = torch.empty_like(hidden) if of_hidden else None
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        openmp.run(
            entry(kind), rows, vocab, size, x[start:], x.stride(0) * x.itemsize,
            turned[:, start * weights.parts :], turned.stride(0) * turned.itemsize, weights.forward, weights.groups,
            logits if weights.back is None else weights.back, bias, targets[start:], logits, grads, packed,
            found[start:], of_states if of_hidden else 0, 0 if of_weights is None else of_weights,
            of_biases, int(start > 0), int(of_hidden or of_weight or of_bias), parts, parts.stride(1) * 4,
            scratch,
            alone=weights.is_little(rows),
        )  # fmt: skip
        if grad_hidden is not None:
            grad_hidden[start : start + rows] = of_states[:rows, :size]
    return Found(
        (found[:, 0].log().double() + found[:, 1]).sum(),
        grad_hidden,
        None if of_weights is None else of_weights[:, :vocab].t(),
        of_biases[:, :vocab].sum(0) if of_bias else None,
    )
