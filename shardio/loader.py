"""`ShardedDataLoader`: batches of this rank's cells only, read ahead on a few threads, without worker processes."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.dataset import Dataset, ReadCostWarning
from shardio.errors import SelectionError, ShardioError
from shardio.partition import Partition, partition
from shardio.reader import NativeReader
from shardio.reading import Reading, within
from shardio.redistribute import check_group, redistribute
from shardio.ring import Lease, Piece, Recycler, Ring
from shardio.sampler import Position, ReadGroupSampler, Sample, valid_starts
from shardio.threads import Threads, cores
from shardio.topology import Topology

MOST_LOCAL_THREADS = 8
REMOTE_THREADS = 16  # they wait for the network, not for a core


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
                    "(group=...), or call shardio.redistribute.redistribute(batch, group)."
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


class ShardedDataLoader:
    """Iterate over an epoch of `ShardedBatch`es; the next epoch begins with the next `iter`.

    Args:
      dataset: from `open_dataset`.
      topology: where this rank stands.
      batch_size: samples per data group and step.
      input_steps, target_steps: dates of one sample.
      targets_read: how many of the `target_steps` are read in an epoch, by its number; default: all. The samples of
        every epoch are those that have all, so that epochs are equally long and a position means the same in each.
      shuffle, seed, drop_last: see `ReadGroupSampler`.
      prefetch: batches under way, counting the one that is handed out next. Never more than prefetch + 2 batches
        are in memory, as long as the consumer keeps one.
      keep_batch_sharded: False gives every rank the whole field, the classical mode.
      group: process group of the model group. With it each chunk is read by one rank only, and ranks exchange cells
        where those read are not those owned; without it every rank reads all that it needs.
      device: where exchanged fields go. Default: the CPU.
      threads: that read and decode. Default: the cores of this rank; 16 for remote stores.
      verify: compare each chunk with its recorded crc32c (Zarr v3 chunks are always checked).
    """

    def __init__(
        self,
        dataset: Dataset,
        topology: Topology | None = None,
        *,
        batch_size: int = 1,
        input_steps: int = 1,
        target_steps: int = 1,
        targets_read: Callable[[int], int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 3,
        keep_batch_sharded: bool = True,
        group: Any = None,
        device: torch.device | str | None = None,
        threads: int | None = None,
        verify: bool = False,
    ):
        for name, value, least in (("input_steps", input_steps, 1), ("target_steps", target_steps, 0)):
            if value < least:
                raise SelectionError(f"{name} is {value}. Use {least} or more.")
        if prefetch < 1:
            raise SelectionError(f"prefetch is {prefetch}. Use 1 (no reading ahead) or more.")
        self.dataset, self.topology = dataset, topology or Topology()
        self.input_steps, self.steps = input_steps, input_steps + target_steps
        self.targets_read, self.prefetch, self.group = targets_read, prefetch, group
        self.device = None if device is None else torch.device(device)
        if group is not None:
            check_group(group, self.topology)
        starts = valid_starts(dataset.dates, dataset.is_missing, self.steps, dataset.step)
        self.sampler = ReadGroupSampler(starts, self.topology, batch_size, shuffle, seed, drop_last)
        owners = partition(dataset.shape[3], self.topology.model_size, dataset.chunk_cells)
        self.reading = Reading(owners, self.topology, shared=group is not None, whole=not keep_batch_sharded)
        _tell_cost(self.reading)
        self._pool = Threads(threads or _threads(dataset), "shardio-read")
        self._memory = Recycler()
        spare = (prefetch + 2) * batch_size * self.steps
        self._ring = Ring(dataset, self.reading, self._pool, verify, torch.cuda.is_available(), spare)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.sampler.batches_per_epoch

    def __iter__(self) -> Iterator[ShardedBatch]:
        steps, upcoming = self.steps_read(self.sampler.begin()), self.sampler.upcoming()
        ahead: deque[tuple[Position, ShardedBatch]] = deque()
        try:
            while True:
                while len(ahead) < self.prefetch and (item := next(upcoming, None)) is not None:
                    ahead.append((item[0], self._begin(item[1], steps)))
                if not ahead:
                    break
                position, batch = ahead.popleft()
                batch.wait()
                if self.reading.exchanges:
                    batch.exchange(self.group, self.device)
                self.sampler.epoch, self.sampler.cursor = position
                yield batch
                del batch
        finally:
            ahead.clear()
            self._ring.collect()

    def steps_read(self, epoch: int) -> int:
        """Dates of each sample that a batch of this epoch holds."""
        steps = self.steps if self.targets_read is None else self.input_steps + self.targets_read(epoch)
        if not self.input_steps <= steps <= self.steps:
            raise SelectionError(
                f"targets_read({epoch}) is {steps - self.input_steps}. Let it be 0 to {self.steps - self.input_steps}, "
                "the target_steps of a sample."
            )
        return steps

    def state_dict(self) -> dict[str, Any]:
        """The exact position after the last batch handed out."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, also under another topology or batch size."""
        self.sampler.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; where that is the present one, stay where it is."""
        self.sampler.set_epoch(epoch)

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, samples: list[Sample], steps: int) -> ShardedBatch:
        leases = [self._ring.lease(sample.start + step) for sample in samples for step in range(steps)]
        return ShardedBatch(leases, samples, steps, self.dataset, self.reading, self._memory)


def put(target: Tensor, piece: Piece) -> None:
    """Copy a piece to its variables of `target` [variables, ensemble, cells of the piece]."""
    if isinstance(piece.places, slice):
        target[piece.places].copy_(piece.values, non_blocking=True)
    else:
        target[list(piece.places)] = piece.values.to(target.device)


def _threads(dataset: Dataset) -> int:
    if any(not isinstance(part.source.reader, NativeReader) for part in dataset.parts):
        return REMOTE_THREADS
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_LOCAL_THREADS, cores() // ranks_here))


def _tell_cost(reading: Reading) -> None:
    amplification = reading.read_amplification
    if amplification > 1.01:
        warnings.warn(
            f"{reading.topology.model_size} ranks read {amplification:.2f} x the bytes of each date: {_why(reading)}",
            ReadCostWarning,
            stacklevel=3,
        )


def _why(reading: Reading) -> str:
    if reading.whole:
        return "every rank reads all cells. Give the loader the process group of the model group (group=...)."
    return (
        f"{reading.grid_chunks} grid-chunks do not divide into their shards. Give the loader the process group of "
        "the model group (group=...), or rechunk to a multiple of the ranks."
    )
