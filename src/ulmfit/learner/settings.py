"""What a learner starts with: configuration from the same YAML as the command line, a bundle, a tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from ulmfit.bundle import Bundle, load_bundle
from ulmfit.config import DatasetConfig, ModelConfig, TrainConfig
from ulmfit.errors import UsageError, did_you_mean
from ulmfit.hydra_config import load_config
from ulmfit.learner.base import Learner
from ulmfit.learner.text_data import TextData
from ulmfit.tasks import inputs, stages
from ulmfit.tasks.locations import Parent, choose_parent
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.validation import validate

Config = TrainConfig | Sequence[str]
Init = str | Path | Bundle | Learner | None
Stage = Literal["lm", "classifier"]


def train_config(
    data: TextData,
    stage: Stage,
    config: Config = (),
    model: str | ModelConfig | None = None,
    direction: str | None = None,
    drop_mult: float | None = None,
    seed: int | None = None,
    progress: bool = True,
    settings: dict[str, Any] | None = None,
) -> TrainConfig:
    """The configuration of `ulmfit train` with a learner's arguments in it.

    Args:
        config: words as on the command line, or a whole configuration; its data set gives way to `data`.
        model: name of a file in `conf/model`, or the shape itself.
        settings: fields of the stage's section, such as `batch_size`.

    Raises:
        UsageError: an unknown setting or a wrong value.
    """
    if not isinstance(data, TextData):
        raise UsageError(
            f"got data of type {type(data).__name__}, expected TextData; make it with TextData.from_csv, from_frame, "
            "from_lists or from_folder"
        )
    if isinstance(config, TrainConfig):
        result = copy.deepcopy(config)
    else:
        result = load_config("train", [config] if isinstance(config, str) else list(config))
    result.dataset = data.config or DatasetConfig(name=data.name)
    if model is not None:
        result.model = load_config("train", [f"model={model}"]).model if isinstance(model, str) else model
    if direction is not None:
        result.stage.lm.direction = direction
    if seed is not None:
        result.seed = seed
    section = getattr(result.stage, stage)
    if drop_mult is not None:
        section.dropout = replace(section.dropout, multiplier=drop_mult)
    known = [field.name for field in fields(section)]
    for name, value in (settings or {}).items():
        if name not in known:
            raise UsageError(
                f"got {name}={value!r}, expected one of the settings {', '.join(known)}{did_you_mean(name, known)}"
            )
        setattr(section, name, value)
    result.trainer.enable_progress_bar = result.trainer.enable_progress_bar and progress
    result.logger.csv, result.logger.log_every = True, 1  # the learner's history
    validate(result)
    return result


def starting_bundle(init: Init, stage: str, data: TextData, direction: str | None) -> tuple[Bundle | None, str]:
    """The bundle that training starts from (None: random weights), and what a new bundle calls it.

    Raises:
        BundleError: `init` is no bundle of a language model.
        UsageError: `init` is something else.
    """
    if isinstance(init, Learner):
        return init.bundle(), f"{init.title} trained on {init.data.name}"
    if isinstance(init, Bundle):
        return init, str(init.path)
    if init is not None and not isinstance(init, str | Path):
        raise UsageError(
            f"got init of type {type(init).__name__}, expected a learner, a bundle, the folder of one, or 'scratch'"
        )
    parent: Parent = choose_parent(None if init is None else str(init), stage, None, data.name, direction)
    bundle = None if parent.path is None else load_bundle(parent.path)
    if parent.path is None and init is None:
        stages.log.warning("%s; the text alone has to teach the language, which takes long", parent.why)
    return bundle, stages.parent_name(parent)


def tokenizer_for(data: TextData, config: TrainConfig, bundle: Bundle | None) -> Tokenizer:
    """The bundle's tokenizer, or one learnt from the data where there is none or `vocabulary=train`."""
    if data.config is not None or (bundle is not None and config.stage.lm.vocabulary == "keep"):
        return inputs.tokenizer_for(config, bundle, config.stage.lm)
    return Tokenizer.train(data.texts("lm"), config.tokenizer)
