"""The built wheel at work: from an empty folder, in an environment of its own, every verb of a first afternoon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from ulmfit import __version__

pytestmark = [pytest.mark.slow, pytest.mark.cli]

TINY = [
    "model=tiny",
    "tokenizer.vocab_size=400",
    "dataset.limit=60",
    "trainer=cpu",
    "trainer.threads=1",
    "stage.lm.epochs=1",
    "stage.lm.batch_size=8",
]
EPOCH = "stage.classifier.epochs=1"


@pytest.fixture(scope="module")
def ulmfit(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of the wheel in a new environment, which takes torch and the others from that of the tests."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    base = {"base": str(home), "platbase": str(home)}
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else None
    paths = sysconfig.get_paths(scheme, vars=base) if scheme else sysconfig.get_paths(vars=base)
    # What the folder holds is found, but its own .pth files are not read: an editable ulmfit stays out of sight.
    ours = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    python = Path(paths["scripts"]) / ("python.exe" if os.name == "nt" else "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    done = subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = shutil.which("ulmfit", path=paths["scripts"])
    assert found is not None
    return Path(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that the tests of this file share, as a user would stay in one."""
    return tmp_path_factory.mktemp("empty")


def run(ulmfit: Path, folder: Path, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ULMFIT_DATA")}
    environment = kept | {"ULMFIT_CACHE": str(folder / ".cache"), "OMP_NUM_THREADS": "1"}
    command = [str(ulmfit), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done


def test_help_and_version(ulmfit: Path, folder: Path) -> None:
    assert run(ulmfit, folder, "--version").stdout == f"ulmfit {__version__}\n"
    assert "usage: ulmfit VERB" in run(ulmfit, folder, "--help").stdout
    assert list(folder.iterdir()) == []


def test_first_afternoon(ulmfit: Path, folder: Path) -> None:
    done = run(ulmfit, folder, "inspect", "dataset.limit=60")
    assert "hardware" in done.stdout

    done = run(ulmfit, folder, "find_lr", "stage=lm_finetune", "init=scratch", *TINY, "steps=20")
    assert "suggested learning rate" in done.stdout

    done = run(ulmfit, folder, "train", "stage=lm_finetune", "init=scratch", *TINY)
    assert "language model: validation perplexity" in done.stdout
    (language_model,) = folder.glob("runs/helpdesk/lm_finetune-*/bundle")

    # Without init the classifier takes the language model just made, and says so.
    done = run(ulmfit, folder, "train", "stage=classifier", *TINY, EPOCH)
    assert language_model.relative_to(folder).as_posix() in done.stderr
    assert "macro F1" in done.stdout
    (classifier,) = folder.glob("runs/helpdesk/classifier-*/bundle")
    assert f"predict bundle={classifier.relative_to(folder).as_posix()}" in done.stdout

    done = run(ulmfit, folder, "predict", text="my laptop does not start\n")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["text"] == "my laptop does not start"
    assert line["label"] in line["probabilities"]
    assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)

    done = run(ulmfit, folder, "evaluate", "dataset.limit=60")
    assert "accuracy" in done.stdout

    done = run(ulmfit, folder, "generate", "prompt=my laptop", "tokens=5", "temperature=0")
    assert done.stdout.startswith("my laptop")


def test_sweep_and_report(ulmfit: Path, folder: Path) -> None:
    done = run(
        ulmfit,
        folder,
        "train",
        "stage=classifier",
        "init=scratch",
        *TINY,
        EPOCH,
        "--multirun",
        "seed=0,1",
        "runs=sweep",
    )
    assert "2 of 2 runs finished." in done.stderr
    assert "ulmfit report runs=sweep" in done.stderr
    done = run(ulmfit, folder, "report", "runs=sweep")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 2 + 1  # heading and rule, two runs, their mean
    assert "mean of 2 seeds" in lines[-1]
    assert "±" in lines[-1]
