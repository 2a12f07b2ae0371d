"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ulmfit import memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)

# Pieces too small to be mapped one by one, and every hundredth stays in use, so freeing alone returns nothing.
PROGRAM = """
import resource
from ulmfit.memory import give_back

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 2**20

pieces = [bytearray(b"x" * 50_000) for _ in range(4_000)]
full = held()
kept = pieces[::100]
del pieces
freed = held()
give_back()
print(full, freed, held(), len(set(map(bytes, kept))))
"""


@glibc
def test_memory_below_a_piece_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    full, freed, after, kinds = map(int, done.stdout.split())
    assert full - freed < 20  # MB: the C library keeps them
    assert full - after > 150
    assert kinds == 1


# Pieces larger than glibc ever keeps by itself, the last of which lies at the heap's end.
TRAINING = """
import resource
from ulmfit.memory import kept

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 2**20

def step():
    pieces = [bytearray(b"x" * (40 << 20)) for _ in range(4)]
    del pieces
    return held()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

start = held()
with kept():
    first = step()
    before = faults()
    second = step()
    print(first - start, second - start, faults() - before, end=" ")
print(held() - start, step() - start)
"""


@glibc
def test_what_a_step_frees_is_there_for_the_next_and_goes_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True)
    first, second, faults, end, later = map(int, done.stdout.split())
    assert first > 140 and abs(second - first) < 50  # MB
    assert faults < 15_000  # of 40,960 pages: the source of each copy is another piece
    assert end < 20 and later < 20


@glibc
@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_a_users_setting_is_left_as_it_is(setting: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True, env={**os.environ, **setting}
    )
    assert int(done.stdout.split()[0]) < 20


def test_an_error_within_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    option = SimpleNamespace(mallopt=lambda *given: calls.append(given), malloc_trim=lambda size: calls.append("trim"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: option)
    with pytest.raises(ZeroDivisionError), memory.kept():
        raise ZeroDivisionError
    assert calls[:2] == [(-1, 2**31 - 1), (-4, 0)]
    assert calls[2:] == [(-4, 65_536), (-3, 32 << 20), (-1, 64 << 20), "trim"]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # a call would fail
    memory.give_back()
    with memory.kept():
        pass


def test_a_c_library_without_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back()
    with memory.kept():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_memory_in_use() -> None:
    before = memory.resident()
    held = bytearray(b"x" * (64 << 20))
    assert memory.resident() - before > 48 << 20
    assert len(held) == 64 << 20


def test_memory_in_use_is_zero_where_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/self/statm")

    monkeypatch.setattr("builtins.open", absent)
    assert memory.resident() == 0
