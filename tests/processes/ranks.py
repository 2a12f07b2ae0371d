"""Trains the same tiny models with one process and with several: `python ranks.py FOLDER 1 2 4`.

Every rank of every group of processes writes what it saw to FOLDER/<processes>-<rank>.pt. A script of its own, because
its processes are forked from one that has imported torch but not used it yet: that saves their start.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist

from ulmfit.config import (
    ClassifierConfig,
    DropoutConfig,
    FitConfig,
    LMConfig,
    LoggerConfig,
    MethodConfig,
    OptimConfig,
    TrainerConfig,
    UnfreezingConfig,
)
from ulmfit.data.cache import TokenCache
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.models import LanguageModel
from ulmfit.training import engine

VOCABULARY = 50
BATCH = 12  # rows or documents of a step, over all processes
NO_DROPOUT = DropoutConfig(multiplier=0.0)
GRADUAL = MethodConfig(UnfreezingConfig("gradual"))
LOGGER = LoggerConfig(csv=False)

LM = LMConfig(epochs=2, bptt=12, dropout=NO_DROPOUT, keep="last", optim=OptimConfig(lr=0.01, clip=0.3))
CLASSIFIER = ClassifierConfig(
    epochs=4, bptt=8, max_len=20, dropout=NO_DROPOUT, head_dropout=[0.0, 0.0], keep="last", method=GRADUAL,
    class_weights="balanced", label_smoothing=0.1, optim=OptimConfig(lr=0.004, clip=0.3),
)  # fmt: skip
CASES: dict[str, FitConfig] = {
    "lm": LM,
    "lm, accumulated, ended early": replace(LM, optim=OptimConfig(lr=0.01, accumulate=2), max_steps=7),
    "lm, dropout": replace(LM, dropout=DropoutConfig()),
    "classifier": CLASSIFIER,
    "classifier, accumulated": replace(CLASSIFIER, optim=OptimConfig(lr=0.004, accumulate=2), class_weights="none"),
    "classifier, dropout": replace(CLASSIFIER, dropout=DropoutConfig(), head_dropout=[0.4, 0.1]),
}


def documents(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[2, *rng.integers(3, VOCABULARY, size=rng.integers(2, 30)).tolist()] for _ in range(count)]


def cache(count: int, seed: int) -> TokenCache:
    return TokenCache.from_documents(documents(count, seed), VOCABULARY)


@dataclass
class Witness(lightning.Callback):
    """What this rank read, and in each epoch the checksums of the weights and optimisers of all ranks."""

    read: list[Any] = field(default_factory=list)
    checked: list[Any] = field(default_factory=list)
    sums: list[list[str]] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.draws.append(float(torch.rand(1)))
        what = batch.index if hasattr(batch, "lengths") else torch.stack(batch)
        self.read.append((trainer.current_epoch, batch_idx, what.tolist()))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *more: Any) -> None:
        what = batch.index if hasattr(batch, "lengths") else torch.stack(batch)
        self.checked.append((trainer.global_step, batch_idx, what.tolist()))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        digest = hashlib.sha256()
        moments = [v for s in trainer.optimizers[0].state_dict()["state"].values() for v in s.values()]
        for value in [*pl_module.model.state_dict().values(), *moments]:
            digest.update(value.numpy().tobytes())
        sums = [digest.hexdigest()]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, sums[0])
            sums = gathered
        self.sums.append(sums)


def run(case: str, processes: int) -> dict[str, Any]:
    """Trains one case in this process, one of several."""
    torch.manual_seed(1)
    language_model = LanguageModel(AWDLSTM(Architecture(VOCABULARY, 6, 8, 2)))
    config = replace(CASES[case], batch_size=BATCH // processes)
    trainer = TrainerConfig(
        accelerator="cpu", devices=processes, precision="32-true", enable_progress_bar=False, threads=1,
        timeout_minutes=1.0,
    )  # fmt: skip
    witness = Witness()
    if isinstance(config, LMConfig):
        model: Any = language_model
        result = engine.fit_language_model(
            model, cache(90, 1), cache(7, 2), config, "forward", 5, trainer, LOGGER, None, callbacks=[witness]
        )
    else:
        assert isinstance(config, ClassifierConfig)
        model = new_text_classifier(language_model.encoder, 3, config)
        labels = [i % 5 % 3 for i in range(53)]  # neither number divides by that of processes
        result = engine.fit_classifier(
            model, cache(53, 3), labels, cache(19, 4), labels[:19], config, "forward", 5, trainer, LOGGER, None,
            callbacks=[witness],
        )  # fmt: skip
    return {
        "weights": dict(model.state_dict()),
        "metrics": result.metrics,
        "steps": result.steps,
        "main": result.main,
        "read": witness.read,
        "checked": witness.checked,
        "sums": witness.sums,
        "draws": witness.draws,
    }


def rank_of_a_group(folder: Path, processes: int, rank: int, port: int) -> None:
    """All cases, one after the other, in one process group."""
    warnings.filterwarnings("ignore")
    if processes > 1:
        os.environ |= {
            "LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
        }  # fmt: skip
    torch.save({case: run(case, processes) for case in CASES}, folder / f"{processes}-{rank}.pt")


def main(folder: Path, groups: list[int]) -> int:
    """Starts the groups side by side; the number of processes that failed."""
    children = []
    for processes in groups:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                try:
                    rank_of_a_group(folder, processes, rank, port)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]]))
