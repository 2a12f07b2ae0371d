"""The learning-rate range test: what it does to the network, what it records, what it suggests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ulmfit.config import FindLRConfig, TrainConfig
from ulmfit.errors import UlmfitError, UsageError
from ulmfit.tasks import find_lr as task
from ulmfit.tasks import stages
from ulmfit.tasks.locations import Parent
from ulmfit.training import engine, lr_find
from ulmfit.training.classifier import ClassifierModule
from ulmfit.training.lr_find import find_lr, suggest

Settings = Callable[..., TrainConfig]


@pytest.fixture
def find_settings(settings: Settings) -> Callable[..., FindLRConfig]:
    def make(
        stage: str = "classifier", start: float = 1e-4, end: float = 1.0, steps: int = 40, **v: Any
    ) -> FindLRConfig:
        config = settings(stage, **v)
        return FindLRConfig(
            **{f.name: getattr(config, f.name) for f in fields(config)}, start=start, end=end, steps=steps
        )

    return make


def prepared(config: TrainConfig) -> tuple[ClassifierModule, Any]:
    given = stages.prepare_classifier(config, Parent(None, ""))
    return engine.classifier_parts(
        given.model, given.train, given.train_labels, None, None, config.stage.classifier, "forward", 0
    )


# ------------------------------------------------------------------------------------------------ the verb


@pytest.mark.parametrize(("stage", "key"), [("classifier", "classifier"), ("lm_finetune", "lm"), ("all", "lm")])
def test_suggestion_and_picture(
    find_settings: Callable[..., FindLRConfig], capfd: pytest.CaptureFixture[str], stage: str, key: str
) -> None:
    config = find_settings(stage)
    result = task.run(config)
    folder = Path(config.runs) / "helpdesk" / f"find_lr-{stage}"
    assert sorted(path.name for path in folder.iterdir()) == ["lr_find.json", "lr_find.png"]
    recorded = json.loads((folder / "lr_find.json").read_text())
    assert (
        20 < result["steps"] == len(recorded["rates"]) == len(recorded["losses"]) <= 40
    )  # known: it stopped after one
    assert recorded["suggestion"] == result["suggestion"]
    assert 1e-4 < result["suggestion"] < 1
    out, err = capfd.readouterr()
    assert f"stage.{key}.optim.lr={result['suggestion']:.2g}" in out
    assert str(folder / "lr_find.png") in out
    assert err == ""  # Lightning's hints, say


def test_a_loss_that_never_falls(find_settings: Callable[..., FindLRConfig]) -> None:
    config = find_settings(start=20.0, end=1000.0)
    with pytest.raises(UlmfitError, match=r"the loss never fell between 20 and 1000 in \d+ steps.*lr_find\.png"):
        task.run(config)
    assert (Path(config.runs) / "helpdesk" / "find_lr-classifier" / "lr_find.png").is_file()


@pytest.mark.parametrize("wrong", [{"start": 1.0, "end": 0.5}, {"start": 0.0}, {"steps": 9}])
def test_ranges_that_cannot_be_meant(find_settings: Callable[..., FindLRConfig], wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected 0 < start < end and steps >= 10"):
        task.run(find_settings(**wrong))


# ------------------------------------------------------------------------------------------------ the test itself


def test_the_network_is_as_before(settings: Settings) -> None:
    config = settings(stage__classifier__method__unfreezing__mode="gradual", stage__classifier__epochs=4)
    module, data = prepared(config)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    found = find_lr(module, data, config.stage.classifier, config.trainer, 1e-4, 10.0, 30)
    assert len(found.rates) > 10
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.config is config.stage.classifier
    torch.manual_seed(3)
    again = find_lr(module, data, config.stage.classifier, config.trainer, 1e-4, 10.0, 30)
    assert (again.rates, again.losses) == (found.rates, found.losses)


def test_the_network_is_as_before_after_a_failure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = prepared(settings())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls: list[int] = []

    def fails_later(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of memory")
        return ClassifierModule.training_step(module, *given)

    monkeypatch.setattr(module, "training_step", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        find_lr(module, data, settings().stage.classifier, settings().trainer, steps=20)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_groups_grow_together(settings: Settings, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    config = settings(stage__classifier__optim__accumulate=accumulate)
    module, data = prepared(config)
    used: list[list[float]] = []

    class Watching(lr_find._Recorder):
        def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
            super().on_train_batch_end(trainer, *given)
            rates = {group["group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
            used.append([rates[group] for group in sorted(rates)])

    monkeypatch.setattr(lr_find, "_Recorder", Watching)
    found = find_lr(module, data, config.stage.classifier, config.trainer, 1e-3, 0.1, 20)
    assert found.rates == [rates[-1] for rates in used]
    assert used[0][-1] == pytest.approx(1e-3)
    assert used[-1][-1] == pytest.approx(0.1)
    distinct = sorted(set(found.rates))
    assert len(distinct) == 20
    growth = [b / a for a, b in pairwise(distinct)]
    assert growth == pytest.approx([100 ** (1 / 19)] * 19)
    for rates in used:
        assert [rates[-1] / rate for rate in rates] == pytest.approx([2.6**3, 2.6**2, 2.6, 1])


def test_smoothed_losses(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means weighted 0.98 to the power of their age; the last one before an explosion is the last one kept."""
    config = settings()
    module, data = prepared(config)
    given = [4.0, 2.0, 1.0, 1.0, 500.0, 1.0]
    shown = iter(given + [1.0] * 99)

    def training_step(*ignored: Any) -> torch.Tensor:
        return next(module.parameters()).sum() * 0 + next(shown)

    monkeypatch.setattr(module, "training_step", training_step)
    found = find_lr(module, data, config.stage.classifier, config.trainer, steps=20)
    weights = [[0.98 ** (i - j) for j in range(i + 1)] for i in range(4)]
    expected = [sum(w * x for w, x in zip(row, given, strict=False)) / sum(row) for row in weights]
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert next(shown) == 1.0 and next(shown) == 1.0  # the 500 ended it


