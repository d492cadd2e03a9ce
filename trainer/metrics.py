"""Validation in physical units, exact over uneven shards and data groups: sums first, roots last."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class ErrorSums:
    """Area-weighted squared errors by lead time and variable.

    Args:
      areas: [cells/M].
      shape: lead times and variables.
    """

    def __init__(self, areas: Tensor, shape: tuple[int, int]) -> None:
        self.areas = areas.double()
        self.squares, self.weights = (torch.zeros(shape, dtype=torch.float64, device=areas.device) for _ in range(2))

    def add(self, lead: int, error: Tensor, counted: Tensor) -> None:
        """Add errors [batch, ensemble, cells/M, variables] of the samples counted, bool [batch]; NaN is left out."""
        known = torch.isfinite(error) & counted[:, None, None, None]
        weight = known * self.areas[:, None]
        self.squares[lead] += (torch.where(known, error, 0.0).double().square() * weight).sum(dim=(0, 1, 2))
        self.weights[lead] += weight.sum(dim=(0, 1, 2))

    def root_mean_square(self) -> Tensor:
        """[lead times, variables] float64, of all ranks of the world; NaN where nothing was counted."""
        sums = torch.stack([self.squares, self.weights])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return (sums[0] / sums[1]).sqrt()
