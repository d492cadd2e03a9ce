"""The loss over cut cells: every rank adds up its own cells, one all-reduce makes it the loss of the globe.

    loss = mean over batch and ensemble of  sum over variables  w_v  (sum over cells  a_c e_cv) / (sum over cells  a_c)

a: area of the cell; where the target is NaN the cell is left out of both sums. e: squared, absolute or Huber error.
Backward sends no message: each rank's gradient is that of its own cells (gradients.py adds them up).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardio.errors import PlanError, SelectionError

KINDS = ("mse", "mae", "huber")
SURFACE_PRESSURE = 1000.0  # hPa, of weight 1


@dataclass(frozen=True)
class LossOptions:
    """How errors are weighed.

    Attributes:
      kind: mse, mae or huber, of normalised errors.
      huber_delta: where huber turns from squared to absolute, in standard deviations.
      variable_weights: variable: weight; 1 for those not named.
      pressure_scaling: weigh variables on pressure levels, as t_850, by level / 1000 hPa, and at least by 0.2.
      tendency_scaling: measure errors in standard deviations of the change over one step, not of the variable.
    """

    kind: str = "mse"
    huber_delta: float = 1.0
    variable_weights: dict[str, float] = field(default_factory=dict)
    pressure_scaling: bool = False
    tendency_scaling: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"loss {self.kind!r} is unknown. Use one of: {', '.join(KINDS)}.")
        if not self.huber_delta > 0.0:
            raise PlanError(f"huber_delta is {self.huber_delta}. Use more than 0.")


@dataclass(frozen=True, eq=False)
class Loss:
    """Of one prediction.

    Attributes:
      value: the global loss, the same on all ranks of the model group; its gradient is that of the rank's own cells.
      sums: [batch, ensemble, variables] area-weighted mean error, global, without gradient.
    """

    value: Tensor
    sums: Tensor


class AreaLoss:
    """Area- and variable-weighted error of normalised fields.

    Args:
      areas: [cells/M], steradians or any other unit.
      weights: [variables].
      options: which error.
      group: the model group; None for one rank.
    """

    def __init__(
        self, areas: Tensor, weights: Tensor, options: LossOptions, group: dist.ProcessGroup | None = None
    ) -> None:
        self.areas, self.weights, self.options, self.group = areas, weights / weights.sum(), options, group

    def __deepcopy__(self, memo: dict[int, Any]) -> AreaLoss:
        """Copies of a module share the loss: it never changes, and process groups cannot be copied."""
        return self

    def __call__(self, prediction: Tensor, target: Tensor) -> Loss:
        """Both [batch, ensemble, cells/M, variables], normalised; NaN in target: not counted."""
        known = torch.isfinite(target)
        error = self._error(torch.where(known, prediction - target, 0.0))
        areas = self.areas[:, None]
        own = (error * areas).sum(dim=2)
        totals = torch.stack([own.detach(), (known * areas).sum(dim=2)])
        if self.group is not None:
            dist.all_reduce(totals, group=self.group)
        counted = totals[1].clamp(min=torch.finfo(totals.dtype).tiny)
        mean = totals[0] / counted
        value = (mean * self.weights).sum(dim=-1).mean()
        local = (own / counted * self.weights).sum(dim=-1).mean()
        return Loss(_GlobalValue.apply(local, value), mean)  # type: ignore[no-untyped-call]

    def _error(self, difference: Tensor) -> Tensor:
        if self.options.kind == "mse":
            return difference.square()
        if self.options.kind == "mae":
            return difference.abs()
        delta = self.options.huber_delta
        return torch.where(
            difference.abs() <= delta, 0.5 * difference.square(), delta * (difference.abs() - 0.5 * delta)
        )


class _GlobalValue(torch.autograd.Function):
    """Forward: the global value, bit for bit. Backward: the gradient to the local value."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def variable_weights(variables: Sequence[str], options: LossOptions, tendencies: Mapping[str, float]) -> list[float]:
    """Weight of the error of each variable.

    Args:
      variables: that the model forecasts.
      options: which weights.
      tendencies: variable: standard deviation of its change over one step, in standard deviations of the variable.
    Raises: SelectionError if a weight is given for a variable that the model does not forecast, if one is negative or
      not finite, or if all are 0.
    """
    unknown = sorted(set(options.variable_weights) - set(variables))
    if unknown:
        raise SelectionError(
            f"the loss has weights for {', '.join(unknown)}, which the model does not forecast. "
            f"It forecasts: {', '.join(variables)}."
        )
    power = 1 if options.kind == "mae" else 2
    weights = []
    for name in variables:
        weight = options.variable_weights.get(name, 1.0)
        if options.pressure_scaling and (level := re.fullmatch(r".+_(\d+)", name)):
            weight *= max(0.2, int(level[1]) / SURFACE_PRESSURE)
        if options.tendency_scaling:
            weight /= tendencies[name] ** power
        weights.append(weight)
    if not (min(weights) >= 0.0 and 0.0 < sum(weights) < math.inf):
        told = ", ".join(f"{name} {weight:g}" for name, weight in zip(variables, weights, strict=True))
        raise SelectionError(
            f"the loss cannot weigh its variables by {told}. Let no weight of variable_weights be negative, and one at "
            "least be more than 0."
        )
    return weights
