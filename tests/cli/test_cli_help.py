"""Help explains itself and costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ulmfit.conf_files import groups, options
from ulmfit.help_text import EXAMPLES, SUMMARIES
from ulmfit.hydra_config import load_config
from ulmfit.schema import VERBS, leaf_keys

if TYPE_CHECKING:
    from .conftest import CommandLine

HEAVY = ("torch", "lightning", "pandas", "numpy", "sentencepiece", "matplotlib")


def loaded_by(code: str, folder: Path) -> set[str]:
    """Names of the top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print('|'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.strip().split("|")}


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import ulmfit", HEAVY),
        ("from ulmfit.cli import main; main(['--help'])", (*HEAVY, "hydra", "omegaconf")),
        ("from ulmfit.cli import main; main([])", (*HEAVY, "hydra", "omegaconf")),
        ("from ulmfit.cli import main; main(['--version'])", (*HEAVY, "hydra", "omegaconf")),
        ("from ulmfit.cli import main; main(['trian'])", (*HEAVY, "hydra", "omegaconf")),
        ("from ulmfit.cli import main; main(['train', 'stage=classifier', '--help'])", HEAVY),
        ("from ulmfit.cli import main; main(['train', '--cfg', 'job'])", HEAVY),
        ("from ulmfit.cli import main; main(['train', 'stage.lm.optim.lr=-1'])", HEAVY),
    ],
)
def test_light(tmp_path: Path, code: str, forbidden: tuple[str, ...]) -> None:
    assert loaded_by(code, tmp_path).isdisjoint(forbidden)


def test_python_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ulmfit", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage: ulmfit VERB" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("words", [("--help",), ("-h",), ()])
def test_top_help(ulmfit: CommandLine, words: tuple[str, ...]) -> None:
    assert ulmfit(*words) == 0
    for verb, summary in SUMMARIES.items():
        assert f"  {verb} " in ulmfit.out
        assert summary in ulmfit.out
    for group, default in groups("train").items():
        assert f"\n  {group}" in ulmfit.out
        assert default is None or f"{group} (default {default})" in ulmfit.out
        for option in options(group):
            assert option in ulmfit.out
    assert ulmfit.out.count("  ulmfit ") == 3
    assert max(map(len, ulmfit.out.splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(ulmfit: CommandLine, verb: str) -> None:
    assert ulmfit(verb, "--help") == 0
    for group in groups(verb):
        assert f"\n{group}=" in ulmfit.out
        for option, text in options(group).items():
            assert f"  {option}" in ulmfit.out
            assert text in ulmfit.out
    for key in leaf_keys(VERBS[verb]):
        assert f"\n  {key}=" in ulmfit.out
    assert len(EXAMPLES[verb]) == 3
    assert ulmfit.configs == []


def test_help_shows_the_values_of_this_command_line(ulmfit: CommandLine) -> None:
    assert ulmfit("train", "stage=lm_pretrain", "seed=7", "-h") == 0
    assert "  seed=7\n" in ulmfit.out
    assert "callbacks@stage.lm.method=   (default pretrain)" in ulmfit.out
    assert "stage.lm.dropout.multiplier=0.5" in ulmfit.out
    assert "callbacks@stage.classifier.method" not in ulmfit.out


def test_help_of_values_still_to_be_given(ulmfit: CommandLine) -> None:
    assert ulmfit("train", "dataset=csv", "--help") == 0
    assert "dataset.path=???" in ulmfit.out


def test_comments_of_the_schema_are_shown(ulmfit: CommandLine) -> None:
    assert ulmfit("train", "--help") == 0
    line = next(line for line in ulmfit.out.splitlines() if line.startswith("  stage.lm.optim.clip="))
    assert line.split(maxsplit=1) == ["stage.lm.optim.clip=0.3", "gradient norm"]


@pytest.mark.parametrize(("verb", "example"), [(verb, text) for verb in EXAMPLES for text, _ in EXAMPLES[verb]])
def test_examples_are_valid(verb: str, example: str) -> None:
    words = [word.strip("'") for word in example.partition("<")[0].replace("My printer", "My").split()]
    assert words[0] == verb
    overrides = [word for word in words[1:] if "=" in word]
    if "--multirun" not in words:
        load_config(verb, overrides)
