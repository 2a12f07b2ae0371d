"""`ulmfit train` with two processes: a sweep, and the loss of a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@on_linux
@pytest.mark.slow
def test_a_sweep_runs_each_job_once_in_its_own_folder(tmp_path: Path, caches: Path, launch: ModuleType) -> None:
    """A configuration folder of the user's own travels to the other rank; the second job follows the first."""
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "mine.yaml").write_text("name: mine\nlimit: 40\n", encoding="utf-8")
    words = ["train", "--config-dir", "conf", "--multirun", "seed=0,1", *launch.TWO_RANKS, *launch.SMALL]
    words += ["dataset=mine", "stage=lm_finetune", "stage.lm.max_steps=3"]
    started = launch.Started(tmp_path, [sys.executable, "-m", "ulmfit", *words], {"ULMFIT_CACHE": str(caches)})
    started.seconds_until_gone(200)
    said = started.said
    assert started.process.returncode == 0, said
    assert [said.count(f"Run {n}: ") for n in (1, 2, 3)] == [1, 1, 0], said
    assert "2 of 2 runs finished." in said and "Warning" not in said
    assert len(list((tmp_path / "runs" / "sweeps").iterdir())) == 1
    first, second = sorted((tmp_path / "runs" / "mine").iterdir(), key=lambda path: path.name[-1])
    for folder in (first, second):
        assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["valid_perplexity"] > 1
        assert len(list((folder / "log").glob("attempt-*"))) == 1
        assert (folder / "bundle" / "bundle.json").is_file()
    assert first.name.endswith("seed0") and second.name.endswith("seed1")
    assert (first / "metrics.json").stat().st_mtime < (second / "config.yaml").stat().st_mtime
    one, other = ((folder / "bundle" / "encoder.safetensors").read_bytes() for folder in (first, second))
    assert one != other


@on_linux
@pytest.mark.slow
def test_a_killed_rank_ends_all_with_a_sentence(tmp_path: Path, caches: Path, launch: ModuleType) -> None:
    words = ["train", *launch.TWO_RANKS, *launch.SMALL, "stage=lm_finetune"]
    started = launch.Started(tmp_path, launch.ulmfit(*words), {"ULMFIT_CACHE": str(caches)}, kill="lm 1 1")
    started.wait_for_kill()
    started.seconds_until_gone(60)
    assert started.process.returncode == 1, started.said
    last = started.said.strip().splitlines()[-1]
    assert last == (
        "ulmfit: process 1 of 2 was ended by SIGKILL (perhaps for want of memory), and the others cannot train without "
        "it; repeat the command to go on from the last checkpoint"
    )
    assert "Traceback" not in started.said


def test_processes_that_would_each_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them, into the same folder."""
    from ulmfit.config import LoggerConfig, TrainerConfig
    from ulmfit.errors import UsageError
    from ulmfit.training.trainer import check_trainer

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError) as caught:
        check_trainer(TrainerConfig(accelerator="cpu", devices=1, precision="32-true"), LoggerConfig(csv=False))
    assert str(caught.value) == (
        "this is one of 2 processes, but trainer.devices=1 and trainer.num_nodes=1 make one; "
        "use trainer=ddp or trainer=ddp_multinode"
    )
