"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from ulmfit import memory

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


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_memory_below_a_piece_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    full, freed, after, kinds = map(int, done.stdout.split())
    assert full - freed < 20  # MB: the C library keeps them
    assert full - after > 150
    assert kinds == 1


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # a call would fail
    memory.give_back()


def test_a_c_library_without_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back()


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
