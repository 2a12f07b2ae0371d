"""Starts `ulmfit train` with several processes; as a script it is that command, in which one rank can be killed.

Not a test module: the tests of this folder and the stress tests load it by its path.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

MARK, KILL = "ULMFIT_TEST_MARK", "ULMFIT_TEST_KILL"
DOUBLE = "ULMFIT_TEST_DOUBLE"  # set: float64 where the code asks for at least float32
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
SMALL = [
    "experiment=smoke",
    "trainer.threads=1",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "stage.lm.max_steps=4",
    "stage.classifier.epochs=4",  # an unfreezing each
    "stage.classifier.max_steps=null",
    "stage.classifier.batch_size=16",
]
LOST = ("was ended by SIGKILL", "the connection to another process of this training is lost")


@dataclass
class Started:
    """A command that may start others; all carry the same mark in their environment."""

    folder: Path
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    kill: str = ""  # "stage step rank": SIGKILL in the middle of that step
    log: str = "log"

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.killed = self.folder / f"killed-{self.mark}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **self.environment}
        if self.kill:
            environment[KILL] = f"{self.kill} {self.killed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        """All that the processes have written so far."""
        return (self.folder / self.log).read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[int]:
        """The processes of this command, orphans too."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                marked = f"{MARK}={self.mark}".encode() in environ.read_bytes()
            except OSError:
                continue
            if marked:
                found.append(int(environ.parent.name))
        return found

    def seconds_until_gone(self, limit: float) -> float:
        """How long until no process is left; those left after `limit` seconds are ended, and it is an error."""
        began = time.monotonic()
        while time.monotonic() - began < limit:
            self.process.poll()
            if not self.alive():
                self.process.wait()
                return time.monotonic() - began
            time.sleep(0.1)
        self.end()
        raise AssertionError(f"still there after {limit} s:\n{self.said}")

    def wait_for_kill(self, limit: float = 240) -> None:
        """Until the rank has been killed."""
        self.wait_for(self.killed, limit)

    def wait_for(self, path: Path, limit: float = 240) -> None:
        """Until a file is there."""
        began = time.monotonic()
        while not path.exists():
            ended = self.process.poll() is not None and not self.alive()
            if ended or time.monotonic() - began > limit:
                self.end()
                raise AssertionError(f"no {path.name}:\n{self.said}")
            time.sleep(0.05)

    def end(self) -> None:
        """Kills what is left of it."""
        for process in self.alive():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def ulmfit(*words: str) -> list[str]:
    """The command in which a rank can be killed."""
    return [sys.executable, str(Path(__file__)), *words]


def main() -> int:
    """`ulmfit`, in which one rank kills itself if asked to."""
    from ulmfit import cli

    if os.environ.get(DOUBLE):
        import torch

        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    stage, step, rank, path = os.environ.get(KILL, "none 0 0 none").split(" ", 3)
    if stage != "none":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from ulmfit.training import classifier, lm

        module = {"lm": lm.LMModule, "classifier": classifier.ClassifierModule}[stage]
        train = module.training_step

        def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
            if self.trainer.global_step == int(step) and rank in ("all", str(self.trainer.global_rank)):
                Path(path).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return train(self, batch, batch_idx)

        module.training_step = training_step  # type: ignore[method-assign]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
