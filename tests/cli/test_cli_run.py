"""From the command line to the task: what the task gets, what it sees, what is left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ulmfit.errors import DataError
from ulmfit.schema import VERBS

if TYPE_CHECKING:
    from .conftest import CommandLine


@pytest.mark.parametrize("verb", VERBS)
def test_the_task_gets_its_dataclass_and_the_verb_is_back(ulmfit: CommandLine, tmp_path: Path, verb: str) -> None:
    assert ulmfit(verb, "runs=here") == 0
    assert type(ulmfit.configs[0]) is VERBS[verb]
    assert ulmfit.configs[0].runs == "here"
    assert ulmfit.argv[0][:3] == ["ulmfit", verb, "runs='here'"]
    assert sys.argv == ["ulmfit"]
    assert (ulmfit.out, ulmfit.err) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_runs_the_same_job_again(ulmfit: CommandLine, tmp_path: Path) -> None:
    """What Lightning starts for another rank is `sys.argv` plus three settings of Hydra."""
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    line = ["train", "--config-dir", "conf", "dataset=mine", "init=it's \\a=b (c)", "seed=0,1", "-m"]
    assert ulmfit(*line) == 0
    for config, argv in zip(ulmfit.configs[:2], ulmfit.argv[:2], strict=True):
        extra = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
        assert ulmfit(*argv[1:], *extra) == 0
        assert ulmfit.configs[-1] == config
    assert [config.seed for config in ulmfit.configs] == [0, 1, 0, 1]
    assert {config.init for config in ulmfit.configs} == {"it's \\a=b (c)"}


def test_sweep_runs_each_combination(ulmfit: CommandLine, tmp_path: Path) -> None:
    assert ulmfit("train", "-m", "seed=1,2", "stage=classifier,lm_finetune", "runs=r") == 0
    assert [(c.seed, c.stage.name) for c in ulmfit.configs] == [
        (1, "classifier"),
        (1, "lm_finetune"),
        (2, "classifier"),
        (2, "lm_finetune"),
    ]
    assert "4 of 4 runs finished." in ulmfit.err
    assert ulmfit.err.strip().endswith("ulmfit report runs=r")
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 1
    assert written[0].startswith("r/sweeps/") and written[0].endswith("/multirun.yaml")


def test_sweep_group(ulmfit: CommandLine) -> None:
    assert ulmfit("train", "+sweep=seeds") == 0
    assert [config.seed for config in ulmfit.configs] == [0, 1, 2, 3, 4]
    assert all("hydra.mode=RUN" in argv for argv in ulmfit.argv)
    assert ulmfit(*ulmfit.argv[3][1:]) == 0
    assert ulmfit.configs[5:] == [ulmfit.configs[3]]


def test_sweep_over_methods(ulmfit: CommandLine) -> None:
    assert ulmfit("train", "sweep=ablation_classifier") == 0
    methods = [config.stage.classifier.method for config in ulmfit.configs]
    seen = [(m.unfreezing.mode, m.discriminative.mode, m.schedule.name) for m in methods]
    assert len(seen) == 9
    assert seen[0] == ("last", "none", "constant")
    assert seen[-1] == ("gradual", "factor", "stlr")
    assert len(set(seen)) == 9


def test_bundles_of_an_ensemble_and_of_a_sweep(ulmfit: CommandLine) -> None:
    assert ulmfit("evaluate", "bundle=a,b") == 0
    assert ulmfit("evaluate", "bundle=a,b", "--multirun") == 0
    assert [config.bundle for config in ulmfit.configs] == [["a", "b"], ["a"], ["b"]]


def test_a_failed_run_does_not_stop_the_sweep(ulmfit: CommandLine) -> None:
    def fail_once(config: Any) -> dict[str, float]:
        if config.seed == 1:
            raise DataError("no such file")
        return {}

    ulmfit.behaviour = fail_once
    assert ulmfit("train", "seed=0,1,2", "--multirun") == 2
    assert len(ulmfit.configs) == 3
    assert "run 2: no such file" in ulmfit.err
    assert "2 of 3 runs finished, 1 failed." in ulmfit.err


def test_ranks_of_a_job_do_not_leak_into_the_next(ulmfit: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def like_lightning(config: Any) -> dict[str, float]:
        seen.append(os.environ.get("WORLD_SIZE"))
        os.environ.update(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT="1234")
        return {}

    ulmfit.behaviour = like_lightning
    assert ulmfit("train", "seed=0,1", "-m") == 0
    assert seen == [None, None]
    assert "MASTER_PORT" not in os.environ


def test_cfg_prints_the_configuration(ulmfit: CommandLine) -> None:
    assert ulmfit("train", "dataset=trec6", "--cfg", "job") == 0
    assert "name: trec6" in ulmfit.out
    assert ulmfit.configs == []


def test_version(ulmfit: CommandLine) -> None:
    assert ulmfit("--version") == 0
    assert ulmfit.out.startswith("ulmfit 0.")


@pytest.mark.parametrize(
    ("line", "expected", "absent"),
    [
        ("ulmfit ", ["train", "predict", "find_lr"], ["dataset="]),
        ("ulmfit pr", ["predict"], ["train"]),
        ("ulmfit train dataset=tre", ["dataset=trec6"], ["dataset=imdb"]),
        ("ulmfit train stage.classifier.opt", ["stage.classifier.optim."], ["seed"]),
        ("ulmfit generate te", ["temperature="], ["stage"]),
        ("ulmfit nonsense x", [], ["train"]),
    ],
)
def test_tab_completion(
    ulmfit: CommandLine, monkeypatch: pytest.MonkeyPatch, line: str, expected: list[str], absent: list[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert ulmfit("-sc", "query=bash") == 0
    for word in expected:
        assert word in ulmfit.out
    for word in absent:
        assert word not in ulmfit.out


def test_tab_completion_script(ulmfit: CommandLine) -> None:
    assert ulmfit("-sc", "install=bash") == 0
    assert ulmfit.out.strip().endswith("hydra_bash_completion ulmfit")
