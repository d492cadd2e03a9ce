"""How precise numbers are: of which type weights and fields, and in which type matrices are multiplied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from shardio.errors import PlanError

_TYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "64-true": (torch.float64, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
_SHORT = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # of Lightning


@dataclass(frozen=True)
class Precision:
    """One of Lightning's names, such as bf16-mixed.

    Attributes: name; weights: type of weights, fields and sums; products: of matrices, None for that of the weights.
    Raises: PlanError if there is none of that name, or fields would be kept in 16 bits.
    """

    name: str = "32-true"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _SHORT.get(str(self.name), str(self.name)))
        if self.name in ("bf16-true", "16-true"):
            raise PlanError(
                f"precision {self.name} would keep fields in 16 bits, temperatures rounded to 2 K. Use bf16-mixed."
            )
        if self.name not in _TYPES:
            raise PlanError(f"precision {self.name!r} is unknown. Use one of: {', '.join(_TYPES)}.")

    @property
    def weights(self) -> torch.dtype:
        return _TYPES[self.name][0]

    @property
    def products(self) -> torch.dtype | None:
        return _TYPES[self.name][1]

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """For the forward pass, as Lightning enters it."""
        return nullcontext() if self.products is None else torch.autocast(device, dtype=self.products)
