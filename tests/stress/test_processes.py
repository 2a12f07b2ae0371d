"""Many processes, through the real command: kills, resumes, two hosts with a cable between them, submitit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from .conftest import Table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

CACHE = {"ULMFIT_CACHE": ""}  # set by the fixture `launch`
LIMIT = 60.0  # seconds from the loss of a process to the end of all


@pytest.fixture(scope="module")
def launch(caches: Path) -> ModuleType:
    """`tests/processes/launch.py`."""
    path = Path(__file__).parents[1] / "processes" / "launch.py"
    spec = importlib.util.spec_from_file_location("launch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch"] = module
    spec.loader.exec_module(module)
    CACHE["ULMFIT_CACHE"] = str(caches)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def torchrun(port: int, *words: str, nodes: int = 1, node: int = 0, host: str = "127.0.0.1") -> list[str]:
    """As a cluster starts the processes of one node."""
    options = [f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", f"--node-rank={node}"]
    return [
        sys.executable, "-m", "torch.distributed.run", *options, f"--master-addr={host}", f"--master-port={port}",
        *words,
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of all stages of all runs below a folder, by stage and name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(path).items():
            found[f"{path.parent.parent.name.split('-')[0]}.{path.stem}.{name}"] = value
    assert found, folder
    return found


def differences(one: Path, other: Path) -> float:
    """The largest between the weights of two folders of runs."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory, launch: ModuleType) -> Path:
    """The runs folder of two ranks on one host, both stages, as Lightning starts them."""
    folder = tmp_path_factory.mktemp("one-host")
    started = launch.Started(folder, launch.ulmfit("train", *launch.TWO_RANKS, *launch.SMALL), CACHE)
    started.seconds_until_gone(400)
    assert started.process.returncode == 0, started.said
    return folder / "runs"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_one_with_the_whole_batch(
    tmp_path: Path, launch: ModuleType, table: Table, processes: int
) -> None:
    """Both stages of the command, dropout off.

    In float64: after some steps of float32 at these rates, batch norm and Adam have made large what it rounds.
    """
    words = [*launch.SMALL, "trainer.precision=64-true", "stage.lm.keep=last"]
    words += ["stage.lm.dropout.multiplier=0", "stage.classifier.dropout.multiplier=0", "stage.classifier.keep=last"]
    words += ["stage.classifier.head_dropout=[0,0]", "stage.classifier.tokens_per_batch=1000000"]
    figures = []
    for folder, devices in ((tmp_path / "one", 1), (tmp_path / "several", processes)):
        batch = [f"stage.lm.batch_size={8 // devices}", f"stage.classifier.batch_size={16 // devices}"]
        several = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}"] if devices > 1 else []
        command = launch.ulmfit("train", *several, *words, *batch)
        started = launch.Started(folder, command, {**CACHE, launch.DOUBLE: "1"})
        started.seconds_until_gone(400)
        assert started.process.returncode == 0, started.said
        (path,) = folder.glob("runs/*/*/metrics.json")
        figures.append(json.loads(path.read_text(encoding="utf-8")))
    difference = differences(tmp_path / "one", tmp_path / "several")
    table.add(f"ranks compared: {processes} with 1 (float64), largest difference of a weight", f"{difference:.1e}")
    assert difference < 1e-7  # bundles keep float32
    one, several = figures
    assert one["valid_accuracy"] == several["valid_accuracy"] and one["valid_macro_f1"] == several["valid_macro_f1"]
    assert one["test"]["confusion"] == several["test"]["confusion"]
    assert one["lm"]["valid_perplexity"] == pytest.approx(several["lm"]["valid_perplexity"], rel=1e-9)


def test_killed_ranks(tmp_path: Path, launch: ModuleType, table: Table) -> None:
    """Either rank, either stage, started by Lightning or by torchrun: all end within a minute and say why."""
    slowest, tried = 0.0, 0
    for stage in ("lm", "classifier"):
        for rank in (0, 1):
            for starter in ("lightning", "torchrun"):
                folder = tmp_path / f"{stage}-{rank}-{starter}"
                command = launch.ulmfit("train", *launch.TWO_RANKS, *launch.SMALL)
                if starter == "torchrun":
                    command = torchrun(free_port(), *command[1:])
                started = launch.Started(folder, command, CACHE, kill=f"{stage} 1 {rank}")
                started.wait_for_kill()
                slowest = max(slowest, started.seconds_until_gone(LIMIT))
                assert started.process.returncode != 0
                others = [line for line in started.said.splitlines() if any(sign in line for sign in launch.LOST)]
                assert len(others) == 1 and others[0].startswith("ulmfit"), started.said
                assert not list(folder.glob("runs/**/*.partial"))
                tried += 1
    table.add("ranks killed, all others ended with a sentence / tried", f"{tried} / {tried}")
    table.add("slowest end after a rank was killed", f"{slowest:.0f} s")


@pytest.mark.parametrize("kill", ["lm 2 all", "classifier 5 all"])
def test_two_ranks_resume_exactly(tmp_path: Path, launch: ModuleType, table: Table, one_host: Path, kill: str) -> None:
    """Both killed: each goes on with its own rows' hidden state and its own random numbers."""
    command = launch.ulmfit("train", *launch.TWO_RANKS, *launch.SMALL, "trainer.checkpoint_minutes=0.000001")
    killed = launch.Started(tmp_path, command, CACHE, kill=kill)
    killed.wait_for_kill()
    killed.seconds_until_gone(LIMIT)
    assert len(list(tmp_path.glob("runs/**/last.ckpt"))) == 1
    again = launch.Started(tmp_path, command, CACHE)
    again.seconds_until_gone(400)
    assert again.process.returncode == 0, again.said
    assert differences(tmp_path / "runs", one_host) == 0.0
    table.add(f"two ranks killed and resumed ({kill}), largest difference of a weight", "0")


