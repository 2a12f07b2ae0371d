"""What some tests cannot do without."""

from __future__ import annotations

import pytest

from ulmfit import native

numba = pytest.mark.skipif(not native.is_available(), reason="Numba is not installed, or this is not Linux")
