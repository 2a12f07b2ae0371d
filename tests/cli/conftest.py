"""A command line whose tasks are replaced: what reaches the task is what these tests are about."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ulmfit.cli import main
from ulmfit.schema import VERBS


@dataclass
class CommandLine:
    """Runs `main` in this process; `configs` and `argv` are what each call of a task saw."""

    capsys: pytest.CaptureFixture[str]
    configs: list[Any] = field(default_factory=list)
    argv: list[list[str]] = field(default_factory=list)
    behaviour: Callable[[Any], Any] = lambda config: {"accuracy": 1.0}
    out: str = ""
    err: str = ""

    def __call__(self, *words: str) -> int:
        code = main(list(words))
        self.out, self.err = self.capsys.readouterr()
        return code

    def task(self, config: Any) -> Any:
        self.configs.append(config)
        self.argv.append(list(sys.argv))
        return self.behaviour(config)


@pytest.fixture
def ulmfit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """A command line in an empty folder."""
    line = CommandLine(capsys)
    for verb in VERBS:
        monkeypatch.setitem(sys.modules, f"ulmfit.tasks.{verb}", SimpleNamespace(run=line.task))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ulmfit"])
    for name in ("LOCAL_RANK", "ULMFIT_DATA"):
        monkeypatch.delenv(name, raising=False)
    return line
