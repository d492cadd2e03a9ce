"""The edges of a graph as tables of their nodes, in which attention gathers; never scatters.

    edges  0>0 2>0 1>1 2>1 0>2     ends 0 2 1 2 0   offsets 0 2 4 5      incoming   destinations 0 1: 2 wide   2: 1 wide
                                                                         outgoing   sources 0 2: edges [[0 4] [1 3]]
                                                                                    source 1: edges [[2]]

An edge is its place in the order of destinations. Nothing is held twice, and in no wider a type than it needs: at 9 km
the graph is the largest thing in memory. Where an edge ends follows from the offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.errors import PlanError

Int64 = NDArray[np.int64]
PADDING = 8  # of the places in a table, one in so many may be empty
MOST_EDGES = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Table:
    """Nodes with about equally many edges.

    Attributes:
      nodes: int32 [nodes]; a range where they are consecutive.
      width: edges of those that have most.
      full: whether all have so many.
      edges: int32 [nodes, width], of outgoing edges; behind a node's last edge, that edge again. None of incoming ones,
        which are consecutive.
    """

    nodes: Tensor | range
    width: int
    full: bool
    edges: Tensor | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    def to(self, device: torch.device | str) -> Table:
        nodes = self.nodes if isinstance(self.nodes, range) else self.nodes.to(device)
        return Table(nodes, self.width, self.full, None if self.edges is None else self.edges.to(device))


@dataclass(frozen=True, eq=False)
class Block:
    """Some nodes of a table.

    Attributes:
      nodes: int64 [nodes].
      ends: [nodes, width], the other end of every edge; where empty, that of the node's last edge.
      edges: [nodes, width], which edge it is; where empty, the node's last edge.
      empty: bool [nodes, width, 1]; None if nothing is.
    """

    nodes: Tensor
    ends: Tensor
    edges: Tensor
    empty: Tensor | None


class Layout(Protocol):
    """What lists of edges have to know of the kernel that attends along them. Attributes: whether it wants tables."""

    @property
    def tables(self) -> bool: ...


def wants_tables(kernel: Layout | None) -> bool:
    """Whether lists for this kernel have tables; those for none have."""
    return kernel is None or kernel.tables


@dataclass(frozen=True, eq=False)
class EdgeLists:
    """Edges by destination and by source, built once, shared by all layers; nothing in a step depends on data.

    Attributes:
      sources, destinations: number of nodes at which edges may start and end.
      ends: int32 [edges], where each edge starts; for tables int16 if 16 bits are enough.
      offsets: int32 [destinations + 1], the edges of destination i are offsets[i] to offsets[i + 1]; None where all
        have `most`.
      most: edges of the destination that has most.
      incoming, outgoing: the tables of destinations and of sources; none for a kernel that wants none.
      kernel: that attends along them; None for torch's.
    """

    sources: int
    destinations: int
    ends: Tensor
    offsets: Tensor | None
    most: int
    incoming: tuple[Table, ...]
    outgoing: tuple[Table, ...]
    kernel: Any

    @staticmethod
    def build(
        source: Tensor | Int64,
        destination: Tensor | Int64,
        sources: int,
        destinations: int,
        device: torch.device | str = "cpu",
        kernel: Layout | None = None,
    ) -> EdgeLists:
        """List edges by their ends.

        Args:
          source, destination: [edges], local ids, by ascending destination; features are to be given in this order.
          sources, destinations: how many nodes there are; those without edges get zeros.
          device: where the lists live.
          kernel: that will attend along them; default: torch's.
        Raises: PlanError if an edge ends at no node, edges are not by destination, or too many.
        """
        start, end = (np.asarray(torch.as_tensor(ids).cpu()) for ids in (source, destination))
        _check(start, end, sources, destinations)
        degrees = np.bincount(end, minlength=destinations)
        most = int(degrees.max(initial=0))
        offsets = None
        if not is_regular(degrees):
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32)).to(device)
        ends = torch.from_numpy(start.astype(np.int32)).to(device, ends_type(sources, kernel))
        incoming: tuple[Table, ...] = ()
        outgoing: tuple[Table, ...] = ()
        if wants_tables(kernel):
            incoming = tuple(Table(*one).to(device) for one in tables(degrees))
            outgoing = tuple(one.to(device) for one in _outgoing(start, sources))
        return EdgeLists(sources, destinations, ends, offsets, most, incoming, outgoing, kernel)

    @property
    def edges(self) -> int:
        """Number of edges."""
        return len(self.ends)

    def with_tables(self) -> EdgeLists:
        """For torch's kernel, also where a type turns up that another does not know."""
        return self if wants_tables(self.kernel) else self._with_tables

    @cached_property
    def _with_tables(self) -> EdgeLists:
        destination = self._end(torch.arange(self.edges))  # without tables: in 32 bits
        return EdgeLists.build(self.ends, destination, self.sources, self.destinations, self.ends.device)

    def blocks_in(self, table: Table, rows: int) -> Iterator[Block]:
        """A table of destinations, so many nodes at a time."""
        place = torch.arange(table.width, device=self.ends.device)
        for nodes in _cut(table, rows, self.ends.device):
            if self.offsets is None:
                edges, empty = nodes[:, None] * self.most + place, None
            else:
                first, last = (self.offsets.index_select(0, nodes + i).long()[:, None] for i in (0, 1))
                edges, empty = torch.minimum(first + place, last - 1), None
                if not table.full:
                    empty = (first + place >= last).unsqueeze(-1)
            yield Block(nodes, self._start(edges), edges, empty)

    def blocks_out(self, table: Table, rows: int) -> Iterator[Block]:
        """A table of sources, so many nodes at a time."""
        assert table.edges is not None
        for number, nodes in enumerate(_cut(table, rows, self.ends.device)):
            edges, empty = table.edges[number * rows : (number + 1) * rows].long(), None
            if not table.full:  # a node has no edge twice but behind its last one
                empty = torch.nn.functional.pad(edges[:, 1:] == edges[:, :-1], (1, 0)).unsqueeze(-1)
            yield Block(nodes, self._end(edges), edges, empty)

    def _start(self, edges: Tensor) -> Tensor:
        """Where they start; ids that are negative in 16 bits are those from 2^15 on."""
        ends = self.ends.index_select(0, edges.reshape(-1)).view(edges.shape)
        return ends.int().bitwise_and_(2**16 - 1) if ends.dtype == torch.int16 else ends

    def _end(self, edges: Tensor) -> Tensor:
        """Where they end."""
        if self.offsets is None:
            return edges // self.most
        return torch.searchsorted(self.offsets, edges.int(), right=True) - 1


