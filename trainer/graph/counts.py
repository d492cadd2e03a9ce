"""How much of a graph one rank has, counted in one process, without the other ranks.

Three ways, by what can be done in seconds:

  graph      the real graph is built once, as of one rank, and cut for every M: all counts are exact
  rank       only the part of the rank in the middle is built, and what lies around it. Hidden nodes are given to
             ranks by their number, not by their work, as which border cells feed which nodes depends on
  formulas   densities and boundaries, for shares of a global grid that are too large even for that
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shardio import Partition, balanced
from trainer.graph.edge_lists import is_regular, tables
from trainer.graph.graph import PARTS, Graph, equal_work
from trainer.graph.grid import Int64

Tables = list[tuple[Tensor | range, int, bool]]  # nodes, width, whether all places are taken


@dataclass(frozen=True)
class ChunkCounts:
    """The edges that end at one range of destinations.

    Attributes:
      destinations, edges: how many.
      sources: rows at which they start; all rows of the rank where the range is all destinations.
      regular: whether equally many end at each destination.
      incoming, outgoing: the tables of attention by torch.
    """

    destinations: range
    sources: int
    edges: int
    regular: bool
    incoming: Tables
    outgoing: Tables


class Ends(Protocol):
    """At which rows the edges of a rank start, and where they end."""

    @property
    def edges(self) -> int: ...

    def chunk(self, destinations: range) -> ChunkCounts: ...


@dataclass(frozen=True, eq=False)
class ListedEnds:
    """Edges one by one, sorted by destination. Attributes: row of each source [edges], destination [edges], rows."""

    source: NDArray[np.signedinteger[Any]]
    destination: NDArray[np.signedinteger[Any]]
    rows: int
    destinations: int

    @property
    def edges(self) -> int:
        return self.source.size

    def chunk(self, destinations: range) -> ChunkCounts:
        first, last = np.searchsorted(self.destination, [destinations.start, destinations.stop])
        whole = len(destinations) == self.destinations
        into = np.bincount(self.destination[first:last] - destinations.start, minlength=len(destinations))
        out = np.bincount(self.source[first:last], minlength=self.rows)
        if not whole:  # its own numbers for its sources
            out = -np.sort(-out[out > 0])
        return _counted(destinations, into, out)


@dataclass(frozen=True)
class EvenEnds:
    """Every node has about as many edges as any other.

    Attributes:
      edges, rows, destinations: how many.
      border: rows of a range's neighbours at which its edges start too.
    """

    edges: int
    rows: int
    destinations: int
    border: int

    def chunk(self, destinations: range) -> ChunkCounts:
        share = len(destinations) / self.destinations
        edges, whole = round(self.edges * share), share == 1.0
        sources = self.rows if whole else min(self.rows, round(self.rows * share) + self.border)
        return _counted(destinations, *(_even(edges, nodes) for nodes in (len(destinations), sources)))


def _even(edges: int, nodes: int) -> Int64:
    """[nodes] edges of each."""
    low, more = divmod(edges, nodes)
    return np.repeat([low + 1, low], [more, nodes - more])


def _counted(destinations: range, into: Int64, out: Int64) -> ChunkCounts:
    """Of the number of edges of every destination, and of every source."""
    found = list(tables(into)), list(tables(out))
    return ChunkCounts(destinations, out.size, int(into.sum()), is_regular(into), *found)


@dataclass(frozen=True, eq=False)
class PartCounts:
    """One set of edges, as one rank has it.

    Attributes:
      bounds: [M + 1], first source node of every rank.
      lent, borrowed: [M], rows that each rank needs of this one, and this one of each.
      destinations: that the rank owns.
      ends: of its edges.
    """

    bounds: tuple[int, ...]
    lent: tuple[int, ...]
    borrowed: tuple[int, ...]
    destinations: int
    ends: Ends

    @property
    def halo(self) -> int:
        """Rows of other ranks."""
        return sum(self.borrowed)

    def chunks(self, num_chunks: int) -> Iterator[ChunkCounts]:
        """As sharded_graph cuts them."""
        bounds = balanced(self.destinations, min(num_chunks, self.destinations))
        for start, stop in itertools.pairwise(bounds):
            yield self.ends.chunk(range(start, stop))


@dataclass(frozen=True, eq=False)
class RankCounts:
    """What one rank has of the graph.

    Attributes:
      how: graph, rank or formulas, see the head of this file.
      rank: whose part it is.
      cells: the cut of the cells.
      hidden_bounds: [M + 1], the cut of the hidden nodes.
      encoder, processor, decoder: its edges.
      all_processor_edges: of all ranks; with shard_strategy heads a rank attends along them all.
    """

    how: str
    rank: int
    cells: Partition
    hidden_bounds: tuple[int, ...]
    encoder: PartCounts
    processor: PartCounts
    decoder: PartCounts
    all_processor_edges: Ends

    @property
    def ranks(self) -> int:
        return self.cells.ranks

    @property
    def owned_cells(self) -> int:
        return self.cells.sizes[self.rank]

    @property
    def owned_hidden(self) -> int:
        return self.hidden_bounds[self.rank + 1] - self.hidden_bounds[self.rank]

    @property
    def parts(self) -> dict[str, PartCounts]:
        return {name: getattr(self, name) for name in PARTS}


# ------------------------------------------------------------------------------------------------------ the real graph
class CutGraph:
    """The graph of one rank, cut for M ranks: what each of them would build, to the edge.

    Args:
      graph: as built for one rank.
      cells: the cut of the cells.
      layers: processor_layers with which ranks weigh their work.
    """

    def __init__(self, graph: Graph, cells: Partition, layers: int) -> None:
        self.graph, self.cells = graph, cells
        work = np.diff(graph.encoder.offsets) + layers * np.diff(graph.processor.offsets)
        self.hidden_bounds = equal_work(work, cells.ranks)
        sides = {"encoder": (cells.bounds, self.hidden_bounds), "decoder": (self.hidden_bounds, cells.bounds)}
        self._sides = sides | {"processor": (self.hidden_bounds, self.hidden_bounds)}
        self._rows = {part: self._borrowing(part) for part in PARTS}

    def _borrowing(self, part: str) -> Int64:
        """[M, M], rows that each rank (first axis) needs of each."""
        edges, (bounds, ends), ranks = getattr(self.graph, part), self._sides[part], self.cells.ranks
        user = np.searchsorted(ends, edges.destination, side="right") - 1
        pairs = np.unique(user * bounds[-1] + edges.source)
        owner = np.searchsorted(bounds, pairs % bounds[-1], side="right") - 1
        rows = np.bincount(pairs // bounds[-1] * ranks + owner, minlength=ranks * ranks).reshape(ranks, ranks)
        np.fill_diagonal(rows, 0)
        return rows

    @property
    def largest(self) -> int:
        """The rank with most rows: its own and its halo, of encoder, decoder and every layer between."""
        own, hidden = (np.diff(bounds) for bounds in (self.cells.bounds, self.hidden_bounds))
        halo = sum(rows.sum(axis=1) for rows in self._rows.values())
        return int(np.argmax(own + hidden + halo))

    def rank(self, rank: int) -> RankCounts:
        """The counts of one."""
        edges = self.graph.processor
        every = ListedEnds(edges.source, edges.destination, self.hidden_bounds[-1], self.hidden_bounds[-1])
        encoder, processor, decoder = (self._part(part, rank) for part in PARTS)
        return RankCounts("graph", rank, self.cells, self.hidden_bounds, encoder, processor, decoder, every)

    def _part(self, part: str, rank: int) -> PartCounts:
        edges, (bounds, ends), rows = getattr(self.graph, part), self._sides[part], self._rows[part]
        first, last = np.searchsorted(edges.destination, ends[rank : rank + 2])
        source, owned = edges.source[first:last], slice(*bounds[rank : rank + 2])
        listed = ListedEnds(
            local_rows(source, owned), edges.destination[first:last] - ends[rank], 0, ends[rank + 1] - ends[rank]
        )
        return part_counts(listed, bounds, rows[:, rank], rows[rank], owned)


def local_rows(source: NDArray[np.signedinteger[Any]], owned: slice) -> Int64:
    """Rows of these nodes on the rank: its own first, then the others by id."""
    remote = (source < owned.start) | (source >= owned.stop)
    needed = np.unique(source[remote])
    rows: Int64 = np.where(remote, owned.stop - owned.start + np.searchsorted(needed, source), source - owned.start)
    return rows


def part_counts(ends: ListedEnds, bounds: tuple[int, ...], lent: Int64, borrowed: Int64, owned: slice) -> PartCounts:
    """With the number of rows that lists of edges alone do not tell."""
    rows = owned.stop - owned.start + int(borrowed.sum())
    listed = ListedEnds(ends.source, ends.destination, rows, ends.destinations)
    return PartCounts(bounds, tuple(lent.tolist()), tuple(borrowed.tolist()), ends.destinations, listed)
