"""Unfreezing plans of every mode, short trainings, and wrong configurations."""

from __future__ import annotations

from typing import Any

import pytest

from ulmfit.config import PhaseConfig, UnfreezingConfig
from ulmfit.errors import UsageError
from ulmfit.optim.phases import MODES, Phase, phase_at, phase_steps, plan_phases


def by_epoch(mode: str, epochs: int, num_groups: int) -> list[tuple[int, ...]]:
    phases = plan_phases(UnfreezingConfig(mode), epochs, num_groups)
    return [phase_at(phases, epoch).trainable for epoch in range(epochs)]


def test_gradual_adds_one_lower_group_each_epoch() -> None:
    assert by_epoch("gradual", 7, 5) == [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4), *[(0, 1, 2, 3, 4)] * 3]
    phases = plan_phases(UnfreezingConfig("gradual"), 7, 5)
    assert [phase.name for phase in phases] == ["top 1", "top 2", "top 3", "top 4", "all"]
    assert phases[-1] == Phase("all", first_epoch=4, epochs=3, trainable=(0, 1, 2, 3, 4))


def test_authors_is_head_then_top_layer_then_all() -> None:
    assert by_epoch("authors", 4, 5) == [(4,), (3, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]
    assert by_epoch("authors", 3, 2) == [(1,), (0, 1), (0, 1)]
    assert len(plan_phases(UnfreezingConfig("authors"), 3, 2)) == 2  # head + top layer already is everything


def test_chain_thaw_is_head_then_each_alone_then_all() -> None:
    assert by_epoch("chain_thaw", 7, 4) == [(3,), (0,), (1,), (2,), *[(0, 1, 2, 3)] * 3]


def test_last_and_full() -> None:
    assert by_epoch("last", 3, 5) == [(4,)] * 3
    assert by_epoch("full", 3, 5) == [(0, 1, 2, 3, 4)] * 3


def test_custom_phases_keep_names_lengths_and_scales() -> None:
    config = UnfreezingConfig(
        "phases",
        [
            PhaseConfig("warm", 2, train_top=1),
            PhaseConfig(epochs=1, train_only=[2, 0, 2], lr_scale=0.5),
            PhaseConfig("rest"),
        ],
    )
    assert plan_phases(config, 10, 4) == (
        Phase("warm", 0, 2, (3,)),
        Phase("phase 2", 2, 1, (0, 2), 0.5),
        Phase("rest", 3, 7, (0, 1, 2, 3)),
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "phases"])
def test_a_single_group_always_trains(mode: str) -> None:
    assert by_epoch(mode, 3, 1) == [(0,)] * 3


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "phases"])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_plans_tile_the_epochs_and_short_ones_are_the_beginning_of_long_ones(mode: str, num_groups: int) -> None:
    long = by_epoch(mode, 20, num_groups)
    for epochs in range(1, 10):
        phases = plan_phases(UnfreezingConfig(mode), epochs, num_groups)
        assert [epoch for phase in phases for epoch in range(phase.first_epoch, phase.first_epoch + phase.epochs)] == [
            *range(epochs)
        ]
        assert by_epoch(mode, epochs, num_groups) == long[:epochs]


def test_the_last_phase_goes_on() -> None:
    phases = plan_phases(UnfreezingConfig("authors"), 5, 4)
    assert phase_at(phases, 1000) is phases[-1]


def test_phase_steps_cover_the_training_without_overlap() -> None:
    phases = plan_phases(UnfreezingConfig("authors"), 5, 4)
    assert [phase_steps(phases, epoch, 10, 50) for epoch in range(5)] == [(0, 10), (10, 10), *[(20, 30)] * 3]
    assert [phase_steps(phases, epoch, 10, 14) for epoch in range(2)] == [(0, 10), (10, 4)]  # max_steps=14


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (UnfreezingConfig("gradul"), "did you mean 'gradual'?"),
        (UnfreezingConfig("thaw"), "choose one of gradual, authors, chain_thaw, last, full, phases"),
        (UnfreezingConfig("phases"), "empty list"),
        (UnfreezingConfig("gradual", [PhaseConfig()]), "set mode=phases or remove the list"),
        (UnfreezingConfig("phases", [PhaseConfig(epochs=0)]), "phases[0].epochs=0"),
        (UnfreezingConfig("phases", [PhaseConfig(lr_scale=0.0)]), "phases[0].lr_scale=0.0"),
        (UnfreezingConfig("phases", [PhaseConfig(), PhaseConfig(train_top=5)]), "phases[1].train_top=5"),
        (UnfreezingConfig("phases", [PhaseConfig(train_top=0)]), "give 1 to 4"),
        (UnfreezingConfig("phases", [PhaseConfig(train_only=[4])]), "0 (lowest) to 3 (highest)"),
        (UnfreezingConfig("phases", [PhaseConfig(train_only=[-1])]), "0 (lowest) to 3 (highest)"),
        (UnfreezingConfig("phases", [PhaseConfig(train_only=[])]), "train_only=[]"),
        (UnfreezingConfig("phases", [PhaseConfig(train_top=1, train_only=[1])]), "keep one of them"),
    ],
)
def test_wrong_configurations_are_named(config: UnfreezingConfig, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        plan_phases(config, 3, 4)
    assert message in str(raised.value)


@pytest.mark.parametrize("sizes", [{"epochs": 0, "num_groups": 3}, {"epochs": 3, "num_groups": 0}])
def test_nothing_to_plan_is_an_error(sizes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least one of each"):
        plan_phases(UnfreezingConfig(), **sizes)
