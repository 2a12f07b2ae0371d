"""Discriminative learning rates and the optimiser's parameter groups.

A layer group is a module, or a sequence of modules and parameters; groups are listed lowest first. All of them are
in the optimiser from the start: freezing is `requires_grad`, never a change of the optimiser's groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ulmfit.config import DiscriminativeConfig
from ulmfit.errors import UsageError, did_you_mean

LayerGroup = nn.Module | Sequence[nn.Module | nn.Parameter]
ParameterGroup = dict[str, Any]  # one entry of torch.optim.Optimizer.param_groups

MODES = ("factor", "authors_lm", "slice", "none")


def discriminative_rates(lr: float, num_groups: int, config: DiscriminativeConfig) -> list[float]:
    """The maximal rate of each group, lowest first; `lr` is the highest group's except in `authors_lm`.

    - `factor`: each group has the next higher one's rate divided by `config.factor` (paper, section 3.2: 2.6).
    - `slice`: geometric from `config.lowest` to `lr`, as fastai's `slice(lowest, lr)`; without `lowest`,
      `lr / 10` for all but the highest, as its `slice(lr)`.
    - `authors_lm`: the language model of the authors' scripts, where the tied embedding and decoder are the last
      group. `[lr/6, lr/3, lr, lr/2]` for three LSTM layers: the tied weights get half of the top layer's rate, the
      layer below the top a third, each further one half of the layer above it (`[lr/12, lr/6, lr/3, lr, lr/2]`
      for four layers, `[lr/3, lr, lr/2]` for two).
    - `none`: `lr` for all.

    Raises:
        UsageError: an unknown mode or a rate that is not above 0.
    """
    if config.mode not in MODES:
        raise UsageError(
            f"discriminative.mode={config.mode!r} is not a way to set rates: choose one of {', '.join(MODES)}"
            + did_you_mean(config.mode, MODES)
        )
    for key, value in (("lr", lr), ("discriminative.factor", config.factor), ("discriminative.lowest", config.lowest)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{key}={value} is out of range: give a number above 0")
    below_top = range(num_groups - 1, -1, -1)  # how many groups are above each
    if config.mode == "factor":
        return [lr / config.factor**above for above in below_top]
    if config.mode == "slice" and num_groups > 1:
        if config.lowest is None:
            return [lr / 10] * (num_groups - 1) + [lr]
        step = (lr / config.lowest) ** (1 / (num_groups - 1))
        return [config.lowest * step**index for index in range(num_groups)]
    if config.mode == "authors_lm":
        if num_groups < 2:
            raise UsageError(
                "discriminative.mode=authors_lm is for the layer groups of a language model, "
                f"at least one LSTM layer and the embedding, and got {num_groups} group: use mode=factor"
            )
        lstm = [lr / (3 * 2 ** (above - 1)) if above else lr for above in range(num_groups - 2, -1, -1)]
        return [*lstm, lr / 2]
    return [lr] * num_groups


def group_parameters(layer_groups: Sequence[LayerGroup]) -> list[list[nn.Parameter]]:
    """The parameters of each group; one that several places share (a tied weight) is listed once, where first met."""
    seen: set[int] = set()
    result: list[list[nn.Parameter]] = []
    for group in layer_groups:
        found: list[nn.Parameter] = []
        for part in [group] if isinstance(group, nn.Module) else group:
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found.append(parameter)
        result.append(found)
    return result


def parameter_groups(
    layer_groups: Sequence[LayerGroup], rates: Sequence[float], weight_decay: float
) -> list[ParameterGroup]:
    """What to hand to a torch optimiser: for each layer group its weights, then what must not decay.

    Not decayed are parameters of fewer than two dimensions: biases and both parameters of normalisation layers.

    Returns:
        Dicts with `params`, `lr`, `base_lr` (the rate that schedules scale), `group` (the index of the layer group)
        and `weight_decay`. A layer group gives two, or one or none where there is nothing to put in.

    Raises:
        UsageError: not one rate for each layer group.
    """
    if len(rates) != len(layer_groups):
        raise UsageError(f"got {len(rates)} learning rates for {len(layer_groups)} layer groups: give one for each")
    result: list[ParameterGroup] = []
    for index, (parameters, rate) in enumerate(zip(group_parameters(layer_groups), rates, strict=True)):
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        for members, decay in ((matrices, weight_decay), (others, 0.0)):
            if members:
                result.append({"params": members, "lr": rate, "base_lr": rate, "group": index, "weight_decay": decay})
    return result


def split_by_layer(groups: Sequence[ParameterGroup], layer_groups: Sequence[LayerGroup]) -> list[ParameterGroup]:
    """Split an optimiser's parameter groups so that each belongs to one layer group, named by its key `group`.

    All other options are kept. Groups made by `parameter_groups` come back as they are.

    Raises:
        UsageError: the optimiser has a parameter that no layer group has.
    """
    owner = {
        id(parameter): index
        for index, parameters in enumerate(group_parameters(layer_groups))
        for parameter in parameters
    }
    result: list[ParameterGroup] = []
    for group in groups:
        members: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if id(parameter) not in owner:
                raise UsageError(
                    f"the optimiser has a parameter of shape {tuple(parameter.shape)} that is in none of the "
                    f"{len(layer_groups)} layer groups: make layer_groups() cover every trained parameter"
                )
            members.setdefault(owner[id(parameter)], []).append(parameter)
        result.extend({**group, "params": members[index], "group": index} for index in sorted(members))
    return result
