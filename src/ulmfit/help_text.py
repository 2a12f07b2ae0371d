"""What `--help` prints; groups, keys, defaults and comments are read from `conf/` and `config.py`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ulmfit import __version__, conf_files
from ulmfit.schema import VERBS, comment, field_types, is_section, shown, unwrap

SUMMARIES = {
    "train": "fine-tune a language model and a classifier, or pre-train; writes a bundle",
    "evaluate": "metrics of a bundle, or of an ensemble, on a data set",
    "predict": "labels and probabilities for a file or standard input, as JSON lines",
    "generate": "text from a language model",
    "find_lr": "learning-rate range test of a stage: a plot and a suggestion",
    "pack": "tokenise a corpus into files of limited size, to pre-train on another machine",
    "download": "fetch a data set of the paper from where it is published",
    "inspect": "what is in a data set: counts, lengths, duplicates, leakage, expected time",
    "report": "one table from many runs",
}

EXAMPLES = {
    "train": (
        ("train", "both stages on the sample data and the model that ship"),
        ("train dataset=csv dataset.path=reviews.csv dataset.text=review dataset.label=stars", "your own file"),
        ("train stage=classifier stage.classifier.optim.lr=0.005,0.01 seed=0,1 --multirun", "four runs"),
    ),
    "evaluate": (
        ("evaluate", "the newest classifier on the test texts of the sample data"),
        ("evaluate bundle=runs/imdb/all-0123abcd-seed0/bundle dataset=imdb split=valid", "one bundle"),
        ("evaluate bundle=forward-bundle,backward-bundle dataset=imdb", "an ensemble: probabilities are averaged"),
    ),
    "predict": (
        ("predict < messages.txt", "one text a line, with the newest classifier"),
        ("predict input=reviews.csv text=review output=labels.jsonl", "a column of a file"),
        ("predict bundle=my-bundle batch_size=128 input=texts.txt", "a certain bundle"),
    ),
    "generate": (
        ("generate prompt='My printer'", "with the newest language model"),
        ("generate prompt='My printer' samples=3 temperature=1.0 top_p=0.95", "three bolder texts"),
        ("generate bundle=my-bundle prompt='The' beams=4 tokens=30", "the likeliest text, by beam search"),
    ),
    "find_lr": (
        ("find_lr stage=classifier", "the classifier on the sample data"),
        ("find_lr stage=lm_finetune dataset=trec6", "the language model on TREC-6"),
        ("find_lr stage=classifier start=1e-4 end=10 steps=200", "another range, finer steps"),
    ),
    "pack": (
        ("pack experiment=pretrain_en_base output=packed", "English Wikipedia, pieces of the recipe"),
        ("pack experiment=pretrain_de output=packed-de tokenizer.vocab_size=16000", "another language, more pieces"),
        ("pack stage=lm_pretrain dataset=wikipedia dataset.path=articles.txt.bz2 part_mb=20", "your own articles"),
    ),
    "download": (
        ("download", "TREC-6, into data/trec6"),
        ("download dataset=imdb", "into data/imdb, or below the folder that ULMFIT_DATA names"),
        ("download dataset=ag_news dataset.path=news", "into another folder"),
    ),
    "inspect": (
        ("inspect", "the sample data"),
        ("inspect dataset=csv dataset.path=reviews.csv dataset.text=review", "your own file"),
        ("inspect dataset=imdb bundle=my-bundle", "with the unknown tokens for a bundle's tokenizer"),
    ),
    "report": (
        ("report", "every run under runs/"),
        ("report runs=runs/imdb sort=test_error_%", "one data set, best first"),
        ("report output=table.md", "as a file"),
    ),
}

OPTIONS = """\
options
  -h, --help            this; after a verb, its groups and keys with the values that the command line would use
  -m, --multirun        run once for each combination of values with commas
  -cd, --config-dir DIR look for configuration files in DIR as well (DIR/dataset/mine.yaml is dataset=mine)
  -c, --cfg job         print the whole configuration and stop
  -sc install=bash      print tab completion for a shell: eval "$(ulmfit -sc install=bash)"
  --debug               print the traceback of an error
  -V, --version         print the version"""


def example_lines(examples: tuple[tuple[str, str], ...]) -> list[str]:
    return [line for command, why in examples for line in (f"  ulmfit {command}", f"      {why}")]


def top() -> str:
    """Help without a verb."""
    lines = [
        f"ulmfit {__version__}: fine-tune a language model on your text, then classify with a few labels.",
        "",
        "usage: ulmfit VERB [key=value ...] [options]      (or: python -m ulmfit VERB ...)",
        "",
        "verbs",
        *[f"  {verb:<10}{summary}" for verb, summary in SUMMARIES.items()],
        "",
        "groups of settings (group=option; 'ulmfit train --help' describes each option)",
    ]
    for group, default in conf_files.groups("train").items():
        names = ", ".join(conf_files.options(group))
        head = f"  {group} (default {default})" if default else f"  {group}"
        lines += [head, *textwrap.wrap(names, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    lines += ["", OPTIONS, "", "examples"]
    lines += example_lines((EXAMPLES["train"][0], EXAMPLES["train"][1], EXAMPLES["predict"][0]))
    return "\n".join(lines)


def for_verb(verb: str, config: Any, config_dir: Path | None = None) -> str:
    """Help of a verb; `config` (nested dictionaries) supplies the values shown for its keys."""
    lines = [f"ulmfit {verb}: {SUMMARIES[verb]}", "", f"usage: ulmfit {verb} [key=value ...] [options]", ""]
    lines += ["examples", *example_lines(EXAMPLES[verb]), ""]
    described: set[str] = set()
    groups = {group: default for group, default in conf_files.groups(verb).items() if "@" not in group}
    if "stage" in groups:
        groups |= conf_files.method_groups(config["stage"]["name"])
    for group, default in groups.items():
        name = group.partition("@")[0]
        lines += [f"{group}=" + (f"   (default {default})" if default else "")]
        if name in described:
            lines += ["  the same options as above"]
        else:
            lines += [f"  {option:<20}{text}" for option, text in conf_files.options(group, config_dir).items()]
        described.add(name)
    if several := [group for group in groups if "@" in group]:
        lines += ["", f"Several in brackets are laid on one another: {several[-1]}=[gradual,cosine]"]
    if groups:
        lines.append("")
    lines += ["keys, with the values they would have", *key_lines(VERBS[verb], config), "", OPTIONS]
    return "\n".join(lines)


def key_lines(cls: type[Any], values: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each key: `name=value` and the comment beside the field."""
    lines: list[str] = []
    for name, annotation in field_types(cls).items():
        inner, _ = unwrap(annotation)
        if is_section(inner):
            lines += key_lines(inner, values[name], f"{prefix}{name}.")
        else:
            note = comment(cls, name).replace("None", "null")
            lines.append(f"  {prefix + name + '=' + shown(values[name]):<50}  {note}".rstrip())
    return lines
