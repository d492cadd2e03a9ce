"""The rank arithmetic of all groups: world = data x ensemble x model, and read groups within a model group.

    world 8, num_gpus_per_model 4, read_group_size 2        rank   0 1 2 3 | 4 5 6 7
                                                     model group   0 0 0 0 | 1 1 1 1
                                                      read group   0 0 1 1 | 0 0 1 1
                                                      data group   0 1 2 3 | 0 1 2 3

Ranks of a model group are neighbours, as in the field's convention, so that they share a node where they can.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shardio.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """Where one rank stands.

    Attributes:
      world_size, rank: of all ranks.
      num_gpus_per_model: M, the ranks that together hold one model.
      read_group_size: R, the ranks that together read one sample; divides M. Default M.
      num_gpus_per_ensemble: the ranks that share one ensemble, whole model groups. Default M.
    """

    world_size: int = 1
    rank: int = 0
    num_gpus_per_model: int = 1
    read_group_size: int | None = None
    num_gpus_per_ensemble: int | None = None

    def __post_init__(self) -> None:
        _positive(self)
        if not self.rank < self.world_size:
            raise TopologyError(f"rank {self.rank} is not in a world of {self.world_size}. Ranks count from 0.")
        _divides("num_gpus_per_model", self.model_size, "the world size", self.world_size)
        _divides("read_group_size", self.read_size, "num_gpus_per_model", self.model_size)
        _divides("num_gpus_per_ensemble", self.ensemble_size, "the world size", self.world_size, self.model_size)

    @classmethod
    def from_environment(
        cls,
        num_gpus_per_model: int = 1,
        read_group_size: int | None = None,
        num_gpus_per_ensemble: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Topology:
        """World and rank from torchrun (WORLD_SIZE, RANK) or SLURM (SLURM_NTASKS, SLURM_PROCID); else one rank.

        Args: environment: default: that of this process.
        """
        environment = os.environ if environment is None else environment  # as a default, help() would print it all
        for world, rank in (("WORLD_SIZE", "RANK"), ("SLURM_NTASKS", "SLURM_PROCID")):
            if world in environment and rank in environment:
                size, place = int(environment[world]), int(environment[rank])
                return cls(size, place, num_gpus_per_model, read_group_size, num_gpus_per_ensemble)
        return cls(1, 0, num_gpus_per_model, read_group_size, num_gpus_per_ensemble)

    @property
    def model_size(self) -> int:
        """M."""
        return self.num_gpus_per_model

    @property
    def model_rank(self) -> int:
        """Place in the model group: which shard this rank owns."""
        return self.rank % self.model_size

    @property
    def model_ranks(self) -> range:
        """World ranks of this rank's model group."""
        first = self.rank - self.model_rank
        return range(first, first + self.model_size)

    @property
    def read_size(self) -> int:
        """R."""
        return self.model_size if self.read_group_size is None else self.read_group_size

    @property
    def read_groups(self) -> int:
        """Read groups in a model group: they take turns, date by date."""
        return self.model_size // self.read_size

    @property
    def read_group(self) -> int:
        """Which read group of its model group this rank is in."""
        return self.model_rank // self.read_size

    @property
    def read_rank(self) -> int:
        """Place in the read group."""
        return self.model_rank % self.read_size

    @property
    def read_ranks(self) -> range:
        """World ranks of this rank's read group."""
        first = self.rank - self.read_rank
        return range(first, first + self.read_size)

    @property
    def ensemble_size(self) -> int:
        """Ranks that share one ensemble, and so one sample."""
        return self.model_size if self.num_gpus_per_ensemble is None else self.num_gpus_per_ensemble

    @property
    def ensemble_ranks(self) -> range:
        """World ranks of this rank's ensemble group."""
        first = self.rank // self.ensemble_size * self.ensemble_size
        return range(first, first + self.ensemble_size)

    @property
    def data_size(self) -> int:
        """D: how many samples the world works on at a time, for each place in a batch."""
        return self.world_size // self.ensemble_size

    @property
    def data_rank(self) -> int:
        """Which of the D samples is this rank's: global sample k goes to data rank k mod D."""
        return self.rank // self.ensemble_size

    @property
    def data_ranks(self) -> range:
        """World ranks with the same place in their ensemble groups: gradients are averaged over them."""
        return range(self.rank % self.ensemble_size, self.world_size, self.ensemble_size)

    def effective_batch_size(self, batch_size: int) -> int:
        """Samples per optimizer step over the whole world."""
        return batch_size * self.data_size


def divisors(n: int) -> list[int]:
    """All that divide n."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _positive(topology: Topology) -> None:
    for name in ("world_size", "num_gpus_per_model", "read_group_size", "num_gpus_per_ensemble"):
        value = getattr(topology, name)
        if value is not None and value < 1:
            raise TopologyError(f"{name} is {value}. Use 1 or more.")
    if topology.rank < 0:
        raise TopologyError(f"rank is {topology.rank}. Ranks count from 0.")


def _divides(part_name: str, part: int, whole_name: str, whole: int, of: int = 1) -> None:
    """TopologyError unless `part` divides `whole` and is a multiple of `of`, the size of a model group."""
    if whole % part or part % of:
        wrong = f"does not divide {whole_name} {whole}" if whole % part else f"is not a multiple of {of} (one model)"
        choices = ", ".join(str(choice) for choice in divisors(whole) if choice % of == 0)
        raise TopologyError(f"{part_name} {part} {wrong}. Use one of: {choices}.")
