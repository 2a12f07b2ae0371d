"""From measurements to figures, and from figures to JSON and Markdown."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import shares
from cases import CASES, GPU_CASES, Case, Way

from ulmfit.whole_file import whole_file

Measured = list[dict[str, Any]]
Peaks = tuple[float, float]
OUTCOMES = {"test_error": "test error, %", "accuracy": "validation accuracy", "loss": "training loss"}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def row(case: Case, way: Way, ours: Measured, theirs: Measured, peaks: Peaks, limits: dict[str, float]) -> Any:
    """What JSON holds of a case done one way: both sides in its unit, the ratio of each pair, and which goals are met.

    Args:
        theirs: empty where fastai has no such thing.
        peaks: memory in MB of our processes and of theirs.
    """
    title = f"{case.title}, {way.label}" if way.label else case.title
    found: dict[str, Any] = {"case": case.name, "title": title, "what": case.what, "unit": case.unit}
    for side, runs, peak in (("ours", ours, peaks[0]), ("theirs", theirs, peaks[1])):
        if runs:
            memory = round(max(peak, *(one.get("memory_mb", 0.0) for one in runs)))
            more = {name: [one[name] for one in runs] for name in OUTCOMES if name in runs[0]}
            values = [_figure(case, one) for one in runs]
            found[side] = {**spread(values), "values": values, "peak_memory_mb": memory, **more}
    goals: list[dict[str, Any]] = []
    if theirs:
        each = [[one["seconds"] / one["work"] for one in runs] for runs in (ours, theirs)]
        found["ratio"] = spread([b / a for a, b in zip(*each, strict=True)])
        found["cpu_ratio"] = spread(
            [
                (b["cpu_seconds"] / b["work"]) / max(a["cpu_seconds"] / a["work"], 1e-9)
                for a, b in zip(ours, theirs, strict=True)
            ]
        )
        if way.goal is not None:
            goals.append(_goal(f"{way.goal:g}x", found["ratio"]["median"] >= way.goal))
        mine, other = (found[side]["peak_memory_mb"] for side in ("ours", "theirs"))
        found["memory_ratio"] = round(mine / max(other, 1), 2)
        goals.append(_goal("memory not above fastai's", mine <= other))
        if "test_error" in ours[0]:
            errors = [statistics.median(one["test_error"] for one in runs) for runs in (ours, theirs)]
            goals.append(_goal("error not above fastai's", errors[0] <= errors[1]))
    if way.most is not None:
        goals.append(_goal(f"at most {way.most:g} {case.unit}", found["ours"]["median"] <= way.most))
    if way.share is not None:
        shares.add(found, way.share, ours, theirs, limits)
        if "share" in found and way.least_share is not None:
            goals.append(_goal(f"{way.least_share:.0%} of the matrix peak", found["share"]["value"] >= way.least_share))
    found["goals"] = goals
    return found


def _figure(case: Case, one: dict[str, Any]) -> float:
    return float(one["work"] / one["seconds"] if case.per_second else case.scale * one["seconds"] / one["work"])


def _goal(text: str, met: bool) -> dict[str, Any]:
    return {"goal": text, "met": bool(met)}


def command() -> str:
    """How this run was started; a note stands elsewhere, and where the report was written first says nothing."""
    words, left_out = [], ("--note", "--out")
    given = iter(sys.argv[1:])
    for word in given:
        if word in left_out:
            next(given, None)
        elif not word.startswith(tuple(f"{name}=" for name in left_out)):
            words.append(word)
    return f"make bench ARGS='{' '.join(words)}'" if words else "make bench"


class NotTheSame(Exception):
    """What stands in a report cannot stand beside what is measured now."""


def kept(folder: Path, again: list[str], content: dict[str, Any]) -> dict[str, Any]:
    """What stays of the report in `folder` when the cases `again` are measured again; empty if there is none.

    Returns: rows, failures, limits, profile and note, and under "earlier" by which command, when and how long.

    Raises:
        NotTheSame: it is of another machine, or its cases are no longer what they were.
    """
    path = folder / f"{content['device']}.json"
    if not path.is_file():
        return {}
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["machine"] != content["machine"]:
        raise NotTheSame(f"{path} is of another machine, or of other versions; measure everything again")
    found = {name: [one for one in old[name] if one["case"] not in again] for name in ("rows", "failures")}
    whats = {case.name: case.what for case in [*CASES, *GPU_CASES]}
    for one in [*found["rows"], *found["failures"]]:
        if whats.get(one["case"]) != one.get("what"):
            raise NotTheSame(f"{path} has measured something else as {one['case']}; measure everything again")
    run = {name: old[name] for name in ("command", "date", "seconds")}
    still = {name: old[name] for name in ("limits", "profile", "note") if name in old}
    return {**found, **still, "earlier": [*old.get("earlier", []), run]}


def write(folder: Path, name: str, content: dict[str, Any], markdown: str) -> None:
    """NAME.json and NAME.md, each whole or not at all."""
    with whole_file(folder / f"{name}.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with whole_file(folder / f"{name}.md") as partial:
        partial.write_text(markdown, encoding="utf-8")


def markdown(content: dict[str, Any]) -> str:
    """The report as a page."""
    rows = content["rows"]
    lines = [
        "# This package and fastai on one machine",
        "",
        *([content["note"], ""] if content.get("note") else []),
        *machine_lines(content),
        "",
        "## Speed",
        "",
    ]
    lines += [
        f"Medians of {content['repeats']} alternating runs, if not said otherwise, and their range. A ratio is "
        "fastai's time divided by ours for the same work; the limit is the ratio if nothing but the matrix products "
        f"took time {shares.at_what_speed(rows)}; of tokenising it is SentencePiece's alone, which is no limit.",
        "",
        "| case | unit | this package | fastai | ratio | limit | goal | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goals = [goal for goal in row["goals"] if not goal["goal"].startswith("memory")]
        lines.append(
            f"| {row['title']}{_runs(row, content['repeats'])} | {row['unit']} | {_shown(row['ours'])} "
            f"| {_shown(row.get('theirs'))} | {_shown(row.get('ratio'), 'x')} "
            f"| {_at_limit(row)} "
            f"| {', '.join(goal['goal'] for goal in goals) or '-'} "
            f"| {', '.join('yes' if goal['met'] else '**no**' for goal in goals) or '-'} |"
        )
    of_what = (
        "that torch has taken on the GPU"
        if content["device"] == "gpu"
        else ("of the process and of those it starts, libraries included")
    )
    lines += ["", "## Peak memory", "", f"MB {of_what}.", ""]
    lines += ["| case | this package | fastai | ours / fastai's |", "|---|---|---|---|"]
    for row in rows:
        peaks = [row[side]["peak_memory_mb"] if side in row else "-" for side in ("ours", "theirs")]
        lines.append(f"| {row['title']} | {peaks[0]} | {peaks[1]} | {row.get('memory_ratio', '-')} |")
    lines += ["", *_limits(content)]
    if "profile" in content:
        lines += ["", *_profile(content["profile"])]
    outcome = [(row, name) for row in rows for name in OUTCOMES if name in row["ours"]]
    if outcome:
        lines += ["", "## What came of it", "", "| case | figure | this package | fastai |", "|---|---|---|---|"]
        for row, name in outcome:
            values = [", ".join(map(str, row.get(side, {}).get(name, []))) or "-" for side in ("ours", "theirs")]
            lines.append(f"| {row['title']} | {OUTCOMES[name]} | {values[0]} | {values[1]} |")
    asked = {row["case"] for row in rows} | {failure["case"] for failure in content["failures"]}
    told = [case for case in [*CASES, *GPU_CASES] if case.name in asked]
    lines += ["", "## What is compared", "", *(f"- {case.title}: {case.what}." for case in told)]
    if content["failures"]:
        lines += ["", "## Not measured", ""]
        lines += [f"- {failure['title']}: {failure['why']}" for failure in content["failures"]]
    return "\n".join(lines) + "\n"


def machine_lines(content: dict[str, Any]) -> list[str]:
    """By which command, when and on what."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    trial = "; **a trial on tiny settings: the figures mean nothing**" if content["tiny"] else ""
    runs = [*content.get("earlier", []), content]
    told = "; then ".join(f"`{run['command']}`, {run['date']}, {run['seconds']:.0f} s" for run in runs)
    return [
        f"{told}{trial}.",
        "",
        *([f"{machine['gpu']}."] if "gpu" in machine else []),
        f"{machine['cpu']} ({', '.join(machine['instructions'])}), {machine['cores']} cores, {machine['threads']} "
        f"threads, {machine['memory_gb']:.0f} GB; {machine['system']}, Python {machine['python']}, {versions}.",
    ]


