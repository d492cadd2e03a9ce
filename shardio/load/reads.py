"""`Reads`: fields in an order that is known before, read ahead of who takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardio.format.threads import Threads
from shardio.load.dataset import Dataset
from shardio.load.fill import Filler
from shardio.load.memory import Recycler
from shardio.load.ring import Key, Lease, Ring, threads_for


@dataclass(frozen=True, eq=False)
class Wanted:
    """Fields of one date of a dataset.

    Attributes:
      dataset: from `open_dataset`.
      date: its index.
      variables: their places in the dataset; default: all.
      members: the first so many; default: all.
    """

    dataset: Dataset
    date: int
    variables: Sequence[int] | None = None
    members: int | None = None

    @property
    def key(self) -> Key:
        _, variables, members, _ = self.dataset.shape
        chosen = range(variables) if self.variables is None else self.variables
        return Key(self.date, tuple(chosen), members if self.members is None else min(self.members, members))


class Reads(Iterator[NDArray[np.float32]]):
    """One array [variables, members, cells] after the other, each its taker's own.

    While one is used, the next `ahead` are read; `ahead` + 2 of them are in memory, as long as the taker keeps one.

    Args:
      wanted: in the order in which they are taken.
      cells: of each.
      ahead: how many are under way beside the one that is used.
      pool: threads that read; default: the cores of this rank, 16 for remote stores.

    Raises:
      DatasetError where a date is missing; ChunkError, when it is taken, where one cannot be read.
    """

    def __init__(self, wanted: Sequence[Wanted], cells: slice, ahead: int = 1, pool: Executor | None = None):
        for each in wanted:
            each.dataset.check_present([each.date])
        datasets = {id(each.dataset): each.dataset for each in wanted}
        self._pool = pool or Threads(max(map(threads_for, datasets.values()), default=1), "shardio-read")
        memory = Recycler(ahead + 2)
        self._rings = {
            name: Ring(Filler(dataset), lambda date: cells, self._pool, memory, ahead + 2)
            for name, dataset in datasets.items()
        }
        self._rest, self._ahead = deque(wanted), ahead
        self._begun: deque[Lease] = deque()

    def __next__(self) -> NDArray[np.float32]:
        while self._rest and len(self._begun) <= self._ahead:
            each = self._rest.popleft()
            self._begun.append(self._rings[id(each.dataset)].lease([each.key]))
        if not self._begun:
            raise StopIteration
        lease = self._begun.popleft()
        lease.wait()
        return lease.fields[0]
