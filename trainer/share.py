"""What one rank of a model group has of the work: decided once, at launch, and handed down."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from shardio import Partition
from trainer.comm import Alone, Comm


@dataclass(frozen=True)
class Share:
    """Attributes.

    cells: which rank of the model group owns which cells.
    comm: the model group.
    device: on which this rank computes.
    """

    cells: Partition
    comm: Comm = field(default_factory=Alone)
    device: torch.device | str = "cpu"

    @property
    def rank(self) -> int:
        """In the model group."""
        return self.comm.rank

    @property
    def owned(self) -> slice:
        """The cells that the rank owns."""
        return self.cells.cells(self.rank)
