"""Training against the clock: the speed is measured first, and the schedule laid out for the steps that fit."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from typing import Any

import lightning
import torch

from ulmfit.config import LMConfig, TrainerConfig
from ulmfit.data.cache import TokenCache
from ulmfit.errors import UsageError
from ulmfit.nn.models import LanguageModel
from ulmfit.training.engine import language_model_parts, own_randomness
from ulmfit.training.trainer import bare_trainer, quiet_lightning, run_training

_SHARE = 0.05  # of the time goes into measuring
_LONGEST = 60.0  # seconds, at most
_SPARE = 0.03  # of the time is kept back: speed varies
_VALIDATED = 20  # batches that say how long validation takes


def plan(
    minutes: float,
    model: LanguageModel,
    train: TokenCache,
    valid: TokenCache | None,
    config: LMConfig,
    direction: str,
    seed: int,
    trainer: TrainerConfig,
) -> LMConfig:
    """`config` with the `max_steps`, and as many `epochs`, that take about `minutes` here, measuring included.

    The steps measured train a copy of `model`, and draw no random numbers from training.

    Raises:
        UsageError: several devices, each of which would come to a plan of its own.
    """
    began = _now()
    watch = _Stopwatch(min(_LONGEST, _SHARE * 60 * minutes))
    with own_randomness(), quiet_lightning():
        module, data = language_model_parts(copy.deepcopy(model), train, valid, config, direction, seed)
        measured = bare_trainer(trainer, [watch], max_epochs=1, clip=config.optim.clip, limit_val_batches=0)
        if measured.world_size > 1:
            raise UsageError(
                f"stage.lm.minutes={minutes} needs one device, but {measured.world_size} would train; "
                "set trainer.devices=1, or stage.lm.max_steps"
            )
        run_training(measured, module, data)
        validation = _validation_seconds(module, data, trainer) if valid is not None else 0.0
    steps_per_epoch = math.ceil(len(data.train_dataloader()) / config.optim.accumulate)
    per_step = watch.seconds_per_batch * config.optim.accumulate
    per_step += validation / (config.valid_every or steps_per_epoch)
    left = (1 - _SPARE) * 60 * minutes - (_now() - began) - validation
    steps = max(1, int(left / per_step))
    return replace(config, max_steps=steps, epochs=math.ceil(steps / steps_per_epoch), minutes=None)


class _Stopwatch(lightning.Callback):
    """Stops a training after some seconds; the first batches, which choose kernels and allocate, do not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.seconds_per_batch = 0.0
        self._began = self._counting = 0.0
        self._warm = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = self._counting = _now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = _now()
        done = batch_idx + 1
        if batch_idx < 3 or now - self._began < 0.3 * self.seconds:
            self.seconds_per_batch = (now - self._began) / done  # until something better is known
            self._counting, self._warm = now, done
        else:
            self.seconds_per_batch = (now - self._counting) / (done - self._warm)
        if now - self._began >= self.seconds:
            trainer.should_stop = True


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run on after Python has started them
    return time.monotonic()


def _validation_seconds(
    module: lightning.LightningModule, data: lightning.LightningDataModule, config: TrainerConfig
) -> float:
    """How long a validation takes, from its first batches."""
    loader = data.val_dataloader()
    batches = min(_VALIDATED, len(loader))
    trainer = bare_trainer(config, [], max_epochs=1, clip=None, limit_val_batches=batches)
    began = _now()
    trainer.validate(module, datamodule=data, verbose=False)
    return (_now() - began) * len(loader) / batches