def test_a_loss_that_is_no_number_ends_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    module, data = prepared(config)
    shown = iter([3.0, 2.0, math.nan, 1.0])
    monkeypatch.setattr(module, "training_step", lambda *ignored: next(module.parameters()).sum() * 0 + next(shown))
    found = find_lr(module, data, config.stage.classifier, config.trainer, steps=20)
    assert len(found.losses) == 2
    assert found.suggestion is None


# ------------------------------------------------------------------------------------------------ the suggestion


def valley(low: float, high: float) -> tuple[list[float], list[float]]:
    """A loss that is flat up to the rate `low`, falls to `high`, then explodes."""
    rates = [10 ** (-6 + 7 * i / 99) for i in range(100)]

    def loss(rate: float) -> float:
        position = (math.log10(rate) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return 3 - 2 * min(1, max(0, position)) + max(0, position - 1) ** 2 * 5

    return rates, [loss(rate) for rate in rates]


def test_suggestion_on_a_synthetic_curve() -> None:
    rates, losses = valley(1e-4, 1e-1)
    expected = 1e-4 * (1e-1 / 1e-4) ** (2 / 3)
    assert suggest(rates, losses) == pytest.approx(expected, rel=0.25)


def test_suggestion_with_noise() -> None:
    rates, losses = valley(1e-4, 1e-1)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
    found = suggest(rates, [loss + 0.02 * n for loss, n in zip(losses, noise, strict=True)])
    assert found is not None and 1e-4 < found < 1e-1


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 0.5], [1.0, 2.0, 3.0, 4.0], [1.0] * 50])
def test_no_suggestion_without_a_fall(losses: list[float]) -> None:
    assert suggest([0.1 * (i + 1) for i in range(len(losses))], losses) is None


def test_a_fall_from_the_first_to_the_last() -> None:
    assert suggest([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) in (2.0, 3.0)
