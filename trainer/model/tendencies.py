"""How much each variable changes over one step: the unit in which the model answers, and errors can be measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardio import Dataset, Reads, Wanted
from shardio.errors import SelectionError
from trainer.comm import Comm, sum_arrays

MOST_PAIRS = 32
PIECE = 2**16  # cells
SEED = 0  # of the pairs drawn: every rank, and every run, draws the same


def relative_tendencies(dataset: Dataset, cells: slice, comm: Comm) -> NDArray[np.float64]:
    """Standard deviation of the change over one step, in standard deviations of the variable; 1 for constants.

    The dataset's own statistics of exactly this step, where it has them (`statistics_tendencies_6h_*`); else those of
    up to 32 pairs of neighbouring dates.

    Args:
      dataset: the training dates.
      cells: that this rank owns.
      comm: the model group.
    Returns: [variables] float64, the same on all ranks.
    """
    try:
        deviation = dataset.statistics_tendencies()["stdev"]
        is_whole = bool(np.isfinite(deviation).all())
    except SelectionError:  # it has none of this step
        is_whole = False
    if not is_whole:
        deviation = _sampled(dataset, cells, comm)
    stdev = dataset.statistics["stdev"]
    relative = np.divide(deviation, stdev, out=np.zeros_like(stdev), where=stdev > 0.0)
    return np.where(relative > 1e-6, relative, 1.0)


def _sampled(dataset: Dataset, cells: slice, comm: Comm) -> NDArray[np.float64]:
    """[variables] standard deviation of the change over a sample of pairs; every rank reads its own cells.

    NaN is left out.
    """
    sums = np.zeros((3, len(dataset.variables)))
    pairs = sampled_pairs(dataset).tolist()
    reads = Reads([Wanted(dataset, date + later) for date in pairs for later in (0, 1)], cells, ahead=2)
    for _ in pairs:
        now, then = next(reads), next(reads)
        for start in range(0, now.shape[-1], PIECE):  # so that a rank never holds its cells in float64
            piece = slice(start, start + PIECE)
            change = (then[..., piece].astype(np.float64) - now[..., piece]).reshape(len(dataset.variables), -1)
            known = np.isfinite(change)
            change = np.where(known, change, 0.0)
            sums += known.sum(axis=1), change.sum(axis=1), (change**2).sum(axis=1)
    sums = sum_arrays(comm, sums, "tendencies")
    count = np.maximum(sums[0], 1.0)
    scales: NDArray[np.float64] = np.sqrt(np.maximum(sums[2] / count - (sums[1] / count) ** 2, 0.0))
    return scales


def sampled_pairs(dataset: Dataset) -> NDArray[np.int64]:
    """Indices of the first dates of up to 32 pairs that are one step apart and not missing.

    Drawn at random: evenly spread, they could all be of the same hour of the day, or the same season.
    """
    seconds = np.diff(dataset.dates).astype("timedelta64[s]").astype(np.int64)
    whole = ~dataset.is_missing
    first = np.flatnonzero((seconds == dataset.step) & whole[:-1] & whole[1:])
    if first.size == 0:
        raise SelectionError("no two neighbouring dates have data, so that no change can be learned. Use more dates.")
    return np.sort(np.random.default_rng(SEED).choice(first, min(MOST_PAIRS, first.size), replace=False))
