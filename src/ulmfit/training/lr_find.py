"""The learning-rate range test (Smith 2017): the rate grows exponentially until the loss explodes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning

from ulmfit import plots
from ulmfit.config import FitConfig, TrainerConfig
from ulmfit.errors import UsageError
from ulmfit.training.base import UlmfitModule
from ulmfit.training.callbacks import DiscriminativeLR, ScheduledLR
from ulmfit.training.trainer import bare_trainer, quiet_lightning, run_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.98
_EXPLODED = 4.0  # times the best loss


@dataclass(frozen=True)
class LRFindResult:
    """Rates of the highest group, bias-corrected smoothed losses, and the suggestion (None: no fall seen)."""

    rates: list[float]
    losses: list[float]
    suggestion: float | None

    def plot(self) -> Figure:
        """Loss against rate, with the suggestion marked."""
        return plots.plot_lr_find(self.rates, self.losses, self.suggestion)


class _Recorder(lightning.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._average = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning has divided it
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        smoothed = self._average / (1 - _SMOOTHING ** (len(self.losses) + 1))
        if not math.isfinite(loss) or (self.losses and smoothed > _EXPLODED * min(self.losses)):
            trainer.should_stop = True
        else:
            self.rates.append(max(g["lr"] for g in trainer.optimizers[0].param_groups))
            self.losses.append(smoothed)


def find_lr(
    module: UlmfitModule,
    data: lightning.LightningDataModule,
    config: FitConfig,
    trainer_config: TrainerConfig,
    start: float = 1e-5,
    end: float = 1.0,
    steps: int = 100,
) -> LRFindResult:
    """Train for at most `steps` steps while all groups' rates grow together from `start` to `end`; then undo it.

    Discriminative rates keep their ratios; no group is frozen. The module has its old weights afterwards.

    Raises:
        UsageError: a range that does not grow, or fewer than 10 steps.
    """
    if not 0 < start < end or steps < 10:
        raise UsageError(f"got start={start}, end={end} and steps={steps}, expected 0 < start < end and steps >= 10")
    before = copy.deepcopy(module.state_dict())
    recorder = _Recorder()
    grow = ScheduledLR(lambda step, total: (start / end) ** (1 - min(1.0, step / max(1, total - 1))))
    callbacks = [DiscriminativeLR(end, config.method.discriminative), grow, recorder]
    try:
        with quiet_lightning():
            trainer = bare_trainer(
                trainer_config,
                callbacks,
                max_epochs=steps * config.optim.accumulate,
                max_steps=steps,
                clip=config.optim.clip,
                accumulate_grad_batches=config.optim.accumulate,
            )
            run_training(trainer, module, data)
    finally:
        module.load_state_dict(before)
    return LRFindResult(recorder.rates, recorder.losses, suggest(recorder.rates, recorder.losses))


def suggest(rates: list[float], losses: list[float]) -> float | None:
    """The rate at two thirds of the longest fall of the loss ("valley", as fastai calls it); None if it never falls."""
    longest, best_end = 0, 0
    lengths = [1] * len(losses)
    for i in range(1, len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
        if lengths[i] > longest:
            longest, best_end = lengths[i], i
    if longest < 3:
        return None
    begin = best_end - longest
    position = begin + int((best_end - begin) * 2 / 3)
    return rates[max(0, min(position, len(rates) - 1))]
