"""Which sample comes next, for every data group: the same order on every topology, resumable at any sample.

The order of an epoch is a permutation that depends on (seed, epoch) alone. The sample at position k of that order
goes to data group k mod D. The cursor counts positions, not batches, so that training continues exactly where it
stopped under another world size, model size or batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.dates import frequency_seconds
from shardio.errors import SelectionError
from shardio.load.topology import Topology

logger = logging.getLogger(__name__)


Position = tuple[int, int]  # epoch, cursor


@dataclass(frozen=True)
class Sample:
    """One training window: the index of its first date; `padding` where it fills up the last batch of an epoch."""

    start: int
    padding: bool


def valid_starts(
    dates: NDArray[np.datetime64], missing: NDArray[np.bool_], steps: int, step: int | None = None
) -> NDArray[np.int64]:
    """First dates of all windows of `steps` dates, `step` seconds apart (default: the commonest) and none missing."""
    if len(dates) < steps:
        return np.empty(0, np.int64)
    gaps = np.diff(dates).astype("timedelta64[s]").astype(np.int64)
    step = frequency_seconds(dates) if step is None else step
    broken = np.concatenate([[0], np.cumsum(gaps != step)])
    absent = np.concatenate([[0], np.cumsum(missing)])
    starts = np.arange(len(dates) - steps + 1)
    whole = broken[starts + steps - 1] == broken[starts]
    found: NDArray[np.int64] = starts[whole & (absent[starts + steps] == absent[starts])]
    return found


class ReadGroupSampler:
    """Samples of this rank's data group; all ranks of a model group get the same ones.

    Iterate over it for the first dates of single samples (`sampler=` of a torch DataLoader), over
    `as_batch_sampler()` for lists of them (`batch_sampler=`), over `batches()` for lists of `Sample`. At the end of
    an epoch, samples that fill no batch in every data group are dropped (`drop_last=True`) or the batch is filled up
    with the first samples of the epoch, marked as padding.

    The position is that of the samples taken: a DataLoader with worker processes takes them ahead of its consumer.
    """

    def __init__(
        self,
        starts: NDArray[np.int64],
        topology: Topology,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ):
        if batch_size < 1:
            raise SelectionError(f"batch size is {batch_size}. Use 1 or more.")
        if len(starts) == 0:
            raise SelectionError(
                "no sample is left: every window touches a missing date or a gap. Use fewer steps, or more dates."
            )
        if drop_last and len(starts) < batch_size * topology.data_size:
            raise SelectionError(
                f"{len(starts)} samples are fewer than one batch of {batch_size} in each of {topology.data_size} data "
                "groups, and drop_last would drop them all. Use drop_last=False, or a smaller batch."
            )
        self.starts, self.topology, self.batch_size = starts, topology, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0
        self.cursor = 0

    @property
    def samples_per_step(self) -> int:
        """Samples of one batch in every data group."""
        return self.batch_size * self.topology.data_size

    @property
    def dropped(self) -> int:
        """Samples of an epoch that no data group gets."""
        return len(self.starts) % self.samples_per_step if self.drop_last else 0

    def __len__(self) -> int:
        """Samples of this data group in a whole epoch, padding included."""
        return self.batches_per_epoch * self.batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this data group in a whole epoch."""
        whole, rest = divmod(len(self.starts), self.samples_per_step)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All samples in the order of an epoch, the same for every topology."""
        if not self.shuffle:
            return self.starts
        return np.random.default_rng([self.seed, epoch]).permutation(self.starts)

    def begin(self) -> int:
        """The epoch of the next batch: where nothing of the present one is left, the next one begins."""
        if self.cursor + self._needed > len(self.starts):  # only padding, or less than these larger batches
            self._tell_dropped(self.cursor)
            self.epoch, self.cursor = self.epoch + 1, 0
        return self.epoch

    def upcoming(self) -> Iterator[tuple[Position, list[Sample]]]:
        """(position after it, batch) of the rest of this epoch; the sampler itself stays where it is.

        After the last batch the position is the start of the next epoch, so that who stops there starts anew.
        """
        order, cursor, needed = self.order(self.begin()), self.cursor, self._needed
        while cursor + needed <= len(order):
            positions = np.arange(cursor, cursor + self.samples_per_step)
            mine = positions[positions % self.topology.data_size == self.topology.data_rank]
            batch = [Sample(int(order[k % len(order)]), bool(k >= len(order))) for k in mine]
            cursor += self.samples_per_step
            last = cursor + needed > len(order)
            if last:
                self._tell_dropped(cursor)
            yield (self.epoch + 1, 0) if last else (self.epoch, cursor), batch

    def batches(self) -> Iterator[list[Sample]]:
        """Batches of the rest of this epoch; the position follows."""
        for position, batch in self.upcoming():
            self.epoch, self.cursor = position
            yield batch

    def __iter__(self) -> Iterator[int]:
        """First dates of single samples; the position follows sample by sample."""
        for position, batch in self.upcoming():
            for i, sample in enumerate(batch, 1):
                if i == len(batch):
                    self.epoch, self.cursor = position
                else:
                    self.cursor += self.topology.data_size
                yield sample.start

    @property
    def _needed(self) -> int:
        """Samples that must be left for another batch."""
        return self.samples_per_step if self.drop_last else 1

    def as_batch_sampler(self) -> BatchSampler:
        """What a torch DataLoader takes as `batch_sampler=`."""
        return BatchSampler(self)

    def _tell_dropped(self, cursor: int) -> None:
        if cursor < len(self.starts):
            logger.info("%d samples of epoch %d fill no batch and are dropped", len(self.starts) - cursor, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; where that is the present one, stay at the cursor."""
        if epoch != self.epoch:
            self.epoch, self.cursor = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The exact position: plain numbers, valid under every topology and batch size."""
        return {**self._run, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; SelectionError where it belongs to other samples or another seed."""
        different = {key: (state[key], value) for key, value in self._run.items() if state[key] != value}
        if different:
            detail = ", ".join(f"{key} was {was}, now {now}" for key, (was, now) in different.items())
            raise SelectionError(
                f"this state belongs to another run: {detail}. Open the same dates with the same seed."
            )
        self.epoch, self.cursor = int(state["epoch"]), int(state["cursor"])

    @property
    def _run(self) -> dict[str, Any]:
        """All that the order depends on."""
        return {"seed": self.seed, "shuffle": self.shuffle, "samples": len(self.starts)}


@dataclass(frozen=True)
class BatchSampler:
    """Lists of first dates, one batch each; the position of `sampler` follows."""

    sampler: ReadGroupSampler

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler.batches():
            yield [sample.start for sample in batch]

    def __len__(self) -> int:
        return self.sampler.batches_per_epoch
