"""The command line before Hydra sees it: verb, flags, and overrides checked against the schema.

Hydra's own messages are long and name its internals, so every mistake that can be seen here is answered here, and what
a user would naturally type is put into Hydra's grammar: `bundle=runs/a` for a list, `prompt=Hello, you`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulmfit import conf_files
from ulmfit.errors import UsageError, did_you_mean
from ulmfit.schema import VERBS, describe, element_type, is_section, locate, unknown_key, unwrap

FLAGS = {  # name -> (short form, whether a value follows)
    "--multirun": ("-m", False),
    "--config-dir": ("-cd", True),
    "--cfg": ("-c", True),
    "--resolve": ("", False),
    "--package": ("-p", True),
    "--info": ("-i", True),
    "--hydra-help": ("", False),
    "--shell-completion": ("-sc", False),
}
OWN_FLAGS = {"--help": "-h", "--version": "-V", "--debug": ""}
FILE_KEYS = dict.fromkeys(("train", "find_lr", "pack", "evaluate", "inspect"), "dataset.path")
FILE_KEYS |= {"predict": "input", "report": "runs"}

PARSERS: dict[type, Callable[[str], object]] = {int: int, float: float}
BOOLS = ("true", "false", "yes", "no", "on", "off", "1", "0")


@dataclass
class Arguments:
    """A parsed command line; `flags` and `overrides` are what Hydra receives."""

    verb: str | None = None
    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    config_dir: Path | None = None
    multirun: bool = False
    debug: bool = False
    help: bool = False
    version: bool = False
    completion: bool = False


def parse(argv: Sequence[str]) -> Arguments:
    """Splits `argv` (without the program's name) and checks it.

    Raises:
        UsageError: unknown verb, flag, key or group option, or a value of the wrong type.
    """
    arguments, words = Arguments(), []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = next((long for long, short in OWN_FLAGS.items() if name == short), name)
        name = next((long for long, (short, _) in FLAGS.items() if name == short), name)
        if name in OWN_FLAGS:
            setattr(arguments, name.strip("-"), True)
            continue
        if name not in FLAGS:
            raise UsageError(f"{word}: there is no such option{did_you_mean(name, [*FLAGS, *OWN_FLAGS])}")
        if FLAGS[name][1] and not equals:
            if not queue:
                raise UsageError(f"{name}: expected a value after it")
            value = queue.pop(0)
        take_flag(arguments, name, value)
    if words and (words[0] in VERBS or "=" not in words[0]):
        arguments.verb = known_verb(words.pop(0))
    if arguments.verb is None and words and not (arguments.help or arguments.version or arguments.completion):
        verbs = ", ".join(VERBS)
        raise UsageError(f"{words[0]}: expected a verb before it ({verbs}), such as: ulmfit train {words[0]}")
    if arguments.verb is not None and not arguments.completion:
        arguments.multirun |= any(re.match(r"(\+?sweep=(?!null))|hydra\.mode=MULTIRUN", word) for word in words)
        words = [checked_override(arguments, word) for word in words]
    arguments.overrides = words
    return arguments


def take_flag(arguments: Arguments, name: str, value: str) -> None:
    """Notes what a flag means for us and keeps it for Hydra."""
    if name == "--config-dir":
        arguments.config_dir = Path(value).expanduser()
        if not arguments.config_dir.is_dir():
            raise UsageError(f"--config-dir {value}: there is no such folder; expected one like conf/")
    parts = ("job", "hydra", "all")
    if name == "--cfg" and value not in parts:
        raise UsageError(f"--cfg {value}: expected one of {', '.join(parts)}{did_you_mean(value, parts)}")
    arguments.multirun |= name == "--multirun"
    arguments.completion |= name == "--shell-completion"
    arguments.flags += [name, value] if FLAGS[name][1] else [name]


def known_verb(word: str) -> str:
    """`word` if it is a verb.

    Raises:
        UsageError: it is not.
    """
    if word not in VERBS:
        guess = word.replace("-", "_").replace("lr_find", "find_lr")
        hint = did_you_mean(guess, VERBS) or f"; expected one of {', '.join(VERBS)}"
        raise UsageError(f"{word}: there is no such verb{hint}")
    return word


def checked_override(arguments: Arguments, word: str) -> str:
    """One `key=value` in Hydra's grammar, checked as far as it can be without composing."""
    verb = arguments.verb or ""
    match = re.fullmatch(r"(\+\+|\+|~)?([^=]+)(?:=(.*))?", word, flags=re.DOTALL)
    if match is None:
        raise UsageError(f"'{word}': expected key=value")
    prefix, key, value = match.group(1) or "", match.group(2), match.group(3)
    if key.partition(".")[0] == "hydra" or key.startswith("hydra/"):
        return word
    groups = conf_files.groups(verb)
    if prefix == "~":
        raise UsageError(f"{word}: a key cannot be removed; expected key=value, such as {key}=null")
    if value is None:
        raise UsageError(missing_equals(verb, key))
    if key in groups:
        check_options(arguments, key, value)
        return f"{key}={value}"
    annotation = locate(VERBS[verb], key)
    if annotation is None:
        raise unknown_key(VERBS[verb], key, word, groups)
    return f"{key}={checked_value(arguments, key, value, annotation)}"


def missing_equals(verb: str, word: str) -> str:
    """The sentence for a word without `=`, with the key that it may have been meant for."""
    for group in conf_files.groups(verb):
        if word in conf_files.options(group):
            return f"'{word}': expected key=value; did you mean {group}={word}?"
    if verb in FILE_KEYS and (Path(word).exists() or Path(word).suffix):
        return f"'{word}': expected key=value; did you mean {FILE_KEYS[verb]}={word}?"
    return f"'{word}': expected key=value; 'ulmfit {verb} --help' lists the keys"


def check_options(arguments: Arguments, group: str, value: str) -> None:
    """Checks that the options chosen for a group exist.

    Raises:
        UsageError: one does not, or several were given without `--multirun`.
    """
    known = conf_files.options(group, arguments.config_dir)
    if not arguments.multirun and "," in re.sub(r"\[[^\]]*\]", "", value):
        raise UsageError(several(group, value))
    for name in re.findall(r"[^\s,\[\]'\"]+", re.sub(r"\b(choice|glob|range)\(.*", "", value)):
        if name not in known and name != "null" and not name.startswith("${"):
            hint = did_you_mean(name, known) or f"; expected one of {', '.join(known)}"
            raise UsageError(f"{group}={value}: there is no option '{name}'{hint}")
    if not value.strip("[] "):
        raise UsageError(f"{group}={value}: expected one of {', '.join(known)}")


def several(key: str, value: str) -> str:
    return f"{key}={value}: expected one value; add --multirun to run once for each"


def checked_value(arguments: Arguments, key: str, value: str, annotation: Any) -> str:
    """`value` in Hydra's grammar if it can be of the type `annotation`.

    Raises:
        UsageError: it cannot.
    """
    inner, nullable = unwrap(annotation)
    if value.startswith("${") or inner is Any:
        return value
    if value == "null":
        if not nullable:
            raise UsageError(f"{key}=null: expected {describe(annotation)}")
        return value
    if is_section(inner):
        if not value.startswith("{"):
            raise UsageError(f"{key}={value}: expected {describe(annotation)}, each set as {key}.NAME=VALUE")
        return value
    element = element_type(annotation)
    if element is not None:
        return list_value(value, element, arguments.multirun)
    swept = arguments.multirun and ("," in value or re.match(r"(choice|range|interval|glob|sort|shuffle|tag)\(", value))
    if inner is str:
        return value if swept or re.fullmatch(r"'.*'|\".*\"", value, flags=re.DOTALL) else quoted(value)
    if swept and "(" in value:
        return value
    parts = value.split(",") if swept else [value]
    for part in parts:
        if not can_be(part.strip(), inner):
            if "," in value and all(can_be(piece.strip(), inner) for piece in value.split(",")):
                raise UsageError(several(key, value))
            raise UsageError(f"{key}={value}: expected {describe(annotation)}")
    return value


def can_be(text: str, kind: type) -> bool:
    """Whether `text` reads as a value of `kind`."""
    if kind is bool:
        return text.lower() in BOOLS
    try:
        PARSERS[kind](text)
    except ValueError:
        return False
    return True


def list_value(value: str, element: type, multirun: bool) -> str:
    """Brackets round a list given without them; in a sweep each value becomes a list of its own."""
    if value.startswith("[") or (multirun and "(" in value):
        return value
    items = [item.strip() for item in value.split(",")] if value.strip() else []
    items = [quoted(item) if element is str and not re.fullmatch(r"'.*'|\".*\"", item) else item for item in items]
    return ",".join(f"[{item}]" for item in items) if multirun else f"[{','.join(items)}]"


def quoted(text: str) -> str:
    """A text as one value of Hydra's grammar, whatever characters it has."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
