"""Many kills, at events and at any moment: every training ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import KILL, Attempts, Outcome, Plan, command, outcome_of, survive

from .conftest import Table

KILLS = int(os.environ.get("ULMFIT_STRESS_KILLS", "200"))
SEED = int(os.environ.get("ULMFIT_KILL_SEED", "1"))
STAGES = ["lm_pretrain", "lm_finetune", "classifier", "all"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_kills(attempts: Attempts, tmp_path: Path, table: Table, stage: str) -> None:
    attempts(tmp_path / "first", command(stage))  # afterwards all is imported, so the second is as long as the others
    began = time.monotonic()
    whole = attempts(tmp_path / "whole", command(stage))
    seconds = time.monotonic() - began
    assert whole.code == 0, whole.said
    rng = random.Random(f"{stage} {SEED}")
    times = -(-KILLS // len(STAGES))

    def plans() -> Iterator[Plan]:
        while True:
            yield Plan(KILL, seconds=rng.uniform(0, seconds))
            yield Plan(KILL, count=rng.randint(1, len(whole.events) // 3))

    killed: list[Outcome] = []
    try:
        killed = survive(attempts, tmp_path, command(stage), plans(), times, outcome_of(tmp_path / "whole"))
    finally:
        table.add(f"kills survived / tried: {stage}", f"{len(killed)} / {times}")
    where = Counter(each.where.partition(" ")[0] for each in killed)
    print(f"\n{stage}, seed {SEED}, killed after: {', '.join(f'{name} {n}' for name, n in where.most_common())}")
