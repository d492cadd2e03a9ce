"""What a kernel of attention is: which lists of edges it takes, and how it attends along them, forward and backward."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.graph.edge_lists import EdgeLists


class Rows(NamedTuple):
    """What attends, and is attended to.

    query, tilt: [batch, destinations, heads, depth or features]; key, value: [batch, sources, heads, depth].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    tilt: Tensor


class Kernel(Protocol):
    """Attends along edges, for rows that are contiguous and of one type, and features in the type of sums."""

    @property
    def tables(self) -> bool:
        """Whether it wants tables of edges, or takes `ends` and `offsets` alone."""
        ...

    def lacking(self, device: torch.device) -> str:
        """Why it cannot be had for that device; empty if it can."""
        ...

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether rows may be of that type; those that may not are computed by torch."""
        ...

    def planned(self, device: torch.device) -> Kernel:
        """What stands for it in a plan for that device: makes the same tensors, though they have no numbers."""
        ...

    def forward(self, rows: Rows, features: Tensor, lists: EdgeLists) -> tuple[Tensor, Tensor, Tensor]:
        """The two sums of `attend`, and log sum exp(logit) [batch, destinations, heads], which backward is given."""
        ...

    def backward(
        self, rows: Rows, features: Tensor, offset: Tensor, out: Tensor, carried: Tensor, lists: EdgeLists
    ) -> Rows:
        """Gradients of the rows, given those of the two sums, `out` and `carried`."""
        ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken."""
    return torch.promote_types(dtype, torch.float32)
