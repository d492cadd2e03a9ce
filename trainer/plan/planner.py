"""What each rank of a model group needs, for several sizes of the group, before any of them is booked.

dataset or grid  ->  counts of the largest rank (graph_counts.py)  ->  its step (footprint.py)  ->  rows of a table
                     and what it reads (shardio.load.reading)               and a recommendation
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from shardio import Partition, Reading, Topology, partition
from shardio.errors import PlanError
from trainer.graph.counts import CutGraph, RankCounts
from trainer.graph.graph import PARTS, Graph, GraphOptions, build_graph
from trainer.graph.grid import Float64
from trainer.plan.estimates import GLOBAL, Densities, estimated_counts, rank_counts
from trainer.plan.footprint import Footprint, Job, footprint

MOST_BUILT = 500_000  # cells of a grid whose graph is built whole: seconds
MOST_OF_RANK = 2_500_000  # cells of a rank whose part is built
RESERVE = 0.1  # of the memory: what the allocator cannot use, the libraries' own, and what operations take inside
TRIED_CHUNKS = (1, 2, 4, 8, 16, 32)
WORTH = 0.95  # more chunks are worth their time if the peak falls below so much of what it was
CHUNK_BYTES = 2**20  # smaller grid-chunks cost more in requests than they save


@dataclass(frozen=True, eq=False)
class Field:
    """What the dataset looks like.

    Attributes:
      name: of the grid.
      latitudes, longitudes: [cells], degrees.
      chunk_cells: cells of a grid-chunk; None: as many grid-chunks as ranks.
      variables: stored, of which the model may use fewer.
      itemsize: bytes of a stored number, before compression.
    """

    name: str
    latitudes: Float64
    longitudes: Float64
    chunk_cells: int | None
    variables: int
    itemsize: int = 4

    @property
    def cells(self) -> int:
        return self.latitudes.size

    def cut(self, ranks: int) -> Partition:
        """As the loader cuts the cells."""
        return partition(self.cells, ranks, self.chunk_cells or math.ceil(self.cells / ranks))


@dataclass(frozen=True)
class Reads:
    """Of one sample: inputs and targets.

    Attributes:
      bytes_read: decoded bytes of the chunks that the rank reads.
      bytes_ahead: that the loader keeps on the host for batches read ahead.
      amplification: cells that the model group reads, over the cells of the grid.
      aligned: whether ranks own whole grid-chunks.
      grid_chunks: of a date.
    """

    bytes_read: int
    bytes_ahead: int
    amplification: float
    aligned: bool
    grid_chunks: int


@dataclass(frozen=True)
class Recommendation:
    """What to book.

    Attributes:
      smallest: M that fits as the job is; None if none does.
      gpus_per_model, num_chunks, grid_chunks: to use.
      rechunk: whether the dataset has to be cut anew for them.
      peak: bytes, with them.
      fits: whether it does.
    """

    smallest: int | None
    gpus_per_model: int
    num_chunks: int
    grid_chunks: int
    rechunk: bool
    peak: int
    fits: bool


@dataclass(frozen=True, eq=False)
class Row:
    """The largest rank of a model group of M. Attributes: M, its counts, step, reads, halos if cells were compact."""

    ranks: int
    counts: RankCounts
    step: Footprint
    reads: Reads
    compact: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "gpus_per_model": self.ranks,
            "counted_by": counts.how,
            "rank": counts.rank,
            "cells": counts.owned_cells,
            "hidden_nodes": counts.owned_hidden,
            "edges": {part: one.ends.edges for part, one in counts.parts.items()},
            "halo_rows": {part: one.halo for part, one in counts.parts.items()},
            "halo_rows_if_compact": self.compact,
            "bytes_at_peak": {name: count for name, count in self.step.at_peak.items() if count},
            "bytes_kept_for_backward": {name: count for name, count in self.step.kept.items() if count},
            "peak_bytes": self.step.peak,
            "bytes_sent": dict(self.step.sent),
            "bytes_all_gather": dict(self.step.gathered),
            "collectives": self.step.collectives,
            **asdict(self.reads),
        }


class Planner:
    """Plans one job on one grid.

    Args:
      field: the grid, and how it is stored.
      job: what is trained.
      graph: hidden mesh and edges.
      prefetch: batches that the loader reads ahead.
      read_group_size: R; None for M.
      sharded: keep_batch_sharded of the loader.
    """

    def __init__(
        self,
        field: Field,
        job: Job,
        graph: GraphOptions,
        prefetch: int = 3,
        read_group_size: int | None = None,
        sharded: bool = True,
    ) -> None:
        self.field, self.job, self.prefetch = field, job, prefetch
        self.read_group_size, self.sharded = read_group_size, sharded
        self.options = replace(graph, processor_layers=job.network.num_layers)
        self._built: Graph | None = None
        self._counts: dict[int, RankCounts] = {}

    def counts(self, ranks: int) -> RankCounts:
        """Of the largest rank of so many; built where that takes seconds."""
        if ranks not in self._counts:
            self._counts[ranks] = self._count(ranks)
        return self._counts[ranks]

    def _count(self, ranks: int) -> RankCounts:
        field, cells = self.field, self.field.cut(ranks)
        if field.cells <= MOST_BUILT:
            if self._built is None:
                whole = partition(field.cells, 1, field.cells)
                self._built = build_graph(field.latitudes, field.longitudes, whole, 0, self.options)
            cut = CutGraph(self._built, cells, self.job.network.num_layers)
            return cut.rank(cut.largest)
        middle = ranks // 2
        if cells.sizes[middle] <= MOST_OF_RANK:
            return rank_counts(field.latitudes, field.longitudes, cells, middle, self.options)
        if np.ptp(field.latitudes) < GLOBAL:
            raise PlanError(
                f"a rank of {ranks} would have {cells.sizes[middle]} cells, too many to build its graph here, and "
                f"formulas are for global grids. Plan for {math.ceil(field.cells / MOST_OF_RANK)} ranks or more."
            )
        return estimated_counts(cells, middle, self.options)

    def row(self, ranks: int, num_chunks: int | None = None) -> Row:
        """The largest of so many ranks; with another num_chunks than the job's if given."""
        counts, job = self.counts(ranks), self.job
        if num_chunks is not None:
            job = replace(job, network=replace(job.network, num_chunks=num_chunks))
        hidden = counts.hidden_bounds[-1]
        compact = Densities(self.field.cells, hidden, self.options).halos(ranks, compact=True)
        compact = compact if ranks > 1 else dict.fromkeys(PARTS, 0)
        return Row(ranks, counts, footprint(job, counts), self.reads(ranks, counts.rank), compact)

    def reading(self, ranks: int, rank: int) -> Reading:
        """Who reads which chunks: as ForecastDataModule has it."""
        topology = Topology(ranks, rank, ranks, self.read_group_size)
        return Reading(self.field.cut(ranks), topology, shared=ranks > 1, whole=not self.sharded)

    def bytes_read(self, reading: Reading, date: int) -> int:
        """Decoded bytes of the chunks of a date that the rank reads; the last chunk is stored as long as the others."""
        cells = len(reading.chunks_read(date, reading.topology.model_rank)) * reading.owners.chunk_cells
        return cells * self.field.variables * self.job.ensemble * self.field.itemsize

    def reads(self, ranks: int, rank: int) -> Reads:
        """What a rank reads of a sample; the mean where ranks take turns, date by date."""
        reading, dates = self.reading(ranks, rank), self.job.input_steps + self.job.rollout
        turns = ranks if reading.exchanges else 1
        read = sum(self.bytes_read(reading, date) for date in range(turns)) * dates // turns
        ahead = (self.prefetch + 2) * self.job.batch * read
        return Reads(read, ahead, reading.read_amplification, reading.owners.aligned, reading.grid_chunks)

    def recommend(self, rows: Sequence[Row], memory: int) -> Recommendation:
        """The fewest GPUs that fit as the job is; one size less, where more chunks make it fit.

        Args: rows: of the Ms in question, ascending; memory: of one GPU, bytes.
        """
        usable = memory * (1.0 - RESERVE)
        first = next((place for place, row in enumerate(rows) if row.step.peak <= usable), None)
        smallest = None if first is None else rows[first].ranks
        chosen, chunks = rows[-1 if first is None else first], self.job.network.num_chunks
        if first != 0:
            for row, more in self._more_chunks(rows[-1 if first is None else first - 1]):
                if row.step.peak <= usable or first is None:
                    chosen, chunks = row, more
                if row.step.peak <= usable:
                    break
        peak = chosen.step.peak
        serves = self.field.chunk_cells is not None and chosen.reads.aligned
        most = rows[-1].ranks if rows[-1].ranks % chosen.ranks == 0 else chosen.ranks
        grid_chunks = chosen.reads.grid_chunks if serves else self.grid_chunks(most)
        return Recommendation(smallest, chosen.ranks, chunks, grid_chunks, not serves, peak, peak <= usable)

    def _more_chunks(self, row: Row) -> Iterator[tuple[Row, int]]:
        """For as long as each doubling saves something."""
        before = row.step.peak
        for chunks in TRIED_CHUNKS:
            if chunks > self.job.network.num_chunks:
                found = self.row(row.ranks, chunks)
                if found.step.peak > WORTH * before:
                    return
                before = found.step.peak
                yield found, chunks

    def grid_chunks(self, most: int) -> int:
        """As few as make whole shards for the largest M, and so for all that divide it; more where chunks are large."""
        date = self.field.cells * self.field.variables * self.job.ensemble * self.field.itemsize
        fitting = [most]
        for number in (2 * most, 4 * most):
            cut = partition(self.field.cells, most, math.ceil(self.field.cells / number))
            if cut.aligned and date / number >= CHUNK_BYTES:
                fitting.append(number)
        return fitting[-1]
