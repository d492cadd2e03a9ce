"""`ForecastDataModule`: training and validation dates of a dataset, loaded by shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor

from shardio import Dataset, Partition, ShardedBatch, ShardedDataLoader, Topology, open_dataset, partition, valid_starts
from shardio.errors import DatasetError, SelectionError
from trainer.fit.strategy import DDPGroupStrategy
from trainer.share import Share

Dates = tuple[str | int | None, str | int | None]  # first and last


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Attributes:
      fields: [batch, time, ensemble, cells/M, variables], in the units of the dataset.
      dates: datetime64[s] [batch, time].
      padding: bool [batch], samples that only fill up the last batch of an epoch.
    """

    fields: Tensor
    dates: NDArray[np.datetime64]
    padding: NDArray[np.bool_]


class Batches:
    """A loader as Lightning sees it: batches and an exact position. Lightning would replace the sampler it found.

    `from_start`: every iteration begins with the first batch, also where the last one was broken off.
    """

    def __init__(self, loader: ShardedDataLoader, from_start: bool):
        self._loader, self._from_start = loader, from_start
        self.state_dict, self.load_state_dict, self.set_epoch = (
            loader.state_dict,
            loader.load_state_dict,
            loader.set_epoch,
        )

    def __iter__(self) -> Iterator[ShardedBatch]:
        if self._from_start:
            self._loader.load_state_dict({**self._loader.state_dict(), "epoch": 0, "cursor": 0})
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


