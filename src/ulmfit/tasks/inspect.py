"""What is in a data set, before anyone trains on it: `ulmfit inspect dataset.path=reviews.csv`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ulmfit.config import InspectConfig
from ulmfit.data.sources import Splits, Table, load_splits
from ulmfit.data.splits import text_key

if TYPE_CHECKING:
    from ulmfit.bundle import BundleInfo
    from ulmfit.text.tokenizer import Tokenizer

SPLITS = ("train", "valid", "test", "unlabelled")
QUANTILES = (0.05, 0.5, 0.95)
IMBALANCE = 5  # warn when a class has this many times the rows of another
FEW_ROWS = 10  # warn below this many training rows of a class
SHORT_OF_CHARACTERS = 0.01  # warn above this share of unknown or byte pieces
_CHUNK = 1000  # texts tokenised at a time


def run(config: InspectConfig) -> dict[str, Any]:
    """Print and return the description of a data set; with a bundle also in its tokens, and the expected times.

    Raises:
        DataError: as `load_splits`.
        BundleError: if `config.bundle` is not a bundle.
    """
    tokenizer, info = None, None
    if config.bundle is not None:
        from ulmfit.bundle import read_info
        from ulmfit.tasks.locations import resolve_bundle
        from ulmfit.text.tokenizer import Tokenizer

        folder = resolve_bundle(config.bundle, None)
        info, tokenizer = read_info(folder), Tokenizer.load(folder)
    description = describe(load_splits(config.dataset), tokenizer)
    description["name"] = config.dataset.name
    if info is not None:
        description["time"] = expected_times(description, info)
    print(format_description(description))
    return description


def describe(splits: Splits, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Figures of a data set as plain data.

    Returns:
        `splits`: for each split its `documents`, `classes` (rows per label, or None), `empty` documents,
        `duplicates` (rows whose text stood earlier in the split), `conflicts` (distinct texts with several labels),
        `characters` and `tokens` (quantiles, mean, largest, total; tokens with the begin marker, None without
        tokenizer), `unknown_share` and `byte_share` of the pieces, `seconds` the tokenizer took.
        `overlaps`: for each pair of splits that share texts, how many `documents` of the second stand in the first.
        `warnings`: sentences about what is likely to go wrong.

    Texts count as the same when they differ in whitespace and case only; empty ones never do.
    """
    tables = {name: table for name in SPLITS if (table := splits.of(name)) is not None}
    keys = {name: [text_key(text) if text else None for text in table.texts] for name, table in tables.items()}
    described = {name: _describe_table(table, keys[name], tokenizer) for name, table in tables.items()}
    overlaps = []
    for first, second in combinations(tables, 2):
        seen = set(keys[first]) - {None}
        if shared := sum(key in seen for key in keys[second]):
            overlaps.append({"in": first, "of": second, "documents": shared, "share": shared / len(keys[second])})
    description: dict[str, Any] = {"splits": described, "overlaps": overlaps}
    description["warnings"] = list(_warnings(description))
    return description


