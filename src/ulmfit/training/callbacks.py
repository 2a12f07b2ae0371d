"""The method's three tricks as Lightning callbacks: discriminative rates, slanted triangular rates, gradual unfreezing.

They apply the pure functions of `ulmfit.optim` to any `LightningModule` that offers `layer_groups()`, its layer
groups from the lowest to the highest. At the start of every epoch `requires_grad` follows from the epoch; at the start
of every batch the rate of each group is its base rate times the phase's scale times the schedule's factor for
`trainer.global_step`. Nothing is kept in checkpoints: a resumed run asks the same functions and gets the same values.
(With `max_steps`, save during or after validation or every so many steps, not in `on_train_epoch_end`: Lightning 2.6
counts that epoch twice when it resumes, and the phase follows its count.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ulmfit.config import DiscriminativeConfig, MethodConfig, ScheduleConfig
from ulmfit.errors import UsageError
from ulmfit.optim.groups import LayerGroup, discriminative_rates, group_parameters, split_by_layer
from ulmfit.optim.phases import Phase, phase_at, phase_steps, plan_phases
from ulmfit.optim.schedules import Schedule, build_momentum, build_schedule


def layer_groups_of(module: LightningModule) -> list[LayerGroup]:
    """The layer groups of `module`, lowest first.

    Raises:
        UsageError: it has no method `layer_groups`.
    """
    method = getattr(module, "layer_groups", None)
    if not callable(method):
        raise UsageError(
            f"{type(module).__name__} has no layer_groups(): give it that method, "
            "returning its modules (or lists of parameters) from the lowest to the highest"
        )
    return list(method())


class DiscriminativeLR(Callback):
    """A rate of its own for each layer group (paper, section 3.2).

    Parameter groups of the optimiser that span several layer groups are split first, so a plain
    `Adam(self.parameters())` works as well as `ulmfit.optim.groups.parameter_groups`.

    Args:
        lr: maximal rate of the highest group.
        config: how the other groups' rates follow from it (see `discriminative_rates`).

    Raises:
        UsageError: no `layer_groups()`, or the optimiser has parameters that no layer group has.
    """

    def __init__(self, lr: float, config: DiscriminativeConfig | None = None) -> None:
        self.lr = lr
        self.config = config or DiscriminativeConfig()
        discriminative_rates(lr, 2, self.config)  # complain now, not after the data is read

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before Lightning restores the optimiser from a checkpoint, which has the split groups.
        layers = layer_groups_of(pl_module)
        for optimizer in trainer.optimizers:
            optimizer.param_groups[:] = split_by_layer(optimizer.param_groups, layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After Lightning restored the optimiser: what is configured now wins over what the checkpoint had.
        rates = discriminative_rates(self.lr, len(layer_groups_of(pl_module)), self.config)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"] = rates[group["group"]]


class GradualUnfreezing(Callback):
    """Train only the layer groups of the current phase (paper, section 3.3; see `ulmfit.optim.phases.plan_phases`).

    Frozen groups stay in the optimiser with `requires_grad=False` and no gradient, so they are not updated (nor
    decayed), and when the lowest groups are frozen, no autograd graph is built for them: their forward pass keeps no
    activations and there is no backward pass through them. Unfrozen groups begin with fresh Adam statistics.

    `requires_grad` of every parameter in a layer group is decided here; it is all True again before and after
    training (so `layer_groups()` must work once the module is constructed).

    Modules stay in training mode: dropout works in frozen groups, and the running statistics of a frozen batch
    normalisation go on following what reaches it, since in chain-thaw that changes below the frozen head. fastai
    does the same, and besides trains the frozen layer's scale and shift; here frozen means not trained.

    Distributed: everything is trainable when DDP wraps the module, so gradients of groups unfrozen later are
    synchronised; groups frozen in some epochs then need `strategy="ddp_find_unused_parameters_true"`.

    Args:
        phases: what `plan_phases` returned for as many groups as the module has.

    Raises:
        UsageError: no `layer_groups()`, or the phases name a group that it does not have.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            num_groups = len(layer_groups_of(pl_module))
            highest = max(group for phase in self.phases for group in phase.trainable)
            if highest >= num_groups:
                raise UsageError(
                    f"the unfreezing phases name layer group {highest} but {type(pl_module).__name__} has "
                    f"{num_groups} (0 to {num_groups - 1}): plan the phases for {num_groups} groups"
                )
            _train_only(pl_module, range(num_groups))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Also here: Lightning has no epoch start when it resumes in the middle of an epoch.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _train_only(pl_module, phase_at(self.phases, trainer.current_epoch).trainable)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _train_only(pl_module, range(len(layer_groups_of(pl_module))))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning calls no teardown after an interruption


def _train_only(module: LightningModule, trainable: Sequence[int]) -> None:
    for index, parameters in enumerate(group_parameters(layer_groups_of(module))):
        for parameter in parameters:
            parameter.requires_grad_(index in trainable)
            if index not in trainable:
                parameter.grad = None  # an old gradient would go on moving it


