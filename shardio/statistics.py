"""Mean, standard deviation, minimum and maximum of each variable, in the pass that writes the data.

Every grid-chunk gives its moments; they are merged in the order of dates and chunks, so that the result depends
neither on workers nor on interruptions. Merging: Chan, Golub and LeVeque (1983), stable where a sum of squares is not.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
NAMES = ("mean", "stdev", "minimum", "maximum")


def moments(values: NDArray[np.float32]) -> Float64:
    """[5, variable]: count, mean, sum of squared deviations, minimum, maximum of `values` [variable, n] without NaN."""
    # One variable at a time: a float64 copy of a whole grid-chunk would double the memory.
    return np.stack([_moments_of_one(row) for row in values], axis=1)


def _moments_of_one(row: NDArray[np.float32]) -> Float64:
    valid = row[~np.isnan(row)].astype(np.float64)
    if valid.size == 0:
        return np.array([0, 0, 0, np.inf, -np.inf])
    mean = valid.mean()
    low, high = valid.min(), valid.max()
    return np.array([valid.size, mean, np.square(valid - mean).sum(), low, high])


def merge(parts: Iterable[Float64]) -> Float64:
    """The moments of the union of disjoint sets, merged in the order given."""
    total: Float64 | None = None
    for part in parts:
        if total is None:
            total = np.array(part, np.float64)
            continue
        count = total[0] + part[0]
        weight = np.divide(part[0], count, out=np.zeros_like(count), where=count > 0)
        delta = part[1] - total[1]
        total = np.stack(
            [
                count,
                total[1] + delta * weight,
                total[2] + part[2] + np.square(delta) * total[0] * weight,
                np.minimum(total[3], part[3]),
                np.maximum(total[4], part[4]),
            ]
        )
    assert total is not None
    return total


def finish(total: Float64) -> dict[str, Float64]:
    """Statistics by name, float64 [variable]; NaN for a variable without any value. stdev is of the population."""
    count = total[0]
    seen = count > 0
    nan = np.full_like(count, np.nan)
    return {
        "mean": np.where(seen, total[1], nan),
        "stdev": np.sqrt(np.divide(total[2], count, out=nan.copy(), where=seen)),
        "minimum": np.where(seen, total[3], nan),
        "maximum": np.where(seen, total[4], nan),
    }
