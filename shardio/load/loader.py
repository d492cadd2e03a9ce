"""`ShardedDataLoader`: batches of this rank's cells only, read ahead on a few threads, without worker processes."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shardio.errors import SelectionError
from shardio.format.threads import Threads
from shardio.load.batch import ShardedBatch
from shardio.load.dataset import Dataset, ReadCostWarning
from shardio.load.fill import Filler
from shardio.load.memory import Recycler
from shardio.load.partition import partition
from shardio.load.pinned import PinnedMemory
from shardio.load.reading import Reading
from shardio.load.redistribute import check_group
from shardio.load.ring import Key, Ring, threads_for
from shardio.load.sampler import Position, ReadGroupSampler, Sample, valid_starts
from shardio.load.topology import Topology


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
        self.window = Window(input_steps, target_steps, targets_read)
        self.dataset, self.topology = dataset, topology or Topology()
        self.prefetch, self.group = prefetch, group
        self.device = None if device is None else torch.device(device)
        if prefetch < 1:
            raise SelectionError(f"prefetch is {prefetch}. Use 1 (no reading ahead) or more.")
        if group is not None:
            check_group(group, self.topology)
        starts = valid_starts(dataset.dates, dataset.is_missing, self.window.steps, dataset.step)
        self.sampler = ReadGroupSampler(starts, self.topology, batch_size, shuffle, seed, drop_last)
        owners = partition(dataset.shape[3], self.topology.model_size, dataset.chunk_cells)
        self.reading = Reading(owners, self.topology, shared=group is not None, whole=not keep_batch_sharded)
        _tell_cost(self.reading)
        self._pool = Threads(threads or threads_for(dataset), "shardio-read")
        self._memory = PinnedMemory() if _is_cuda(self.device) else Recycler(prefetch + 2)
        cells = partial(self.reading.cells_read, model_rank=self.topology.model_rank)
        self._ring = Ring(Filler(dataset, verify), cells, self._pool, self._memory, prefetch + 2)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.sampler.batches_per_epoch

    def __iter__(self) -> Iterator[ShardedBatch]:
        steps, upcoming = self.window.read(self.sampler.begin()), self.sampler.upcoming()
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
        finally:
            ahead.clear()
            self._ring.collect()

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
        _, variables, members, _ = self.dataset.shape
        dates = [sample.start + step for sample in samples for step in range(steps)]
        lease = self._ring.lease([Key(date, tuple(range(variables)), members) for date in dates])
        return ShardedBatch(lease, samples, steps, self.dataset, self.reading)


@dataclass(frozen=True)
class Window:
    """The dates of a sample; see `ShardedDataLoader`."""

    input_steps: int
    target_steps: int
    targets_read: Callable[[int], int] | None

    def __post_init__(self) -> None:
        for name, least in (("input_steps", 1), ("target_steps", 0)):
            if getattr(self, name) < least:
                raise SelectionError(f"{name} is {getattr(self, name)}. Use {least} or more.")

    @property
    def steps(self) -> int:
        """Dates of a whole sample."""
        return self.input_steps + self.target_steps

    def read(self, epoch: int) -> int:
        """Dates of each sample that a batch of this epoch holds; SelectionError where a sample has not so many."""
        targets = self.target_steps if self.targets_read is None else self.targets_read(epoch)
        if not 0 <= targets <= self.target_steps:
            raise SelectionError(
                f"targets_read({epoch}) is {targets}. Let it be 0 to {self.target_steps}, the target_steps of a sample."
            )
        return self.input_steps + targets


def _is_cuda(device: torch.device | None) -> bool:
    """Pinned memory opens a context on a GPU: a rank that computes on its CPU is not to have one on somebody's GPU."""
    return device is not None and device.type == "cuda"


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
