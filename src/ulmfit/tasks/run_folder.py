"""Which folder a training run lives in.

The name follows from the configuration alone, so repeating a command finds the interrupted run, every rank of
distributed training computes the same folder, and two different settings never share one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ulmfit.config import TrainConfig
from ulmfit.errors import DataError
from ulmfit.whole_file import whole_file

# What may change between the first attempt and the one that resumes it, because the result stays the same.
CONFIG_FILE = "config.yaml"
WITHOUT_EFFECT = ("runs", "cache", "debug", "logger", "seed")
TRAINER_WITH_EFFECT = ("precision", "devices", "num_nodes")


def relevant(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's result, apart from the seed."""
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    settings["trainer"] = {name: settings["trainer"][name] for name in TRAINER_WITH_EFFECT}
    if config.stage.name == "classifier":
        del settings["stage"]["lm"]
    elif config.stage.name != "all":
        del settings["stage"]["classifier"]
    return settings


def run_folder(config: TrainConfig, *also: str) -> Path:
    """`runs/<dataset>/<stage>-<8 hex digits of the settings>-seed<n>`; runs that differ in the seed share the digits.

    `also` takes what else decides the result, such as a fingerprint of the data.
    """
    text = json.dumps([relevant(config), *also], sort_keys=True)
    digits = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(config.runs) / config.dataset.name / f"{config.stage.name}-{digits}-seed{config.seed}"


def write_config(config: Any, folder: Path) -> Path:
    """Writes the resolved configuration as `config.yaml` into a run's folder."""
    path = folder / CONFIG_FILE
    with whole_file(path) as partial:
        partial.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


@contextmanager
def kept_if_used(folder: Path) -> Iterator[None]:
    """After a failure, removes a run's folder in which there is nothing but its configuration.

    So a wrong column or a device that is not there leaves nothing behind, nor do folders above that were made for it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if not any(path.is_file() and path.name != CONFIG_FILE for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
            for path in missing[1:]:
                try:
                    path.rmdir()
                except OSError:  # somebody else has put something there
                    break
        raise


def read_record(path: Path) -> dict[str, Any]:
    """What a run wrote about itself, as YAML or JSON.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read, expected what 'ulmfit train' wrote; delete the run or train it again")
    return content
