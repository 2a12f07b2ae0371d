"""The names of the package itself, which load nothing heavy until they are used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import ulmfit


def test_every_name_is_there() -> None:
    assert dir(ulmfit) == sorted(ulmfit.__all__)
    for name in ulmfit.__all__:
        value = getattr(ulmfit, name)
        if name != "__version__":
            assert value is getattr(import_module(ulmfit._HOMES[name]), name)
            assert value.__doc__
    assert set(ulmfit._HOMES) == set(ulmfit.__all__) - {"__version__"}


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'TextDate'"):
        _ = ulmfit.TextDate


@pytest.mark.parametrize(
    "code", ["import ulmfit; dir(ulmfit)", "import ulmfit; ulmfit.UlmfitError", "import ulmfit; ulmfit.TextData"]
)
def test_light(code: str) -> None:
    code += "\nimport sys; print(*sorted({'torch', 'lightning', 'pandas', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
