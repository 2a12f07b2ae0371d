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
from ulmfit.hydra_config import load_config
from ulmfit.tasks import train

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
    "experiment=smoke",
    "trainer.threads=1",
    "trainer.checkpoint_minutes=0.000001",  # after each step
    "stage.lm.epochs=2",
    "stage.lm.max_steps=null",
    "stage.lm.batch_size=16",
    "stage.lm.bptt=70",
    "stage.classifier.epochs=4",  # an unfreezing each
    "stage.classifier.max_steps=null",
    "stage.classifier.batch_size=16",
]


def start(folder: Path, caches: Path, kill: str = "") -> subprocess.CompletedProcess[str]:
    script = folder / "start.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return subprocess.run(
        [sys.executable, *([str(script), kill] if kill else ["-m", "ulmfit"]), "train", *COMMAND],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ULMFIT_CACHE": str(caches)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def checksums(runs: Path) -> dict[str, dict[str, str]]:
    """Of the weights of each stage."""
    found = {path.parent.name: read_info(path).checksums for path in runs.glob("helpdesk/*/*/bundle")}
    return {
        stage: {name: value for name, value in sums.items() if name.endswith(".safetensors")}
        for stage, sums in found.items()
    }


@pytest.mark.slow
@pytest.mark.cli
@pytest.mark.usefixtures("no_pictures")
def test_killed_and_interrupted(tmp_path: Path, caches: Path) -> None:
    """In the language model's second epoch, then in the classifier's second, in which one group more is trained."""
    killed = start(tmp_path, caches, "lm 20 SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    (checkpoint,) = tmp_path.glob("runs/helpdesk/*/lm/checkpoints/last.ckpt")

    stopped = start(tmp_path, caches, "classifier 5 SIGINT")
    assert stopped.returncode == 130
    assert "steps, resumed at step 20" in stopped.stderr
    assert "stopping after this step (Ctrl-C again: at once)" in stopped.stderr
    assert "to resume, repeat: ulmfit train experiment=smoke" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not checkpoint.exists()  # that half is done
    assert len(list(tmp_path.glob("runs/helpdesk/*/classifier/checkpoints/last.ckpt"))) == 1

    resumed = start(tmp_path, caches)
    assert resumed.returncode == 0, resumed.stderr
    assert "classifier: 4 epochs, 16 steps, resumed at step 6" in resumed.stderr
    assert "lm_finetune:" not in resumed.stderr
    assert not list(tmp_path.rglob("checkpoints"))

    config = load_config("train", COMMAND)
    config.runs, config.cache = str(tmp_path / "whole"), str(caches)
    train.run(config)
    assert checksums(tmp_path / "runs") == checksums(tmp_path / "whole")
    assert checksums(tmp_path / "whole").keys() == {"lm", "classifier"}
