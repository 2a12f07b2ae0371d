"""Tiles of products, whatever registers this processor has for them, against exact sums."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import needs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ulmfit import native
from ulmfit.nn import matrix_tiles, openmp
from ulmfit.nn.kinds import KINDS, PRODUCTS
from ulmfit.nn.processor import cpu_has_avx2, cpu_has_tiles

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    not cpu_has_avx2() or sys.platform != "linux", reason="no compiled loops on this processor or system"
)


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    needs.products(name)
    return name


def whole_groups(kind: str, groups: int) -> int:
    """Numbers in parts have whole runs of them."""
    return -(-groups // (16 * KINDS[kind].parts)) * 16 * KINDS[kind].parts if KINDS[kind].parts > 1 else groups


def numbers(kind: str, factor: Tensor, groups_at: int) -> Tensor:
    """In double precision; parts of x (rows, groups, neighbours) or of a panel (groups, columns, neighbours) as rows.

    (parts, ...), those of one number at the same place.
    """
    parts = KINDS[kind].parts
    return factor.double().unflatten(groups_at, (-1, parts, 16 if parts > 1 else 1)).movedim(groups_at + 1, 0)


def exact(kind: str, x: Tensor, panel: Tensor) -> Tensor:
    """Sums (rows, columns) of the products of parts that are taken."""
    a, b = numbers(kind, x, 1), numbers(kind, panel, 0)
    return sum(
        (torch.einsum("rksn,kscn->rc", a[one], b[other]) for one, other in PRODUCTS[KINDS[kind].parts]),
        torch.zeros((), dtype=torch.float64),
    )


def factors(kind: str, rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """x (rows, groups, neighbours), 8-bit numbers signed, and a panel (groups, columns, neighbours), unsigned."""
    from ulmfit.nn.register_tiles import COLUMNS, NEIGHBOURS

    torch.manual_seed(seed)
    shapes = (rows, groups, NEIGHBOURS[kind]), (groups, COLUMNS, NEIGHBOURS[kind])
    if kind == "int8":
        return torch.randint(-128, 128, shapes[0]).to(torch.int8), torch.randint(0, 256, shapes[1]).to(torch.uint8)
    x, panel = (torch.randn(shape) for shape in shapes)
    return (x, panel) if kind == "fp32" else (x.bfloat16(), panel.bfloat16())


def ready(function: Any, arguments: int) -> Callable[..., None]:
    """What compiled loops call by address, for Python."""
    unit = ctypes.cast(function, ctypes.c_void_p).value
    assert unit is not None
    return _ready(unit, arguments)


@cache
def _ready(unit: int, arguments: int) -> Callable[..., None]:
    return native.function(native.loaded({"function": unit})["function"], arguments)


@settings(deadline=None)
@given(
    rows=st.integers(1, 32), groups=st.integers(1, 90), columns=st.integers(1, 64), more=st.booleans(),
    fetched=st.sampled_from([0, 64, 128]), seed=st.integers(0, 99),
)  # fmt: skip
def test_tile(kind: str, rows: int, groups: int, columns: int, more: bool, fetched: int, seed: int) -> None:
    """Sums from zero or from what is there, of the columns that are wanted; nothing is written beside the tile."""
    from ulmfit.nn.register_tiles import COLUMNS, multiplier, rows_of

    rows, columns, groups = min(rows, rows_of(kind)), min(columns, COLUMNS), whole_groups(kind, groups)
    x, panel = factors(kind, rows, groups + 3, seed)
    number = torch.int32 if kind == "int8" else torch.float32
    out = torch.randint(-99, 99, (rows + 1, COLUMNS + 16)).to(number)
    before = out.clone()
    ready(multiplier(kind), 12)(
        rows, x.data_ptr(), x.stride(0) * x.itemsize, 4, panel.data_ptr(), columns, groups, out.data_ptr(),
        out.stride(0) * 4, int(more), panel.data_ptr(), fetched,
    )  # fmt: skip
    x, panel = x[:, :groups], panel[:groups]
    right = exact(kind, x, panel) + before[:rows, :COLUMNS] * more
    bound = exact(kind, x.double().abs(), panel.double().abs()) + 100
    error = (out[:rows, :columns].double() - right[:, :columns]).abs()
    assert (error <= (0 if kind == "int8" else 1e-6) * bound[:, :columns]).all()
    assert torch.equal(out[rows:], before[rows:]) and torch.equal(out[:, COLUMNS:], before[:, COLUMNS:])


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 70), groups=st.sampled_from([1, 15, 16, 40, 520, 1100]), columns=st.integers(1, 300),
    threads=st.integers(1, 3), at_once=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_product_of_all_threads(
    kind: str, rows: int, groups: int, columns: int, threads: int, at_once: bool, seed: int
) -> None:
    """Weights that take several blocks, and rows that take several tiles; panels one by one, or all at once."""
    from ulmfit.nn.register_tiles import COLUMNS, PANEL_ROW, panels_of, product

    panels, groups = panels_of(columns), whole_groups(kind, groups)
    x, packed = factors(kind, rows, groups, seed)[0], [factors(kind, 1, groups, seed + i)[1] for i in range(panels)]
    weights, out = torch.stack(packed), torch.zeros(rows, panels * COLUMNS)
    multiply = ready(product(kind), 19)
    for thread in range(threads):
        multiply(
            rows, x.data_ptr(), x.stride(0) * x.itemsize, weights.data_ptr(), groups, groups,
            panels if at_once else 1, 0, 1 if at_once else panels, columns,
            out.data_ptr(), panels * PANEL_ROW, PANEL_ROW, 0, 0, 0, 0, thread, threads,
        )  # fmt: skip
    found = out.view(torch.int32) if kind == "int8" else out
    right, bound = (
        torch.cat([exact(kind, a, panel) for panel in b], 1)
        for a, b in ((x, weights), (x.double().abs(), weights.double().abs()))
    )
    error = (found.double() - right).abs()[:, :columns]
    assert (error <= (0 if kind == "int8" else 2e-6) * bound[:, :columns]).all()


def test_transposed() -> None:
    from ulmfit.nn import intrinsics
    from ulmfit.nn.vectors import compiler

    transpose, carray = intrinsics.transpose(), compiler().numba.carray

    @compiler().entry
    def loop(given: object) -> None:
        a = carray(given, 4)
        transpose(a[0], a[1], a[2], a[3])

    numbers, out = torch.arange(16 * 20, dtype=torch.int32).view(16, 20), torch.zeros(16, 18, dtype=torch.int32)
    given_ = torch.tensor([numbers.data_ptr(), 80, out.data_ptr(), 72])
    native.function(native.loaded({"loop": loop})["loop"])(given_.data_ptr())
    assert torch.equal(out[:, :16], numbers[:, :16].t()) and not out[:, 16:].any()


def test_processors_that_may_not_use_their_tiles_take_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_tiles, "cpu_has_tiles", lambda: True)
    for allowed in (True, False):
        monkeypatch.setattr(matrix_tiles, "_is_allowed", lambda allowed=allowed: allowed)
        assert matrix_tiles.multiplies("bf16") is matrix_tiles.multiplies("int8") is allowed
        assert not matrix_tiles.multiplies("fp32")


def test_tiles_are_used_where_they_can_be() -> None:
    if not (cpu_has_tiles() and openmp.is_available()):
        pytest.skip("this processor has no tiles")
    assert matrix_tiles.multiplies("bf16") and matrix_tiles.multiplies("int8")
