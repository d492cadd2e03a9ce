"""Who of a model group reads which chunks of a date, and who owns which cells. Pure arithmetic.

Without sharing, a rank reads every chunk that holds cells it owns. With sharing, each chunk is read by one rank of
the model group: read groups take turns date by date, the R ranks of the group whose turn it is split the chunks, and
`redistribute` brings the cells to their owners. Either way no two ranks disagree, for all follow from the date.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardio.load.partition import Partition, balanced
from shardio.load.topology import Topology


@dataclass(frozen=True)
class Reading:
    """Attributes.

    owners: which cells each rank of the model group owns.
    topology: of this rank.
    shared: whether each chunk is read once in the model group.
    whole: whether every rank of the model group gets all cells (keep_batch_sharded=False).
    """

    owners: Partition
    topology: Topology
    shared: bool
    whole: bool

    @property
    def grid_chunks(self) -> int:
        return math.ceil(self.owners.bounds[-1] / self.owners.chunk_cells)

    @property
    def exchanges(self) -> bool:
        """Whether ranks read other cells than they need, so that batches have to be redistributed."""
        if not self.shared or self.topology.model_size == 1:
            return False
        return self.whole or not self.owners.aligned or self.topology.read_groups > 1

    def wanted(self, model_rank: int) -> slice:
        """The cells that a rank of the model group is to hold in the end."""
        return slice(0, self.owners.bounds[-1]) if self.whole else self.owners.cells(model_rank)

    def chunks_read(self, date: int, model_rank: int) -> range:
        """The chunks of a date that a rank of the model group reads."""
        if not self.exchanges:
            return range(self.grid_chunks) if self.whole else self.owners.chunks(model_rank)
        topology = self.topology
        turn, place = divmod(model_rank, topology.read_size)
        if date % topology.read_groups != turn:
            return range(0)
        # Ranks that get one chunk more than others do so in turns too.
        place = (place + date // topology.read_groups) % topology.read_size
        bounds = balanced(self.grid_chunks, topology.read_size)
        return range(bounds[place], bounds[place + 1])

    def cells_of(self, chunk: int) -> slice:
        """The cells of a chunk."""
        start = chunk * self.owners.chunk_cells
        return slice(start, min(start + self.owners.chunk_cells, self.owners.bounds[-1]))

    def cells_read(self, date: int, model_rank: int) -> slice:
        """The cells of a date that a rank reads: all of its chunks where batches are redistributed, else its own."""
        if not self.exchanges:
            return self.wanted(model_rank)
        chunks = self.chunks_read(date, model_rank)
        return slice(self.cells_of(chunks[0]).start, self.cells_of(chunks[-1]).stop) if chunks else slice(0, 0)

    @property
    def read_amplification(self) -> float:
        """Cells that the model group reads of a date, over the cells of the grid."""
        if self.shared:
            return 1.0
        return float(self.topology.model_size) if self.whole else self.owners.read_amplification


def meet(a: slice, b: slice) -> slice:
    """The common part of two ranges of cells; empty where they do not touch."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def within(part: slice, whole: slice) -> slice:
    """`part` counted from the start of `whole`."""
    return slice(part.start - whole.start, part.stop - whole.start)