class ScheduledLR(Callback):
    """Set the rate of every parameter group at every step to base rate * phase's scale * `schedule(step, total)`.

    The base rate is what `DiscriminativeLR` or `parameter_groups` set, else the rate the optimiser was made with.
    Phases are those of the trainer's `GradualUnfreezing`, if it has one. Total is how many optimiser steps the trainer
    is going to make, accumulation and `max_steps` considered.

    Args:
        schedule: factor of the maximal rate, from `(step, total)`.
        momentum: momentum (Adam's beta1) from `(step, total)`; None leaves it alone.
        restart_per_phase: run the schedule once for each unfreezing phase instead of once for the whole training.

    Raises:
        UsageError: the number of steps is not known, or something else schedules the rate as well.
    """

    def __init__(self, schedule: Schedule, momentum: Schedule | None = None, restart_per_phase: bool = False) -> None:
        self.schedule = schedule
        self.momentum = momentum
        self.restart_per_phase = restart_per_phase
        self._phases: tuple[Phase, ...] = ()
        self._total = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.lr_scheduler_configs or sum(isinstance(callback, ScheduledLR) for callback in callbacks) > 1:
            raise UsageError(
                f"{type(self).__name__} is not the only learning-rate schedule of this training: "
                "keep one schedule callback and return no scheduler from configure_optimizers"
            )
        self._phases = next((c.phases for c in callbacks if isinstance(c, GradualUnfreezing)), ())
        self._total = _total_steps(trainer)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("base_lr", group["lr"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, total, scale = trainer.global_step, self._total, 1.0
        if self._phases:
            epoch = trainer.current_epoch
            scale = phase_at(self._phases, epoch).lr_scale
            if self.restart_per_phase:
                start, total = phase_steps(self._phases, epoch, _steps_per_epoch(trainer), total)
                step = max(0, step - start)
        factor = scale * self.schedule(step, total)
        momentum = self.momentum(step, total) if self.momentum else None
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
                if momentum is not None and "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                elif momentum is not None:
                    group["momentum"] = momentum


def _total_steps(trainer: Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if not 0 < total < float("inf"):
        raise UsageError(
            "the learning-rate schedule cannot know how many steps training takes, because the training data has no "
            "length or there is no end: set max_steps, or max_epochs with data that has a length"
        )
    return int(total)


def _steps_per_epoch(trainer: Trainer) -> int:
    batches = trainer.num_training_batches
    if batches == float("inf"):
        raise UsageError("restart_per_phase needs training data with a length: give it __len__ or turn the option off")
    return math.ceil(batches / trainer.accumulate_grad_batches)


class SlantedTriangularLR(ScheduledLR):
    """Short linear rise, long linear fall (paper, section 3.2; `ulmfit.optim.schedules.slanted_triangular`)."""

    def __init__(self, cut_frac: float = 0.1, ratio: float = 32.0, restart_per_phase: bool = False) -> None:
        config = ScheduleConfig("stlr", cut_frac=cut_frac, ratio=ratio)
        super().__init__(build_schedule(config), restart_per_phase=restart_per_phase)


class OneCycleLR(ScheduledLR):
    """Cosine rise and fall, with momentum the other way if given (`ulmfit.optim.schedules.one_cycle`)."""

    def __init__(
        self,
        pct_start: float = 0.25,
        div: float = 25.0,
        final_div: float = 1e5,
        momentum: Sequence[float] | None = None,
        restart_per_phase: bool = False,
    ) -> None:
        config = ScheduleConfig(
            "one_cycle",
            pct_start=pct_start,
            div=div,
            final_div=final_div,
            momentum=None if momentum is None else list(momentum),
        )
        super().__init__(build_schedule(config), build_momentum(config), restart_per_phase)


class CosineLR(ScheduledLR):
    """Linear warm-up, then a cosine down to `floor` (`ulmfit.optim.schedules.cosine`)."""

    def __init__(self, warmup: float = 0.0, floor: float = 0.0, restart_per_phase: bool = False) -> None:
        config = ScheduleConfig("cosine", warmup=warmup, floor=floor)
        super().__init__(build_schedule(config), restart_per_phase=restart_per_phase)


class ConstantLR(ScheduledLR):
    """One rate after a linear warm-up (`ulmfit.optim.schedules.constant`)."""

    def __init__(self, warmup: float = 0.0, restart_per_phase: bool = False) -> None:
        config = ScheduleConfig("constant", warmup=warmup)
        super().__init__(build_schedule(config), restart_per_phase=restart_per_phase)


_SCHEDULED: dict[str, Callable[[ScheduleConfig], ScheduledLR]] = {
    "stlr": lambda c: SlantedTriangularLR(c.cut_frac, c.ratio, c.restart_per_phase),
    "one_cycle": lambda c: OneCycleLR(c.pct_start, c.div, c.final_div, c.momentum, c.restart_per_phase),
    "cosine": lambda c: CosineLR(c.warmup, c.floor, c.restart_per_phase),
    "constant": lambda c: ConstantLR(c.warmup, c.restart_per_phase),
}


def method_callbacks(config: MethodConfig, lr: float, epochs: int, num_groups: int) -> list[Callback]:
    """The callbacks that `config` describes: rates per group, unfreezing, schedule.

    Warns when `epochs` are too few for the unfreezing to reach every group.

    Raises:
        UsageError: a value of `config` that cannot be used.
    """
    build_schedule(config.schedule)  # raises for a wrong name or value
    discriminative_rates(lr, num_groups, config.discriminative)
    phases = plan_phases(config.unfreezing, epochs, num_groups)
    never = sorted(set(range(num_groups)).difference(*(phase.trainable for phase in phases)))
    if never and config.unfreezing.mode in ("gradual", "authors", "chain_thaw"):
        rank_zero_warn(
            f"unfreezing.mode={config.unfreezing.mode} does not reach layer groups {never} of {num_groups} in {epochs} "
            "epochs, so they are never trained: train for more epochs or use unfreezing.mode=full"
        )
    return [
        DiscriminativeLR(lr, config.discriminative),
        GradualUnfreezing(phases),
        _SCHEDULED[config.schedule.name](config.schedule),
    ]
