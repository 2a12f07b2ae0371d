"""The callbacks on a small module of somebody else's: rates at every step, freezing, resuming, checkpoints."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ulmfit.config import (
    DiscriminativeConfig,
    MethodConfig,
    PhaseConfig,
    ScheduleConfig,
    UnfreezingConfig,
)
from ulmfit.errors import UsageError
from ulmfit.optim.groups import discriminative_rates, group_parameters, parameter_groups
from ulmfit.optim.phases import phase_at, phase_steps, plan_phases
from ulmfit.optim.schedules import build_momentum, build_schedule, slanted_triangular
from ulmfit.training.callbacks import (
    ConstantLR,
    CosineLR,
    DiscriminativeLR,
    GradualUnfreezing,
    OneCycleLR,
    ScheduledLR,
    SlantedTriangularLR,
    method_callbacks,
)

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES, GROUPS, LR = 6, 4, 0.01


class Tiny(LightningModule):
    """Four layer groups, the lowest an embedding, the highest a head with batch normalisation."""

    def __init__(self, grouped: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 5)
        self.lower, self.upper = nn.Linear(5, 5), nn.Linear(5, 5)
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.grouped = grouped
        self.features: list[Tensor] = []

    def layer_groups(self) -> list[nn.Module]:
        return [self.embedding, self.lower, self.upper, self.head]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        features = self.upper(torch.tanh(self.lower(self.embedding(tokens).mean(1))))
        self.features = [features]
        return nn.functional.cross_entropy(self.head(features), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if not self.grouped:
            return torch.optim.AdamW(self.parameters(), lr=1.0, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1)
        groups = parameter_groups(self.layer_groups(), [1.0] * GROUPS, weight_decay=0.1)
        return torch.optim.AdamW(groups, betas=(0.8, 0.99), eps=1e-5)


class Recorder(Callback):
    """What the optimiser used at each of its steps, and how the parameters moved."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}  # step -> rate of each layer group
        self.momenta: dict[int, float] = {}
        self.trainable: dict[int, tuple[int, ...]] = {}  # step -> groups that require a gradient
        self.with_gradient: dict[int, tuple[int, ...]] = {}
        self.moved: dict[int, tuple[int, ...]] = {}
        self.before: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        step, rates = trainer.global_step, {}
        for group in optimizer.param_groups:
            assert rates.setdefault(group["group"], group["lr"]) == group["lr"]
        self.rates[step] = [rates[index] for index in range(GROUPS)]
        self.momenta[step] = optimizer.param_groups[0]["betas"][0]
        groups = group_parameters(pl_module.layer_groups())
        self.trainable[step] = tuple(i for i, group in enumerate(groups) if all(p.requires_grad for p in group))
        frozen = tuple(i for i, group in enumerate(groups) if not any(p.requires_grad for p in group))
        assert sorted(self.trainable[step] + frozen) == list(range(GROUPS))
        self.with_gradient[step] = tuple(i for i, group in enumerate(groups) if any(p.grad is not None for p in group))
        self.before = [[p.detach().clone() for p in group] for group in groups]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups = group_parameters(pl_module.layer_groups())
        if self.before:
            self.moved[trainer.global_step - 1] = tuple(
                i
                for i, (old, new) in enumerate(zip(self.before, groups, strict=True))
                if any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            )
        self.before = []


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (BATCHES * 4, 3), generator=generator)
    labels = torch.randint(3, (BATCHES * 4,), generator=generator)
    return DataLoader(TensorDataset(tokens, labels), batch_size=4)


def make_trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def fit(
    callbacks: Sequence[Callback], module: Tiny | None = None, ckpt: Path | None = None, **options: Any
) -> Recorder:
    recorder = Recorder()
    trainer = make_trainer([*callbacks, recorder], **options)
    trainer.fit(module or Tiny(), batches(), ckpt_path=None if ckpt is None else str(ckpt))
    return recorder


SCHEDULES = [
    ScheduleConfig("stlr", cut_frac=0.2, ratio=16),
    ScheduleConfig("one_cycle", pct_start=0.3, momentum=[0.95, 0.85, 0.95]),
    ScheduleConfig("cosine", warmup=0.1, floor=0.05),
    ScheduleConfig("constant", warmup=0.3),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda config: config.name)
