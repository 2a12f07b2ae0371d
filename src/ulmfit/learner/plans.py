"""From the arguments of a fit to the configuration that the engine takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from ulmfit.config import (
    DiscriminativeConfig,
    FitConfig,
    MethodConfig,
    PhaseConfig,
    ScheduleConfig,
    UnfreezingConfig,
)
from ulmfit.errors import UsageError

Rate = float | slice | None
Stage = TypeVar("Stage", bound=FitConfig)


def as_frozen(stage: Stage, epochs: int, lr: Rate, schedule: ScheduleConfig, first: int, groups: int) -> Stage:
    """`stage` for a fit by `schedule` of the layer groups from `first` on.

    Raises:
        UsageError: no epochs, or a rate that is not above 0.
    """
    top, rates = _rates(stage, lr)
    unfreezing = UnfreezingConfig("full")
    if first > 0:
        unfreezing = UnfreezingConfig("phases", [PhaseConfig("as frozen", train_only=list(range(first, groups)))])
    method = MethodConfig(unfreezing, schedule, rates)
    return replace(stage, epochs=_checked(epochs), optim=replace(stage.optim, lr=top), method=method)


def by_method(stage: Stage, epochs: int | None, lr: Rate) -> Stage:
    """`stage` with its own method; a number for `lr` is the rate of the highest layer group.

    Raises:
        UsageError: no epochs, or a rate that is not above 0.
    """
    top, rates = _rates(stage, lr)
    method = replace(stage.method, discriminative=rates) if isinstance(lr, slice) else stage.method
    epochs = _checked(stage.epochs if epochs is None else epochs)
    return replace(stage, epochs=epochs, optim=replace(stage.optim, lr=top), method=method)


def _rates(stage: FitConfig, lr: Rate) -> tuple[float, DiscriminativeConfig]:
    """The highest group's rate, and how the others follow from it."""
    if lr is None:
        return stage.optim.lr, stage.method.discriminative
    low, high, step = (lr.start, lr.stop, lr.step) if isinstance(lr, slice) else (None, lr, None)
    if not _is_rate(high) or not (low is None or _is_rate(low)) or step is not None:
        raise UsageError(f"got the learning rate {lr}, expected a number above 0, slice(lowest, highest), or None")
    if isinstance(lr, slice):
        return float(high), DiscriminativeConfig("slice", lowest=None if low is None else float(low))
    return float(high), DiscriminativeConfig("none")


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _checked(epochs: Any) -> int:
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise UsageError(f"got epochs={epochs!r}, expected a whole number of at least 1")
    return epochs
