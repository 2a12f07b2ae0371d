"""`make bench`: this package and fastai side by side on the same data, shape and machine, and the machine's own limit.

Every case prepares and warms up one process a side, then lets them measure in turns. Results so far are written after
each case, so an interrupted or partly failing run leaves what it has.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import limits
import material
import report
import scale
from cases import CASES, GPU_CASES, GPU_NAMES, NAMES, Case
from measured import Measured
from processes import Failed, Worker


def main(words: list[str]) -> int:
    options = _options(words)
    known = [*NAMES, *scale.NAMES, *GPU_NAMES]
    groups = {"": NAMES, "scale": scale.NAMES, "gpu": GPU_NAMES}
    chosen = groups.get(options.cases) or options.cases.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        print(
            f"bench: no case is called {', '.join(unknown)}; expected scale, gpu or {', '.join(known)}", file=sys.stderr
        )
        return 2
    if options.update and any(name in scale.NAMES for name in chosen):
        print("bench: --update is for the cases against fastai; measure scale whole", file=sys.stderr)
        return 2
    # A selection must not replace the figures of a full run.
    place = "docs" if options.cases in groups or options.update else "runs"
    out = Path(options.out or material.ROOT / place / "benchmarks")
    with tempfile.TemporaryDirectory(prefix="ulmfit-bench-") as name:
        folder = Path(name)
        try:
            material.prepare(folder, options.tiny)
        except material.NoData as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        failures = 0
        try:
            for device, cases in (("cpu", CASES), ("gpu", GPU_CASES)):
                if any(case.name in chosen for case in cases):
                    failures += compare([case for case in cases if case.name in chosen], folder, out, options, device)
        except report.NotTheSame as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        if any(name in chosen for name in scale.NAMES):
            failures += scale.run([name for name in scale.NAMES if name in chosen], folder, out, options)
    print(f"written to {out}", file=sys.stderr)
    return 1 if failures else 0


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        epilog=f"cases: {', '.join(NAMES)}; scale: {', '.join(scale.NAMES)}; gpu: {', '.join(GPU_NAMES)}",
    )
    parser.add_argument(
        "--cases", default="", help="names, with commas between, or scale, or gpu; default: all on the CPU"
    )
    parser.add_argument("--repeats", type=int, help="runs of each side; default: 5, and 1 or 2 where one takes minutes")
    parser.add_argument("--threads", type=int, default=2, help="of either side (2)")
    parser.add_argument(
        "--out", help="folder of the report; default: docs/benchmarks, for some of the cases runs/benchmarks"
    )
    parser.add_argument(
        "--update", action="store_true", help="measure the cases again and keep the others of the report that is there"
    )
    parser.add_argument("--note", help="a line at the head of the report, which --update keeps")
    parser.add_argument("--tiny", action="store_true", help="a trial of seconds on the sample data")
    return parser.parse_args(words)


def compare(chosen: list[Case], folder: Path, out: Path, options: argparse.Namespace, device: str) -> int:
    """Run cases and write DEVICE.json and DEVICE.md; returns how many failed, wholly or in part."""
    started = time.monotonic()
    content: dict[str, Any] = {
        "command": report.command(),
        "date": datetime.date.today().isoformat(),
        "seconds": 0.0,
        "tiny": options.tiny,
        "repeats": options.repeats or 5,
        "device": device,
        "note": options.note or "",
        "machine": limits.machine(options.threads, device),
        "limits": {},
        "rows": [],
        "failures": [],
    }
    measured: list[Measured] = []
    kept = report.kept(out, [case.name for case in chosen], content) if options.update else {}
    content |= kept and {name: kept[name] for name in ("earlier", "limits", "profile") if name in kept}
    content["note"] = content["note"] or kept.get("note", "")
    _limits(content, folder, options)
    for case in chosen:
        _say(case.title)
        found = Measured(case, _settings(case, options))
        measured.append(found)
        before = time.monotonic()
        found.measure(folder, options.repeats or case.repeats or 5)
        if found.without_limits:
            _say(f"  the machine's limit was not measured beside the runs: {found.without_limits}")
        _write(content, measured, started, out, kept)
        for row in (row for row in content["rows"] if row["case"] == case.name):
            _tell(row)
        for failure in (failure for failure in content["failures"] if failure["case"] == case.name):
            _say(f"  {failure['title']} failed: {failure['why']}")
        _say(f"  ({time.monotonic() - before:.0f} s)")
    if not options.tiny:
        _limits(content, folder, options)
    if device == "gpu":
        _profile(content, folder, options)
    _write(content, measured, started, out, kept)
    return sum(len(found.failures()) for found in measured)


def _settings(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    trial = case.tiny if options.tiny else {}
    return {"threads": options.threads, "device": case.device, "tiny": options.tiny, **case.settings, **trial}


def _write(content: dict[str, Any], measured: list[Measured], started: float, out: Path, kept: dict[str, Any]) -> None:
    content["seconds"] = time.monotonic() - started
    rows = [*kept.get("rows", []), *(row for found in measured for row in found.rows(content["limits"]))]
    content["rows"] = sorted(rows, key=lambda row: [*NAMES, *GPU_NAMES].index(row["case"]))
    content["failures"] = [*kept.get("failures", []), *(failure for found in measured for failure in found.failures())]
    report.write(out, content["device"], content, report.markdown(content))


def _limits(content: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """The best found so far."""
    settings = {"threads": options.threads, "device": content["device"], "tiny": options.tiny}
    try:
        with Worker("limits", "measure", folder, settings) as worker:
            for name, value in worker.measure().items():
                content["limits"][name] = max(value, content["limits"].get(name, 0.0))
    except Failed as error:
        _say(f"the machine's limit was not measured: {error}")


def _profile(content: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """What the GPU does in a step of the first case."""
    case = GPU_CASES[0]
    try:
        with Worker(
            "ours", "profile", folder, {**_settings(case, options), **case.ways[0].settings, "steps": 60}
        ) as one:
            content["profile"] = one.measure()
    except Failed as error:
        _say(f"no profile was made: {error}")


def _tell(row: dict[str, Any]) -> None:
    ours, theirs, ratio = (row.get(name, {}).get("median") for name in ("ours", "theirs", "ratio"))
    shown = f"  {row['title']}: {ours:.4g} {row['unit']}"
    if "share" in row:
        shown += f", {row['share']['value']:.0%} of {row['share']['of']}"
    if ratio is not None:
        shown += f", fastai {theirs:.4g}, ratio {ratio:.3g}x (of processor time {row['cpu_ratio']['median']:.3g}x)"
        shown += f", memory {row['memory_ratio']}x"
    missed = [goal["goal"] for goal in row["goals"] if not goal["met"]]
    _say(shown + (f"; missed: {', '.join(missed)}" if missed else ""))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