@pytest.mark.parametrize("grouped", [True, False], ids=["own-groups", "plain-optimiser"])
def test_every_group_has_its_base_rate_times_the_factor_at_every_step(schedule: ScheduleConfig, grouped: bool) -> None:
    config = MethodConfig(schedule=schedule)
    recorder = fit(method_callbacks(config, LR, 3, GROUPS), Tiny(grouped), max_epochs=3)
    bases = discriminative_rates(LR, GROUPS, config.discriminative)
    factor, momentum = build_schedule(schedule), build_momentum(schedule)
    total = 3 * BATCHES
    assert recorder.rates == {step: [base * factor(step, total) for base in bases] for step in range(total)}
    assert recorder.momenta == {step: momentum(step, total) if momentum else 0.8 for step in range(total)}
    assert set(recorder.moved.values()) == {(0, 1, 2, 3)}


def test_schedule_follows_optimiser_steps_when_gradients_accumulate() -> None:
    steps = 2 * math.ceil(BATCHES / 4)  # six batches: a step of four, then one of two
    recorder = fit([DiscriminativeLR(LR), SlantedTriangularLR()], max_epochs=2, accumulate_grad_batches=4)
    assert {step: rates[-1] for step, rates in recorder.rates.items()} == {
        step: LR * slanted_triangular(step, steps) for step in range(steps)
    }


@pytest.mark.parametrize("options", [{"max_epochs": 5, "max_steps": 8}, {"max_epochs": -1, "max_steps": 8}])
def test_max_steps_is_what_the_schedule_is_laid_out_for(options: dict[str, int]) -> None:
    recorder = fit([DiscriminativeLR(LR), SlantedTriangularLR()], **options)
    assert [rates[-1] for rates in recorder.rates.values()] == [LR * slanted_triangular(s, 8) for s in range(8)]


def test_without_discriminative_rates_the_optimisers_own_rate_is_the_base() -> None:
    recorder = fit([CosineLR()], max_epochs=1)
    assert recorder.rates[0] == [1.0] * GROUPS
    assert recorder.rates[3] == [pytest.approx(0.5)] * GROUPS


def test_own_schedules_are_functions() -> None:
    callbacks = [DiscriminativeLR(LR), ScheduledLR(lambda step, total: step / total, lambda step, total: 0.5)]
    recorder = fit(callbacks, max_epochs=1)
    assert [rates[-1] for rates in recorder.rates.values()] == [LR * (step / BATCHES) for step in range(BATCHES)]
    assert set(recorder.momenta.values()) == {0.5}


