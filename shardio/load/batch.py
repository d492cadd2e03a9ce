"""`ShardedBatch`: samples of one step, as one rank holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.errors import ShardioError
from shardio.load.dataset import Dataset
from shardio.load.partition import Partition
from shardio.load.reading import Reading
from shardio.load.redistribute import redistribute
from shardio.load.ring import Lease
from shardio.load.sampler import Sample


@dataclass(frozen=True)
class Piece:
    """What this rank read of a date: `values` [variables, ensemble, cells], a view."""

    cells: slice
    values: Tensor


class ShardedBatch:
    """Samples of one step, as one rank holds them.

    Attributes:
      cells: the cells of `fields`: those this rank owns (all of them where keep_batch_sharded is false).
      dates: datetime64[s] [batch, time].
      padding: bool [batch], samples that only fill up the last batch of an epoch: leave them out of metrics.
      partition: who owns which cells.
      pieces: [batch x time], what this rank read of each date: views, no copy.
    """

    def __init__(self, lease: Lease, samples: Sequence[Sample], steps: int, dataset: Dataset, reading: Reading):
        self._lease: Lease | None = lease
        self._dataset, self.reading = dataset, reading
        self.starts = [sample.start for sample in samples]
        self.indices = [[sample.start + step for step in range(steps)] for sample in samples]
        self.padding: NDArray[np.bool_] = np.array([sample.padding for sample in samples])
        self._steps = steps
        self._fields: Tensor | None = None

    @property
    def dates(self) -> NDArray[np.datetime64]:
        dates: NDArray[np.datetime64] = self._dataset.dates[np.array(self.indices)]
        return dates

    @property
    def cells(self) -> slice:
        return self.reading.wanted(self.reading.topology.model_rank)

    @property
    def partition(self) -> Partition:
        return self.reading.owners

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of `fields`: batch, time, ensemble, cells/M, variables."""
        _, variables, ensemble, _ = self._dataset.shape
        return len(self.starts), self._steps, ensemble, self.cells.stop - self.cells.start, variables

    @property
    def pieces(self) -> list[Piece]:
        stored, rank, first = self._stored, self.reading.topology.model_rank, 0
        pieces = []
        for key in self._held.keys:
            cells = self.reading.cells_read(key.date, rank)
            shape = (len(key.variables), key.members, cells.stop - cells.start)
            pieces.append(Piece(cells, stored[first : first + math.prod(shape)].view(shape)))
            first += math.prod(shape)
        return pieces

    @property
    def fields(self) -> Tensor:
        """[batch, time, ensemble, cells/M, variables], a permuted view of [batch, time, variables, ensemble, cells/M].

        A view of the memory that the chunks were decoded into; this batch's own, to write into as well.
        """
        if self._fields is None:
            if self.reading.exchanges:
                raise ShardioError(
                    "the ranks of the model group read each other's cells. Give the loader their process group "
                    "(group=...), or call shardio.load.redistribute.redistribute(batch, group)."
                )
            batch, time, ensemble, cells, variables = self.shape
            stored = self._stored.view(batch, time, variables, ensemble, cells)
            self._fields = stored.permute(0, 1, 3, 4, 2)
        return self._fields

    def wait(self) -> None:
        """Until all chunks are read; raises what went wrong in a read."""
        if self._lease is not None:
            self._lease.wait()

    def exchange(self, group: Any, device: torch.device | None) -> None:
        """Fill `fields` by `redistribute`; all ranks of the model group take part."""
        self._fields = redistribute(self, group, device)
        self.release()

    def to(self, device: torch.device | str) -> Tensor:
        """`fields` on a device, in one copy that a GPU makes while this process goes on."""
        device = torch.device(device)
        fields = self.fields.to(device, non_blocking=device.type == "cuda")  # in stored order: one row of bytes
        if fields is not self._fields:
            self._fields = fields
            self.release()
        return fields

    def release(self) -> None:
        """Give the buffers back early; views that are still held keep theirs."""
        self._lease = None

    @property
    def _held(self) -> Lease:
        if self._lease is None:
            raise ShardioError("this batch was released. Use its fields before `release()`.")
        return self._lease

    @property
    def _stored(self) -> Tensor:
        """All that was read, one date after the other."""
        buffer = self._held.buffer
        return torch.from_numpy(buffer.values) if buffer.owner is None else buffer.owner
