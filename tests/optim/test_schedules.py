"""Schedules: exact values of the paper's formula, edge cases, and fastai's curves as oracle."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from ulmfit.config import ScheduleConfig
from ulmfit.errors import UsageError
from ulmfit.optim.schedules import (
    SCHEDULES,
    build_momentum,
    build_schedule,
    constant,
    cosine,
    one_cycle,
    slanted_triangular,
)


def printed_stlr(step: int, total: int, cut_frac: float, ratio: float) -> float:
    """Equation 3 as printed, sound where total * cut_frac is whole."""
    cut = math.floor(total * cut_frac)
    progress = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_frac - 1))
    return (1 + progress * (ratio - 1)) / ratio


def test_slanted_triangular_known_values() -> None:
    values = [slanted_triangular(step, 20, cut_frac=0.1, ratio=32) for step in range(20)]
    assert values[:3] == [1 / 32, (1 + 0.5 * 31) / 32, 1.0]
    assert values[11] == (1 + 0.5 * 31) / 32  # half-way down
    assert values[19] == pytest.approx((1 + 31 / 18) / 32, rel=1e-12)
    assert max(values) == values[2]


@pytest.mark.parametrize(("total", "cut_frac"), [(100, 0.1), (1000, 0.1), (30, 1 / 3), (80, 0.125), (100, 0.29)])
def test_slanted_triangular_is_the_printed_formula_where_that_is_sound(total: int, cut_frac: float) -> None:
    if total * cut_frac < round(total * cut_frac):  # 100 * 0.29 is 28.999999999999996
        assert slanted_triangular(29, total, cut_frac) == 1.0
        return
    for step in range(total):
        assert slanted_triangular(step, total, cut_frac) == pytest.approx(printed_stlr(step, total, cut_frac, 32))


def test_slanted_triangular_stays_positive_when_the_cut_is_not_whole() -> None:
    assert printed_stlr(118, 119, 0.1, 32) < 1 / 32  # the printed formula falls below its own minimum
    values = [slanted_triangular(step, 119) for step in range(119)]
    assert values[11] == 1.0
    assert all(1 / 32 <= value <= 1 for value in values)
    falls = [a - b for a, b in itertools.pairwise(values[11:])]
    assert falls == pytest.approx([31 / 32 / 108] * 107)
    assert values[-1] - falls[-1] == pytest.approx(1 / 32)  # the end of the fall is step 119 itself


@pytest.mark.parametrize("total", range(1, 10))
def test_slanted_triangular_of_fewer_than_ten_steps(total: int) -> None:
    values = [slanted_triangular(step, total) for step in range(total)]
    assert values[0] == 1 / 32
    assert total == 1 or (values[1] == 1.0 and values[1:] == sorted(values[1:], reverse=True))
    assert all(1 / 32 <= value <= 1 for value in values)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_past_the_end_a_schedule_stays_where_it_ended(name: str, total: int) -> None:
    schedule = build_schedule(ScheduleConfig(name, warmup=0.1))
    assert schedule(total + 5, total) == schedule(total, total)
    assert all(0 <= schedule(step, total) <= 1 for step in range(total + 1))


def test_cosine_and_constant_warm_up_linearly_from_above_zero() -> None:
    assert [constant(step, 40, warmup=0.1) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert [cosine(step, 40, warmup=0.1) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert cosine(22, 40, warmup=0.1, floor=0.2) == pytest.approx(0.6)  # half-way between 1 and the floor
    assert cosine(40, 40, warmup=0.1, floor=0.2) == pytest.approx(0.2)
    assert constant(0, 40) == cosine(0, 40) == 1.0


def test_build_schedule_passes_every_parameter_on() -> None:
    step, total = 3, 50
    assert build_schedule(ScheduleConfig("stlr", cut_frac=0.3, ratio=8))(step, total) == slanted_triangular(
        step, total, 0.3, 8
    )
    config = ScheduleConfig("one_cycle", pct_start=0.4, div=10, final_div=100)
    assert build_schedule(config)(step, total) == one_cycle(step, total, 0.4, 10, 100)
    assert build_schedule(ScheduleConfig("cosine", warmup=0.1, floor=0.2))(step, total) == cosine(step, total, 0.1, 0.2)
    assert build_schedule(ScheduleConfig("constant", warmup=0.1))(step, total) == constant(step, total, 0.1)
    assert build_momentum(config) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "one_cycel"}, "did you mean 'one_cycle'?"),
        ({"name": "xyz"}, "choose one of stlr, one_cycle, cosine, constant"),
        ({"cut_frac": 0.0}, "schedule.cut_frac=0.0 is out of range"),
        ({"ratio": 0.5}, "schedule.ratio=0.5 is out of range"),
        ({"warmup": 1.0}, "schedule.warmup=1.0 is out of range"),
        ({"name": "one_cycle", "pct_start": 1.0}, "schedule.pct_start=1.0 is out of range"),
        ({"momentum": [0.9, 0.8, 0.9]}, "use schedule.name=one_cycle"),
        ({"name": "one_cycle", "momentum": [0.9, 0.8]}, "give three numbers"),
        ({"name": "one_cycle", "momentum": [0.9, 0.8, 1.0]}, "give three numbers"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build_schedule(ScheduleConfig(**values))
    assert message in str(raised.value)


# fastai as oracle: it evaluates at step / total, with the pieces' borders in float32.


@pytest.mark.fastai
@pytest.mark.parametrize(("total", "pct_start"), [(1, 0.25), (7, 0.25), (100, 0.25), (173, 0.3), (40, 0.0)])
def test_one_cycle_equals_combined_cos(total: int, pct_start: float) -> None:
    pytest.importorskip("fastai")
    from fastai.callback.schedule import combined_cos

    lr, div, final_div, momentum = 0.01, 25.0, 1e5, (0.95, 0.85, 0.95)
    rate_of = combined_cos(pct_start, lr / div, lr, lr / final_div)
    momentum_of = combined_cos(pct_start, *momentum)
    config = ScheduleConfig("one_cycle", pct_start=pct_start, div=div, final_div=final_div, momentum=list(momentum))
    factor, own_momentum = build_schedule(config), build_momentum(config)
    assert own_momentum is not None
    for step in range(total):
        assert lr * factor(step, total) == pytest.approx(rate_of(step / total), rel=1e-6, abs=1e-9)
        assert own_momentum(step, total) == pytest.approx(momentum_of(step / total), rel=1e-6)


@pytest.mark.fastai
def test_curves_equal_those_of_fastai_training() -> None:
    """The rates and momenta that `fit_one_cycle` and `fit_flat_cos` really train with, epochs and all."""
    pytest.importorskip("fastai")
    import torch
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    def learner() -> Any:
        items = [(torch.ones(1), torch.ones(1))] * 10
        loaders = DataLoaders(DataLoader(items, bs=2), DataLoader(items, bs=2), device=torch.device("cpu"))
        return Learner(loaders, torch.nn.Linear(1, 1), loss_func=torch.nn.functional.mse_loss)

    with (fitted := learner()).no_bar(), fitted.no_logging():
        fitted.fit_one_cycle(3, 0.01)
    config = ScheduleConfig("one_cycle", momentum=[0.95, 0.85, 0.95])
    factor, momentum = build_schedule(config), build_momentum(config)
    assert momentum is not None
    assert len(fitted.recorder.hps["lr"]) == 15
    assert fitted.recorder.hps["lr"] == pytest.approx([0.01 * factor(step, 15) for step in range(15)], rel=1e-5)
    assert fitted.recorder.hps["mom"] == pytest.approx([momentum(step, 15) for step in range(15)], rel=1e-5)

    with (fitted := learner()).no_bar(), fitted.no_logging():
        fitted.fit_flat_cos(3, 0.01, pct_start=0.0)
    assert fitted.recorder.hps["lr"] == pytest.approx([0.01 * cosine(s, 15, floor=1e-5) for s in range(15)], rel=1e-5)
