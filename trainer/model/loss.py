"""Which loss, and how much each variable counts in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from shardio.errors import PlanError, SelectionError
from trainer.model.levels import pressure_levels
from trainer.model.losses.area import AreaLoss, huber
from trainer.model.losses.measured import Loss, Weighing

SURFACE_PRESSURE = 1000.0  # hPa, of weight 1


@dataclass(frozen=True)
class LossOptions:
    """How errors are weighed.

    Attributes:
      kind: mse, mae or huber, of normalised errors.
      huber_delta: where huber turns from squared to absolute, in standard deviations.
      variable_weights: variable: weight; 1 for those not named.
      pressure_scaling: weigh variables on pressure levels (levels.py) by level / 1000 hPa, and at least by 0.2.
      tendency_scaling: measure errors in standard deviations of the change over one step, not of the variable.
    """

    kind: str = "mse"
    huber_delta: float = 1.0
    variable_weights: dict[str, float] = field(default_factory=dict)
    pressure_scaling: bool = False
    tendency_scaling: bool = False

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise PlanError(f"loss {self.kind!r} is unknown. Use one of: {', '.join(LOSSES)}.")
        if not self.huber_delta > 0.0:
            raise PlanError(f"huber_delta is {self.huber_delta}. Use more than 0.")


@dataclass(frozen=True)
class Kind:
    """A loss that options can name.

    Attributes:
      build: the loss, of so weighed errors.
      degree: with which power of the error it grows.
    """

    build: Callable[[Weighing, LossOptions], Loss]
    degree: int = 2


LOSSES = {
    "mse": Kind(lambda weighing, _: AreaLoss(weighing, torch.square)),
    "mae": Kind(lambda weighing, _: AreaLoss(weighing, torch.abs), degree=1),
    "huber": Kind(lambda weighing, options: AreaLoss(weighing, huber(options.huber_delta))),
}


def build_loss(options: LossOptions, weighing: Weighing) -> Loss:
    """The loss that the options name; weights of variables may have any sum."""
    weights = weighing.weights / weighing.weights.sum()
    return LOSSES[options.kind].build(replace(weighing, weights=weights), options)


def variable_weights(
    variables: Sequence[str],
    options: LossOptions,
    tendencies: Mapping[str, float],
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> list[float]:
    """Weight of the error of each variable.

    Args:
      variables: that the model forecasts.
      options: which weights.
      tendencies: variable: standard deviation of its change over one step, in standard deviations of the variable.
      metadata: what the dataset says of each; its level types decide what is on a pressure level.
    Raises: SelectionError if a weight is given for a variable that the model does not forecast, if one is negative or
      not finite, or if all are 0.
    """
    unknown = sorted(set(options.variable_weights) - set(variables))
    if unknown:
        raise SelectionError(
            f"the loss has weights for {', '.join(unknown)}, which the model does not forecast. "
            f"It forecasts: {', '.join(variables)}."
        )
    levels = pressure_levels(variables, metadata) if options.pressure_scaling else {}
    weights = []
    for name in variables:
        weight = options.variable_weights.get(name, 1.0)
        if name in levels:
            weight *= max(0.2, levels[name] / SURFACE_PRESSURE)
        if options.tendency_scaling:
            weight /= tendencies[name] ** LOSSES[options.kind].degree
        weights.append(weight)
    if not (min(weights) >= 0.0 and 0.0 < sum(weights) < math.inf):
        told = ", ".join(f"{name} {weight:g}" for name, weight in zip(variables, weights, strict=True))
        raise SelectionError(
            f"the loss cannot weigh its variables by {told}. Let no weight of variable_weights be negative, and one at "
            "least be more than 0."
        )
    return weights
