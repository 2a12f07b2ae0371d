"""Hydra's, OmegaConf's and YAML's messages as one sentence in a user's words.

Most mistakes on a command line are answered before Hydra sees it (`arguments.py`); these are those of configuration
files and of values inside brackets.
"""

from __future__ import annotations

import re

from yaml import YAMLError

from ulmfit import config as config_module
from ulmfit.conf_files import groups
from ulmfit.errors import UlmfitError, UsageError, did_you_mean
from ulmfit.failures import chain
from ulmfit.schema import VERBS, describe, locate, unknown_key


def explained(verb: str, error: BaseException) -> UlmfitError:
    """The error to show for an exception of composing a verb's configuration."""
    causes = list(chain(error))
    ours = next((cause for cause in causes if isinstance(cause, UlmfitError)), None)
    if ours is not None:
        return ours
    broken = next((cause for cause in causes if isinstance(cause, YAMLError)), None)
    if broken is not None:
        return UsageError(f"a configuration file is not valid YAML: {' '.join(str(broken).split())}")
    text = "\n".join(dict.fromkeys(str(cause) for cause in causes))
    source = first(r"In '([^']+)'", text)
    where = f" (in {source}.yaml)" if source and source != verb else ""
    override = getattr(error, "override", None)
    if override is not None:  # Hydra's grammar
        return UsageError(f"{override}: cannot be read; put a value with commas, quotes or brackets into quotes")
    reference = reference_sentence(text, where)
    return (
        UsageError(reference) if reference else key_error(verb, text, where) or UsageError(file_sentence(text, where))
    )


def reference_sentence(text: str, where: str) -> str | None:
    """The sentence when a value refers to something that is not there, or None."""
    key = first(r"full_key: (\S+)", text) or "a configuration value"
    variable = first(r"Environment variable '([^']+)' not found", text)
    if variable is not None:
        return f"{key}{where}: refers to the environment variable {variable}, which is not set"
    reference = first(r"Interpolation key '([^']+)' not found", text)
    return f"{key}{where}: refers to the key '{reference}', which does not exist" if reference else None


def key_error(verb: str, text: str, where: str) -> UlmfitError | None:
    """The error when a key is unknown or its value of the wrong type, or None when it is something else."""
    key = first(r"full_key: ([^\s\[]+)", text)
    if key is None:
        return None
    if key.startswith("hydra."):
        return UsageError(f"{key}: Hydra has no such setting, or its value has another type")
    cls = VERBS[verb]
    owner = getattr(config_module, first(r"object_type=(\w+)", text) or "", cls)
    if owner is not cls and "." not in key:  # inside a list OmegaConf counts from the element, not from the root
        cls = owner
        override = first(r"Error merging override (.*)", text) or first(r"Could not override '([^']+)'", text)
        where = f" (in {override})" if override else where
    if first(r"(Key '[^']+' (?:is )?not in)", text) is not None:
        return unknown_key(cls, key, key + where, groups(verb) if cls is VERBS[verb] else ())
    annotation = locate(cls, key)
    value = first(r"Value '(.*?)' of type", text) or first(r"value: (\S+)", text)
    given = "=null" if "is not Optional" in text else f"={value}" if value else ""
    expected = f"expected {describe(annotation)}" if annotation is not None else "the value has the wrong type"
    return UsageError(f"{key}{given}{where}: {expected}")


def file_sentence(text: str, where: str) -> str:
    """The sentence for what is wrong with files and groups rather than with a key."""
    missing = first(r"Could not find '([^']+)'", text)
    if missing is not None:
        folder, _, option = missing.rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        hint = did_you_mean(option, options) or (f"; expected one of {', '.join(options)}" if options else "")
        return f"{folder}={option}{where}: there is no such configuration file{hint}"
    group = first(r"Could not override '([^']+)'. No match", text)
    if group is not None:
        return f"{group}{where}: the chosen stage has no such part; leave it out or choose another stage"
    package = first(r"Could not override '([^']+)'.\s*Did you mean", text)
    if package is not None:
        return f"{package}{where}: there is no such group; such a file starts with '# @package _global_'"
    mandatory = first(r"Missing mandatory value: (\S+)", text)
    if mandatory is not None:
        return f"{mandatory} is not set: expected {mandatory}=VALUE"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("See http")]
    return " ".join(lines[:3]).rstrip(".") or "the configuration cannot be composed"


def first(pattern: str, text: str) -> str | None:
    """The first group of the first match."""
    match = re.search(pattern, text)
    return match.group(1) if match else None
