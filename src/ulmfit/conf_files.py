"""The YAML files under `conf/`: where they are, which groups a verb has, what each option is for. No Hydra."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


@cache
def conf_dir() -> Path:
    """The folder of the configuration: inside an installed package, else at the root of the repository."""
    packaged = Path(__file__).resolve().parent / "conf"
    return packaged if packaged.is_dir() else packaged.parents[2] / "conf"


@cache
def read_defaults(path: Path) -> tuple[Any, ...]:
    """The defaults list of a configuration file."""
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tuple((content or {}).get("defaults", ()))


@cache
def groups(verb: str) -> dict[str, str | None]:
    """The configuration groups of a verb and their defaults, `callbacks@stage.lm.method` and its like included."""
    found: dict[str, str | None] = {}
    for item in read_defaults(conf_dir() / f"{verb}.yaml"):
        if isinstance(item, dict):
            found |= {group: option for group, option in item.items() if group != "hydra"}
    if "stage" in found:
        found |= method_groups(found["stage"] or "all")
    return found


def method_groups(stage: str) -> dict[str, str | None]:
    """The places of `callbacks/` in a stage, such as `callbacks@stage.lm.method`, and what stands there."""
    found: dict[str, str | None] = {}
    path = conf_dir() / "stage" / f"{stage}.yaml"
    for item in read_defaults(path) if path.is_file() else ():
        if isinstance(item, str) and item != "_self_":
            found |= method_groups(item)
        for place, option in item.items() if isinstance(item, dict) else ():
            group, _, package = place.lstrip("/").partition("@")
            found[f"{group}@stage.{package}"] = ",".join(option) if isinstance(option, list) else option
    return found


def options(group: str, extra: Path | None = None) -> dict[str, str]:
    """Name and description (the first comment) of each option of a group, the user's own in `extra` included."""
    name = group.partition("@")[0]
    found: dict[str, str] = {}
    for root in [conf_dir(), *([extra] if extra else [])]:
        for path in sorted((root / name).rglob("*.yaml")):
            found[path.relative_to(root / name).with_suffix("").as_posix()] = description(path)
    return found


def description(path: Path) -> str:
    """The first comment line of a file that is not a directive."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("#") and "@package" not in line:
                return line.lstrip("# ").strip()
    return ""