class ForecastDataModule(LightningDataModule):
    """Windows of input and target dates.

    Training samples are the windows of the largest rollout; of each only the dates of the epoch's rollout are read.

    Args:
      dataset: path of a dataset; best with as many grid-chunks as ranks read it, or a multiple (shardio rechunk).
      train_start, train_end: first and last date of training, both included; 2020, 2020-03 or 2020-03-01T06:00.
      val_start, val_end: of validation; without them there is no validation.
      frequency: a coarser step than the dataset's, such as 12h.
      select, drop: variables to keep, or to leave out.
      batch_size: samples per model group and step.
      input_steps: dates that the model is given.
      seed: of the order of samples; it depends on nothing else, least of all on the number of ranks. Default: that
        of --seed_everything; 0 without the command.
      keep_batch_sharded: every rank loads only its own cells; false loads all cells on every rank.
      prefetch: batches read ahead.
      threads: that read and decode, per rank. Default: the cores of the rank.
      verify: compare every chunk with its recorded checksum.
    """

    def __init__(
        self,
        dataset: str,
        train_start: str | int | None = None,
        train_end: str | int | None = None,
        val_start: str | int | None = None,
        val_end: str | int | None = None,
        frequency: str | None = None,
        select: list[str] | None = None,
        drop: list[str] | None = None,
        batch_size: int = 1,
        input_steps: int = 1,
        seed: int | None = None,
        keep_batch_sharded: bool = True,
        prefetch: int = 3,
        threads: int | None = None,
        verify: bool = False,
    ):
        super().__init__()
        self.path, self.batch_size, self.input_steps, self.seed = dataset, batch_size, input_steps, seed or 0
        self.keep_batch_sharded = keep_batch_sharded
        self._read: dict[str, Any] = {"prefetch": prefetch, "threads": threads, "verify": verify}
        self._chosen: dict[str, Any] = {"frequency": frequency, "select": select, "drop": drop}
        self._train_dates, self._val_dates = (train_start, train_end), (val_start, val_end)
        self._opened: dict[Dates, Dataset] = {}
        self._loaders: list[ShardedDataLoader] = []
        self._position: dict[str, Any] | None = None
        self._training: Batches | None = None

    @property
    def dataset(self) -> Dataset:
        """The training dates."""
        return self._open(self._train_dates)

    @property
    def validation(self) -> Dataset | None:
        """The validation dates; None where none are given."""
        return self._open(self._val_dates) if self.has_validation else None

    @property
    def has_validation(self) -> bool:
        """Whether dates of validation are given."""
        return any(self._val_dates)

    @property
    def topology(self) -> Topology:
        """Where this rank stands, by the trainer's strategy."""
        return self.strategy.topology

    @property
    def partition(self) -> Partition:
        """Who owns which cells."""
        return partition(self.dataset.shape[3], self.topology.model_size, self.dataset.chunk_cells)

    @property
    def share(self) -> Share:
        """What this rank has of the work."""
        return Share(self.partition, self.strategy.model_comm, self.strategy.root_device)

    @property
    def samples_per_step(self) -> int:
        """Of all data groups together, before gradients are accumulated."""
        return self.topology.effective_batch_size(self.batch_size)

    def train_dataloader(self) -> Batches:
        rollout = self._module.rollout
        self._training = self._loader(self.dataset, rollout.maximum, shuffle=True, targets_read=rollout.steps)
        if self._position is not None:
            self._training.load_state_dict(self._position)
        return self._training

    def check_windows(self, topology: Topology, module: Any) -> None:
        """SelectionError if there are too few dates for a window of input and targets, or for one batch of them."""
        if self.batch_size < 1 or self.input_steps < 1:
            raise SelectionError(
                f"batch_size is {self.batch_size}, input_steps {self.input_steps}. Use 1 or more for both."
            )
        for kind, dataset, steps in (
            ("training", self.dataset, module.rollout.maximum),
            ("validation", self.validation, module.validation_steps),
        ):
            if dataset is None:
                continue
            starts = valid_starts(dataset.dates, dataset.is_missing, self.input_steps + steps, self.dataset.step)
            least = self.batch_size * topology.data_size if dataset is self.dataset else 1
            if len(starts) < least:
                raise SelectionError(
                    f"{len(dataset.dates)} {kind} dates, {dataset.dates[0]} to {dataset.dates[-1]}, hold {len(starts)} "
                    f"windows of {self.input_steps} + {steps} dates without a gap: fewer than the {least} of one step "
                    f"(batch size {self.batch_size}, {topology.data_size} data groups). Use more dates, fewer steps "
                    "ahead, a smaller batch, or fewer data groups."
                )

    def begin_epoch(self, epoch: int) -> None:
        """Go to its first sample, also where the trainer's limit_train_batches left some of the last one unused."""
        assert self._training is not None
        self._training.set_epoch(epoch)

    def val_dataloader(self) -> Batches | list[Batches]:
        if self.validation is None:
            return []
        return self._loader(self.validation, self._module.validation_steps, shuffle=False)

    def resume(self, position: dict[str, Any]) -> None:
        """Begin training at this position. Lightning restores it too late: it made the loader to count the batches."""
        self._position = position

    def teardown(self, stage: str) -> None:
        """End the reading threads."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    def transfer_batch_to_device(self, batch: ShardedBatch, device: torch.device, dataloader_idx: int) -> Batch:
        """Without keep_batch_sharded all cells arrived: from here on the rank keeps its own only."""
        fields = batch.to(device)
        if not self.keep_batch_sharded:
            fields = fields[..., self.share.owned, :]
        return Batch(fields, batch.dates, batch.padding)

    def _open(self, dates: Dates) -> Dataset:
        if dates not in self._opened:
            try:
                self._opened[dates] = open_dataset(self.path, start=dates[0], end=dates[1], **self._chosen)
            except DatasetError as error:
                path = Path(self.path)
                there = path.exists() or path.with_name(f"{path.name}.partial").exists()
                if there or "://" in self.path or path.is_absolute():
                    raise
                raise DatasetError(
                    f"{error} It would be {path.absolute()}. Paths are relative to the folder where the command is "
                    "called; give --data.dataset PATH."
                ) from error
        return self._opened[dates]

    def _loader(
        self, dataset: Dataset, target_steps: int, shuffle: bool, targets_read: Callable[[int], int] | None = None
    ) -> Batches:
        loader = ShardedDataLoader(
            dataset,
            self.topology,
            batch_size=self.batch_size,
            input_steps=self.input_steps,
            target_steps=target_steps,
            targets_read=targets_read,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=shuffle,
            keep_batch_sharded=self.keep_batch_sharded,
            group=self.strategy.model_comm.group,
            device=self.strategy.root_device,
            **self._read,
        )
        self._loaders.append(loader)
        return Batches(loader, from_start=not shuffle)

    @property
    def strategy(self) -> DDPGroupStrategy:
        """Of the trainer."""
        if self.trainer is None or not isinstance(self.trainer.strategy, DDPGroupStrategy):
            raise MisconfigurationException("ForecastDataModule needs a Trainer with strategy=DDPGroupStrategy(...).")
        return self.trainer.strategy

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module
