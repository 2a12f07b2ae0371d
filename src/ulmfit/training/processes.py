"""Training with several processes: how they are started and watched, and how they end when one of them is lost."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from ulmfit.config import TrainerConfig
from ulmfit.errors import LostProcess, UsageError
from ulmfit.nn.synchronised import several_processes
from ulmfit.ranks import speaker

_Value = TypeVar("_Value")

_LAUNCHER = "ULMFIT_LAUNCHER"  # set for processes that we start: the number of the one that started them
_GRACE = 20.0  # seconds; a process that hears of a loss from a broken connection can explain itself, so it may first
_ALONE = timedelta(days=7)  # that rank 0 may work while the others wait
# How gloo, NCCL and the store through which processes find each other say that there is nobody at the other end.
_LOST = ("gloo/", "Gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe", "imed out", "timeout")

_patient: dist.ProcessGroup | None = None  # all processes, for when rank 0 works alone
_children: list[subprocess.Popen[bytes]] = []
_watched = threading.Event()  # set: nobody is to be ended for the loss of a child any more


class Ranks(DDPStrategy):
    """Lightning's DDP, but a lost process ends all with a sentence, where Lightning would kill them without a word.

    Args:
        minutes: after which a process that does not answer is taken for lost.
        threads: of each process; None: Lightning shares the processors out.
        find_unused_parameters: needed if some parameters get no gradients, as with gradual unfreezing.
    """

    def __init__(self, minutes: float, threads: int | None, find_unused_parameters: bool = True) -> None:
        super().__init__(timeout=timedelta(minutes=minutes), find_unused_parameters=find_unused_parameters)
        self.threads = threads

    def setup_distributed(self) -> None:
        global _patient
        known = dist.is_initialized()
        super().setup_distributed()
        if not known:
            _patient = dist.new_group(backend="gloo", timeout=_ALONE)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes, self.threads)


def ranks_for(trainer: Trainer, config: TrainerConfig) -> Ranks | None:
    """The strategy to make `trainer` with instead of its own, if that is DDP; None: it may stay.

    Raises:
        UsageError: this is one of several processes, but each would train alone.
    """
    if trainer.world_size == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"this is one of {os.environ['WORLD_SIZE']} processes, but trainer.devices={config.devices} and "
            f"trainer.num_nodes={config.num_nodes} make one; use trainer=ddp or trainer=ddp_multinode"
        )
    own = trainer.strategy
    if type(own) is not DDPStrategy or not isinstance(own.launcher, _SubprocessScriptLauncher):
        return None
    return Ranks(config.timeout_minutes, config.threads, not config.strategy.endswith("unused_parameters_false"))


class _Launcher(_SubprocessScriptLauncher):
    def __init__(self, environment: ClusterEnvironment, processes: int, nodes: int, threads: int | None) -> None:
        super().__init__(environment, processes, nodes)
        self.threads = threads

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise UsageError(
                f"trainer.devices={self.num_processes} on trainer.num_nodes={self.num_nodes} are not as many processes "
                f"as were started ({' '.join(str(error).split()):.200})"
            ) from error
        if not self.cluster_environment.creates_processes_externally:
            self._start_children()
        elif _LAUNCHER in os.environ:
            _follow(int(os.environ.pop(_LAUNCHER)))
        if self.threads is None:
            _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            with _losses_explained():
                return function(*args, **kwargs)
        except BaseException:
            _watched.set()  # whatever becomes of the children, this process knows how to end
            raise

    def _start_children(self) -> None:
        os.environ[_LAUNCHER] = str(os.getpid())
        try:
            self._call_children_scripts()
        finally:
            del os.environ[_LAUNCHER]
        if not _children:
            atexit.register(end_children)
        _children[:] = self.procs
        _watched.clear()
        threading.Thread(target=_watch, args=(list(self.procs),), daemon=True).start()


def _watch(children: list[subprocess.Popen[bytes]]) -> None:
    """Ends this process if a child fails and this one, waiting for it in vain or busy, does not come to an end."""
    while not _failed(children):
        if _watched.wait(0.5) or all(child.poll() == 0 for child in children):
            return
    if not _watched.wait(_GRACE):
        _end_at_once(children)


def _follow(launcher: int) -> None:
    """Ends this process, if it does not end by itself, after the one that started it is gone."""

    def follow() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        time.sleep(_GRACE)
        _end_at_once([])

    threading.Thread(target=follow, daemon=True).start()


def _end_at_once(children: list[subprocess.Popen[bytes]]) -> None:
    _say(_what_happened())
    for child in children:
        child.kill()
    os._exit(LostProcess.exit_code)


def _say(message: str) -> None:
    print(f"{speaker()}: {message}", file=sys.stderr, flush=True)


def end_children(seconds: float = _GRACE) -> None:
    """Waits for the processes that this one has started, and ends those that are still there after so many seconds."""
    _watched.set()
    until = time.monotonic() + seconds
    for child in _children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    _children.clear()


@contextmanager
def _losses_explained() -> Iterator[None]:
    """Where processes wait for each other.

    Raises:
        LostProcess: another process ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        lost = several_processes() and any(sign in str(error) for sign in _LOST)
        if not lost and not (dist.is_available() and isinstance(error, dist.DistError)):
            raise
        message = _what_happened()
        _say(message)  # now: whoever has started the processes may end this one before it comes to that
        raise LostProcess(message) from error


def _what_happened() -> str:
    again = "repeat the command to go on from the last checkpoint"
    until = time.monotonic() + 2  # a connection breaks a moment before the process has ended
    while _children and not _failed(_children) and time.monotonic() < until:
        time.sleep(0.05)
    for rank, code in _failed(_children).items():
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        memory = " (perhaps for want of memory)" if code == -9 else ""
        return f"process {rank} of {len(_children) + 1} {how}{memory}, and the others cannot train without it; {again}"
    return (
        "the connection to another process of this training is lost: it ended (then it may have said why), or its "
        f"machine or the network failed; {again}"
    )


def _failed(children: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    codes = {rank: child.poll() for rank, child in enumerate(children, 1)}
    return {rank: code for rank, code in codes.items() if code}


def from_all(value: _Value) -> list[_Value]:
    """The value that each process has, by rank; all have to call this."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Until all processes are here, so that what rank 0 wrote is there for the others; they wait however long it takes.

    Raises:
        LostProcess: one of them ended.
    """
    if several_processes():
        with _losses_explained():
            dist.barrier(_patient)
