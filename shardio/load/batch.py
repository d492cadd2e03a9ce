"""`ShardedBatch`: samples of one step, as one rank holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.errors import ShardioError
from shardio.load.dataset import Dataset
from shardio.load.partition import Partition
from shardio.load.reading import Reading, within
from shardio.load.redistribute import redistribute
from shardio.load.ring import Lease, Piece, Recycler, put
from shardio.load.sampler import Sample


class ShardedBatch:
    """Samples of one step, as one rank holds them.

    Attributes:
      cells: the cells of `fields`: those this rank owns (all of them where keep_batch_sharded is false).
      dates: datetime64[s] [batch, time].
      padding: bool [batch], samples that only fill up the last batch of an epoch: leave them out of metrics.
      partition: who owns which cells.
      pieces: [batch x time] lists of chunks as this rank read them: views, no copy.
    """

    def __init__(
        self,
        leases: Sequence[Lease],
        samples: Sequence[Sample],
        steps: int,
        dataset: Dataset,
        reading: Reading,
        memory: Recycler,
    ):
        self._leases: Sequence[Lease] | None = leases
        self._dataset, self._fields = dataset, None
        self.reading, self._memory = reading, memory
        self.starts = [sample.start for sample in samples]
        self.indices = [[sample.start + step for step in range(steps)] for sample in samples]
        self.padding: NDArray[np.bool_] = np.array([sample.padding for sample in samples])
        self._steps = steps

    _fields: Tensor | None

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
    def pieces(self) -> list[list[Piece]]:
        if self._leases is None:
            raise ShardioError("this batch was released. Use its fields before `release()`.")
        return [lease.pieces() for lease in self._leases]

    @property
    def fields(self) -> Tensor:
        """[batch, time, ensemble, cells/M, variables], a permuted view of [batch, time, variables, ensemble, cells/M].

        Where one chunk is the whole shard it is a view of the buffer; else the chunks are put together at first use.
        """
        if self._fields is None:
            if self.reading.exchanges:
                raise ShardioError(
                    "the ranks of the model group read each other's cells. Give the loader their process group "
                    "(group=...), or call shardio.load.redistribute.redistribute(batch, group)."
                )
            self._fields = self._view() if self._is_one_piece() else self._assemble(torch.device("cpu"))
        return self._fields

    def wait(self) -> None:
        """Until all chunks are read; raises what went wrong in a read."""
        for lease in self._leases or ():
            lease.wait()

    def exchange(self, group: Any, device: torch.device | None) -> None:
        """Fill `fields` by `redistribute`; all ranks of the model group take part."""
        self._fields = redistribute(self, group, device)
        self.release()

    def to(self, device: torch.device | str) -> Tensor:
        """`fields` on a device: chunks are copied straight to their place, without being put together here first."""
        device = torch.device(device)
        if self._fields is not None:
            return self._fields.to(device, non_blocking=True)
        if device.type == "cpu" or self.reading.exchanges:
            return self.fields.to(device)
        self._fields = self._assemble(device)
        if device.type == "cuda":
            # The buffers may be reused when the copies have finished, not before.
            torch.cuda.current_stream(device).synchronize()
        self.release()
        return self._fields

    def release(self) -> None:
        """Give the buffers back early; views that are still held keep theirs."""
        self._leases = None

    def _is_one_piece(self) -> bool:
        pieces = self.pieces
        return len(pieces) == 1 and len(pieces[0]) == 1 and pieces[0][0].places == slice(0, self.shape[-1])

    def _view(self) -> Tensor:
        return self.pieces[0][0].values[None, None].permute(0, 1, 3, 4, 2)

    def _assemble(self, device: torch.device) -> Tensor:
        batch, time, ensemble, cells, variables = self.shape
        shape = (batch * time, variables, ensemble, cells)
        on_host = device.type == "cpu"
        stored = self._memory.take(math.prod(shape)).view(shape) if on_host else torch.empty(shape, device=device)
        for target, pieces in zip(stored, self.pieces, strict=True):
            for piece in pieces:
                put(target[..., within(piece.cells, self.cells)], piece)
        return stored.view(batch, time, variables, ensemble, cells).permute(0, 1, 3, 4, 2)
