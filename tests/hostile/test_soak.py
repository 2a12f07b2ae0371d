"""Prediction as a long-lived process, in small; `stress` does a hundred times as many texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "stress" / "soak.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads how much memory a process has from Linux")
def test_memory_and_answers_stay(trained: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(trained / "classifier" / "bundle"), "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["texts"] == 2000
    assert seen["single"] > 5
    assert seen["same"]
    # What grows with every text, be it 100 kB a text, would be 100 MB in the second half; buffers for the longest come.
    assert seen["memory"][-1] - seen["memory"][4] < 60 << 20