def expected_times(description: dict[str, Any], info: BundleInfo) -> dict[str, float]:
    """Rough seconds for an epoch of each stage on this machine, from one training step of a network of this shape.

    Returns:
        `tokens_per_second` of the language model, `lm_finetune` (seconds an epoch over train and unlabelled),
        `classifier` (seconds an epoch over train, everything unfrozen), `predict_test` (seconds, if there is a test).
    """
    import torch

    from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
    from ulmfit.nn.models import LanguageModel

    rows, steps = 32, 70
    model = LanguageModel(AWDLSTM(Architecture(**info.architecture)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    tokens = torch.randint(3, max(4, info.architecture["vocab_size"]), (rows, steps), device=device)

    def language_model() -> None:
        model.loss(tokens, tokens).cross_entropy.backward()  # type: ignore[no-untyped-call]

    def encoder() -> None:
        model.encoder(tokens)[0].sum().backward()

    def reading() -> None:
        with torch.no_grad():
            model.encoder(tokens)

    def seconds_per_token(step: Any) -> float:
        step()  # memory and threads are set up
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / (rows * steps)

    per_token = seconds_per_token(language_model)
    counts = {name: split["tokens"]["total"] for name, split in description["splits"].items()}
    times = {"tokens_per_second": 1 / per_token}
    times["lm_finetune"] = per_token * (counts.get("train", 0) + counts.get("unlabelled", 0))
    if description["splits"].get("train", {}).get("classes"):
        times["classifier"] = seconds_per_token(encoder) * counts["train"]
    if "test" in counts:
        times["predict_test"] = seconds_per_token(reading) * counts["test"]
    return times


def format_description(description: dict[str, Any]) -> str:
    """The description as a plain-text table for people."""
    splits: dict[str, dict[str, Any]] = description["splits"]
    names = list(splits)
    lines = [f"Data set {description['name']}" if "name" in description else "Data set", ""]
    rows: list[tuple[str, list[str]]] = [("documents", [_count(splits[n]["documents"]) for n in names])]
    for key in ("empty", "duplicates", "conflicts"):
        title = {"empty": "  empty", "duplicates": "  repeated in the split", "conflicts": "  with several labels"}[key]
        rows.append((title, [_count(splits[n][key]) for n in names]))
    for unit in ("characters", "tokens"):
        if all(splits[n][unit] is None for n in names):
            continue
        rows.append((f"{unit}, total", [_count(splits[n][unit]["total"]) for n in names]))
        for key, title in (("q5", "5 % are below"), ("q50", "half are below"), ("q95", "95 % are below")):
            rows.append((f"  {title}", [_count(splits[n][unit][key]) for n in names]))
        rows.append(("  longest", [_count(splits[n][unit]["largest"]) for n in names]))
    if any(splits[n]["tokens"] is not None for n in names):
        rows.append(("unknown pieces", [f"{splits[n]['unknown_share']:.2%}" for n in names]))
        rows.append(("byte pieces", [f"{splits[n]['byte_share']:.2%}" for n in names]))
    lines += _table_lines(["", *names], [[title, *cells] for title, cells in rows])

    labelled = [n for n in names if splits[n]["classes"] is not None]
    if labelled:
        labels = sorted({label for n in labelled for label in splits[n]["classes"]})
        cells = [[label, *(_with_share(splits[n], label) for n in labelled)] for label in labels]
        lines += ["", *_table_lines(["class", *labelled], cells)]
    if description["overlaps"]:
        lines += ["", "The same text in two splits"]
        for item in description["overlaps"]:
            lines.append(
                f"  {_count(item['documents'])} of {item['of']} ({item['share']:.2%}) also stand in {item['in']}"
            )
    if times := description.get("time"):
        lines += ["", f"Expected times here (rough; {times['tokens_per_second']:,.0f} tokens/s in training)"]
        titles = {
            "lm_finetune": "fine-tuning the language model, an epoch",
            "classifier": "training the classifier, an epoch",
            "predict_test": "predicting the test split",
        }
        lines += [f"  {title}: {_duration(times[key])}" for key, title in titles.items() if key in times]
    if description["warnings"]:
        lines += ["", "Take note", *(f"  - {warning}" for warning in description["warnings"])]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ figures


def _describe_table(table: Table, keys: Sequence[bytes | None], tokenizer: Tokenizer | None) -> dict[str, Any]:
    counted = Counter(key for key in keys if key is not None)
    result: dict[str, Any] = {
        "documents": len(table),
        "classes": None if table.labels is None else dict(sorted(Counter(table.labels).items())),
        "empty": sum(key is None for key in keys),
        "duplicates": sum(counted.values()) - len(counted),
        "conflicts": 0,
        "characters": _quantiles([len(text) for text in table.texts]),
        "tokens": None,
        "unknown_share": None,
        "byte_share": None,
    }
    if table.labels is not None:
        labels_of: dict[bytes, set[str]] = {}
        for key, label in zip(keys, table.labels, strict=True):
            if key is not None:
                labels_of.setdefault(key, set()).add(label)
        result["conflicts"] = sum(len(labels) > 1 for labels in labels_of.values())
    if tokenizer is not None:
        result |= _describe_tokens(table.texts, tokenizer)
    return result


def _describe_tokens(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    byte_ids = {i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i)}
    lengths: list[int] = []
    unknown = in_bytes = 0
    started = time.perf_counter()
    for start in range(0, len(texts), _CHUNK):
        for ids in tokenizer.encode_batch(texts[start : start + _CHUNK]):
            lengths.append(len(ids) + 1)  # with the begin marker
            unknown += ids.count(tokenizer.unk_id)
            in_bytes += sum(i in byte_ids for i in ids)
    pieces = max(1, sum(lengths) - len(lengths))
    return {
        "tokens": _quantiles(lengths),
        "unknown_share": unknown / pieces,
        "byte_share": in_bytes / pieces,
        "seconds": time.perf_counter() - started,
    }


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    figures: dict[str, float] = {f"q{round(100 * q)}": ordered[round(q * last)] for q in QUANTILES}
    return figures | {"mean": sum(ordered) / len(ordered), "largest": ordered[-1], "total": sum(ordered)}


def _warnings(description: dict[str, Any]) -> Iterable[str]:
    splits = description["splits"]
    classes = splits.get("train", {}).get("classes")
    if classes:
        largest, smallest = max(classes, key=classes.__getitem__), min(classes, key=classes.__getitem__)
        if classes[largest] >= IMBALANCE * classes[smallest]:
            yield (
                f"The classes are unequal: {classes[largest]:,} training rows of '{largest}' and {classes[smallest]:,}"
                f" of '{smallest}'; look at macro F1 beside accuracy, and try stage.classifier.class_weights=balanced."
            )
        if few := [label for label, count in classes.items() if count < FEW_ROWS]:
            yield f"Fewer than {FEW_ROWS} training rows: {', '.join(few)}."
        for name in ("valid", "test"):
            found = splits.get(name, {}).get("classes") or {}
            if unseen := [label for label in found if label not in classes]:
                yield f"Labels in {name} that no training row has: {', '.join(unseen)}."
            if found and (missing := [label for label in classes if label not in found]):
                yield f"Classes without a row in {name}: {', '.join(missing)}."
    for item in description["overlaps"]:
        count, where = f"{item['documents']:,}", item["in"]
        if item["of"] == "unlabelled" and where != "train":
            yield f"{count} unlabelled documents also stand in {where}; language-model fine-tuning leaves those out."
        elif item["of"] == "test":
            yield f"{count} test documents also stand in {where}, so the test figure is a little too good."
    for name, split in splits.items():
        if split["conflicts"]:
            yield f"{split['conflicts']:,} texts of {name} have several different labels."
        if split["empty"]:
            yield f"{split['empty']:,} documents of {name} are empty."
        share = (split["unknown_share"] or 0) + (split["byte_share"] or 0)
        if share > SHORT_OF_CHARACTERS:
            yield (
                f"{share:.1%} of the pieces of {name} are unknown or single bytes: the tokenizer does not know this"
                " kind of text; try stage.lm.vocabulary=train."
            )


# ------------------------------------------------------------------------------------------------ layout


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _with_share(split: dict[str, Any], label: str) -> str:
    count = split["classes"].get(label, 0)
    return f"{count:,} ({count / split['documents']:.1%})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = row
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
