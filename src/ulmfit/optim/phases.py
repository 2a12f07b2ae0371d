"""Which layer groups train in which epoch: unfreezing laid out as phases, a pure function of the configuration.

Group 0 is the lowest (the embedding), the last one the highest (the head of a classifier).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ulmfit.config import PhaseConfig, UnfreezingConfig
from ulmfit.errors import UsageError, did_you_mean

MODES = ("gradual", "authors", "chain_thaw", "last", "full", "phases")


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs in which the same groups train."""

    name: str
    first_epoch: int  # counted from 0
    epochs: int  # at least 1; the last phase of a plan goes on for as long as training does
    trainable: tuple[int, ...]  # indices of the groups, ascending
    lr_scale: float = 1.0  # multiplies the rate of every group


def plan_phases(config: UnfreezingConfig, epochs: int, num_groups: int) -> tuple[Phase, ...]:
    """Lay out the phases of a training of `epochs` epochs over `num_groups` layer groups.

    - `gradual`: epoch e trains the e + 1 highest groups, until all train (paper, section 3.3).
    - `authors`: an epoch of the highest group, one of the two highest, then all (the authors' scripts).
    - `chain_thaw`: an epoch of the highest group, then one of each other group alone from the lowest up,
      then all (Felbo et al. 2017, section 3.3).
    - `last`: only the highest group; `full`: all groups; `phases`: as `config.phases` lists them.

    Epoch e trains the same groups whatever `epochs` is, so a longer training continues a shorter one. Phases that
    would start at `epochs` or later are left out, and the last one left gets all epochs that remain.

    Raises:
        UsageError: an unknown mode, no epochs or groups, or phases that cannot be meant.
    """
    if config.mode not in MODES:
        raise UsageError(
            f"unfreezing.mode={config.mode!r} is not a way of unfreezing: choose one of {', '.join(MODES)}"
            + did_you_mean(config.mode, MODES)
        )
    if epochs < 1 or num_groups < 1:
        raise UsageError(f"got {epochs} epochs and {num_groups} layer groups: unfreezing needs at least one of each")
    if config.phases and config.mode != "phases":
        raise UsageError(
            f"unfreezing.phases is given but unfreezing.mode={config.mode} ignores it: "
            "set mode=phases or remove the list"
        )
    if config.mode != "phases":
        return _lay_out(_named(config.mode, num_groups), epochs)
    if not config.phases:
        raise UsageError("unfreezing.mode=phases got an empty list: give unfreezing.phases at least one phase")
    return _lay_out([_custom(phase, index, num_groups) for index, phase in enumerate(config.phases)], epochs)


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """The phase that `epoch` (from 0) belongs to; the last phase goes on for ever."""
    return max((phase for phase in phases if phase.first_epoch <= epoch), key=lambda phase: phase.first_epoch)


def phase_steps(phases: Sequence[Phase], epoch: int, steps_per_epoch: int, total: int) -> tuple[int, int]:
    """First step of the phase of `epoch`, and how many steps it has, in a training of `total` steps."""
    phase = phase_at(phases, epoch)
    start = phase.first_epoch * steps_per_epoch
    end = total if phase is phases[-1] else min(total, start + phase.epochs * steps_per_epoch)
    return start, max(1, end - start)


def _lay_out(phases: Sequence[Phase], epochs: int) -> tuple[Phase, ...]:
    """Put phases one after the other into `epochs` epochs."""
    placed: list[Phase] = []
    first = 0
    for phase in phases:
        if first < epochs:
            placed.append(replace(phase, first_epoch=first, epochs=min(phase.epochs, epochs - first)))
        first += phase.epochs
    placed[-1] = replace(placed[-1], epochs=epochs - placed[-1].first_epoch)
    return tuple(placed)


def _named(mode: str, num_groups: int) -> list[Phase]:
    """The one-epoch phases of a named mode; with few groups, those that would repeat the one before are left out."""
    if mode == "chain_thaw" and num_groups > 1:
        alone = [Phase(f"group {index}", 0, 1, (index,)) for index in range(num_groups - 1)]
        return [_top(1, num_groups), *alone, _top(num_groups, num_groups)]
    counts = {"gradual": range(1, num_groups + 1), "authors": (1, 2, num_groups), "last": (1,)}.get(mode, (num_groups,))
    return [_top(count, num_groups) for count in sorted({min(count, num_groups) for count in counts})]


def _top(count: int, num_groups: int) -> Phase:
    """One epoch of the `count` highest groups."""
    name = "all" if count == num_groups else f"top {count}"
    return Phase(name, 0, 1, tuple(range(num_groups - count, num_groups)))


def _custom(config: PhaseConfig, index: int, num_groups: int) -> Phase:
    """One phase of the user's list, checked."""
    where = f"unfreezing.phases[{index}]"
    if config.epochs < 1:
        raise UsageError(f"{where}.epochs={config.epochs} is out of range: give at least 1")
    if config.lr_scale <= 0:
        raise UsageError(f"{where}.lr_scale={config.lr_scale} is out of range: give a number above 0")
    if config.train_top is not None and config.train_only is not None:
        raise UsageError(f"{where} has both train_top and train_only: keep one of them")
    if config.train_only is not None:
        groups = tuple(sorted(set(config.train_only)))
        if not groups or groups[0] < 0 or groups[-1] >= num_groups:
            raise UsageError(
                f"{where}.train_only={config.train_only} does not fit a network of {num_groups} layer groups: "
                f"list numbers from 0 (lowest) to {num_groups - 1} (highest)"
            )
        return Phase(config.name or f"phase {index + 1}", 0, config.epochs, groups, config.lr_scale)
    count = num_groups if config.train_top is None else config.train_top
    if not 1 <= count <= num_groups:
        raise UsageError(
            f"{where}.train_top={count} does not fit a network of {num_groups} layer groups: give 1 to {num_groups}"
        )
    phase = _top(count, num_groups)
    return replace(phase, name=config.name or phase.name, epochs=config.epochs, lr_scale=config.lr_scale)
