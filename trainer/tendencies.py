"""How much each variable changes over one step: the unit in which the model answers, and errors can be measured."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shardio import Dataset
from shardio.errors import SelectionError

MOST_PAIRS = 32


def relative_tendencies(
    dataset: Dataset, cells: slice, group: dist.ProcessGroup | None, device: torch.device | str
) -> NDArray[np.float64]:
    """Standard deviation of the change over one step, in standard deviations of the variable; 1 for constants.

    Taken from up to 32 pairs of neighbouring dates, evenly spread; every rank reads its own cells. NaN is left out.

    Args:
      dataset: the training dates.
      cells: that this rank owns.
      group: the model group; None for one rank.
      device: on which the group communicates.
    Returns: [variables] float64, the same on all ranks.
    """
    seconds = np.diff(dataset.dates).astype("timedelta64[s]").astype(np.int64)
    whole = ~dataset.is_missing
    first = np.flatnonzero((seconds == dataset.step) & whole[:-1] & whole[1:])
    if first.size == 0:
        raise SelectionError("no two neighbouring dates have data, so that no change can be learned. Use more dates.")
    chosen = first[np.unique(np.linspace(0, first.size - 1, MOST_PAIRS).astype(int))]
    sums = np.zeros((3, len(dataset.variables)))
    for date in chosen.tolist():
        now, then = dataset[date : date + 2, :, :, cells].astype(np.float64)
        change = (then - now).reshape(len(dataset.variables), -1)
        known = np.isfinite(change)
        change = np.where(known, change, 0.0)
        sums += known.sum(axis=1), change.sum(axis=1), (change**2).sum(axis=1)
    if group is not None:
        total = torch.from_numpy(sums).to(device)
        dist.all_reduce(total, group=group)
        sums = total.cpu().numpy()
    count = np.maximum(sums[0], 1.0)
    deviation = np.sqrt(np.maximum(sums[2] / count - (sums[1] / count) ** 2, 0.0))
    stdev = dataset.statistics["stdev"]
    relative = np.divide(deviation, stdev, out=np.zeros_like(deviation), where=stdev > 0.0)
    return np.where(relative > 1e-6, relative, 1.0)