@pytest.mark.parametrize("mode", ["gradual", "authors", "chain_thaw", "last", "full"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_groups_of_the_phase_get_gradients_and_move(mode: str, accumulate: int) -> None:
    config, epochs = UnfreezingConfig(mode), 6
    callbacks = method_callbacks(MethodConfig(unfreezing=config), LR, epochs, GROUPS)
    recorder = fit(callbacks, max_epochs=epochs, accumulate_grad_batches=accumulate)
    phases, per_epoch = plan_phases(config, epochs, GROUPS), BATCHES // accumulate
    expected = {step: phase_at(phases, step // per_epoch).trainable for step in range(epochs * per_epoch)}
    assert recorder.trainable == recorder.with_gradient == recorder.moved == expected


class ZeroedGradients(Tiny):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


def test_a_group_that_was_trained_before_stops_at_once() -> None:
    """A gradient left over, even one of zeros, would let momentum and weight decay go on moving a frozen group."""
    phases = plan_phases(UnfreezingConfig("chain_thaw"), 5, GROUPS)
    recorder = fit([GradualUnfreezing(phases)], ZeroedGradients(), max_epochs=5)
    assert recorder.moved == {step: phase_at(phases, step // BATCHES).trainable for step in range(5 * BATCHES)}


def test_frozen_lowest_groups_build_no_graph() -> None:
    seen: list[tuple[bool, bool]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.features[0].requires_grad, pl_module.features[0].grad_fn is not None))

    phases = plan_phases(UnfreezingConfig("gradual"), 2, GROUPS)
    fit([GradualUnfreezing(phases), Watch()], max_epochs=2)
    assert seen == [(False, False)] * BATCHES + [(True, True)] * BATCHES


def test_scale_of_a_phase_and_one_cycle_for_each() -> None:
    unfreezing = UnfreezingConfig(
        "phases", [PhaseConfig(epochs=1, train_top=1, lr_scale=2.0), PhaseConfig(epochs=2, lr_scale=0.5)]
    )
    phases, per_epoch = plan_phases(unfreezing, 3, GROUPS), BATCHES // 2
    for restart in (False, True):
        config = MethodConfig(unfreezing, ScheduleConfig("stlr", restart_per_phase=restart))
        recorder = fit(method_callbacks(config, LR, 3, GROUPS), max_epochs=3, accumulate_grad_batches=2)
        for step in range(3 * per_epoch):
            epoch = step // per_epoch
            start, length = phase_steps(phases, epoch, per_epoch, 3 * per_epoch) if restart else (0, 3 * per_epoch)
            factor = phase_at(phases, epoch).lr_scale * slanted_triangular(step - start, length)
            assert recorder.rates[step][-1] == LR * factor
        assert (recorder.rates[per_epoch][-1] == LR * 0.5 / 32) is restart  # a new cycle begins at its lowest rate


def test_batch_normalisation_of_a_frozen_head_follows_statistics_but_is_not_trained() -> None:
    module = Tiny()
    config = UnfreezingConfig("phases", [PhaseConfig(train_only=[0])])
    before = copy.deepcopy(module.head.state_dict())
    fit([GradualUnfreezing(plan_phases(config, 1, GROUPS))], module, max_epochs=1)
    after = module.head.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}


class SaveAt(Callback):
    """Write a checkpoint after `step` optimiser steps, or at the end of epoch `epoch`."""

    def __init__(self, path: Path, step: int | None = None, epoch: int | None = None) -> None:
        self.path, self.step, self.epoch = path, step, epoch

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


class ResumableBatches:
    """The same batches in every epoch, resumed in the middle of one."""

    def __init__(self) -> None:
        self.batches, self.next = list(batches()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.next %= len(self.batches)  # Lightning takes the last batch without asking for the end
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


EPOCHS, STEPS = {"max_epochs": 5}, {"max_epochs": 5, "max_steps": 28}


@pytest.mark.parametrize(
    ("limit", "where"),
    [
        *[(EPOCHS, where) for where in ({"step": 3}, {"step": 12}, {"step": 16}, {"epoch": 0}, {"epoch": 1})],
        *[(STEPS, where) for where in ({"step": 3}, {"step": 12}, {"step": 16})],
    ],
    ids=str,
)
def test_resuming_continues_with_the_same_rates_groups_and_weights(
    where: dict[str, int], limit: dict[str, int], tmp_path: Path
) -> None:
    schedule = ScheduleConfig("one_cycle", momentum=[0.95, 0.85, 0.95])
    config = MethodConfig(UnfreezingConfig("chain_thaw"), schedule)
    path = tmp_path / "middle.ckpt"

    def run(extra: list[Callback], ckpt: Path | None) -> tuple[Recorder, Tiny]:
        module, recorder = Tiny(), Recorder()
        trainer = make_trainer([*method_callbacks(config, LR, 5, GROUPS), recorder, *extra], **limit)
        trainer.fit(module, ResumableBatches(), ckpt_path=None if ckpt is None else str(ckpt))  # type: ignore[arg-type]
        return recorder, module

    whole, module = run([SaveAt(path, **where)], None)
    rest, resumed = run([], path)
    first = where["step"] if "step" in where else (where["epoch"] + 1) * BATCHES
    assert min(rest.rates) == first
    assert max(rest.rates) == max(whole.rates)
    for name in ("rates", "momenta", "trainable", "with_gradient", "moved"):
        expected = {step: value for step, value in getattr(whole, name).items() if step >= first}
        assert getattr(rest, name) == expected, name
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_rates_configured_now_win_over_those_in_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    fit([DiscriminativeLR(LR), ConstantLR(), SaveAt(path, epoch=0)], max_epochs=1)
    recorder = fit([DiscriminativeLR(3 * LR), ConstantLR()], ckpt=path, max_epochs=2)
    assert {rates[-1] for rates in recorder.rates.values()} == {3 * LR}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda config: config.name)
def test_checkpoints_hold_nothing_of_the_callbacks(schedule: ScheduleConfig, tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    callbacks = method_callbacks(MethodConfig(UnfreezingConfig("gradual"), schedule), LR, 4, GROUPS)
    fit([*callbacks, SaveAt(path, epoch=1)], max_epochs=4)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"] == {}
    assert checkpoint["lr_schedulers"] == []
    assert all(callback.state_dict() == {} for callback in callbacks)


def test_everything_is_trainable_again_after_training_and_after_an_interruption() -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop")

    unfreezing = GradualUnfreezing(plan_phases(UnfreezingConfig("last"), 1, GROUPS))
    module = Tiny()
    fit([unfreezing], module, max_epochs=1)
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        fit([unfreezing, Interrupt()], module, max_epochs=1)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_everything_is_trainable_when_the_strategy_wraps_the_module() -> None:
    module = Tiny()
    module.embedding.requires_grad_(False)  # left over from something else

    class Wrap(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert all(parameter.requires_grad for parameter in pl_module.parameters())

    fit([GradualUnfreezing(plan_phases(UnfreezingConfig("last"), 1, GROUPS)), Wrap()], module, max_epochs=1)


def test_method_callbacks_build_what_is_configured() -> None:
    kinds = {"stlr": SlantedTriangularLR, "one_cycle": OneCycleLR, "cosine": CosineLR, "constant": ConstantLR}
    for schedule in SCHEDULES:
        rates, unfreezing, scheduled = method_callbacks(
            MethodConfig(UnfreezingConfig("authors"), schedule, DiscriminativeConfig("none")), LR, 6, GROUPS
        )
        assert isinstance(rates, DiscriminativeLR) and rates.config.mode == "none" and rates.lr == LR
        assert isinstance(unfreezing, GradualUnfreezing)
        assert unfreezing.phases == plan_phases(UnfreezingConfig("authors"), 6, GROUPS)
        assert type(scheduled) is kinds[schedule.name]
        for step in (0, 3, 40):
            assert scheduled.schedule(step, 50) == build_schedule(schedule)(step, 50)


@pytest.mark.filterwarnings("default")
def test_too_few_epochs_to_reach_every_group_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"gradual does not reach layer groups \[0, 1\] of 4 in 2 epochs"):
        method_callbacks(MethodConfig(UnfreezingConfig("gradual")), LR, 2, GROUPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method_callbacks(MethodConfig(UnfreezingConfig("gradual")), LR, 4, GROUPS)
        method_callbacks(MethodConfig(UnfreezingConfig("last")), LR, 2, GROUPS)  # is meant to train only one


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(list(batches().dataset))


class NoGroups(Tiny):
    layer_groups = None  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnSchedule(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class ForgottenHead(Tiny):
    def layer_groups(self) -> list[nn.Module]:
        return [self.embedding, self.lower, self.upper]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


FULL = plan_phases(UnfreezingConfig("full"), 1, 5)


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (NoGroups, [DiscriminativeLR(LR)], "NoGroups has no layer_groups"),
        (NoGroups, [GradualUnfreezing(FULL)], "NoGroups has no layer_groups"),
        (Tiny, [GradualUnfreezing(FULL)], "name layer group 4 but Tiny has 4"),
        (ForgottenHead, [DiscriminativeLR(LR)], "make layer_groups() cover every trained parameter"),
        (OwnSchedule, [CosineLR()], "keep one schedule callback"),
        (Tiny, [CosineLR(), ConstantLR()], "keep one schedule callback"),
    ],
)
def test_what_cannot_work_is_one_sentence(module: type[Tiny], callbacks: list[Callback], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        make_trainer(callbacks, max_epochs=1).fit(module(), batches())
    assert message in str(raised.value)


def test_training_data_without_a_length_needs_max_steps() -> None:
    data = DataLoader(Endless(), batch_size=4)
    with pytest.raises(UsageError, match="set max_steps"):
        make_trainer([CosineLR()], max_epochs=2).fit(Tiny(), data)
    recorder = Recorder()
    make_trainer([DiscriminativeLR(LR), CosineLR(), recorder], max_epochs=2, max_steps=9).fit(Tiny(), data)
    assert len(recorder.rates) == 9
    phases = plan_phases(UnfreezingConfig("full"), 2, GROUPS)
    restarting = make_trainer([GradualUnfreezing(phases), CosineLR(restart_per_phase=True)], max_epochs=2, max_steps=9)
    with pytest.raises(UsageError, match="restart_per_phase needs training data with a length"):
        restarting.fit(Tiny(), data)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("inf")])
def test_a_rate_that_cannot_be_used_is_named_before_training(lr: float) -> None:
    with pytest.raises(UsageError, match="give a number above 0"):
        DiscriminativeLR(lr)
