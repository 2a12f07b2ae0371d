"""Executes notebooks in place, without the times of each cell, so that only real changes show in a diff.

python notebooks/execute.py            all of this folder
python notebooks/execute.py A.ipynb    these
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Runs a notebook in its own folder and replaces it; one with an error stays as it was and raises."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,  # one block for the lines of a training, not one each
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    temporary = path.with_name(f".{path.name}")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.ipynb"))
    if not paths:
        sys.exit(f"no notebooks in {Path(__file__).parent}")
    for path in paths:
        print(f"executing {path}", file=sys.stderr)
        execute(path)
