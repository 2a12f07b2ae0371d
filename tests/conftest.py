"""Trainings that take a moment: a tiny network on a few rows of the sample data. And the built package."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
from attempts import Attempts

from ulmfit.config import TrainConfig
from ulmfit.interruption import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[1]
Settings = Callable[..., TrainConfig]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Loops are compiled once for all tests of a run, and none that the user has are taken."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="ulmfit-tests-")
        config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))
        os.environ["ULMFIT_CACHE"] = folder


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A handler that a test leaves behind would make another one fail, depending on their order."""
    numbers = (signal.SIGINT, *STOP_SIGNALS)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    assert {number: signal.getsignal(number) for number in numbers} == before


TINY = {
    "init": "scratch",
    "dataset__limit": 60,  # rows of each split
    "model__embedding_dim": 16,
    "model__hidden_dim": 24,
    "model__num_layers": 2,
    "tokenizer__vocab_size": 400,
    "stage__lm__epochs": 2,
    "stage__lm__batch_size": 16,
    "stage__lm__bptt": 40,
    "stage__lm__optim__lr": 0.02,
    "stage__classifier__epochs": 2,
    "stage__classifier__batch_size": 16,
    "stage__classifier__max_len": 100,
    "stage__classifier__optim__lr": 0.02,
    "trainer__accelerator": "cpu",
    "trainer__devices": 1,
    "trainer__precision": "32-true",
    "trainer__threads": 1,
    "trainer__enable_progress_bar": False,
}


def configured(config: TrainConfig, **values: Any) -> TrainConfig:
    """Sets keys of a configuration: `stage__lm__epochs` is stage.lm.epochs."""
    for key, value in values.items():
        *sections, name = key.split("__")
        section = reduce(getattr, sections, config)
        assert hasattr(section, name), key
        setattr(section, name, value)
    return config


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and token caches that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tmp_path: Path, caches: Path) -> Settings:
    """Makes the configuration of a tiny training below `tmp_path`."""

    def make(stage: str = "classifier", **values: Any) -> TrainConfig:
        fixed = {"stage__name": stage, "runs": str(tmp_path / "runs"), "cache": str(caches)}
        return configured(TrainConfig(), **{**TINY, **fixed, **values})

    return make


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files for plots: drawing takes longer than such trainings."""
    from ulmfit import plots

    def save(figure: Any, path: Path) -> Path:
        path.touch()
        return path

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, caches: Path) -> Path:
    """The folder of a finished `stage=all`, for reading only: lm/bundle and classifier/bundle."""
    from ulmfit.tasks import train

    runs = tmp_path_factory.mktemp("trained")
    values = {"stage__name": "all", "runs": str(runs), "cache": str(caches)}
    train.run(configured(TrainConfig(), **{**TINY, **values}))
    (folder,) = (runs / "helpdesk").iterdir()
    return folder


@pytest.fixture(scope="session")
def trained_backward(tmp_path_factory: pytest.TempPathFactory, caches: Path) -> Path:
    """As `trained`, reading backward."""
    from ulmfit.tasks import train

    runs = tmp_path_factory.mktemp("backward")
    values = {"stage__name": "all", "runs": str(runs), "cache": str(caches), "stage__lm__direction": "backward"}
    train.run(configured(TrainConfig(), **{**TINY, **values}))
    (folder,) = (runs / "helpdesk").iterdir()
    return folder


@pytest.fixture(scope="session")
def attempts() -> Iterator[Attempts]:
    """Runs `ulmfit train` with mishaps, see `attempts.py`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Attempts()
    yield made
    made.close()


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel built from it, so that both are shown to be complete."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    """The wheel of this source."""
    (path,) = dist.glob("ulmfit-*-py3-none-any.whl")
    return path
