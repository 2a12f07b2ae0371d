"""How near our runs come to what the machine can do, and how far ahead of fastai that would be."""

from __future__ import annotations

import statistics
from typing import Any

from limits import BESIDE, TEXT

Measured = list[dict[str, Any]]
# Of the limits measured beside the runs, by what stands in front of "fp32", "bf16" or "int8" in their names.
MEANINGS = {
    "square": "A square product is ({:,} x {:,}) x ({:,} x {:,}), torch's. On processors with AMX our loops multiply "
    "float32 in the tiles for bfloat16, in three parts or (`high`) two, and may do more than torch's float32 product.",
    "recurrent product": "A recurrent product is ({:,} x {:,}) x ({:,} x {:,}), a step of a batch of texts, in int8 "
    "the rounding of its rows included; in GOP/s.",
    "SentencePiece": "SentencePiece's speed, in MB/s, is what tokenising would have without rules, hand-over and files "
    "if each word were segmented anew; those that were met before are looked up.",
    TEXT: f"The {TEXT} are all that the shipped network multiplies to read one of the case's mean length: in each "
    "layer all inputs at once, then the states token by token, each in the fastest way that torch has; their limit is "
    "in texts/s.",
}


def between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The limits of a run from those measured directly before and after it."""
    return {name: (before[name] + after[name]) / 2 for name in before if name in after}


def add(row: dict[str, Any], name: str, ours: Measured, theirs: Measured, limits: dict[str, float]) -> None:
    """What our runs reach of a limit, and the ratio to fastai if they reached it, where the limit is known.

    Each run is compared with what was measured before and after it, or where that is missing (as on a GPU), the median
    with the best of the whole report, `limits`.
    """
    work = ours[0].get("flop", 1e9) / 1e9  # one token, text or MB in what the limit counts
    speeds = [work * one["work"] / one["seconds"] for one in ours]
    speed = statistics.median(speeds)
    if all(name in one.get("limits", {}) for one in [*ours, *theirs]):
        for side, runs in (("ours", ours), ("theirs", theirs)):
            if runs:
                row[side]["limits"] = [round(one["limits"][name], 2) for one in runs]
        values = [round(reached / one["limits"][name], 3) for reached, one in zip(speeds, ours, strict=True)]
        share = {"value": round(statistics.median(values), 3), "min": min(values), "max": max(values), "values": values}
        ratios = [one["seconds"] / one["work"] * one["limits"][name] / work for one in theirs]
    elif name in limits:
        share = {"value": round(speed / limits[name], 3)}
        ratios = [row["ratio"]["median"] * limits[name] / speed] if theirs else []
    else:
        return
    if "flop" in ours[0]:
        row["gflops"] = round(speed, 1)
    row["share"] = {"of": name, **share}
    if ratios:
        row["ratio_at_the_limit"] = round(statistics.median(ratios), 2)


def at_what_speed(rows: list[dict[str, Any]]) -> str:
    """The speed of the machine that a ratio's limit assumes."""
    beside = any(_is_beside(row) for row in rows)
    return "at the machine's speed " + ("directly before and after fastai's run" if beside else "below")


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of shares, and what is compared in it."""
    rows = [row for row in rows if "share" in row]
    if not rows:
        return []
    found = ["", "| case | GFLOP/s | limit | share of the limit |", "|---|---|---|---|"]
    for row in rows:
        share = row["share"]
        limit, spread = "-", ""
        if _is_beside(row):
            limit = str(round(statistics.median(row["ours"]["limits"]), 1))
            spread = f" ({share['min']:.0%}-{share['max']:.0%})"
        shown = f"{share['value']:.0%}{spread} of {share['of']}"
        found.append(f"| {row['title']} | {row.get('gflops', '-')} | {limit} | {shown} |")
    names = {row["share"]["of"] for row in rows if _is_beside(row)}
    if names:
        told = [
            "The machine's speed drifts, so each run is compared with a limit measured directly before and after it: "
            "the medians, and the range of the shares."
        ]
        for name, meaning in MEANINGS.items():
            if any(each.startswith(name) for each in names):
                m, k, n = BESIDE.get(name, (0, 0, 0))
                told.append(meaning.format(m, k, k, n))
        if not all(_is_beside(row) for row in rows):
            told.append("A share without a range, and the limit of that case's ratio, are at the best speed above.")
        found += ["", " ".join(told)]
    return [*found, "", "Counted are matrix products of tokens that are no padding; in an epoch those of training."]


def _is_beside(row: dict[str, Any]) -> bool:
    """Whether its limit was measured beside its runs; reports from before that was done are kept as they are."""
    return "values" in row.get("share", {})
