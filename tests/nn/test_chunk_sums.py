"""A chunk's sums, and their gradients, are those of the operations that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ulmfit.nn.chunk_sums import chunk_sums
from ulmfit.nn.losses import activation_regularisation


def reference(hidden: Tensor, kept: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    x, mask = hidden.float(), kept.unsqueeze(-1)
    nothing = 0 * x.sum()  # a single step has no differences, and no gradient
    size = x.size(-1)
    squares = activation_regularisation(x, x, 1.0, 0.0, kept) * kept.sum() * size
    moves = activation_regularisation(x, x, 0.0, 1.0, kept) * (kept[:, 1:] & kept[:, :-1]).sum() * size
    maximum = x.masked_fill(~mask, -torch.inf).amax(1)
    return maximum, x.masked_fill(~mask, 0).sum(1), x[torch.arange(len(x)), last], squares, moves + nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "with padding"])
@pytest.mark.parametrize("steps", [1, 9])
def test_values_and_gradients(dtype: torch.dtype, whole: bool, steps: int) -> None:
    """Of few values, so that most maxima are there several times, and of steps laid out as an LSTM leaves them."""
    generator = torch.Generator().manual_seed(steps)
    hidden = torch.randint(-3, 2, (steps, 5, 6), generator=generator).to(dtype).transpose(0, 1).requires_grad_()
    kept = torch.ones(5, steps, dtype=torch.bool)
    if not whole:
        kept[0] = False  # a document whose last `max_len` steps come later
        kept[1, steps // 2 + 1 :] = False
        kept[2, : steps // 2] = False
    last = torch.randint(0, steps, (5,), generator=generator)
    expected = reference(hidden, kept, last)
    actual = chunk_sums(hidden, None if whole else kept, last)
    upstream = [torch.randn(each.shape, generator=generator) for each in expected]
    finite = torch.isfinite(expected[0])
    upstream[0] *= finite  # a document without steps has no gradient from its maximum
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32 and torch.allclose(mine, theirs, atol=1e-5)
    (mine,) = torch.autograd.grad(actual, hidden, upstream)
    (theirs,) = torch.autograd.grad(
        [torch.where(finite, expected[0], 0), *expected[1:]], hidden, upstream, retain_graph=True
    )
    assert mine.dtype == dtype and torch.isfinite(mine).all()
    assert torch.allclose(mine.float(), theirs.float(), atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0.01)


def test_keeps_no_copy_of_the_states() -> None:
    """A long document has many chunks, and the backward pass needs what each of them keeps."""
    hidden = torch.randn(4, 30, 16).bfloat16().requires_grad_()
    kept = torch.ones(4, 30, dtype=torch.bool)
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        chunk_sums(hidden, kept, torch.zeros(4, dtype=torch.int64))
    large = [each for each in saved if each.numel() == hidden.numel()]
    assert [each.data_ptr() for each in large] == [hidden.data_ptr()]
