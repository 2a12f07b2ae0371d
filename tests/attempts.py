"""Runs `ulmfit train` again and again, cheaply, and lets mishaps befall it at a place of one's choice.

One process imports everything once and forks a child for each attempt, which runs the command in a folder. On its way
the child passes *events*: a training step, half a checkpoint on disk, a file about to take its place, and so on. At
one of them it may kill or stop itself, send itself a signal, or fill the disk. Run as a script, this is that process;
imported, it offers `Attempts`, the way to talk to it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KILL, STOP = "SIGKILL", "SIGSTOP"
FULL = "full disk"  # not a signal: whatever is written below the folder from then on fails
BALLAST = "ballast"  # the file that fills the file system

# A tiny training in which everything happens: unfreezing, validation, early stopping that remembers, several chunks.
TINY = [
    "init=scratch",
    "model=tiny",
    "dataset.limit=36",
    "tokenizer.vocab_size=400",
    "trainer=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.threads=1",
    "trainer.enable_progress_bar=false",
    "trainer.checkpoint_minutes=1e-9",  # after each step
    "stage.lm.epochs=3",
    "stage.lm.max_steps=null",
    "stage.lm.batch_size=8",
    "stage.lm.bptt=90",
    "stage.lm.patience=2",
    "stage.lm.optim.lr=0.05",
    "stage.lm.method.unfreezing.mode=gradual",
    "stage.classifier.epochs=4",
    "stage.classifier.max_steps=null",
    "stage.classifier.batch_size=8",
    "stage.classifier.patience=2",
    "stage.classifier.max_len=60",
    "stage.classifier.optim.lr=0.05",
    "stage.classifier.method.unfreezing.mode=gradual",
    "cache=cache",
]


@dataclass
class Plan:
    """What befalls an attempt, and where.

    Attributes:
        mishap: name of a signal, or FULL.
        event: at which kind of event; "": at any.
        count: at how manieth of these.
        seconds: instead, so long after the start.
        folder: the file system to fill.
    """

    mishap: str = KILL
    event: str = ""
    count: int = 1
    seconds: float | None = None
    folder: str = ""

    @property
    def code(self) -> int:
        """With which an attempt ends then."""
        return {KILL: -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75, FULL: 1}[self.mishap]


@dataclass
class Outcome:
    """How an attempt ended.

    Attributes:
        code: the exit code, or the number of the signal that ended it, negative.
        events: what it passed, the last one being where its mishap befell it.
        said: standard error.
        process: its number; it is still there if `stopped`.
    """

    code: int
    events: list[str]
    said: str
    process: int
    stopped: bool = False

    @property
    def where(self) -> str:
        """The event at which it ended."""
        return self.events[-1] if self.events else "at the start"


class Attempts:
    """Asks a process of its own for attempts; see the module."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, folder: Path, words: Sequence[str], plan: Plan | None = None) -> Outcome:
        """`ulmfit WORDS` in `folder`, until it ends or stops."""
        folder.mkdir(parents=True, exist_ok=True)
        return self._ask(folder=str(folder), words=list(words), plan=None if plan is None else asdict(plan))

    def go_on(self, stopped: Outcome) -> Outcome:
        """Lets an attempt that has stopped itself run to its end."""
        return self._ask(goes_on=stopped.process)

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def _ask(self, **request: Any) -> Outcome:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))


