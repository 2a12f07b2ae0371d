"""Reading the dataclasses of `config.py` as a schema: which keys exist, of what type, with which comment.

Everything the command line says about configuration comes from here, so it cannot disagree with the code.
Standard library only.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

from ulmfit import config as config_module
from ulmfit.errors import UsageError, did_you_mean

VERBS: dict[str, type[Any]] = {
    "train": config_module.TrainConfig,
    "evaluate": config_module.EvaluateConfig,
    "predict": config_module.PredictConfig,
    "generate": config_module.GenerateConfig,
    "find_lr": config_module.FindLRConfig,
    "pack": config_module.PackConfig,
    "download": config_module.DownloadConfig,
    "inspect": config_module.InspectConfig,
    "report": config_module.ReportConfig,
}


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Name and type of each field of a dataclass, in order (base classes first)."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def unwrap(annotation: Any) -> tuple[Any, bool]:
    """`(type, may be null)`: `int | None` -> `(int, True)`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(annotation))
    return annotation, annotation is Any


def element_type(annotation: Any) -> Any | None:
    """Type of the elements if `annotation` is a list (nullable or not), else None."""
    inner, _ = unwrap(annotation)
    return typing.get_args(inner)[0] if typing.get_origin(inner) is list else None


def is_section(annotation: Any) -> bool:
    """Whether values of this type have keys of their own."""
    return dataclasses.is_dataclass(annotation)


def describe(annotation: Any) -> str:
    """The type in a user's words: `int | None` -> 'a whole number or null'."""
    inner, nullable = unwrap(annotation)
    element = element_type(annotation)
    if element is not None:
        plural = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}
        words = f"a list of {plural.get(element, 'sections')} in brackets"
    elif is_section(inner):
        words = f"a section with the keys {', '.join(field_types(inner))}"
    else:
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        words = names.get(inner, "any value")
    return words + (" or null" if nullable and inner is not Any else "")


def leaf_keys(cls: type[Any], prefix: str = "") -> tuple[str, ...]:
    """All dotted keys that hold values, in order."""
    keys: list[str] = []
    for name, annotation in field_types(cls).items():
        inner, _ = unwrap(annotation)
        keys += leaf_keys(inner, f"{prefix}{name}.") if is_section(inner) else [prefix + name]
    return tuple(keys)


def unknown_key(cls: type[Any], key: str, shown: str, groups: typing.Iterable[str] = ()) -> UsageError:
    """The error for a key that does not exist; a key whose end is right (`optim.lr`) is completed."""
    keys = [*leaf_keys(cls), *groups]
    endings = [known for known in keys if known.endswith("." + key)]
    if endings:
        return UsageError(f"{shown}: there is no key '{key}'; did you mean {' or '.join(endings)}?")
    hint = did_you_mean(key, keys)
    if not hint:  # a right section with a wrong end: compare the ends within it
        parent, _, last = key.rpartition(".")
        siblings = [known for known in keys if known.rpartition(".")[0] == parent]
        hint = did_you_mean(last, [known.rpartition(".")[2] for known in siblings])
        hint = hint or (f"; expected one of {', '.join(siblings)}" if siblings else "")
    if not hint:  # a known name in the wrong place
        ends: dict[str, str] = {}
        for known in keys:
            ends.setdefault(known.rpartition(".")[2], known)
        close = did_you_mean(key.rpartition(".")[2], ends)
        hint = f"; did you mean '{ends[close.split(chr(39))[1]]}'?" if close else ""
    hint = hint or f"; expected one of {', '.join([*field_types(cls), *groups])}"
    return UsageError(f"{shown}: there is no key '{key}'{hint}")


def locate(cls: type[Any], key: str) -> Any | None:
    """The type at a dotted key, list indices included (`phases.0.epochs`), or None where there is no such key."""
    annotation: Any = cls
    for part in key.split("."):
        inner, _ = unwrap(annotation)
        element = element_type(annotation)
        if element is not None and part.isdigit():
            annotation = element
        elif is_section(inner) and part in field_types(inner):
            annotation = field_types(inner)[part]
        else:
            return None
    return annotation


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(shown(item) for item in value)}]"
    return f"'{value}'" if isinstance(value, str) and not value.strip() else str(value)


@cache
def comments() -> dict[tuple[str, str], str]:
    """The comment beside each field in `config.py`, by class and field name; what the help prints."""
    source = Path(config_module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                rest = lines[(item.end_lineno or item.lineno) - 1][item.end_col_offset or 0 :]
                found[node.name, item.target.id] = rest.partition("#")[2].strip()
    return found


def comment(cls: type[Any], name: str) -> str:
    """The comment of a field, looked up through the base classes."""
    return next((comments()[base.__name__, name] for base in cls.__mro__ if (base.__name__, name) in comments()), "")
