"""What some tests cannot do without."""

from __future__ import annotations

import pytest

from ulmfit import native
from ulmfit.nn import matrix_tiles
from ulmfit.nn.kinds import KINDS
from ulmfit.nn.processor import cpu_has_avx2, cpu_multiplies_bfloat16

numba = pytest.mark.skipif(not native.is_available(), reason="Numba is not installed, or this is not Linux")


def products(kind: str) -> None:
    """Skips the test on processors that do not multiply such numbers (`ulmfit.nn.kinds`) natively."""
    if KINDS[kind].parts > 1:
        there = matrix_tiles.multiplies(kind)
    else:
        there = cpu_has_avx2() if kind == "fp32" else cpu_multiplies_bfloat16()
    if not there:
        pytest.skip("this processor has no such products")
