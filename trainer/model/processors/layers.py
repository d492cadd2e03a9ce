"""What every processor is built from: so many blocks, computed again in backward if that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from trainer.model.layers import Block


@dataclass(frozen=True)
class Layers:
    """Attributes.

    count: of blocks.
    make: one, with weights of its own.
    checkpointing: compute activations again in backward instead of keeping them.
    """

    count: int
    make: Callable[[], Block]
    checkpointing: bool


class BlockList(nn.ModuleList):
    """The blocks of all layers.

    Args: layers: how many, and of which kind.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers.make() for _ in range(layers.count))
        self.checkpointing = layers.checkpointing
