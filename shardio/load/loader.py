"""`ShardedDataLoader`: batches of this rank's cells only, read ahead on a few threads, without worker processes."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shardio.errors import SelectionError
from shardio.format.reader import NativeReader
from shardio.format.threads import Threads, cores
from shardio.load.batch import ShardedBatch
from shardio.load.dataset import Dataset, ReadCostWarning
from shardio.load.partition import partition
from shardio.load.reading import Reading
from shardio.load.redistribute import check_group
from shardio.load.ring import Recycler, Ring
from shardio.load.sampler import Position, ReadGroupSampler, Sample, valid_starts
from shardio.load.topology import Topology

MOST_LOCAL_THREADS = 8
REMOTE_THREADS = 16  # they wait for the network, not for a core


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
      device: where fields go. Default: the CPU. Where it is a GPU, chunks are read into pinned memory.
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
        self._ring = Ring(dataset, self.reading, self._pool, verify, _is_cuda(self.device), spare)

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


def _is_cuda(device: torch.device | None) -> bool:
    """Pinned memory opens a context on a GPU: a rank that computes on its CPU is not to have one on somebody's GPU."""
    return device is not None and device.type == "cuda"


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
