"""Memory that a thread uses again and again."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray


class Scratch(threading.local):
    """One growing byte buffer per thread and purpose: fresh memory costs as much as decoding."""

    def take(self, purpose: str, nbytes: int, likely: int = 0) -> NDArray[np.uint8]:
        """`nbytes` bytes; `likely` is how many it may be another time, so that the buffer need not grow."""
        buffer: NDArray[np.uint8] | None = getattr(self, purpose, None)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = np.empty(max(nbytes, likely), np.uint8)
            setattr(self, purpose, buffer)
        return buffer[:nbytes]
