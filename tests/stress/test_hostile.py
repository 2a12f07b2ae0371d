"""Bad and hostile input, at length: fuzzing of every file format, bombs of real size, the whole table of bad input."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stress.fuzz_targets import NAMES

HERE = Path(__file__).parent
SECONDS = os.environ.get("ULMFIT_FUZZ_SECONDS", "30")  # for each format


@pytest.mark.skipif(sys.platform == "win32", reason="limits of memory are POSIX")
@pytest.mark.parametrize("name", NAMES)
def test_fuzzed(name: str, tmp_path: Path, table: Any) -> None:
    """Nothing but our own error, in two minutes and 12 GiB of addresses for each input."""
    seed = str(int.from_bytes(os.urandom(4), "big"))
    command = [sys.executable, str(HERE / "fuzz_mutations.py"), name, SECONDS, seed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        last = (tmp_path / "last-input").read_bytes() if (tmp_path / "last-input").exists() else b""
        pytest.fail(f"seed {seed}, exit code {done.returncode}, input {last[:2000]!r}\n{done.stderr[-3000:]}")
    table.add(f"fuzz executions: {name}", f"{int(done.stdout):,}, no finding")


# ------------------------------------------------------------------------------------------------------------ bombs

READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from ulmfit.cli import main
from ulmfit.config import DatasetConfig
from ulmfit.data.sources import iter_texts, read_table
from ulmfit.errors import DataError
path = sys.argv[1]
for read in (lambda: read_table(path), lambda: sum(map(len, iter_texts(DatasetConfig(train=path), "lm")))):
    try:
        read()
    except DataError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""
BOMBS = {"lines": b"all work and no play\n" * 100_000, "one line": b"all work and no play " * 100_000}


def packers() -> dict[str, Callable[[bytes], bytes]]:
    import bz2
    import gzip
    import lzma

    found: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found[".zst"] = lambda content: bytes(zstandard.compress(content, 19))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_of_eight_gigabytes(kind: str, tmp_path: Path, table: Any) -> None:
    """In a process that may have two."""
    most, refused = 0, 0
    for suffix, pack in packers().items():
        path = tmp_path / f"d.txt{suffix}"
        path.write_bytes(pack(BOMBS[kind] * 4) * 1000)  # many streams in one file
        assert path.stat().st_size < 32 << 20
        done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        *sentences, resident = done.stdout.splitlines()
        assert len(sentences) == 2
        assert all("unpacks to more than" in line or "is longer than" in line for line in sentences), sentences
        most, refused = max(most, int(resident)), refused + 1
    table.add(f"bombs of 8 GB refused ({kind})", f"{refused} / {len(packers())}, at most {most} MiB in use")


# -------------------------------------------------------------------------------------------------------- bad input


def test_the_table_of_bad_input(table: Any) -> None:
    """Every case, the long ones too, through the real command."""
    tests = HERE.parent
    files = [tests / "cli" / name for name in ("test_bad_input.py", "test_cli_errors.py", "test_cli_validation.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "stress or not stress", "-p", "no:cacheprovider", *files]
    done = subprocess.run(list(map(str, command)), cwd=tests.parent, capture_output=True, text=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-500:])}
    tried = sum(counts.values()) - counts.get("skipped", 0)
    table.add("bad inputs handled / tried", f"{counts.get('passed', 0)} / {tried}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert tried >= 80
