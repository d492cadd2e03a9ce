"""Memory that is used again when nobody looks at it any more: fresh memory costs as much as decoding."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Buffer:
    """`values` float32, not initialised; every view of them keeps the memory. `owner`: what else they are a view of."""

    values: NDArray[np.float32]
    owner: Any = None


class Memory(Protocol):
    """Lends buffers."""

    def take(self, length: int) -> Buffer:
        """A buffer of `length` values, nobody else's while a view of it lives."""


class Recycler:
    """Memory of this process; a buffer ends with the last view of it, and its memory is lent again."""

    def __init__(self, spare: int):
        """`spare`: most buffers that are kept although nobody looks at them."""
        self._spare, self._lent = spare, 0
        self._free: list[NDArray[np.float32]] = []
        # A view ends by garbage collection, on any thread, in the middle of anything: that only appends here.
        self._returned: deque[NDArray[np.float32]] = deque()

    def take(self, length: int) -> Buffer:
        self._collect()
        fitting = [place for place, memory in enumerate(self._free) if memory.size >= length]
        if fitting:
            memory = self._free.pop(fitting[0])
        else:
            del self._free[:1]  # too small: one that is large enough takes its place
            memory = np.empty(length, np.float32)
        self._lent += 1
        # NumPy's views of a view keep what that is a view of, unless it is no array.
        window = np.frombuffer(memoryview(memory), np.float32, length)
        weakref.finalize(window, self._returned.append, memory).atexit = False
        return Buffer(window)

    @property
    def buffers(self) -> int:
        """In memory, in use or spare."""
        self._collect()
        return self._lent + len(self._free)

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
            self._lent -= 1
        del self._free[: max(0, len(self._free) - self._spare)]
