"""How fast the machine is at this moment: a matrix product, a copy and a decode, some 15 ms each.

A time over that of this kernel, taken right before and after, means the same on a fast and a slow machine, and on one
that others use too: far from exactly, but far better than seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numcodecs.blosc
import numpy as np
import torch

PRODUCT, COPY, DECODE = 512, 2**23, 2**23  # rows, numbers, bytes
TIMES = {"product": 3, "copy": 3, "decode": 16}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Its operands, made once."""

    rows: torch.Tensor = field(default_factory=lambda: torch.ones(PRODUCT, PRODUCT))
    source: np.ndarray = field(default_factory=lambda: np.ones(COPY, np.float32))
    target: np.ndarray = field(default_factory=lambda: np.ones(COPY, np.float32))
    stored: bytes = field(default_factory=lambda: _encode())
    decoded: np.ndarray = field(default_factory=lambda: np.empty(DECODE, np.uint8))

    def parts(self) -> dict[str, float]:
        """Seconds of each part."""
        work = {
            "product": lambda: torch.mm(self.rows, self.rows),
            "copy": lambda: np.copyto(self.target, self.source),
            "decode": lambda: numcodecs.blosc.decompress(self.stored, self.decoded),
        }
        seconds = {}
        for name, part in work.items():
            began = time.perf_counter()
            for _ in range(TIMES[name]):
                part()
            seconds[name] = time.perf_counter() - began
        return seconds

    def seconds(self) -> float:
        """Of all of it."""
        return sum(self.parts().values())


def _encode() -> bytes:
    waves = np.sin(np.arange(DECODE // 4, dtype=np.float32) / 100)
    encoded: bytes = numcodecs.blosc.compress(waves.tobytes(), b"lz4", 5, numcodecs.blosc.SHUFFLE, 0)
    return encoded
