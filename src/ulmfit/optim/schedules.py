"""Learning-rate schedules: pure functions of the step, so there is nothing to save and nothing to restore wrongly.

A schedule maps `(step, total)` to a factor of the maximal rate. `step` counts optimiser steps from 0, `total` is how
many the training (or the phase) is laid out for; a step past the end gets the value of the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ulmfit.config import ScheduleConfig
from ulmfit.errors import UsageError, did_you_mean

Schedule = Callable[[int, int], float]

SCHEDULES = ("stlr", "one_cycle", "cosine", "constant")


def _share(total: int, fraction: float) -> int:
    """`floor(total * fraction)`; the tolerance is for products such as 100 * 0.29, which floats put below 29."""
    return math.floor(total * fraction + 1e-9)


def slanted_triangular(step: int, total: int, cut_frac: float = 0.1, ratio: float = 32.0) -> float:
    """Short linear rise, long linear fall (paper, section 3.2, equation 3), between `1 / ratio` and 1.

    The printed formula falls over `cut * (1 / cut_frac - 1)` steps, which is not `total - cut` unless
    `total * cut_frac` is whole (the rate then goes negative) and is zero for `total < 1 / cut_frac`.
    Here it falls over `total - cut` steps with `cut` at least 1, which agrees wherever the printed one is sound.
    """
    step = min(step, total)
    cut = max(1, _share(total, cut_frac))
    progress = step / cut if step < cut else 1 - (step - cut) / max(1, total - cut)
    return (1 + progress * (ratio - 1)) / ratio


def _cosine_between(start: float, end: float, position: float) -> float:
    """Half a cosine wave from `start` (position 0) to `end` (position 1)."""
    return start + (end - start) * (1 - math.cos(math.pi * position)) / 2


def _rise_and_fall(step: int, total: int, peak: float, start: float, middle: float, end: float) -> float:
    """Cosine from `start` to `middle` during the share `peak` of the steps, then cosine to `end`."""
    position = min(step / total, 1.0)
    if position < peak:
        return _cosine_between(start, middle, position / peak)
    return _cosine_between(middle, end, (position - peak) / (1 - peak))


def one_cycle(step: int, total: int, pct_start: float = 0.25, div: float = 25.0, final_div: float = 1e5) -> float:
    """`1 / div` up to 1 up to `pct_start` of the steps, then down to `1 / final_div`, both as cosines (Smith 2018)."""
    return _rise_and_fall(step, total, pct_start, 1 / div, 1.0, 1 / final_div)


def one_cycle_momentum(step: int, total: int, momentum: Sequence[float], pct_start: float = 0.25) -> float:
    """The momentum (Adam's beta1) itself, through `momentum = (start, middle, end)` in step with `one_cycle`."""
    start, middle, end = momentum
    return _rise_and_fall(step, total, pct_start, start, middle, end)


def _warmup(step: int, warm: int) -> float:
    """Linear up to 1 at step `warm`; step 0 is already above 0, so no step is wasted."""
    return min(1.0, (step + 1) / (warm + 1))


def cosine(step: int, total: int, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine from 1 to `floor` (SGDR without restarts)."""
    warm = _share(total, warmup)
    if step < warm:
        return _warmup(step, warm)
    return _cosine_between(1.0, floor, min((step - warm) / max(1, total - warm), 1.0))


def constant(step: int, total: int, warmup: float = 0.0) -> float:
    """Always 1, after a linear warm-up over the share `warmup` of the steps."""
    return _warmup(step, _share(total, warmup))


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that `config` names, its parameters bound.

    Raises:
        UsageError: an unknown name, or a parameter out of its range.
    """
    _check(config)
    if config.name == "stlr":
        return lambda step, total: slanted_triangular(step, total, config.cut_frac, config.ratio)
    if config.name == "one_cycle":
        return lambda step, total: one_cycle(step, total, config.pct_start, config.div, config.final_div)
    if config.name == "cosine":
        return lambda step, total: cosine(step, total, config.warmup, config.floor)
    return lambda step, total: constant(step, total, config.warmup)


def build_momentum(config: ScheduleConfig) -> Schedule | None:
    """The momentum itself (not a factor) as a function of `(step, total)`; None where the optimiser keeps its own.

    Raises:
        UsageError: as `build_schedule`.
    """
    _check(config)
    momentum = config.momentum
    if momentum is None:
        return None
    return lambda step, total: one_cycle_momentum(step, total, momentum, config.pct_start)


def _check(config: ScheduleConfig) -> None:
    if config.name not in SCHEDULES:
        raise UsageError(
            f"schedule.name={config.name!r} is not a schedule: choose one of {', '.join(SCHEDULES)}"
            + did_you_mean(config.name, SCHEDULES)
        )
    ranges = (
        ("cut_frac", 0 < config.cut_frac <= 1, "above 0 and at most 1, such as 0.1"),
        ("ratio", config.ratio >= 1, "at least 1, such as 32"),
        ("warmup", 0 <= config.warmup < 1, "at least 0 and below 1, such as 0.05"),
        ("floor", 0 <= config.floor <= 1, "between 0 and 1, such as 0"),
        ("pct_start", 0 <= config.pct_start < 1, "at least 0 and below 1, such as 0.25"),
        ("div", config.div >= 1, "at least 1, such as 25"),
        ("final_div", config.final_div >= 1, "at least 1, such as 1e5"),
    )
    for key, fits, expected in ranges:
        if not fits:
            raise UsageError(f"schedule.{key}={getattr(config, key)} is out of range: give a number {expected}")
    momentum = config.momentum
    if momentum is None:
        return
    if config.name != "one_cycle":
        raise UsageError(
            f"schedule.momentum={momentum} has no meaning for {config.name}: "
            "use schedule.name=one_cycle or leave it out"
        )
    if len(momentum) != 3 or not all(0 <= value < 1 for value in momentum):
        raise UsageError(
            f"schedule.momentum={momentum} is not usable: "
            "give three numbers from 0 to below 1, such as [0.95, 0.85, 0.95]"
        )
