"""The edges of a graph as tables of their nodes, in which attention gathers; never scatters.

    edges  0>0 2>0 1>1 2>1 0>2       incoming   destinations 0 1: sources [[0 2] [1 2]]   destination 2: [[0]]
                                     outgoing   sources 0 2: destinations [[0 2] [0 1]]   source 1: [[1]]

Nodes with equally many edges make a bucket, whose edges are a table [nodes, width].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.errors import PlanError
from trainer.model.kernels import cpp as attention_kernel

Int64 = NDArray[np.int64]
KERNELS = ("auto", "torch", "cpp")
PADDING = 8  # of the places in a bucket, one in so many may be empty


@dataclass(frozen=True, eq=False)
class Bucket:
    """Nodes with about equally many edges, as a table.

    Attributes:
      nodes: int64 [nodes].
      ends: int64 [nodes, width], the other end of every edge; where empty, that of the node's last edge.
      edges: int64 [nodes, width], which edge it is; where empty, the number of edges.
      empty: bool [nodes, width, 1]; None if nothing is.
    """

    nodes: Tensor
    ends: Tensor
    edges: Tensor
    empty: Tensor | None

    def blocks(self, rows: int) -> Iterator[Bucket]:
        """Cut into buckets of at most that many nodes."""
        for first in range(0, len(self.nodes), rows):
            part = slice(first, first + rows)
            empty = None if self.empty is None else self.empty[part]
            yield Bucket(self.nodes[part], self.ends[part], self.edges[part], empty)

    def to(self, device: torch.device | str) -> Bucket:
        empty = None if self.empty is None else self.empty.to(device)
        return Bucket(self.nodes.to(device), self.ends.to(device), self.edges.to(device), empty)


@dataclass(frozen=True, eq=False)
class EdgeLists:
    """Edges by destination and by source, built once, shared by all layers; nothing in a step depends on data.

    Attributes:
      sources, destinations: number of nodes at which edges may start and end.
      edges: number of edges.
      incoming: by destination; edges are counted as they were given.
      outgoing: by source; edges are counted in the order in which the tables of incoming list them, empty places too.
      rows: for the compiled kernel, edges by destination and by source as offsets, ends, edges; None without it.
    """

    sources: int
    destinations: int
    edges: int
    incoming: tuple[Bucket, ...]
    outgoing: tuple[Bucket, ...]
    rows: tuple[attention_kernel.Rows, attention_kernel.Rows] | None

    @staticmethod
    def build(
        source: Tensor | Int64,
        destination: Tensor | Int64,
        sources: int,
        destinations: int,
        device: torch.device | str = "cpu",
        kernel: str = "auto",
    ) -> EdgeLists:
        """Sort edges by their ends.

        Args:
          source, destination: int64 [edges], local ids, in any order; features are to be given in this order.
          sources, destinations: how many nodes there are; those without edges get zeros.
          device: where the lists live.
          kernel: torch, cpp (for CPUs, compiled when first used), or auto: cpp where it can be had.
        Raises: PlanError if an edge ends at no node, or the kernel is unknown.
        """
        start, end = (np.asarray(torch.as_tensor(ids).cpu(), dtype=np.int64) for ids in (source, destination))
        if start.shape != end.shape or start.ndim != 1:
            raise PlanError(f"edges have sources {start.shape} and destinations {end.shape}. Give one each per edge.")
        for name, ids, count in (("source", start, sources), ("destination", end, destinations)):
            if ids.size and not 0 <= ids.min() <= ids.max() < count:
                raise PlanError(
                    f"edges have {name}s {ids.min()} to {ids.max()}, but there are {count}. Give local ids of the "
                    f"nodes at hand, or more {name}s."
                )
        by_destination = _sort(end, start, np.arange(end.size), destinations)
        tables = _tables(by_destination, end.size)
        places = np.concatenate([*(table.edges.numpy().ravel() for table in tables), np.empty(0, np.int64)])
        back = _tables(_sort(start, end, _positions(places, end.size), sources), places.size)
        rows = None
        if _is_compiled(kernel, torch.device(device)):
            by_source = _sort(start, end, _positions(by_destination.edges, end.size), sources)
            rows = by_destination.tensors(), by_source.tensors()
        incoming, outgoing = (tuple(table.to(device) for table in part) for part in (tables, back))
        return EdgeLists(sources, destinations, end.size, incoming, outgoing, rows)


def _is_compiled(kernel: str, device: torch.device) -> bool:
    """Raises: PlanError if cpp is asked for and cannot be had."""
    if kernel not in KERNELS:
        raise PlanError(f"attention kernel {kernel!r} is unknown. Use one of: {', '.join(KERNELS)}.")
    if kernel == "torch" or (kernel == "auto" and device.type != "cpu"):
        return False
    library, why = attention_kernel.load() if device.type == "cpu" else (None, f"it is for CPUs, not {device.type}")
    if kernel == "cpp" and library is None:
        raise PlanError(f"attention kernel cpp cannot be had: {why}. Use kernel auto or torch.")
    return library is not None


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Edges by node: those of node i are offsets[i] to offsets[i + 1] of ends (their other ends) and edges (ids)."""

    offsets: Int64
    ends: Int64
    edges: Int64

    def tensors(self) -> attention_kernel.Rows:
        return attention_kernel.Rows(*(torch.from_numpy(array) for array in (self.offsets, self.ends, self.edges)))


def _sort(node: Int64, end: Int64, edge: Int64, nodes: int) -> _Sorted:
    order = np.argsort(node, kind="stable")
    return _Sorted(np.searchsorted(node[order], np.arange(nodes + 1)), end[order], edge[order])


def _positions(listed: Int64, edges: int) -> Int64:
    """[edges], where in the list each edge is; empty places list the edge that does not exist."""
    position = np.empty(edges + 1, np.int64)
    position[listed] = np.arange(listed.size)
    return position[:edges]


def _tables(by_node: _Sorted, none: int) -> list[Bucket]:
    """All nodes that have edges, in tables, widest first."""
    degrees = np.diff(by_node.offsets)
    tables = []
    for width, least in table_widths(degrees):
        nodes = np.flatnonzero((degrees <= width) & (degrees >= least))
        place, degree = np.arange(width), degrees[nodes, None]
        listed = by_node.offsets[nodes, None] + np.minimum(place, degree - 1)
        empty = place >= degree
        edges = np.where(empty, none, by_node.edges[listed])
        holes = torch.from_numpy(empty).unsqueeze(-1) if empty.any() else None
        ends = torch.from_numpy(by_node.ends[listed])
        tables.append(Bucket(torch.from_numpy(nodes), ends, torch.from_numpy(edges), holes))
    return tables


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