def outcome_of(folder: Path) -> dict[str, Any]:
    """What a finished run has found: checksums of the weights of each bundle, and all figures but the time it took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return value

    (run,) = (folder / "runs").glob("*/*")
    described = {path: json.loads(path.read_text(encoding="utf-8")) for path in run.rglob("bundle.json")}
    return {
        "figures": timeless(json.loads((run / "metrics.json").read_text(encoding="utf-8"))),
        "bundles": {
            str(path.relative_to(run)): [
                {k: v for k, v in content["checksums"].items() if k.endswith(".safetensors")},
                content["metrics"],
                content["provenance"]["steps"],
            ]
            for path, content in described.items()
        },
    }


def command(stage: str, *more: str) -> list[str]:
    """A tiny training of this stage."""
    return ["train", f"stage={stage}", "experiment=smoke", *TINY, *more]


def survive(
    attempts: Attempts, folder: Path, words: Sequence[str], plans: Iterable[Plan], times: int, expected: dict[str, Any]
) -> list[Outcome]:
    """Repeats a command, the next plan befalling it each time, until it ends; begins anew until so many have befallen.

    Every end has to be that of an uninterrupted run, and leave nothing behind.

    Returns:
        How the attempts ended that did not come to their end.
    """
    left, interrupted = iter(plans), list[Outcome]()
    while len(interrupted) < times:
        place = folder / f"from-{len(interrupted)}"
        plan = next(left, None)
        assert plan is not None, f"{times} mishaps were to befall, but only {[each.where for each in interrupted]} did"
        while (outcome := attempts(place, words, plan)).code != 0:
            assert plan is not None and outcome.code == plan.code, outcome
            interrupted.append(outcome)
            plan = next(left, None) if len(interrupted) < times else None
        assert outcome_of(place) == expected, [each.where for each in interrupted]
        assert unfinished(place) == [], [each.where for each in interrupted]
    return interrupted


def unfinished(folder: Path) -> list[str]:
    """What no finished run may leave below a folder."""
    left = [p for name in (".*.partial", ".*.old", ".lock", "checkpoints") for p in folder.rglob(name)]
    return [str(path.relative_to(folder)) for path in left]


# ---------------------------------------------------------------------------------------------- in the other process

_plan: Plan | None = None
_log = -1
_passed: dict[str, int] = {}
_full = ""
_configurations: dict[str, Any] = {}


def event(name: str) -> None:
    """Passed here; it is written down first, since this may be the end."""
    os.write(_log, f"{name}\n".encode())
    for each in ("", name):
        _passed[each] = _passed.get(each, 0) + 1
    plan = _plan
    if plan is None or plan.seconds is not None or plan.event not in ("", name) or _passed[plan.event] != plan.count:
        return
    if plan.mishap == FULL:
        fill(plan.folder)
    else:
        os.kill(os.getpid(), getattr(signal, plan.mishap))


def fill(folder: str) -> None:
    """Of a file system of its own the last byte; elsewhere writing fails by our doing."""
    global _full
    if not os.path.ismount(folder):
        _full = folder
        return
    with open(Path(folder) / BALLAST, "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def refuse_to_write(name: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: below a full folder no file is opened for writing, and no folder made."""
    if not _full or name not in ("open", "os.mkdir"):
        return
    path, flags = arguments[0], arguments[2] if name == "open" else os.O_WRONLY
    if not isinstance(path, str | bytes) or not flags & (os.O_WRONLY | os.O_RDWR):
        return
    if os.path.abspath(os.fsdecode(path)).startswith(_full):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


def before(owner: Any, name: str, *events: str) -> None:
    """Makes a function of `owner` pass events when it is called."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for each in events:
            event(each)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def around(owner: Any, name: str, which: Callable[..., Any]) -> None:
    """The same before and after; `which` names what the arguments are about."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        event(f"before {which(*args)}")
        result = original(*args, **kwargs)
        event(f"after {which(*args)}")
        return result

    setattr(owner, name, wrapped)


def _thing(new: Any, final: Any) -> str:
    """What takes its place: a file, the bundle, a folder in the cache (whose name is a checksum)."""
    path = Path(final)
    return path.name if path.suffix or path.name == "bundle" else path.parent.name


def halved(write: Callable[[bytes], object], content: bytes, name: str) -> None:
    """Writes in two parts, an event between them."""
    middle = len(content) // 2
    write(content[:middle])
    event(name)
    write(content[middle:])


