"""Prediction as a long-lived process: 200,000 texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("soak.py")


def test_two_hundred_thousand_texts(trained: Path, table: Any) -> None:
    """Memory does not grow after the first tenth, and the same texts get the same answers at the end."""
    count = int(os.environ.get("ULMFIT_SOAK_TEXTS", "200000"))
    command = [sys.executable, str(SCRIPT), str(trained / "classifier" / "bundle"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    early, late = seen["memory"][0] / 2**20, seen["memory"][-1] / 2**20
    table.add("soak: texts predicted", f"{seen['texts']:,}, {seen['single']:,} of them alone")
    table.add("soak: resident memory after a tenth and at the end", f"{early:.0f} and {late:.0f} MiB")
    table.add("soak: answers to the same texts", "identical" if seen["same"] else "DIFFERENT")
    assert seen["same"]
    assert late - early < 50, seen["memory"]
