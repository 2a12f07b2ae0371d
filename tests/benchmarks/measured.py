"""A case as it is measured: its processes, who runs when, and what each run brought."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import report
import shares
from cases import Case
from processes import Beside, Failed, Worker


class Measured:
    """What was measured of a case: of each of our ways, and of fastai; or why not."""

    def __init__(self, case: Case, settings: dict[str, Any]) -> None:
        self.case = case
        self.settings = settings
        # Sides measure in this order: ours and theirs take turns.
        self.ways = {way.label or "ours": way for way in case.ways}
        self.sides = [*self.ways, *([] if case.alone else ["fastai"])]
        self.runs: dict[str, list[dict[str, Any]]] = {side: [] for side in self.sides}
        self.peaks: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.without_limits = ""  # why the machine's limit was not measured before and after each run

    def measure(self, folder: Path, repeats: int) -> None:
        """A process for each side; a side that fails is left out from then on."""
        workers: dict[str, Worker] = {}
        try:
            for bundle in self._bundles():
                if not (folder / bundle).exists():
                    with Worker("ours", f"make_{bundle}", folder, self.settings):
                        pass
            # Side by side where nothing is measured of the processor that they share.
            with ThreadPoolExecutor(len(self.sides) if self.case.device == "gpu" else 1) as pool:
                for side in self.sides:
                    more = {} if side == "fastai" else self.ways[side].settings
                    module = "theirs" if side == "fastai" else "ours"
                    pool.submit(self._try, side, lambda s=side, m=module, x=more: self._start(workers, s, m, folder, x))
            names = {way.share for way in self.case.ways if way.share} if self.case.device == "cpu" else ()
            with Beside(sorted(names), folder, self.settings) as beside:
                before = beside.measure()
                for _ in range(repeats):
                    for side in [side for side in self.sides if side not in self.failed]:
                        self._try(side, lambda s=side: self.runs[s].append(workers[s].measure()))
                        after = beside.measure()
                        if side not in self.failed:
                            self.runs[side][-1]["limits"] = shares.between(before, after)
                        before = after
                self.without_limits = beside.failed
            if self.case.device == "cpu":
                self.peaks = {side: worker.memory_mb for side, worker in workers.items()}
        except Failed as error:
            self.failed = dict.fromkeys(self.sides, str(error))
        finally:
            for worker in workers.values():
                worker.__exit__()

    def _bundles(self) -> list[str]:
        """What our side reads, made by a process of its own, whose memory is not that of the work measured."""
        full = ["full"] if self.settings.get("shape") == "full" else []
        return full + (["classifier"] if self.case.task in ("predict_many", "predict_one") else [])

    def _start(self, workers: dict[str, Worker], side: str, module: str, folder: Path, more: dict[str, Any]) -> None:
        workers[side] = Worker(module, self.case.task, folder, {**self.settings, **more}).__enter__()

    def _try(self, side: str, step: Callable[[], object]) -> None:
        try:
            step()
        except Failed as error:
            self.failed[side] = str(error)

    def rows(self, limits: dict[str, float]) -> list[dict[str, Any]]:
        """A row of the report for each of our ways that worked; without fastai's side if that failed."""
        theirs = [] if "fastai" in self.failed else self.runs.get("fastai", [])
        return [
            report.row(
                self.case,
                way,
                self.runs[side],
                theirs,
                (self.peaks.get(side, 0.0), self.peaks.get("fastai", 0.0)),
                limits,
            )
            for side, way in self.ways.items()
            if side not in self.failed
        ]

    def failures(self) -> list[dict[str, str]]:
        """Which side failed and why."""
        return [
            {"case": self.case.name, "what": self.case.what, "title": f"{self.case.title}, {side}", "why": why}
            for side, why in self.failed.items()
        ]
