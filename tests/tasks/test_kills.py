"""`ulmfit train`, killed anywhere and started again by the same command, writes what an uninterrupted run writes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import BALLAST, FULL, KILL, STOP, Attempts, Outcome, Plan, command, outcome_of, survive, unfinished

KILLS = 20
SEED = int(os.environ.get("ULMFIT_KILL_SEED", "1"))
# What every stage passes, in this order.
EVENTS = ["epoch", "step", "gradients", "half a checkpoint", "before last.ckpt", "after last.ckpt", "validation"]
AT_THE_END = ["half encoder", "before metrics.json", "after metrics.json"]
AT_THE_START = {"lm_pretrain": ["half tokenizer", "cache"], "lm_finetune": ["cache", "half offsets"], "classifier": []}

Whole = Callable[[str], tuple[Outcome, dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(attempts: Attempts, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An uninterrupted run of a stage: how it went, and what it found."""
    runs: dict[str, tuple[Outcome, dict[str, Any]]] = {}

    def run(stage: str) -> tuple[Outcome, dict[str, Any]]:
        if stage not in runs:
            folder = tmp_path_factory.mktemp(stage)
            outcome = attempts(folder, command(stage))
            assert outcome.code == 0, outcome.said
            assert unfinished(folder) == []
            runs[stage] = outcome, outcome_of(folder)
        return runs[stage]

    return run


def sentence(outcome: Outcome) -> str:
    """The one that a user reads at the end."""
    assert "Traceback" not in outcome.said, outcome.said
    (line,) = [line for line in outcome.said.splitlines() if line.startswith("ulmfit: ")]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["lm_pretrain", "lm_finetune", "classifier"])
