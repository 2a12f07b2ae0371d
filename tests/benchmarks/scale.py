"""Time and memory against the size of the corpus and the length of a document, and a corpus larger than memory."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import limits
import report
from processes import Failed, Worker

NAMES = ["scale_corpus", "scale_length", "scale_memory"]
SIZES, TINY_SIZES = [4_000_000, 40_000_000, 400_000_000], [100_000, 1_000_000]
LENGTHS, TINY_LENGTHS = [100, 1000, 10_000, 100_000, 1_000_000], [100, 1000]
CORPUS = {"build": "text to token cache", "read": "a shuffled epoch of 64 x 70 batches from it"}
DOCUMENT = {"predict": "prediction", "train": "training step of a classifier"}


def run(chosen: list[str], folder: Path, out: Path, options: argparse.Namespace) -> int:
    """Measure and write scale.json, scale.md and plots; returns how many measurements failed."""
    started = time.monotonic()
    content: dict[str, Any] = {
        "command": report.command(),
        "date": datetime.date.today().isoformat(),
        "tiny": options.tiny,
        "machine": limits.machine(options.threads),
        "points": [],
        "limited": [],
        "failures": [],
    }

    def point(task: str, **settings: Any) -> dict[str, Any] | None:
        name = " ".join([task, *(f"{key}={value}" for key, value in settings.items())])
        try:
            with Worker("scale_tasks", task, folder, {"threads": options.threads, **settings}) as worker:
                found = {"task": task, **settings, **worker.measure(), "private_mb": round(worker.private_mb)}
        except Failed as error:
            content["failures"].append({"title": name, "why": str(error)})
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            return None
        shown = ", ".join(f"{key} {found[key]:.4g}" for key in ("seconds", "cpu_seconds", "private_mb"))
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        return found

    def keep(list_name: str, found: dict[str, Any] | None) -> None:
        if found is not None:
            content[list_name].append(found)
        content["seconds"] = time.monotonic() - started
        report.write(out, "scale", content, markdown(content))

    if "scale_corpus" in chosen:
        for size in TINY_SIZES if options.tiny else SIZES:
            for task in CORPUS:
                keep("points", point(task, bytes=size))
    if "scale_length" in chosen:
        lengths = TINY_LENGTHS if options.tiny else LENGTHS
        for length in lengths if point("make_network", lengths=lengths) else []:
            for task in DOCUMENT:
                keep("points", point(task, tokens=length))
    if "scale_memory" in chosen:
        size, times, headroom = (1_000_000, 1, 64) if options.tiny else (300_000_000, 4, 64)
        built = point("limited_build", bytes=size, headroom_mb=headroom)
        keep("limited", built)
        keep("limited", built and point("limited_read", times=times, headroom_mb=headroom))
    _plot(content, out)
    return len(content["failures"])


def markdown(content: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Time and memory against size",
        "",
        *report.machine_lines(content),
        "",
    ]
    lines += [
        "One run of each size, each in a fresh process. Memory is what the process and those it starts hold privately "
        "at most (sampled, libraries included), without pages of mapped files: the system takes those back when it "
        "needs them.",
    ]
    for title, key, unit, tasks in (
        ("Size of the corpus", "bytes", "MB of text", CORPUS),
        ("Length of a document", "tokens", "tokens", DOCUMENT),
    ):
        points = [point for point in content["points"] if point["task"] in tasks]
        if not points:
            continue
        lines += ["", f"## {title}", "", f"![{title}](scale-{'corpus' if key == 'bytes' else 'length'}.png)", ""]
        if key == "tokens":
            lines += ["A network of 64/128/2, fp32, `max_len` 1,400.", ""]
        lines += [f"| what | {unit} | s | {'MB' if key == 'bytes' else 'tokens'}/s | memory, MB |"]
        lines += ["|---|---|---|---|---|"]
        for task, what in tasks.items():
            for point in (point for point in points if point["task"] == task):
                size = point["bytes"] / 1e6 if key == "bytes" else point["work"]
                lines.append(
                    f"| {what} | {report.number(size)} | {point['seconds']:.3g} "
                    f"| {report.number(size / point['seconds'])} | {point['private_mb']:,} |"
                )
    if content["limited"]:
        lines += ["", "## A corpus larger than memory", ""]
        lines += [
            "The process is allowed 64 MB more than it holds after loading its libraries (RLIMIT_DATA); the token "
            "cache is larger than all that it may hold together.",
            "",
            "| what | may hold, MB | token cache, MB | s |",
            "|---|---|---|---|",
        ]
        for point in content["limited"]:
            what = CORPUS[point["task"].removeprefix("limited_")]
            lines.append(f"| {what} | {point['limit_mb']:,} | {point['cache_mb']:,} | {point['seconds']:.3g} |")
    if content["failures"]:
        lines += ["", "## Failed", "", *(f"- {failure['title']}: {failure['why']}" for failure in content["failures"])]
    return "\n".join(lines) + "\n"


def _plot(content: dict[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    from ulmfit.whole_file import whole_file

    for name, tasks, label in (("corpus", CORPUS, "MB of text"), ("length", DOCUMENT, "tokens of the document")):
        series = {what: [p for p in content["points"] if p["task"] == task] for task, what in tasks.items()}
        if not any(series.values()):
            continue
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        seconds, memory = figure.subplots(1, 2)
        for what, points in series.items():
            sizes = [point["bytes"] / 1e6 if name == "corpus" else point["work"] for point in points]
            line = seconds.plot(sizes, [point["seconds"] for point in points], "o-", label=what)[0]
            if points:  # what linear growth from the largest size backwards would be
                last = points[-1]["seconds"] / sizes[-1]
                seconds.plot(sizes, [last * size for size in sizes], ":", color=line.get_color(), linewidth=1)
            memory.plot(sizes, [point["private_mb"] for point in points], "o-", label=what)
        for axes, title in ((seconds, "seconds (dotted: linear)"), (memory, "private memory, MB")):
            axes.set(xscale="log", xlabel=label, title=title)
            axes.grid(alpha=0.3)
        seconds.set_yscale("log")
        memory.set_ylim(bottom=0)
        seconds.legend(fontsize="small")
        with whole_file(out / f"scale-{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=110)
