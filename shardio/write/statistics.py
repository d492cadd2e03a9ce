"""Mean, standard deviation, minimum and maximum of each variable, in the pass that writes the data.

Every grid-chunk gives its moments; they are merged in the order of dates and chunks, so that the result depends
neither on workers nor on interruptions. Merging: Chan, Golub and LeVeque (1983), stable where a sum of squares is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
BLOCK = 2**16


def moments(values: NDArray[np.float32]) -> Float64:
    """[5, variable]: count, mean, sum of squared deviations, minimum, maximum of `values` [variable, n] without NaN."""
    # In blocks: a float64 copy of a whole grid-chunk would double the memory.
    return np.stack([merge(_moments_of_block(block) for block in _blocks(row)) for row in values], axis=1)


def _blocks(row: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    return (row[start : start + BLOCK] for start in range(0, len(row), BLOCK))


def _moments_of_block(block: NDArray[np.float32]) -> Float64:
    valid = block[~np.isnan(block)].astype(np.float64)
    if valid.size == 0:
        return np.array([0, 0, 0, np.inf, -np.inf])
    low, high = valid.min(), valid.max()
    with np.errstate(invalid="ignore"):  # an infinite value makes mean or stdev NaN, as in NumPy
        mean = valid.mean()
        return np.array([valid.size, mean, np.square(valid - mean).sum(), low, high])


def merge(parts: Iterable[Float64]) -> Float64:
    """The moments of the union of disjoint sets, merged in the order given."""
    total: Float64 | None = None
    for part in parts:
        if total is None:
            total = np.array(part, np.float64)
            continue
        with np.errstate(invalid="ignore"):
            total = _merge_two(total, part)
    assert total is not None
    return total


def _merge_two(a: Float64, b: Float64) -> Float64:
    count = a[0] + b[0]
    weight = np.divide(b[0], count, out=np.zeros_like(count), where=count > 0)
    delta = b[1] - a[1]
    return np.stack(
        [
            count,
            a[1] + delta * weight,
            a[2] + b[2] + np.square(delta) * a[0] * weight,
            np.minimum(a[3], b[3]),
            np.maximum(a[4], b[4]),
        ]
    )


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