class Hosts:
    """Two network namespaces that a virtual cable joins: hosts with a file system in common."""

    def __init__(self) -> None:
        self.names = [f"ulmfit-{os.getpid()}-{node}" for node in (0, 1)]
        self.ends = [f"ul{os.getpid() % 100000}{node}" for node in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def connect(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for name, end, address in zip(self.names, self.ends, self.addresses, strict=True):
            self.ip("link", "set", end, "netns", name)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", name, "link", "set", end, "up")

    def cut(self) -> None:
        self.ip("-n", self.names[0], "link", "set", self.ends[0], "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def on(self, node: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[node], *command]

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], capture_output=True, check=True)

    def start(self, launch: ModuleType, folder: Path, starter: str, kill: str = "", *more: str) -> list[Any]:
        """Both hosts' commands: by torchrun, or by hand with Lightning's variables."""
        several = ["trainer=ddp_multinode", "trainer.accelerator=cpu", "trainer.devices=1"]
        words = launch.ulmfit("train", *several, *launch.SMALL, *more)
        both = []
        for node in (0, 1):
            environment = {**CACHE, "GLOO_SOCKET_IFNAME": self.ends[node]}
            if starter == "torchrun":
                command = torchrun(29500, *words[1:], nodes=2, node=node, host=self.addresses[0])
            else:
                command = words
                environment |= {
                    "MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29501", "NODE_RANK": str(node)
                }  # fmt: skip
            command = self.on(node, command)
            both.append(launch.Started(folder, command, environment, kill=kill, log=f"log-{node}"))
        return both


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts, joined."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command 'ip' (package iproute2)")
    both = Hosts()
    try:
        both.connect()
    except subprocess.CalledProcessError as error:
        both.remove()
        pytest.skip(f"may not make network namespaces: {error.stderr.decode().strip()}")
    yield both
    both.remove()


@pytest.mark.parametrize("starter", ["torchrun", "by hand"])
def test_two_hosts_equal_one(
    tmp_path: Path, launch: ModuleType, table: Table, hosts: Hosts, one_host: Path, starter: str
) -> None:
    both = hosts.start(launch, tmp_path, starter)
    for started in both:
        started.seconds_until_gone(400)
        assert started.process.returncode == 0, started.said
    assert "written to runs" in both[0].said and "written to runs" not in both[1].said
    assert differences(tmp_path / "runs", one_host) == 0.0
    table.add(f"nodes compared: 2 hosts ({starter}) with 1, largest difference of a weight", "0")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("starter", ["torchrun", "by hand"])
def test_a_host_loses_the_other(
    tmp_path: Path, launch: ModuleType, table: Table, hosts: Hosts, starter: str, rank: int
) -> None:
    both = hosts.start(launch, tmp_path, starter, f"lm 1 {rank}")
    both[rank].wait_for_kill()
    seconds = max(started.seconds_until_gone(LIMIT) for started in both)
    assert all(started.process.returncode != 0 for started in both)
    assert any(sign in both[1 - rank].said for sign in launch.LOST), both[1 - rank].said
    table.add(f"rank {rank} of two hosts killed ({starter}): both ended after", f"{seconds:.0f} s")


def test_the_cable_is_cut(tmp_path: Path, launch: ModuleType, table: Table, hosts: Hosts) -> None:
    """Nothing closes the connection, so it takes `trainer.timeout_minutes`."""
    more = ["trainer.timeout_minutes=0.3", "stage.lm.max_steps=100000", "stage.lm.epochs=100000"]
    both = hosts.start(launch, tmp_path, "by hand", "", *more, "trainer.checkpoint_minutes=0.000001")
    both[0].wait_for(next_checkpoint(tmp_path, both[0]))
    hosts.cut()
    seconds = max(started.seconds_until_gone(2 * LIMIT) for started in both)
    for started in both:
        assert started.process.returncode == 1
        assert launch.LOST[1] in started.said, started.said
    table.add("cable cut between two hosts, timeout_minutes=0.3: both ended after", f"{seconds:.0f} s")


def next_checkpoint(folder: Path, started: Any) -> Path:
    """The checkpoint of the run that is going on in a folder."""
    runs = folder / "runs" / "helpdesk"
    started.wait_for(runs)
    while not list(runs.iterdir()):
        pass
    (run,) = runs.iterdir()
    return run / "lm" / "checkpoints" / "last.ckpt"


def test_through_submitit(tmp_path: Path, launch: ModuleType, table: Table, one_host: Path) -> None:
    """A sweep whose jobs submitit starts, each with two ranks of its own."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra 'sweep'")
    words = ["train", "--multirun", "seed=0,1", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]
    started = launch.Started(
        tmp_path, [sys.executable, "-m", "ulmfit", *words, *launch.TWO_RANKS, *launch.SMALL], CACHE
    )
    started.seconds_until_gone(400)
    assert started.process.returncode == 0, started.said
    runs = sorted((tmp_path / "runs" / "helpdesk").iterdir(), key=lambda path: path.name[-1])
    assert [run.name.rpartition("-")[2] for run in runs] == ["seed0", "seed1"]
    assert all((run / "metrics.json").is_file() for run in runs)
    (tmp_path / "first").mkdir()
    runs[0].rename(tmp_path / "first" / runs[0].name)
    assert differences(tmp_path / "first", one_host) == 0.0
    table.add("submitit (local): jobs of two ranks finished / started", "2 / 2")
