"""The benchmark's harness: it measures, says what failed, and leaves a readable report. No figure is judged."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def bench(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE), "--repeats", "2", "--threads", "1", "--out", str(out), *words]
    kept = {**os.environ, **environment}
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300)


def read(out: Path, name: str) -> tuple[dict[str, Any], str]:
    """The report; nothing else was left in the folder."""
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.md"]
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


def cells(page: str) -> None:
    """Every table has rows of one width."""
    tables = [block for block in page.split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmark."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def runs(*figures: tuple[float, float | None]) -> list[dict[str, Any]]:
    """Of 1,000 tokens of a GFLOP each, by seconds and the limit measured beside it."""
    return [
        {"seconds": seconds, "cpu_seconds": seconds, "work": 1000, "flop": 1e9}
        | ({} if limit is None else {"limits": {"square fp32": limit}})
        for seconds, limit in figures
    ]


def full_step(harness: Any, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a report: fp32 at full size, where the best product of the whole report was at 125 GFLOP/s."""
    (case,) = (case for case in harness("cases").CASES if case.name == "lm_step_full")
    row: dict[str, Any] = harness("report").row(case, case.ways[0], ours, theirs, (1.0, 1.0), {"square fp32": 125.0})
    return row


def peak_goal(row: dict[str, Any]) -> bool:
    (met,) = (goal["met"] for goal in row["goals"] if goal["goal"] == "90% of the matrix peak")
    return bool(met)


def page_of(harness: Any, *rows: dict[str, Any]) -> str:
    content = {"command": "", "date": "", "seconds": 0, "tiny": False, "repeats": 3, "device": "cpu", "failures": []}
    content |= {"machine": harness("limits").machine(1), "limits": {}, "rows": list(rows)}
    page: str = harness("report").markdown(content)
    cells(page)
    return page


def test_a_run_is_compared_with_the_limit_beside_it(harness: Any) -> None:
    # The machine is half as fast in the second round.
    theirs = runs((15, 100), (30, 50), (15, 120))
    row = full_step(harness, runs((10, 110), (20, 55), (10, 125)), theirs)
    assert row["share"] == {
        "of": "square fp32", "value": 0.909, "min": 0.8, "max": 0.909, "values": [0.909, 0.909, 0.8],
    }  # fmt: skip
    assert peak_goal(row)
    assert row["ratio_at_the_limit"] == 1.5  # the median of 15 x 100, 30 x 50 and 15 x 120, by 1,000
    assert (row["ours"]["limits"], row["theirs"]["limits"]) == ([110, 55, 125], [100, 50, 120])
    page = page_of(harness, row)
    assert "| 100.0 | 110 | 91% (80%-91%) of square fp32 |" in page
    assert (
        "took time at the machine's speed directly before and after fastai's run; of tokenising" in page
        and "without a range" not in page
    )

    assert not peak_goal(full_step(harness, runs((10, 115), (20, 55), (10, 125)), theirs))
    alone = full_step(harness, runs((10, 110)), [])
    assert alone["share"]["value"] == 0.909 and "ratio_at_the_limit" not in alone


def test_without_a_limit_beside_the_runs_the_best_of_the_report_counts(harness: Any) -> None:
    row = full_step(harness, runs((10, 110), (20, 55), (10, None)), runs((15, 100), (30, 50), (15, 120)))
    assert row["share"] == {"of": "square fp32", "value": 0.8} and not peak_goal(row)
    assert row["ratio_at_the_limit"] == 1.88  # 1.5 x 125 / 100
    page = page_of(harness, row)
    assert (
        "| 100.0 | - | 80% of square fp32 |" in page and "took time at the machine's speed below; of tokenising" in page
    )
    beside = full_step(harness, runs((10, 110)), runs((15, 100)))
    assert "A share without a range" in page_of(harness, row, beside)


