"""Memory that a GPU copies from while the next batch is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardio.load.memory import Buffer


class PinnedMemory:
    """Pinned memory as torch lends it.

    A copy that does not block notes its stream with the memory that it reads, whoever begins it, and torch lends that
    memory again when all copies out of it have finished. So buffers end with the last view of them and are never used
    again from here: the event that would have to be waited for is known to torch alone. It knows it by the storage
    of what is copied, so that views of `owner` are protected; those of the array are not.
    """

    def __init__(self, empty: Callable[[int], Tensor] | None = None):
        """`empty`: gives a float32 tensor of so many values, of memory with this property."""
        self._empty = empty or _pinned

    def take(self, length: int) -> Buffer:
        owner = self._empty(length)
        return Buffer(owner.numpy(), owner)


def _pinned(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.float32, pin_memory=True)