def test_killed_anywhere(attempts: Attempts, whole: Whole, tmp_path: Path, stage: str) -> None:
    """At each kind of place, from the token cache to the figures, then wherever chance has it."""
    outcome, expected = whole(stage)
    rng = random.Random(f"{stage} {SEED}")
    counts = Counter(outcome.events)
    kinds = [*AT_THE_START[stage], *EVENTS, *AT_THE_END]

    def plans() -> Iterator[Plan]:
        for kind in kinds:
            yield Plan(KILL, kind, rng.randint(1, min(counts[kind], 3)))
        while True:
            yield Plan(KILL, "", rng.randint(1, len(outcome.events) // 3))

    killed = survive(attempts, tmp_path, command(stage), plans(), KILLS, expected)
    where = [each.where for each in killed]
    print(f"{stage}, seed {SEED}, killed at: {', '.join(where)}")
    assert set(kinds) <= set(where)
    assert sum("resumed" in each.events for each in killed) > 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["lm_finetune", "classifier"])
def test_asked_to_stop(attempts: Attempts, whole: Whole, tmp_path: Path, stage: str) -> None:
    """Before, during and after training, where the next checkpoint would be an hour away."""
    outcome, expected = whole(stage)
    counts = Counter(outcome.events)
    an_epoch = counts["step"] // counts["epoch"]
    plans = [
        Plan("SIGTERM", "cache" if stage == "lm_finetune" else "tokenizer"),  # nothing to save yet
        Plan("SIGUSR1", "step", 2),
        Plan("SIGTERM", "validation"),  # saved at the end of the first epoch
        Plan("SIGINT", "step"),
        Plan("SIGTERM", "step", counts["step"] - an_epoch - 1),  # the last one
        Plan("SIGTERM", "half encoder"),
    ]
    words = command(stage, "trainer.checkpoint_minutes=60")
    stopped = survive(attempts, tmp_path, words, plans, len(plans), expected)
    assert [each.events.count("half a checkpoint") for each in stopped] == [0, 1, 1, 1, 1, 0]
    assert [each.events.count("step") for each in stopped][-1] == 0
    for each in stopped:
        assert f"; to resume, repeat: ulmfit {' '.join(words)}" in sentence(each)


def test_a_time_limit(attempts: Attempts, whole: Whole, tmp_path: Path) -> None:
    """Of each attempt: a cluster's job ends, the next one goes on."""
    words = command("classifier", "trainer.checkpoint_minutes=60", "trainer.max_time=00:00:00:00")
    for step in (1, 2):
        outcome = attempts(tmp_path, words)
        assert outcome.code == 75
        assert sentence(outcome).startswith(f"ulmfit: the time is up (trainer.max_time) at step {step} of ")
        assert "; to resume, repeat: ulmfit train" in sentence(outcome)
        assert not list(tmp_path.rglob("bundle")), "an untrained bundle"
    assert attempts(tmp_path, words[:-1]).code == 0  # the limit is no part of what a run is
    assert outcome_of(tmp_path) == whole("classifier")[1]


@pytest.mark.parametrize("more", [[], ["stage.classifier.max_steps=3"]], ids=["epochs", "steps"])
def test_epochs_of_one_step(attempts: Attempts, tmp_path: Path, more: list[str]) -> None:
    """Saved at their end, where Lightning by itself would skip an epoch, or make one twice."""
    words = command("classifier", "stage.classifier.batch_size=64", "stage.classifier.patience=null", *more)
    outcome = attempts(tmp_path / "whole", words)
    assert Counter(outcome.events)["half a checkpoint"] == Counter(outcome.events)["step"] == 3 + (not more)
    plans = [Plan(KILL, "validation", 2), Plan("SIGTERM", "step", 1), Plan(KILL, "step", 1)]
    stopped = survive(attempts, tmp_path, words, plans, 3, outcome_of(tmp_path / "whole"))
    assert ["resumed" in each.events for each in stopped] == [False, True, True]


# -- no room ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["a small disk", "simulated"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that can be filled."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "simulated":
        yield folder
        return
    mount = shutil.which("mount") or "mount"
    words = [mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


@pytest.mark.slow
def test_a_full_disk(attempts: Attempts, whole: Whole, small: Path) -> None:
    """At each kind of file: what was there stays, a sentence says it, and with room again the run goes on."""
    words = command("lm_finetune")
    for number, event in enumerate(["tokenizer", "cache", "half a checkpoint", "half encoder", "after bundle"]):
        outcome = attempts(small, words, Plan(FULL, event, 1 + (event == "half a checkpoint"), folder=str(small)))
        assert outcome.code == 1
        assert sentence(outcome).startswith("ulmfit: the disk is full"), outcome.said
        (small / BALLAST).unlink(missing_ok=True)
        assert [name for name in unfinished(small) if not name.endswith("checkpoints")] == []
        checkpoints = list(small.rglob("last.ckpt"))
        assert len(checkpoints) == (number > 1)
        assert all(torch.load(path, weights_only=True)["global_step"] > 0 for path in checkpoints)
        assert len(list(small.rglob("bundle.json"))) == (event == "after bundle")
    assert attempts(small, words).code == 0
    assert outcome_of(small) == whole("lm_finetune")[1]


# -- two at once ------------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(attempts: Attempts, whole: Whole, tmp_path: Path) -> None:
    words = command("classifier")
    first = attempts(tmp_path, words, Plan(STOP, "step", 2))
    assert first.stopped
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name not in (".said", ".events")}
    second = attempts(tmp_path, words)
    assert second.code == 1
    assert "is in use by process " in sentence(second) and f"process {first.process} on " in sentence(second)
    assert "seed0 is in use" in sentence(second)
    assert "step" not in second.events
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert attempts.go_on(first).code == 0
    assert outcome_of(tmp_path) == whole("classifier")[1]
    assert unfinished(tmp_path) == []
    assert "is finished already" in attempts(tmp_path, words).said


def test_two_builders_of_one_cache(attempts: Attempts, whole: Whole, tmp_path: Path) -> None:
    """One is in the middle of it: the other neither waits for it nor takes its work for abandoned."""
    first = attempts(tmp_path, command("lm_finetune"), Plan(STOP, "cache", 2))
    assert first.stopped
    (unfinished_cache,) = [name for name in unfinished(tmp_path) if name.startswith("cache/tokens")]
    second = attempts(tmp_path, command("lm_finetune", "seed=1", "runs=others"))
    assert second.code == 0
    assert second.events.count("cache") == whole("lm_finetune")[0].events.count("cache") > 3
    assert (tmp_path / unfinished_cache).is_dir()
    os.kill(first.process, signal.SIGKILL)
    assert attempts.go_on(first).code == -signal.SIGKILL
    assert attempts(tmp_path, command("lm_finetune")).code == 0
    assert outcome_of(tmp_path) == whole("lm_finetune")[1]
    assert unfinished(tmp_path) == []


def test_a_place_that_is_taken(attempts: Attempts, tmp_path: Path) -> None:
    """Known before the training, not after it."""
    words = command("classifier")
    attempts(tmp_path, words, Plan("SIGTERM", "step", 2))
    (run,) = tmp_path.glob("runs/*/*")
    (run / "bundle").mkdir()
    (run / "bundle" / "notes.txt").write_text("mine")
    outcome = attempts(tmp_path, words)
    assert outcome.code == 2
    assert "holds something else than a bundle" in sentence(outcome)
    assert "step" not in outcome.events
