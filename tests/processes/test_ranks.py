"""Several processes compute what one would: the same weights and figures, from the same data, read once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = ["lm", "lm, accumulated, ended early", "classifier", "classifier, accumulated"]  # without dropout
GROUPS = (2, 4)

Rank = dict[str, Any]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Rank]]]:
    """What each rank of 1, 2 and 4 processes reports."""
    if not hasattr(os, "fork"):
        pytest.skip("the script forks")
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "1", *map(str, GROUPS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in (1, *GROUPS)}


@pytest.mark.parametrize("processes", GROUPS)
@pytest.mark.parametrize("case", [*CASES, "lm, dropout", "classifier, dropout"])
def test_all_ranks_have_the_same_weights_after_every_epoch(
    outcomes: dict[int, list[dict[str, Rank]]], processes: int, case: str
) -> None:
    """Whatever group is being unfrozen; the optimiser's moments too."""
    ranks = [rank[case] for rank in outcomes[processes]]
    assert [rank["main"] for rank in ranks] == [True] + [False] * (processes - 1)
    assert len(ranks[0]["sums"]) == (4 if "classifier" in case else 1 if "early" in case else 2)
    for sums in ranks[0]["sums"]:
        assert len(sums) == processes and len(set(sums)) == 1
    assert len({epoch[0] for epoch in ranks[0]["sums"]}) == len(ranks[0]["sums"])
    for rank in ranks[1:]:
        assert rank["metrics"] == ranks[0]["metrics"]
        for name, value in ranks[0]["weights"].items():
            assert torch.equal(value, rank["weights"][name]), name


@pytest.mark.parametrize("processes", GROUPS)
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_with_the_whole_batch(
    outcomes: dict[int, list[dict[str, Rank]]], processes: int, case: str
) -> None:
    """Batch norm, weights of classes, label smoothing, AR, TAR, clipping and shards of unequal size included."""
    one, several = outcomes[1][0][case], outcomes[processes][0][case]
    assert one["steps"] == several["steps"]
    for name, value in one["weights"].items():
        assert torch.allclose(value, several["weights"][name], rtol=0, atol=1e-5), name
    for name, value in one["metrics"].items():
        exact = name in ("valid_accuracy", "valid_macro_f1")
        assert several["metrics"][name] == (value if exact else pytest.approx(value, rel=1e-5)), name


@pytest.mark.parametrize("processes", GROUPS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["read", "checked"])
def test_the_ranks_together_read_what_one_process_reads(
    outcomes: dict[int, list[dict[str, Rank]]], processes: int, case: str, what: str
) -> None:
    """In training step by step, so in equally many; in validation each document once, none repeated to fill up."""
    one = outcomes[1][0][case][what]
    ranks = [rank[case][what] for rank in outcomes[processes]]
    if "classifier" in case and what == "checked":
        assert sorted(i for _, _, index in one for i in index) == sorted(
            i for rank in ranks for _, _, index in rank for i in index
        )
        return
    assert {len(rank) for rank in ranks} == {len(one)}
    for alone, *parts in zip(one, *ranks, strict=True):
        assert {part[:2] for part in parts} == {alone[:2]}
        if "classifier" in case:
            assert sorted(alone[2]) == sorted(i for part in parts for i in part[2])
        else:  # inputs and targets, row by row
            assert alone[2] == [[row for part in parts for row in part[2][i]] for i in (0, 1)]


@pytest.mark.parametrize("processes", GROUPS)
def test_each_rank_draws_random_numbers_of_its_own(outcomes: dict[int, list[dict[str, Rank]]], processes: int) -> None:
    """Dropout that masks the same places in every rank's rows would be a weaker one."""
    draws = [rank["classifier, dropout"]["draws"] for rank in outcomes[processes]]
    assert len({draw for rank in draws for draw in rank}) == sum(map(len, draws))
    assert draws[0][0] == outcomes[1][0]["classifier, dropout"]["draws"][0]
