"""Validation in physical units, exact over uneven shards and data groups: sums first, roots last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.comm import Alone, Comm


class ErrorSums:
    """Area-weighted squared errors by lead time and variable.

    Args:
      areas: [cells/M].
      shape: lead times and variables.
      comm: all ranks.
    """

    def __init__(self, areas: Tensor, shape: tuple[int, int], comm: Comm | None = None) -> None:
        self.areas, self.comm = areas.double(), comm or Alone()
        self.squares, self.weights = (torch.zeros(shape, dtype=torch.float64, device=areas.device) for _ in range(2))

    def add(self, lead: int, error: Tensor, known: Tensor) -> None:
        """Add errors where they are known; both [batch, ensemble, cells/M, variables].

        An error that is known and not finite, as of a model that diverged, makes the result so.
        """
        weight = known * self.areas[:, None]
        self.squares[lead] += (torch.where(known, error, 0.0).double().square() * weight).sum(dim=(0, 1, 2))
        self.weights[lead] += weight.sum(dim=(0, 1, 2))

    def root_mean_square(self) -> Tensor:
        """[lead times, variables] float64, of all ranks; NaN where nothing was counted."""
        sums = torch.stack([self.squares, self.weights])
        self.comm.sum(sums, "validation")
        return (sums[0] / sums[1]).sqrt()


@dataclass(frozen=True)
class Scores:
    """Root mean square errors of a validation.

    Attributes:
      leads: lead times, such as 6h.
      variables: that the model forecasts.
      units: of the variables; empty where the dataset has none.
      rmse: [leads, variables] of the model, in the units of the dataset.
      persistence: [leads, variables] of a forecast that nothing changes.
    """

    leads: tuple[str, ...]
    variables: tuple[str, ...]
    units: tuple[str, ...]
    rmse: NDArray[np.float64]
    persistence: NDArray[np.float64]

    def flat(self) -> dict[str, float]:
        """rmse/t/6h: value, persistence/t/6h: value, ..."""
        return {
            f"{name}/{variable}/{lead}": float(values[i, k])
            for name, values in (("rmse", self.rmse), ("persistence", self.persistence))
            for i, lead in enumerate(self.leads)
            for k, variable in enumerate(self.variables)
        }

    def nested(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Of each variable and lead time: rmse, persistence, ratio; None where nothing was counted."""

        def number(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.rmse / self.persistence
        columns = (("rmse", self.rmse), ("persistence", self.persistence), ("ratio", ratio))
        return {
            variable: {
                lead: {name: number(values[i, k]) for name, values in columns} for i, lead in enumerate(self.leads)
            }
            for k, variable in enumerate(self.variables)
        }
