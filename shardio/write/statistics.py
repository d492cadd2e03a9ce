"""Mean, standard deviation, minimum and maximum of each variable, in the pass that writes the data.

Sums and sums of squares are exact: whole numbers, in units in which every float32 is one. So they are the same for
every number of grid-chunks, workers and pieces and for every order of cells, and nothing cancels in a variance.

    values --> whole numbers k of a unit 2^exponent, below 2^BITS
    sum of k * k, known modulo 2^64 from integers (which wrap), and to less than 2^63 from floats: that is, exactly
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
BLOCK = 2**16  # values at a time: fewer cost more in calls, more leave the processor's cache
DOT = 2**12  # values of a dot product: its error stays below DOT * 2^-53 of it, in whatever order they are added
BITS = 43  # 2 * BITS + log2(BLOCK * DOT) - 53 < 63: what a dot product may be wrong by
UNIT = 149  # 2^-149, the smallest float32, of which all others are multiples
MANTISSA = 24
WRAP = 2**64


@dataclass(frozen=True)
class Moments:
    """Of some values of each variable [variable], without NaN.

    Attributes:
      count: int64, infinite values included.
      total, squares: whole numbers of any size: the sums of finite values and of their squares, in units of 2^-UNIT
        and of 2^(-2 UNIT).
      low, high: float64, the smallest and the largest value; infinite the wrong way round where there is none.
    """

    count: NDArray[np.int64]
    total: NDArray[np.object_]
    squares: NDArray[np.object_]
    low: Float64
    high: Float64

    def __add__(self, other: Moments) -> Moments:
        """Of the union of disjoint sets: the same in every order."""
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    def to_json(self) -> list[list[Any]]:
        """Plain numbers, exact."""
        return [array.tolist() for array in (self.count, self.total, self.squares, self.low, self.high)]

    @classmethod
    def from_json(cls, plain: list[list[Any]]) -> Moments:
        """What `to_json` gave."""
        return cls(*(np.array(column, kind) for column, kind in zip(plain, ("i8", "O", "O", "f8", "f8"), strict=True)))


def moments(values: NDArray[np.float32]) -> Moments:
    """Of `values` [variable, n]."""
    wide = np.empty(min(BLOCK, values.shape[1]))
    with np.errstate(invalid="ignore"):  # signalling NaN
        rows = [_of_row(row, wide) for row in values]
    return Moments.from_json([list(column) for column in zip(*rows, strict=True)])


def merge(parts: Iterable[Moments | None]) -> Moments | None:
    """Of the union of disjoint sets; None where there is none."""
    total: Moments | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


def finish(total: Moments) -> dict[str, Float64]:
    """Statistics by name, float64 [variable]; NaN for a variable without any value. stdev is of the population.

    Where values are infinite, so is the mean, or NaN where they are of both signs; stdev is NaN.
    """
    rows = [_finish(*column) for column in zip(*total.to_json(), strict=True)]
    return dict(zip(("mean", "stdev", "minimum", "maximum"), np.array(rows, np.float64).T, strict=True))


def _finish(count: int, total: int, squares: int, low: float, high: float) -> tuple[float, float, float, float]:
    if count == 0:
        return math.nan, math.nan, math.nan, math.nan
    low, high = low + 0.0, high + 0.0  # of -0 and 0 either may be the lower one, as they come
    infinite = [bound for bound in (low, high) if math.isinf(bound)]
    if infinite:
        return sum(infinite), math.nan, low, high
    # Python divides whole numbers of any size and rounds once.
    mean = total / 2**UNIT / count  # the first of them is math.fsum
    return mean, math.sqrt((count * squares - total**2) / (count**2 << 2 * UNIT)), low, high


def _of_row(row: NDArray[np.float32], wide: Float64) -> tuple[int, int, int, float, float]:
    """Count, total, squares, low and high of one variable; `wide` is room for a block."""
    count, total, squares, low, high = len(row), 0, 0, math.inf, -math.inf
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        finite = wide[: len(block)]
        np.copyto(finite, block)
        least, most = float(block.min()), float(block.max())
        largest = max(abs(least), abs(most))
        if not math.isfinite(largest):
            count -= int(np.count_nonzero(np.isnan(block)))
            least, most = float(np.fmin.reduce(block)), float(np.fmax.reduce(block))
            np.copyto(finite, 0, where=~np.isfinite(block))
            largest = float(np.abs(finite).max())
        low, high = min(low, least), max(high, most)
        sums = _sums(finite, _smallest(block, least, most), largest)
        total, squares = total + sums[0], squares + sums[1]
    return count, total, squares, low, high


def _smallest(block: NDArray[np.float32], low: float, high: float) -> float:
    """Of the magnitudes other than 0."""
    if low > 0 or high < 0:
        return min(abs(low), abs(high))
    bits = np.left_shift(block.view(np.uint32), 1)  # without their sign they are in the order of the magnitudes
    bits -= 1  # 0 becomes the largest
    return float(np.uint32((int(bits.min()) + 1) // 2).view(np.float32))


def _sums(values: Float64, smallest: float, largest: float) -> tuple[int, int]:
    """Sums of `values` and of their squares, in units of 2^-UNIT and of its square; overwrites `values`."""
    total = squares = 0
    rest: Float64 | None = values
    while rest is not None and largest:
        values, rest = rest, None
        exponent = max(math.frexp(largest)[1] - BITS, -UNIT)
        bound = 0.0 if exponent == -UNIT else math.ldexp(1, exponent + MANTISSA - 1)
        if not smallest >= bound:  # what is smaller is no multiple of 2^exponent: its turn comes next
            magnitudes = np.abs(values)
            small = (magnitudes < bound) & (magnitudes > 0)
            rest = values.compress(small)
            largest = float(np.abs(rest).max(initial=0))
            np.copyto(values, 0, where=small)
        first, second = _sums_of_multiples(values, exponent)
        total += first << (exponent + UNIT)
        squares += second << 2 * (exponent + UNIT)
    return total, squares


def _sums_of_multiples(values: Float64, exponent: int) -> tuple[int, int]:
    """Sums of k and of k * k, where `values` are k * 2^exponent, k below 2^BITS; overwrites `values`."""
    whole = len(values) // DOT * DOT
    parts, rest = values[:whole].reshape(-1, DOT), values[whole:]
    dots = float((parts[:, None, :] @ parts[:, :, None]).sum() + rest @ rest)
    # Beside a number so large, the unit of float64 is 2^exponent: its last bits are those of k.
    large = math.ldexp(1.5, exponent + 52)
    values += large
    bits, offset, n = values.view(np.uint64), int(np.float64(large).view(np.uint64)), len(values)
    first = (int(bits.sum()) - n * offset + WRAP // 2) % WRAP - WRAP // 2
    bits *= bits
    second = (int(bits.sum()) - 2 * offset * first - n * offset**2) % WRAP
    return first, second + WRAP * round((math.ldexp(dots, -2 * exponent) - second) / WRAP)
