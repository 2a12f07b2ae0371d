"""Compiled loops are kept as text, loaded without Numba, and made anew where they cannot be trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ulmfit import native

pytestmark = pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")


def total() -> Callable[..., Any]:
    """A function that adds up the numbers behind the first, which says how many they are."""
    import numba

    pointer = native.pointer()

    @native.part
    def summed(numbers: Any) -> Any:
        found = 0
        for i in range(1, len(numbers)):
            found += numbers[i]
        return found

    def run(address: Any) -> Any:
        count = numba.carray(pointer(address, numba.int64), 1)[0]
        return summed(numba.carray(pointer(address, numba.int64), count + 1))

    return run


@pytest.fixture
def made(tmp_path, monkeypatch) -> Callable[[], tuple[int, int]]:
    """Loads the function; what it says of 3 numbers, and how often it was compiled so far."""
    monkeypatch.setenv("ULMFIT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.py"
    source.write_text("1")
    compiled = []

    def make() -> str:
        compiled.append(1)
        return native.text_of(total())

    def load() -> tuple[int, int]:
        numbers = np.array([3, 20, -1, 4])
        return native.loaded("total", [source], make)(numbers.ctypes.data), len(compiled)

    return load


def kept(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "compiled").iterdir()
    return path


def test_what_is_compiled_is_kept_and_needs_no_numba(made, tmp_path):
    assert made() == (23, 1)
    assert made() == (23, 1)
    code = (
        "import sys; sys.modules['numba'] = None; import numpy; from pathlib import Path; from ulmfit import native\n"
        "numbers = numpy.array([2, 5, 6])\n"
        "print(native.loaded('total', [Path('source.py')], lambda: 1 / 0)(numbers.ctypes.data))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "11\n", done.stderr


def test_it_is_compiled_anew_when_a_source_changes(made, tmp_path):
    made()
    (tmp_path / "source.py").write_text("2")
    assert made() == (23, 2)
    assert len(list((tmp_path / "cache" / "compiled").iterdir())) == 2


def test_a_damaged_text_is_replaced(made, tmp_path, caplog):
    made()
    whole = kept(tmp_path).read_text()
    kept(tmp_path).write_text(whole[: len(whole) // 2])
    assert made() == (23, 2)
    assert "is damaged" in caplog.text
    assert made() == (23, 2)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_text_that_others_may_write_is_not_used(made, tmp_path, caplog, what):
    made()
    path = kept(tmp_path)
    (path if what == "file" else path.parent).chmod(0o777)
    assert made() == (23, 2)
    assert "others may write" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_time(made, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert made() == (23, 1)
    assert made() == (23, 2)


def test_what_takes_memory_is_refused():
    import numba

    pointer = native.pointer()

    def run(address: Any) -> Any:
        return len(np.zeros(numba.carray(pointer(address, numba.int64), 1)[0]))

    with pytest.raises(ValueError, match="run takes memory"):
        native.text_of(run)
