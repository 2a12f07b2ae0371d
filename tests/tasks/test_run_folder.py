"""The folder of a run is a function of what decides its result."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from ulmfit.config import TrainConfig
from ulmfit.tasks.run_folder import run_folder, write_config


def settings(**values: Any) -> TrainConfig:
    """The default configuration of a classifier with some keys set (`stage__lm__epochs` is stage.lm.epochs)."""
    config = TrainConfig()
    for key, value in {"stage__name": "classifier", "dataset__name": "trec6", **values}.items():
        *sections, name = key.split("__")
        setattr(reduce(getattr, sections, config), name, value)
    return config


def folder(**values: Any) -> Path:
    return run_folder(settings(**values))


def test_name() -> None:
    path = folder(runs="here", seed=3)
    assert path.parts[:2] == ("here", "trec6")
    stage, digits, seed = path.name.split("-")
    assert (stage, seed) == ("classifier", "seed3")
    assert len(digits) == 8 and int(digits, 16) >= 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("debug", True),
        ("cache", "/tmp/x"),
        ("logger__tensorboard", True),
        ("trainer__max_time", "00:01:00:00"),
        ("trainer__accelerator", "cpu"),
        ("trainer__threads", 2),
        ("stage__lm__epochs", 99),
        ("dataset__path", "/elsewhere/trec6"),  # fingerprints stand for the files
        ("dataset__licence", "CC0"),
        ("publish", "mine"),
        ("init", "scratch"),  # so does one for the parent
    ],
)
def test_what_has_no_effect_on_the_result_resumes(key: str, value: Any) -> None:
    assert folder(**{key: value}) == folder()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage__classifier__optim__lr", 0.02),
        ("stage__classifier__epochs", 13),
        ("stage__classifier__method__unfreezing__mode", "last"),
        ("dataset__train_size", 100),
        ("dataset__limit", 10),
        ("trainer__precision", "32-true"),
        ("trainer__matmul_precision", "high"),
        ("trainer__devices", 2),
    ],
)
def test_other_settings_have_another_folder(key: str, value: Any) -> None:
    assert folder(**{key: value}) != folder()


def test_seeds_share_the_digits() -> None:
    first, second = folder(seed=1), folder(seed=2)
    assert first != second
    assert first.name.rpartition("-")[0] == second.name.rpartition("-")[0]


def test_both_stages_count_for_all() -> None:
    assert folder(stage__name="all", stage__lm__epochs=99) != folder(stage__name="all")
    assert folder(stage__name="lm_finetune", stage__classifier__epochs=99) == folder(stage__name="lm_finetune")


def test_another_parent_has_another_folder() -> None:
    assert run_folder(settings(), "scratch", "text") != run_folder(settings(), "0123", "text")


def test_other_data_has_another_folder() -> None:
    assert run_folder(settings(), "fingerprint") != run_folder(settings())


def test_write_config(tmp_path: Path) -> None:
    config = settings(dataset__path="Füße.csv")
    path = write_config(config, tmp_path / "new")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["stage"]["classifier"]["optim"]["lr"] == config.stage.classifier.optim.lr
    assert content["dataset"]["path"] == config.dataset.path
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
