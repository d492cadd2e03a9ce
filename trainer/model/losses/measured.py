"""What a loss is given to know, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.comm import Alone, Comm


@dataclass(frozen=True, eq=False)
class Weighing:
    """How much each error counts, as one rank knows it.

    Attributes:
      areas: [cells/M], steradians or any other unit.
      weights: [variables] of the forecast; their sum is 1.
      comm: the model group.
    """

    areas: Tensor
    weights: Tensor
    comm: Comm = field(default_factory=Alone)


@dataclass(frozen=True, eq=False)
class Measured:
    """Of one prediction.

    Attributes:
      value: the global loss, the same on all ranks of the model group; its gradient is that of the rank's own cells.
      sums: [batch, ensemble, variables] area-weighted mean error, global, without gradient.
    """

    value: Tensor
    sums: Tensor


class Loss(Protocol):
    """Of normalised fields, cut over the ranks of a model group, which call it together and may exchange rows.

    A frozen dataclass, whose tensors the plan finds, and of which copies of a module share one (`__deepcopy__`).
    """

    def __call__(self, prediction: Tensor, target: Tensor) -> Measured:
        """Both [batch, ensemble, cells/M, variables]; NaN in target: not counted."""
        ...


def with_global_value(local: Tensor, value: Tensor) -> Tensor:
    """Forward: the global value, bit for bit. Backward: the gradient to the local value."""
    joined: Tensor = _GlobalValue.apply(local, value)  # type: ignore[no-untyped-call]
    return joined


class _GlobalValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
