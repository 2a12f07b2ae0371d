"""Checks of values, for those who build the dataclasses in Python."""

from __future__ import annotations

from typing import Any

import pytest

from ulmfit import config as c
from ulmfit.errors import UsageError
from ulmfit.schema import VERBS, describe, field_types, leaf_keys, locate
from ulmfit.validation import CHECKS, validate


@pytest.mark.parametrize("cls", VERBS.values())
def test_defaults_are_valid(cls: type[Any]) -> None:
    validate(cls())


def test_every_check_belongs_to_a_field() -> None:
    for cls, checks in CHECKS.items():
        assert set(checks) <= set(field_types(cls)), cls


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (c.OptimConfig(lr="fast"), "lr=fast: expected a number"),  # type: ignore[arg-type]
        (c.FitConfig(epochs=1.5), "epochs=1.5: expected a whole number"),  # type: ignore[arg-type]
        (c.FitConfig(epochs=True), "epochs=true: expected a whole number"),
        (c.FitConfig(keep="bset"), "keep=bset: expected one of best, last; did you mean 'best'?"),
        (c.DatasetConfig(text="review"), "text=review: expected a list of texts in brackets"),  # type: ignore[arg-type]
        (c.LoggerConfig(csv="yes"), "csv=yes: expected true or false"),  # type: ignore[arg-type]
        (c.OptimConfig(betas=[0.9, 1.0]), "betas=[0.9,1.0]: expected two numbers from 0 to below 1"),
        (c.DropoutConfig(hidden=1.0), "hidden=1.0: expected a number from 0 to below 1"),
        (c.GenerateConfig(top_p=0.0), "top_p=0.0: expected a number above 0 to 1"),
        (c.PhaseConfig(train_only=[]), "train_only=[]: expected numbers of layer groups, 0 for the lowest"),
        (c.TrainerConfig(devices=[]), "devices=[]: expected auto, a number of devices, or a list of their numbers"),
        (c.ScheduleConfig(momentum=[0.9]), "momentum=[0.9]: expected null or three numbers"),
    ],
)
def test_message(config: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(config)
    assert str(caught.value).startswith(message)


def test_message_names_the_whole_key() -> None:
    config = c.TrainConfig()
    config.stage.lm.method.unfreezing = c.UnfreezingConfig(
        mode="phases", phases=[c.PhaseConfig(name="a"), c.PhaseConfig(name="b", epochs=0)]
    )
    with pytest.raises(UsageError, match=r"^stage\.lm\.method\.unfreezing\.phases\.1\.epochs=0: expected at least 1$"):
        validate(config)


def test_allowed_edges() -> None:
    validate(c.DropoutConfig(hidden=0.0, multiplier=0.0))
    validate(c.FitConfig(epochs=1))
    validate(c.OptimConfig(lr=1, clip=None))
    validate(c.TrainerConfig(devices=[0, 2]))
    validate(c.TrainerConfig(max_time="01:00:00:00"))
    validate(c.TokenizerConfig(vocab_size=64, byte_fallback=False))
    validate(c.ScheduleConfig(name="one_cycle", momentum=[0.95, 0.85, 0.95]))


def test_keys_of_the_schema() -> None:
    keys = leaf_keys(c.TrainConfig)
    assert "stage.lm.method.schedule.cut_frac" in keys
    assert "stage.lm" not in keys
    assert all(locate(c.TrainConfig, key) is not None for key in keys)
    assert locate(c.TrainConfig, "stage.lm.method.unfreezing.phases.3.epochs") is int
    assert locate(c.TrainConfig, "stage.lm.method.unfreezing.phases.x.epochs") is None
    assert locate(c.TrainConfig, "seed.x") is None


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (list[str], "a list of texts in brackets"),
        (list[float] | None, "a list of numbers in brackets or null"),
        (c.ModelConfig, "a section with the keys embedding_dim, hidden_dim, num_layers"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words
