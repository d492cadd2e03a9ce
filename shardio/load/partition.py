"""How a range of cells is cut into one contiguous range per rank.

10,007 cells in 7 grid-chunks of 1,430 over 3 ranks: along the chunk grid the ranks get 3, 2 and 2 chunks, the
first 29 % more cells than the mean, so the cut is balanced instead: 3336, 3336, 3335 cells, and the chunks that two
ranks share are counted in the read amplification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from shardio.errors import PlanError

LARGEST_ALIGNED_IMBALANCE = 0.05


@dataclass(frozen=True)
class Partition:
    """Contiguous ranges of cells, one per rank.

    Attributes:
      bounds: [ranks + 1], first cell of every rank, then the number of cells.
      chunk_cells: cells of one grid-chunk (the last may be shorter).
      aligned: whether every bound lies on the chunk grid.
    """

    bounds: tuple[int, ...]
    chunk_cells: int
    aligned: bool

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Cells of every rank."""
        return tuple(end - start for start, end in pairwise(self.bounds))

    @property
    def imbalance(self) -> float:
        """How much larger the largest shard is than the mean: 0 is perfect balance."""
        return max(self.sizes) * self.ranks / self.bounds[-1] - 1

    @property
    def read_amplification(self) -> float:
        """Cells of all chunks that the ranks touch, over the cells of the grid: 1 when no chunk is read twice."""
        return sum(self.cells_read(rank) for rank in range(self.ranks)) / self.bounds[-1]

    def cells(self, rank: int) -> slice:
        """The cells that `rank` owns."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def chunks(self, rank: int) -> range:
        """The grid-chunks that hold the cells of `rank`."""
        owned = self.cells(rank)
        return range(owned.start // self.chunk_cells, math.ceil(owned.stop / self.chunk_cells))

    def cells_read(self, rank: int) -> int:
        """Cells of the chunks that `rank` has to decode."""
        chunks = self.chunks(rank)
        return min(chunks.stop * self.chunk_cells, self.bounds[-1]) - chunks.start * self.chunk_cells


def balanced(cells: int, ranks: int) -> tuple[int, ...]:
    """Bounds of `ranks` ranges whose sizes differ by one cell at most, the larger ones first."""
    small, extra = divmod(cells, ranks)
    return tuple(rank * small + min(rank, extra) for rank in range(ranks + 1))


def partition(cells: int, ranks: int, chunk_cells: int) -> Partition:
    """Cut along the chunk grid where that divides evenly or costs at most 5 % imbalance; else to +-1 cell.

    Raises: PlanError where there are more ranks than cells.
    """
    if not 1 <= ranks <= cells:
        raise PlanError(f"{cells} cells cannot be cut over {ranks} ranks. Use 1 to {cells} ranks.")
    chunks = math.ceil(cells / chunk_cells)
    if ranks <= chunks:
        bounds = tuple(min(chunk * chunk_cells, cells) for chunk in balanced(chunks, ranks))
        aligned = Partition(bounds, chunk_cells, aligned=True)
        if chunks % ranks == 0 or aligned.imbalance <= LARGEST_ALIGNED_IMBALANCE:
            return aligned
    bounds = balanced(cells, ranks)
    on_grid = all(bound % chunk_cells == 0 for bound in bounds[:-1])
    return Partition(bounds, chunk_cells, aligned=on_grid)