def _check(start: Int64, end: Int64, sources: int, destinations: int) -> None:
    if start.shape != end.shape or start.ndim != 1:
        raise PlanError(f"edges have sources {start.shape} and destinations {end.shape}. Give one each per edge.")
    for name, ids, count in (("source", start, sources), ("destination", end, destinations)):
        if ids.size and not 0 <= ids.min() <= ids.max() < count:
            raise PlanError(
                f"edges have {name}s {ids.min()} to {ids.max()}, but there are {count}. Give local ids of the "
                f"nodes at hand, or more {name}s."
            )
    if (end[1:] < end[:-1]).any():
        raise PlanError("edges are not in the order of their destinations. Sort them, and their features.")
    if max(end.size, sources, destinations) > MOST_EDGES:
        raise PlanError(f"{end.size} edges are too many for one rank. Use more ranks, or more chunks.")


def is_regular(degrees: Int64) -> bool:
    """Whether all nodes have equally many edges, and some."""
    return bool(degrees.size and degrees[0] and (degrees == degrees[0]).all())


def ends_type(sources: int, kernel: Layout | None) -> torch.dtype:
    """The narrowest type for ids of so many nodes."""
    return torch.int16 if sources <= 2**16 and wants_tables(kernel) else torch.int32


def tables(degrees: Int64) -> Iterator[tuple[Tensor | range, int, bool]]:
    """Nodes, width and whether it is full of every table, widest first; of nodes with so many edges each."""
    for width, least in table_widths(degrees):
        nodes = np.flatnonzero((degrees <= width) & (degrees >= least))
        full, first, last = bool((degrees[nodes] == width).all()), int(nodes[0]), int(nodes[-1]) + 1
        is_range = last - first == nodes.size
        yield range(first, last) if is_range else torch.from_numpy(nodes.astype(np.int32)), width, full


def _outgoing(start: Int64, sources: int) -> Iterator[Table]:
    """Tables of sources, each with its edges in ascending order."""
    edges, degrees = np.argsort(start, kind="stable").astype(np.int32), np.bincount(start, minlength=sources)
    last = np.cumsum(degrees)
    for nodes, width, full in tables(degrees):
        chosen = np.asarray(nodes)
        listed = np.minimum((last - degrees)[chosen, None] + np.arange(width), last[chosen, None] - 1)
        yield Table(nodes, width, full, torch.from_numpy(edges[listed]))


def by_degree(start: Int64, sources: int) -> Int64:
    """[sources], an order of the sources in which those of one table are consecutive."""
    degrees = np.bincount(start, minlength=sources)
    return np.argsort(-degrees, kind="stable")


def _cut(table: Table, rows: int, device: torch.device) -> Iterator[Tensor]:
    """Its nodes, int64, so many at a time."""
    for first in range(0, len(table), rows):
        nodes = table.nodes[first : first + rows]
        yield torch.arange(nodes.start, nodes.stop, device=device) if isinstance(nodes, range) else nodes.long()


def table_widths(degrees: Int64) -> list[tuple[int, int]]:
    """Most and fewest edges of a node of each table, given the number of edges of every node.

    From the widest down a table takes in nodes with fewer edges until one in PADDING of its places is empty: a few
    tables, however many different numbers of edges there are.
    """
    widths, counts = (column[::-1] for column in np.unique(degrees[degrees > 0], return_counts=True))
    found = []
    while widths.size:
        places = np.cumsum(counts) * widths[0]
        fitting = places - np.cumsum(counts * widths) <= places / PADDING
        taken = widths.size if fitting.all() else int(np.argmin(fitting))
        found.append((int(widths[0]), int(widths[taken - 1])))
        widths, counts = widths[taken:], counts[taken:]
    return found
