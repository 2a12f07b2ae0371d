"""Which folder a training run lives in.

The name follows from the configuration alone, so repeating a command finds the interrupted run, every rank of
distributed training computes the same folder, and two different settings never share one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ulmfit.config import TrainConfig
from ulmfit.errors import DataError, InUseError
from ulmfit.interruption import CHECKPOINTS
from ulmfit.locks import locked
from ulmfit.ranks import main_process
from ulmfit.whole_file import read_small, remove_partials, whole_file

CONFIG_FILE, LOCK_FILE = "config.yaml", ".lock"
# What may change between the first attempt and the one that resumes it, because the result stays the same.
WITHOUT_EFFECT = ("runs", "cache", "debug", "logger", "seed", "publish")
# Fingerprints of the texts and of the parent stand for these: on another machine the same files lie elsewhere.
PLACES = ("path", "train", "valid", "test", "unlabelled")
WITHOUT_EFFECT_OF_DATASET = (*PLACES, "licence", "max_document_chars")
TRAINER_WITH_EFFECT = ("precision", "matmul_precision", "devices", "num_nodes")


_MOST_FIGURES, _MOST_SETTINGS = 256 << 20, 1 << 20  # bytes of a file


def relevant(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's result, apart from the seed and from what fingerprints say better."""
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    trainer = settings["trainer"]
    settings["trainer"] = {name: trainer[name] for name in TRAINER_WITH_EFFECT if trainer[name] is not None}
    settings["dataset"] = {n: v for n, v in settings["dataset"].items() if n not in WITHOUT_EFFECT_OF_DATASET}
    del settings["init"]
    if config.stage.name == "classifier":
        del settings["stage"]["lm"]
    elif config.stage.name != "all":
        del settings["stage"]["classifier"]
    return settings


def run_folder(config: TrainConfig, *also: str) -> Path:
    """`runs/<dataset>/<stage>-<8 hex digits of the settings>-seed<n>`; runs that differ in the seed share the digits.

    `also` takes what else decides the result: fingerprints of the data and of the parent's weights.
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
def working_in(folder: Path) -> Iterator[None]:
    """Locks a run's folder, and removes from it what a killed process left half-written.

    After a failure, a folder in which there is nothing but its configuration is removed. So a wrong column or a device
    that is not there leaves nothing behind, nor do folders above that were made for it. Of several processes that
    train together, rank 0 does all this.

    Raises:
        InUseError: another process is training there.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = locked(folder / LOCK_FILE) if main_process() else nullcontext()
    try:
        with lock:
            if main_process():
                remove_partials(folder)
            yield
    except InUseError:
        raise
    except BaseException:
        if not any(path.is_file() and path.name not in (CONFIG_FILE, LOCK_FILE) for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
            for path in missing[1:]:
                try:
                    path.rmdir()
                except OSError:  # somebody else has put something there
                    break
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes from the folder of a finished run what is left if it was killed at the very end."""
    for checkpoints in [*folder.rglob(CHECKPOINTS)]:
        shutil.rmtree(checkpoints, ignore_errors=True)
    with suppress(OSError):  # a folder that may only be read
        (folder / LOCK_FILE).unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """What a run wrote about itself, as YAML or JSON.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    content: Any = None
    try:
        if path.suffix == ".json":
            content = json.loads(read_small(path, _MOST_FIGURES).decode())
        else:
            text = read_small(path, _MOST_SETTINGS).decode()
            # Names for parts of a document repeat them any number of times; we write none.
            if "*" not in text or not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                content = yaml.safe_load(text)
        plain = _is_plain(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        plain = False
    if not isinstance(content, dict) or not plain:
        raise unreadable(path)
    return content


def unreadable(path: Path) -> DataError:
    """The error for a record that holds something else than what belongs there."""
    return DataError(f"{path} cannot be read, expected what 'ulmfit train' wrote; delete the run or train it again")


def _is_plain(value: Any) -> bool:
    """Whether there are only names and values that we write: YAML also has dates, sets and bytes."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
