"""Discriminative rates, parameter groups, and the optimiser's trajectory next to fastai's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ulmfit.config import DiscriminativeConfig
from ulmfit.errors import UsageError
from ulmfit.optim.groups import discriminative_rates, group_parameters, parameter_groups, split_by_layer


def classifier() -> list[nn.Module]:
    """Embedding, LSTM, head with batch normalisation: one of each kind of parameter."""
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    return [nn.Embedding(10, 5), nn.LSTM(5, 6), head]


def test_each_group_has_the_next_higher_rate_divided_by_the_factor() -> None:
    rates = discriminative_rates(0.01, 5, DiscriminativeConfig())
    assert rates == pytest.approx([0.01 / 2.6**4, 0.01 / 2.6**3, 0.01 / 2.6**2, 0.01 / 2.6, 0.01], rel=1e-12)
    assert rates[-1] == 0.01


@pytest.mark.parametrize(
    ("num_groups", "parts"),
    [(2, [1, 2]), (3, [3, 1, 2]), (4, [6, 3, 1, 2]), (5, [12, 6, 3, 1, 2])],
)
def test_authors_language_model_rates(num_groups: int, parts: list[int]) -> None:
    config = DiscriminativeConfig("authors_lm")
    assert discriminative_rates(0.004, num_groups, config) == pytest.approx([0.004 / part for part in parts])


def test_slice_and_none() -> None:
    config = DiscriminativeConfig("slice", lowest=1e-4)
    assert discriminative_rates(1e-2, 3, config) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert discriminative_rates(1e-2, 1, config) == [1e-2]
    assert discriminative_rates(1e-2, 3, DiscriminativeConfig("slice")) == [1e-3, 1e-3, 1e-2]
    assert discriminative_rates(1e-2, 3, DiscriminativeConfig("none")) == [1e-2] * 3


@pytest.mark.parametrize(
    ("lr", "num_groups", "config", "message"),
    [
        (0.1, 3, DiscriminativeConfig("factr"), "did you mean 'factor'?"),
        (0.1, 3, DiscriminativeConfig("xyz"), "choose one of factor, authors_lm, slice, none"),
        (0.0, 3, DiscriminativeConfig(), "lr=0.0 is out of range"),
        (float("nan"), 3, DiscriminativeConfig(), "lr=nan is out of range"),
        (0.1, 3, DiscriminativeConfig(factor=-1), "discriminative.factor=-1"),
        (0.1, 3, DiscriminativeConfig("slice", lowest=0.0), "discriminative.lowest=0.0"),
        (0.1, 1, DiscriminativeConfig("authors_lm"), "use mode=factor"),
    ],
)
def test_wrong_rates_are_named(lr: float, num_groups: int, config: DiscriminativeConfig, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        discriminative_rates(lr, num_groups, config)
    assert message in str(raised.value)


def test_weights_decay_but_normalisation_and_biases_do_not() -> None:
    layers = classifier()
    groups = parameter_groups(layers, [0.1, 0.2, 0.3], weight_decay=0.05)
    assert [(group["group"], group["lr"], group["base_lr"], group["weight_decay"]) for group in groups] == [
        (0, 0.1, 0.1, 0.05),
        (1, 0.2, 0.2, 0.05),
        (1, 0.2, 0.2, 0.0),
        (2, 0.3, 0.3, 0.05),
        (2, 0.3, 0.3, 0.0),
    ]
    names = {id(p): f"{i}.{name}" for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    kept = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {"0.weight", "1.weight_ih_l0", "1.weight_hh_l0", "2.1.weight", "2.3.weight"}
    assert kept == {"1.bias_ih_l0", "1.bias_hh_l0", "2.0.weight", "2.0.bias", "2.1.bias", "2.2.weight", "2.2.bias"}
    torch.optim.AdamW(groups)  # accepts the keys, and no parameter twice


def test_a_tied_weight_appears_once() -> None:
    embedding, decoder = nn.Embedding(10, 5), nn.Linear(5, 10)
    decoder.weight = embedding.weight
    top = nn.ModuleList([embedding, decoder])
    (tied, bias) = parameter_groups([top], [0.1], 0.01)
    assert [id(p) for p in tied["params"]] == [id(embedding.weight)]
    assert [id(p) for p in bias["params"]] == [id(decoder.bias)]
    assert [len(group) for group in group_parameters([embedding, decoder])] == [1, 1]  # the lower group keeps it


def test_groups_may_be_lists_and_may_be_empty() -> None:
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    found = group_parameters([[linear.weight], nn.Dropout(), [linear, norm]])
    assert [[id(p) for p in group] for group in found] == [
        [id(linear.weight)],
        [],
        [id(linear.bias), id(norm.weight), id(norm.bias)],
    ]
    assert [group["group"] for group in parameter_groups([[linear.weight], nn.Dropout(), norm], [1, 2, 3], 0)] == [0, 2]


def test_one_rate_for_each_group() -> None:
    with pytest.raises(UsageError, match="got 2 learning rates for 3 layer groups"):
        parameter_groups(classifier(), [0.1, 0.2], 0.0)


def test_any_optimiser_can_be_split_by_layer() -> None:
    layers = classifier()
    options = torch.optim.AdamW(nn.ModuleList(layers).parameters(), lr=0.1, weight_decay=0.03).param_groups
    split = split_by_layer(options, layers)
    assert [group["group"] for group in split] == [0, 1, 2]
    assert [[id(p) for p in group["params"]] for group in split] == [
        [id(p) for p in group] for group in group_parameters(layers)
    ]
    assert all(group["weight_decay"] == 0.03 and group["lr"] == 0.1 for group in split)
    own = parameter_groups(layers, [0.1, 0.2, 0.3], 0.05)
    assert split_by_layer(own, layers) == own
    with pytest.raises(UsageError, match=r"shape \(10, 5\) that is in none of the 2 layer groups"):
        split_by_layer(options, layers[1:])


@pytest.mark.fastai
@pytest.mark.parametrize("num_groups", [2, 4, 5])
def test_slice_equals_fastai(num_groups: int) -> None:
    pytest.importorskip("fastai")
    from fastai.optimizer import Adam

    optimizer = Adam([[nn.Parameter(torch.zeros(1))] for _ in range(num_groups)], lr=1.0)
    optimizer.set_hyper("lr", slice(1e-5, 2e-3))
    expected = [float(hyper["lr"]) for hyper in optimizer.hypers]
    ours = discriminative_rates(2e-3, num_groups, DiscriminativeConfig("slice", lowest=1e-5))
    assert ours == pytest.approx(expected, rel=1e-12)
    optimizer.set_hyper("lr", slice(2e-3))
    expected = [float(hyper["lr"]) for hyper in optimizer.hypers]
    assert discriminative_rates(2e-3, num_groups, DiscriminativeConfig("slice")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.fastai
def test_adamw_follows_fastai_adam() -> None:
    """Same gradients, per-group rates that change every step, decay on weights only: same weights for 50 steps."""
    pytest.importorskip("fastai")
    import copy

    from fastai.optimizer import Adam

    from ulmfit.optim.schedules import slanted_triangular

    torch.manual_seed(0)
    ours = [nn.BatchNorm1d(7), nn.Linear(7, 9), nn.Sequential(nn.Tanh(), nn.Linear(9, 3))]
    theirs = copy.deepcopy(ours)
    rates = discriminative_rates(0.01, 3, DiscriminativeConfig())
    groups = parameter_groups(ours, rates, weight_decay=0.1)
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.99), eps=1e-5)
    adam = Adam([list(layer.parameters()) for layer in theirs], lr=1.0, mom=0.8, sqr_mom=0.99, eps=1e-5, wd=0.1)
    for parameters in adam.param_lists:
        for parameter in parameters:
            adam.state[parameter]["do_wd"] = parameter.ndim > 1
    for step in range(50):
        inputs, targets = torch.randn(16, 7), torch.randint(3, (16,))
        factor = slanted_triangular(step, 50)
        for group in adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        adam.set_hyper("lr", [rate * factor for rate in rates])
        for layers, optimizer in ((ours, adamw), (theirs, adam)):
            nn.functional.cross_entropy(nn.Sequential(*layers)(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        for own, other in zip(group_parameters(ours), group_parameters(theirs), strict=True):
            for a, b in zip(own, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
