"""What several tests of the network share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import needs
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ulmfit.nn.kinds import KINDS
from ulmfit.nn.processor import cpu_has_avx2, cpu_has_tiles

_WITHOUT = """
import sys, pytest, torch
file, chosen, *missing = sys.argv[1:]
for name in missing:
    setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
from ulmfit.nn import register_tiles
assert (register_tiles.COLUMNS == 16) is ("avx512" in missing)
assert register_tiles.rows_of("bf16") == 6
sys.exit(pytest.main([file, "-q", "-p", "no:cacheprovider", "-n", "0", "-k", chosen]))
"""


class LargestTensor(TorchDispatchMode):
    """Context in which `numel` is the size of the largest tensor any operation returned, backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.fixture
def largest_tensor() -> type[LargestTensor]:
    """The class, to open as many contexts as a test needs."""
    return LargestTensor


@pytest.fixture(scope="module", params=[name for name in KINDS if name != "int8"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of numbers that training multiplies."""
    name: str = request.param
    needs.products(name)
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """Afterwards torch has as many threads as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def passes_with_avx2_alone() -> Callable[[str, str], None]:
    """Asserts that the chosen tests of a file pass where registers are those of AVX2, in a process of its own."""
    if not cpu_has_avx2():
        pytest.skip("no AVX2 on this processor")

    return lambda file, chosen: _passes_without(file, chosen, "avx512", "avx512_bf16", "amx_tile")


@pytest.fixture
def passes_without_tiles() -> Callable[[str, str], None]:
    """The same where the processor has AMX, and everything else but that."""
    if not cpu_has_tiles():
        pytest.skip("no AMX on this processor")
    return lambda file, chosen: _passes_without(file, chosen, "amx_tile")


def _passes_without(file: str, chosen: str, *missing: str) -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT, file, chosen, *missing], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
