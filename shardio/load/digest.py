"""Which grid this is, told in one word: the same for the same cells in any order."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def digest_grid(latitudes: NDArray[np.float64], longitudes: NDArray[np.float64]) -> str:
    """16 hexadecimal digits of the places of all cells [cells], degrees, in whatever order they are stored."""
    order = np.lexsort((longitudes, latitudes))
    digest = hashlib.sha256()
    for coordinates in (latitudes, longitudes):
        digest.update(np.ascontiguousarray(coordinates[order], np.float64))
    return digest.hexdigest()[:16]
