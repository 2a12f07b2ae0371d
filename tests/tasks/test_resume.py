"""`ulmfit train`, killed and started again by the same command, writes what an uninterrupted run writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ulmfit.bundle import read_info

# Sends itself a signal in the middle of a step; the first argument is the stage, the step and the signal.
SCRIPT = """
    import os, signal, sys
    from ulmfit.training import classifier, lm

    stage, step, number = sys.argv.pop(1).split()
    module = {"lm": lm.LMModule, "classifier": classifier.ClassifierModule}[stage]
    train = module.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == int(step):
            os.kill(os.getpid(), getattr(signal, number))
        return train(self, batch, batch_idx)

    module.training_step = training_step
    from ulmfit.cli import main
    sys.exit(main())
"""

COMMAND = [
    "train",
    "experiment=smoke",
    "trainer.threads=1",
    "trainer.checkpoint_minutes=0.000001",
    "trainer.enable_progress_bar=false",
    "stage.lm.epochs=2",
    "stage.lm.max_steps=null",
    "stage.lm.batch_size=16",
    "stage.classifier.epochs=4",  # an unfreezing each
    "stage.classifier.max_steps=null",
    "stage.classifier.batch_size=16",
]


def run(folder: Path, cache: Path, kill: str = "", *more: str) -> subprocess.CompletedProcess[str]:
    script = folder / "start.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    start = [str(script), kill] if kill else ["-m", "ulmfit"]
    return subprocess.run(
        [sys.executable, *start, *COMMAND, *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ULMFIT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def checksums(folder: Path) -> dict[str, dict[str, str]]:
    bundles = folder.glob("runs/helpdesk/*/*/bundle")
    return {
        path.parent.name: {k: v for k, v in read_info(path).checksums.items() if "tensors" in k} for path in bundles
    }


@pytest.mark.slow
@pytest.mark.cli
def test_killed_twice(tmp_path: Path, cache: Path) -> None:
    """In the language model's second epoch, and in the classifier's second, in which one group more is trained."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = run(whole, cache)
    assert done.returncode == 0, done.stderr
    for kill in ("lm 9 SIGKILL", "classifier 6 SIGKILL"):
        assert run(broken, cache, kill).returncode == -signal.SIGKILL
        assert len(list(broken.glob("runs/helpdesk/*/*/checkpoints/last.ckpt"))) == 1
    done = run(broken, cache)
    assert done.returncode == 0, done.stderr
    assert checksums(broken) == checksums(whole)
    assert checksums(whole).keys() == {"lm", "classifier"}
    assert not list(broken.rglob("checkpoints"))


@pytest.mark.slow
@pytest.mark.cli
def test_interrupted_from_the_keyboard(tmp_path: Path, cache: Path) -> None:
    stopped = run(tmp_path, cache, "classifier 5 SIGINT", "trainer.checkpoint_minutes=60")
    assert stopped.returncode == 130
    assert "stopping after this step" in stopped.stderr
    assert "to resume, repeat: ulmfit train experiment=smoke" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert len(list(tmp_path.glob("runs/helpdesk/*/classifier/checkpoints/last.ckpt"))) == 1
    again = run(tmp_path, cache, "", "trainer.checkpoint_minutes=60", "trainer.enable_progress_bar=true")
    assert again.returncode == 0, again.stderr
    assert "classifier: 4 epochs, 16 steps, resumed at step 6" in again.stderr
    assert "lm_finetune:" not in again.stderr  # that half is done
