"""The benchmark's harness: it measures, says what failed, and leaves a readable report. No figure is judged."""

from __future__ import annotations

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
