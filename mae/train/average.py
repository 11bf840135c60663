"""Exponential moving average (EMA) of the weights: one for every task, in one process, under DDP and under FSDP."""

from collections.abc import Sequence
from math import log

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class AverageConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings that every task has.

    ema  decay per step of the exponential moving average of the weights; None: no average
    """

    ema: float | None = Field(None, gt=0, lt=1)


def begin_average(average: nn.Module, model: nn.Module) -> nn.Module:
    """Returns `average`, a part of the model or all of it, with the model's weights and frozen."""
    state = model.state_dict()
    average.load_state_dict({name: state[name] for name in average.state_dict()})
    return average.requires_grad_(False)


def pair_parameters(average: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Returns (average, weights) of each parameter of the average that is trained, by its name."""
    weights = dict(model.named_parameters())
    return [(own, weights[name]) for name, own in average.named_parameters() if weights[name].requires_grad]


@torch.no_grad()
def update_average(
    pairs: Sequence[tuple[Tensor, Tensor]], decay: float, step: int, skipped: Tensor | None = None
) -> None:
    """Moves each average towards its weights: average <- d average + (1 - d) weights.

    d = min(decay, (1 + step) / (10 + step)) after `step` earlier updates: of what was there at the beginning about
    9! / step^9 is left, and a short run averages its last tenth. Each rank updates its own rows of sharded parameters.

    skipped  1 if this step left the weights as they were: the average stays too. The host does not wait for a GPU's
    """
    averages, weights = ([_rows(pair[part]) for pair in pairs] for part in (0, 1))
    share = 1 - min(decay, (1 + step) / (10 + step))
    if skipped is not None and skipped.device.type != "cpu":
        torch._foreach_lerp_(averages, weights, [share * (1 - skipped)] * len(pairs))
    elif not skipped:
        torch._foreach_lerp_(averages, weights, weight=share)


def _rows(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def describe_average(decay: float, global_batch: int) -> str:
    """Returns the decay in words: after how many steps and images half of a weight's share in the average is gone."""
    steps = log(2) / -log(decay)
    return f"decay {decay:g} per step: a half-life of {steps:,.3g} steps or {steps * global_batch:,.3g} images"
