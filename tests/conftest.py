"""Trainings that take a moment: a tiny network on a few rows of the sample data."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from ulmfit.config import TrainConfig

Settings = Callable[..., TrainConfig]

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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and token caches that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tmp_path: Path, cache: Path) -> Settings:
    """Makes the configuration of a tiny training below `tmp_path`."""

    def make(stage: str = "classifier", **values: Any) -> TrainConfig:
        fixed = {"stage__name": stage, "runs": str(tmp_path / "runs"), "cache": str(cache)}
        return configured(TrainConfig(), **{**TINY, **fixed, **values})

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of a finished `stage=all`, for reading only: lm/bundle and classifier/bundle."""
    from ulmfit.tasks import train

    runs = tmp_path_factory.mktemp("trained")
    values = {"stage__name": "all", "runs": str(runs), "cache": str(cache)}
    train.run(configured(TrainConfig(), **{**TINY, **values}))
    (folder,) = (runs / "helpdesk").iterdir()
    return folder


@pytest.fixture(scope="session")
def trained_backward(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """As `trained`, reading backward."""
    from ulmfit.tasks import train

    runs = tmp_path_factory.mktemp("backward")
    values = {"stage__name": "all", "runs": str(runs), "cache": str(cache), "stage__lm__direction": "backward"}
    train.run(configured(TrainConfig(), **{**TINY, **values}))
    (folder,) = (runs / "helpdesk").iterdir()
    return folder