def _limits(content: dict[str, Any]) -> list[str]:
    limits = content["limits"]
    if not limits:
        return ["## The machine's limit", "", "Not measured.", *shares.lines(content["rows"])]
    pieces = "; SentencePiece alone, without our rules, hand-over and files: {SentencePiece} MB/s"
    lines = [
        "## The machine's limit",
        "",
        "Best of the same run (before and after the cases): matrix products in torch, GFLOP/s, at the sizes of a step "
        f"of 64 x 70 tokens; copying memory, read and written: {limits['memory copy']} GB/s"
        f"{pieces.format(**limits) if 'SentencePiece' in limits else ''}.",
        "",
    ]
    kinds = [kind for kind in ("fp32", "tf32", "bf16") if f"square {kind}" in limits]
    names = [name.removesuffix(" bf16") for name in limits if name.endswith(" bf16")]
    lines += [f"| product | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(limits[f'{name} {kind}']) for kind in kinds)} |" for name in names]
    return [*lines, *shares.lines(content["rows"])]


def _profile(found: dict[str, Any]) -> list[str]:
    """A step's kernels, those that take longest one by one."""
    kernels, whole = found["kernels"], found["step_us"]
    busy = sum(us for us, _, _ in kernels)
    lines = [
        "## Where a step's time goes",
        "",
        f"Of a step of {whole:,.0f} microseconds (traced, so a little slower) kernels run for {busy:,.0f}; those that "
        f"run at the same time are counted twice.{found.get('note', '')}",
        "",
        "| kernel | microseconds a step | calls |",
        "|---|---|---|",
    ]
    lines += [f"| `{_kernel(name)}` | {number(us)} | {number(calls)} |" for us, calls, name in kernels[:20]]
    rest = kernels[20:]
    if rest:
        lines.append(
            f"| {len(rest)} others | {number(sum(us for us, _, _ in rest))} | {number(sum(n for _, n, _ in rest))} |"
        )
    return lines


def _kernel(name: str) -> str:
    """A C++ name without return type, templates and arguments."""
    return name.removeprefix("void ").replace("|", "/")[:90]


def _runs(row: dict[str, Any], repeats: int) -> str:
    runs = len(row["ours"]["values"])
    return "" if runs == repeats else f" ({runs} run{'s' if runs > 1 else ''})"


def _at_limit(row: dict[str, Any]) -> str:
    return f"{row['ratio_at_the_limit']:.3g}x" if "ratio_at_the_limit" in row else "-"


def _shown(found: dict[str, Any] | None, suffix: str = "") -> str:
    if found is None:
        return "-"
    return f"{number(found['median'])}{suffix} ({number(found['min'])}-{number(found['max'])})"


def number(value: float) -> str:
    """Three digits, or more where the number has them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
