"""The loss over cut cells: every rank adds up its own cells, one all-reduce makes it the loss of the globe.

    loss = mean over batch and ensemble of  sum over variables  w_v  (sum over cells  a_c e_cv) / (sum over cells  a_c)

a: area of the cell; where the target is NaN the cell is left out of both sums. e: squared, absolute or Huber error.
Backward sends no message: each rank's gradient is that of its own cells (gradients.py adds them up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.model.losses.measured import Measured, Weighing, with_global_value


@dataclass(frozen=True, eq=False)
class AreaLoss:
    """Area- and variable-weighted error of normalised fields, cell by cell.

    Attributes:
      weighing: of cells and variables.
      error: of a difference, elementwise.
    """

    weighing: Weighing
    error: Callable[[Tensor], Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> AreaLoss:
        """Copies of a module share the loss: it never changes, and process groups cannot be copied."""
        return self

    def __call__(self, prediction: Tensor, target: Tensor) -> Measured:
        """Both [batch, ensemble, cells/M, variables], normalised; NaN in target: not counted."""
        known = torch.isfinite(target)
        error = self.error(torch.where(known, prediction - target, 0.0))
        areas, weights = self.weighing.areas[:, None], self.weighing.weights
        own = (error * areas).sum(dim=2)
        totals = self.weighing.comm.sum(torch.stack([own.detach(), (known * areas).sum(dim=2)]), "loss")
        counted = totals[1].clamp(min=torch.finfo(totals.dtype).tiny)
        mean = totals[0] / counted
        value = (mean * weights).sum(dim=-1).mean()
        local = (own / counted * weights).sum(dim=-1).mean()
        return Measured(with_global_value(local, value), mean)


def huber(delta: float) -> Callable[[Tensor], Tensor]:
    """Squared below `delta`, absolute above, in one smooth piece."""

    def error(difference: Tensor) -> Tensor:
        far = delta * (difference.abs() - 0.5 * delta)
        return torch.where(difference.abs() <= delta, 0.5 * difference.square(), far)

    return error