def test_limits_are_measured_before_and_after_every_run(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of fastai, and where its side fails on the way."""
    measured, failed = harness("measured"), harness("processes").Failed
    clock = itertools.count()

    class Fake:
        memory_mb = 1.0

        def __init__(self, side: Any, *_: Any) -> None:
            self.side, self.count, self.failed = side, 0, ""

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def measure(self) -> dict[str, Any]:
            if not isinstance(self.side, str):  # the names of the limits
                return {name: float(next(clock)) for name in self.side[:1]}
            self.count += 1
            if self.side == "theirs" and self.count == 2:
                raise failed("broken")
            return {"seconds": 1.0, "at": next(clock)}

    monkeypatch.setattr(measured, "Worker", Fake)
    monkeypatch.setattr(measured, "Beside", Fake)
    (case,) = (case for case in harness("cases").CASES if case.name == "lm_step_small")
    found = measured.Measured(case, {"threads": 1, "device": "cpu"})
    found.measure(Path(), 3)
    assert found.failed == {"fastai": "broken"}
    assert [len(found.runs[side]) for side in found.sides] == [*[3] * len(case.ways), 1]
    for run in itertools.chain(*found.runs.values()):
        assert run["limits"] == {"square bf16": run["at"]}  # the mean of the moments before and after


@pytest.mark.slow
def test_limits_beside(harness: Any, tmp_path: Path) -> None:
    harness("material").prepare(tmp_path, True)
    cases, beside = harness("cases").CASES, harness("processes").Beside
    names = sorted({way.share for case in cases for way in case.ways if way.share})
    settings = {"threads": 1, "device": "cpu", "tiny": True, "texts": 5}
    with beside(names, tmp_path, settings) as one:
        found = one.measure(), one.measure()
    assert one.failed == "" and all(set(each) == set(names) and min(each.values()) > 0 for each in found)
    with beside(["circle fp32"], tmp_path, settings) as other:
        assert other.measure() == {} and "circle" in other.failed
    with beside([], tmp_path, settings) as none:
        assert (none.measure(), none.failed) == ({}, "")


def test_an_older_report_is_kept(harness: Any, tmp_path: Path) -> None:
    """One whose shares are of the best products before and after all cases."""
    old = full_step(harness, runs((10, None)), runs((15, None)))
    content = {"command": "make bench", "date": "2026-01-01", "seconds": 1.0, "machine": harness("limits").machine(1)}
    content |= {"limits": {"square fp32": 125.0}, "rows": [old], "failures": [], "note": "The quiet machine."}
    (tmp_path / "cpu.json").write_text(json.dumps(content))
    done = bench(tmp_path, "--tiny", "--cases", "help", "--update")
    assert done.returncode == 0, done.stderr
    updated, page = read(tmp_path, "cpu")
    assert [row["case"] for row in updated["rows"]] == ["help", "lm_step_full"] and updated["rows"][1] == old
    assert "80% of square fp32" in page and "\n\nThe quiet machine.\n\n" in page
    cells(page)


def test_notes_and_places_are_no_part_of_the_command(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--cases", "help", "--note", "by night", "--tiny"])
    assert harness("report").command() == "make bench ARGS='--cases help --tiny'"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--note=by night", "--cases", "help", "--out", "/some/where", "--out=here"]
    )
    assert harness("report").command() == "make bench ARGS='--cases help'"


@pytest.mark.slow
@pytest.mark.fastai
def test_both_sides_of_a_case(tmp_path: Path) -> None:
    pytest.importorskip("fastai")
    done = bench(tmp_path, "--tiny", "--cases", "tokenise_pieces")
    assert done.returncode == 0, done.stderr
    content, page = read(tmp_path, "cpu")
    (row,) = content["rows"]
    assert row["case"] == "tokenise_pieces" and not content["failures"]
    for side in ("ours", "theirs"):
        values = row[side]["values"]
        assert len(values) == 2 and min(values) > 0
        assert row[side]["min"] <= row[side]["median"] <= row[side]["max"]
        assert row[side]["peak_memory_mb"] > 0
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert row["share"]["of"] == "SentencePiece" and row["ratio_at_the_limit"] > 0
    assert [len(found) for found in (row["share"]["values"], row["ours"]["limits"], row["theirs"]["limits"])] == [2] * 3
    assert {"square fp32", "square bf16", "memory copy"} <= set(content["limits"])
    assert row["title"] in page and "What is compared" in page
    cells(page)


def test_a_side_that_fails_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    broken = tmp_path / "packages" / "fastai"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('this fastai is broken')\n")
    paths = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    done = bench(tmp_path / "out", "--tiny", "--cases", "import,help", PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    content, page = read(tmp_path / "out", "cpu")
    assert [row["case"] for row in content["rows"]] == ["import", "help"]
    assert all("theirs" not in row and "ratio" not in row for row in content["rows"])
    (failure,) = content["failures"]
    assert failure["title"] == "import, fastai" and "this fastai is broken" in failure["why"]
    assert "## Not measured" in page and "this fastai is broken" in page
    cells(page)

    again = ["--tiny", "--cases", "help", "--update"]
    assert bench(tmp_path / "out", *again).returncode == 0
    updated, page = read(tmp_path / "out", "cpu")
    assert updated["rows"][0] == content["rows"][0] and updated["failures"] == content["failures"]
    assert [row["case"] for row in updated["rows"]] == ["import", "help"] and updated["rows"][1] != content["rows"][1]
    assert page.count("make bench ARGS=") == 2
    others = {**updated["rows"][0], "what": "something else"}, {**updated["rows"][0], "case": "gone"}
    for changed, told in (
        ({"machine": {**updated["machine"], "cpu": "another"}}, "another machine"),
        *(({"rows": [other]}, f"something else as {other['case']}") for other in others),
    ):
        (tmp_path / "out" / "cpu.json").write_text(json.dumps({**updated, **changed}))
        refused = bench(tmp_path / "out", *again)
        assert refused.returncode == 1 and told in refused.stderr and "Traceback" not in refused.stderr
        assert "written" not in refused.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_corpus_under_a_limit_of_memory(tmp_path: Path) -> None:
    done = bench(tmp_path, "--tiny", "--cases", "scale_memory")
    assert done.returncode == 0, done.stderr
    content, page = read(tmp_path, "scale")
    assert [point["task"] for point in content["limited"]] == ["limited_build", "limited_read"]
    assert all(point["limit_mb"] > 0 and point["cache_mb"] > 0 for point in content["limited"])
    cells(page)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cases", "latncy"], "no case is called latncy"),
        (["--cases", "scale_length", "--update"], "measure scale whole"),
        ([], "holds no trec6/train.csv"),
    ],
)
def test_wrong_use_is_told(tmp_path: Path, words: list[str], told: str) -> None:
    done = bench(tmp_path / "out", *words, ULMFIT_DATA=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
