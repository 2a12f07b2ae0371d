"""Starting the processes that measure, asking them, and watching their memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """A process that measures gave up; the message says why."""


class Worker:
    """One side of one case; use it in a `with` statement.

    Args:
        timeout: seconds that a preparation or a measurement may take.
    """

    def __init__(
        self,
        side: str,
        task: str,
        folder: Path,
        settings: dict[str, Any],
        timeout: float = 1800,
        script: str = "worker",
    ) -> None:
        threads = str(settings["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if settings.get("device") != "gpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # fastai would take it
        command = [sys.executable, str(HERE / f"{script}.py"), side, task, str(folder), json.dumps(settings)]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # open while it runs
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._timeout = timeout
        self._peak = 0.0
        self.private_mb = 0.0  # the most that they held at a time without pages of files, sampled
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._watch_memory, daemon=True)
        self._watch.start()

    def __enter__(self) -> Worker:
        try:
            self._answer()
        except Failed:
            self.__exit__()
            raise
        return self

    def measure(self) -> dict[str, Any]:
        """One measurement.

        Raises:
            Failed: it went wrong.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        return self._answer()

    @property
    def memory_mb(self) -> float:
        """The most memory that the process and those it started have had in use so far, 0 where it is not known."""
        return max(self._peak, _status(self._process.pid, "VmHWM"))

    def __exit__(self, *_: object) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._watch.join()
        for pid in (*_descendants(self._process.pid), self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        alarm = threading.Timer(self._timeout, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        """Why there is no answer."""
        self._log.seek(0)
        said = self._log.read()[-300:].strip()
        return f"the process was killed, or needed more than {self._timeout:.0f} s" + (
            f"; it said: {said}" if said else ""
        )

    def _watch_memory(self) -> None:
        """Processes that it starts count too; pages that they share are counted once."""
        wait = 0.05
        while not self._ended.wait(wait):
            began = time.thread_time()
            started = _descendants(self._process.pid)
            if started:
                together = _status(self._process.pid, "VmRSS") + sum(_own_share(pid) for pid in started)
                self._peak = max(self._peak, together)
            private = sum(_status(pid, "RssAnon") for pid in (self._process.pid, *started))
            self.private_mb = max(self.private_mb, private)
            # Reading the memory of a large process takes milliseconds: no more than a hundredth of a core.
            wait = max(0.05, 100 * (time.thread_time() - began))


class Beside:
    """The machine's limits, measured between runs by a process that sleeps meanwhile; use it in a `with` statement.

    Attributes:
        failed: why there are none (any more).
    """

    def __init__(self, names: list[str], folder: Path, settings: dict[str, Any]) -> None:
        self._names = names
        self._start = lambda: Worker("limits", "beside", folder, {**settings, "names": names}).__enter__()
        self._worker: Worker | None = None
        self.failed = ""

    def __enter__(self) -> Beside:
        if self._names:
            try:
                self._worker = self._start()
            except Failed as error:
                self.failed = str(error)
        return self

    def measure(self) -> dict[str, float]:
        """Each of the names that can be measured, as it is now."""
        if self._worker is None or self.failed:
            return {}
        try:
            found = self._worker.measure()
        except Failed as error:
            self.failed = str(error)
            return {}
        return {name: found[name] for name in self._names if name in found}

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.__exit__()


def _status(pid: int, name: str) -> float:
    """A line of /proc/PID/status in MB."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def _own_share(pid: int) -> float:
    """Memory of a process in MB, each shared page divided by those who share it."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def _descendants(pid: int) -> list[int]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    except OSError:
        pass
    return found
