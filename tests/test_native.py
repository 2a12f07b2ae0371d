"""Compiled loops are kept, loaded without Numba, and made anew where they cannot be trusted."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest

from ulmfit import native

pytestmark = needs.numba


def total() -> int:
    """Puts the sum of the numbers behind the first, which says how many they are, in its place."""
    import numba

    pointer = native.pointer()

    @native.part
    def summed(numbers: Any) -> Any:
        found = 0
        for i in range(1, len(numbers)):
            found += numbers[i]
        return found

    def run(address: Any) -> None:
        count = numba.carray(pointer(address, numba.int64), 1)[0]
        numbers = numba.carray(pointer(address, numba.int64), count + 1)
        numbers[0] = summed(numbers)

    return native.unit(run, numba.void(numba.int64))


@pytest.fixture
def made(tmp_path, monkeypatch) -> Callable[[], tuple[int, int]]:
    """Loads the function; what it says of 3 numbers, and how often it was compiled so far."""
    monkeypatch.setenv("ULMFIT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.py"
    source.write_text("1")
    compiled = []

    def build() -> dict[str, int]:
        compiled.append(1)
        return {"total": total()}

    def load(fact: int = 0) -> tuple[int, int]:
        numbers = np.array([3, 20, -1, 4])
        native.function(native.kept("total", [source], [fact], build)["total"])(numbers.ctypes.data)
        return int(numbers[0]), len(compiled)

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
        "native.function(native.kept('total', [Path('source.py')], [0], lambda: 1 / 0)['total'])(numbers.ctypes.data)\n"
        "print(numbers[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "11\n", done.stderr


def test_it_is_compiled_anew_when_a_source_or_fact_changes(made, tmp_path):
    made()
    (tmp_path / "source.py").write_text("2")
    assert made() == (23, 2)
    assert made(fact=1) == (23, 3)
    assert len(list((tmp_path / "cache" / "compiled").iterdir())) == 3


@pytest.mark.parametrize(
    "damage", [lambda code: code[: len(code) // 2], lambda code: code[:-9] + bytes(9), lambda code: b""]
)
def test_damaged_code_is_replaced(made, tmp_path, caplog, damage):
    made()
    kept(tmp_path).write_bytes(damage(kept(tmp_path).read_bytes()))
    assert made() == (23, 2)
    assert "is damaged" in caplog.text
    assert made() == (23, 2)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_code_that_others_may_write_is_not_used(made, tmp_path, caplog, what):
    made()
    path = kept(tmp_path)
    (path if what == "file" else path.parent).chmod(0o777)
    assert made() == (23, 2)
    assert "others may write" in caplog.text
    assert made() == (23, 2)  # written anew, for this user alone


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_it_is_kept_where_groups_may_write_by_default(made, caplog):
    before = os.umask(0o002)
    try:
        assert [made(), made()] == [(23, 1), (23, 1)]
    finally:
        os.umask(before)
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_costs_only_time(made, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert made() == (23, 1)
    assert made() == (23, 2)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_keeps_nobody_waiting(made, tmp_path):
    made()
    path = kept(tmp_path)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert made() == (23, 2)
    assert made() == (23, 2)


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_folder_behind_a_link_stays_as_it_is(made, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "compiled").symlink_to(tmp_path / "elsewhere")
    assert [made(), made()] == [(23, 1), (23, 1)]
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("given", ["", "here"])
def test_only_an_absolute_cache_folder_counts(monkeypatch, given):
    monkeypatch.delenv("ULMFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert native.user_cache() == Path.home() / ".cache" / "ulmfit"


def test_threads_that_compile_at_once_do_not_mix_their_functions(tmp_path, monkeypatch):
    import numba

    monkeypatch.setenv("ULMFIT_CACHE", str(tmp_path))
    pointer = native.pointer()

    def build(factor: int) -> dict[str, int]:
        def run(address: Any) -> None:
            numba.carray(pointer(address, numba.int64), 1)[0] *= factor

        return {f"times{factor}": native.unit(run, numba.void(numba.int64))}

    def times(factor: int) -> int:
        numbers = np.array([10])
        found = native.kept(f"times{factor}", [], [], lambda: build(factor))
        native.function(found[f"times{factor}"])(numbers.ctypes.data)
        return int(numbers[0])

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(times, range(2, 8))) == [20, 30, 40, 50, 60, 70]


def test_without_a_home_directory_it_costs_only_time(made, monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ULMFIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert made() == (23, 1)
    assert made() == (23, 2)


def test_functions_call_each_other_and_other_libraries_by_address():
    import numba

    pointer = native.pointer()

    def twice(address: Any) -> None:
        numba.carray(pointer(address, numba.int64), 1)[0] *= 2

    double = native.unit(twice, numba.void(numba.int64))
    calls = [ctypes.CFUNCTYPE(None, ctypes.c_int64)(number) for number in (double, native.symbol("elsewhere"))]
    first, second = calls

    def run(address: Any) -> None:
        first(address)
        first(address + 8)
        second(address + 8)

    seen = []
    elsewhere = ctypes.CFUNCTYPE(None, ctypes.c_int64)(seen.append)
    where = ctypes.cast(elsewhere, ctypes.c_void_p).value
    units = {"run": native.unit(run, numba.void(numba.int64)), "double": double}
    with pytest.raises(ValueError, match="the functions ulmfit_elsewhere are nowhere"):
        native.loaded(units)
    found = native.loaded(units, {"elsewhere": where})
    numbers = np.array([3, 20])
    native.function(found["run"])(numbers.ctypes.data)
    native.function(found["double"])(numbers.ctypes.data)
    assert numbers.tolist() == [12, 40] and seen == [numbers.ctypes.data + 8]


def test_what_takes_memory_is_refused():
    import numba

    pointer = native.pointer()

    def run(address: Any) -> None:
        numbers = numba.carray(pointer(address, numba.int64), 1)
        numbers[0] = len(np.zeros(numbers[0]))

    with pytest.raises(ValueError, match=r"NRT_.* are nowhere"):
        native.loaded({"run": native.unit(run, numba.void(numba.int64))})
