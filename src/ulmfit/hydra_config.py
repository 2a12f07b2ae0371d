"""From YAML to dataclasses: the schemas registered with Hydra, and composition."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ulmfit.arguments import parse
from ulmfit.composition_errors import explained
from ulmfit.conf_files import conf_dir, groups
from ulmfit.errors import UsageError
from ulmfit.schema import VERBS, element_type, field_types, is_section, unknown_key, unwrap
from ulmfit.validation import validate

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zip", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


def register(verb: str) -> None:
    """Makes the schema of a verb and the two resolvers of the YAML files known to Hydra; may be called again."""
    ConfigStore.instance().store(name=f"{verb}_schema", node=VERBS[verb], provider="ulmfit")
    OmegaConf.register_new_resolver("dataset_name", dataset_name, replace=True)
    OmegaConf.register_new_resolver("required", required, replace=True)


def dataset_name(path: str | None, default: str) -> str:
    """The name that runs on a data set go under: of its file or folder (`x/reviews.csv.bz2` -> `reviews`)."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(path))) if path else ""
    while name.lower().endswith(ENDINGS):
        name = Path(name).stem
    return re.sub(r"[^\w.-]+", "-", name)[:100].strip("-.") or default


def required(key: str, what: str) -> str:
    """A value that has to be given.

    Raises:
        UsageError: always, because the resolver stands in for the missing value.
    """
    raise UsageError(f"{key} is not set: expected {key}=VALUE, {what}")


def load_config(verb: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> Any:
    """The configuration that `ulmfit VERB overrides...` would run with, for notebooks and tests.

    Raises:
        UsageError: an unknown key or option, or a wrong value.
    """
    try:
        return to_config(verb, composed(verb, overrides, config_dir))
    except CONFIGURATION_ERRORS as error:
        raise explained(verb, error) from error


def composed(verb: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> DictConfig:
    """The merged YAML of a verb, with interpolations still in it."""
    register(verb)
    flags = ["--config-dir", str(config_dir)] if config_dir else []
    words = parse([verb, *flags, *overrides]).overrides
    if config_dir:
        words = [*words, f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    with initialize_config_dir(str(conf_dir()), job_name="ulmfit", version_base="1.3"):
        return compose(verb, overrides=words)


def to_config(verb: str, composed: DictConfig) -> Any:
    """The dataclass of a verb, checked.

    Raises:
        UsageError: keys that are not in the schema, or values that fail `validation.validate`.
    """
    cls = VERBS[verb]
    content = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    for key in stray_keys(cls, content):
        raise unknown_key(cls, key, key, groups(verb))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, cls)
    validate(config)
    return config


def stray_keys(annotation: Any, value: Any, prefix: str = "") -> Iterator[str]:
    """Keys in nested containers that the schema does not have; additions inside lists pass Hydra unseen."""
    inner, _ = unwrap(annotation)
    element = element_type(annotation)
    if element is not None and isinstance(value, list):
        for index, item in enumerate(value):
            yield from stray_keys(element, item, f"{prefix}{index}.")
    elif is_section(inner) and isinstance(value, dict):
        known = field_types(inner)
        for name, item in value.items():
            if name in known:
                yield from stray_keys(known[name], item, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"
