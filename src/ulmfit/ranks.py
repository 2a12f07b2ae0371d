"""Which of the processes of a distributed training this one is, before anything of torch is loaded."""

from __future__ import annotations

import os


def main_process() -> bool:
    """Whether this is the only process or, in distributed training, rank 0, before anything is set up."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def speaker() -> str:
    """What a message of this process begins with; ranks above 0 name themselves."""
    if main_process():
        return "ulmfit"
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    if rank is None:  # known to those who started the processes of this machine only by its number there
        node = os.environ.get("NODE_RANK", "0")
        rank = os.environ.get("LOCAL_RANK", "0") + (f" of node {node}" if node != "0" else "")
    return f"ulmfit (rank {rank})"