def stage_events() -> None:
    """Puts events into everything a training does."""
    import shutil

    import torch

    from ulmfit import plots, whole_file
    from ulmfit.data import cache
    from ulmfit.text.tokenizer import Tokenizer
    from ulmfit.training.base import UlmfitModule
    from ulmfit.training.checkpoints import Recovery
    from ulmfit.training.classifier import ClassifierModule
    from ulmfit.training.lm import LMModule

    for module in (LMModule, ClassifierModule):
        before(module, "training_step", "step")
        before(module, "validation_step", "validation")
        before(module, "on_train_epoch_start", "epoch")
    before(UlmfitModule, "configure_gradient_clipping", "gradients")
    before(cache, "_encode_chunk", "cache")
    before(Tokenizer, "__init__", "tokenizer")
    before(shutil, "rmtree", "removal")
    before(Recovery, "on_load_checkpoint", "resumed")
    around(os, "replace", _thing)
    around(whole_file, "_exchange", _thing)

    save = torch.save

    def save_in_two_parts(content: Any, file: Any) -> None:
        buffer = io.BytesIO()
        save(content, buffer)
        halved(file.write, buffer.getvalue(), "half a checkpoint")

    def write_in_two_parts(path: Path, content: bytes) -> int:
        with open(path, "wb", buffering=0) as file:
            halved(file.write, content, f"half {path.name.strip('.').partition('.')[0]}")
        return len(content)

    torch.save = save_in_two_parts
    Path.write_bytes = write_in_two_parts  # type: ignore[method-assign, assignment]
    cache._CHUNK_CHARS = 1500
    os.cpu_count = lambda: 1  # no workers
    plots.save = lambda figure, path: path.touch()  # type: ignore[assignment, return-value]


def configured(words: list[str]) -> Any:
    """The configuration that a command line gives; composed once, since that takes longer than a tiny training."""
    from ulmfit import hydra_config

    key = " ".join(words)
    if key not in _configurations:
        _configurations[key] = hydra_config.load_config("train", words[1:])
    return _configurations[key]


def attempt(folder: str, words: list[str], config: Any, plan: dict[str, Any] | None) -> int:
    """In a forked child: the command, to its end; returns its exit code."""
    global _plan, _log
    os.chdir(folder)
    _log = os.open(".events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    said = os.open(".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    _plan = None if plan is None else Plan(**plan)
    sys.addaudithook(refuse_to_write)
    from ulmfit import cli, failures
    from ulmfit.tasks import train

    try:
        with cli.plain_messages(debug=False):
            try:
                train.run(config)
                return 0
            except BaseException as error:
                return failures.report(error, words, debug=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def wait(process: int, plan: Plan | None, folder: str) -> Outcome:
    """Until a child ends or stops."""
    if plan is not None and plan.seconds is not None:
        until = time.monotonic() + plan.seconds
        while time.monotonic() < until and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(process, getattr(signal, plan.mishap))  # if it has ended, nothing happens to what is left of it
    _, status = os.waitpid(process, os.WUNTRACED)
    stopped = os.WIFSTOPPED(status)
    return Outcome(
        code=0 if stopped else os.waitstatus_to_exitcode(status),
        events=Path(folder, ".events").read_text().split("\n")[:-1],
        said=Path(folder, ".said").read_text(errors="replace"),
        process=process,
        stopped=stopped,
    )


def serve() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    import torch

    from ulmfit import cli  # noqa: F401 - so that children need not
    from ulmfit.tasks import scoring, stages, train  # noqa: F401

    torch.set_num_threads(1)
    stage_events()
    folders: dict[int, str] = {}
    for line in sys.stdin:
        request = json.loads(line)
        plan = request.get("plan")
        if "goes_on" in request:
            process = request["goes_on"]
            os.kill(process, signal.SIGCONT)
        else:
            config = configured(request["words"])
            for name in (".events", ".said"):
                Path(request["folder"], name).write_text("")
            process = os.fork()
            if process == 0:
                os._exit(attempt(request["folder"], request["words"], config, plan))
            folders[process] = request["folder"]
        outcome = wait(process, None if plan is None else Plan(**plan), folders[process])
        if not outcome.stopped:
            del folders[process]
        print(json.dumps(asdict(outcome)), file=answers, flush=True)
    for process in folders:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    serve()
