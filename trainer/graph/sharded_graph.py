"""A rank's part of the graph as the model uses it: tensors on the device, halos agreed, destinations in chunks.

    Graph (numpy, graph.py)  ->  Links of encoder, processor, decoder  ->  one Chunk for each range of destinations

All of it is built once, before the first step, and shared by all layers and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio import balanced
from shardio.errors import PlanError
from trainer.comm import Alone, Comm
from trainer.graph.edge_lists import EdgeLists, Layout, by_degree, wants_tables
from trainer.graph.graph import Edges, Graph
from trainer.graph.halo import Halo, build_halo, exchange

NODE_FEATURES = 4
EDGE_FEATURES = 3


@dataclass(frozen=True, eq=False)
class Chunk:
    """The edges that end at one range of a rank's destinations.

    Attributes:
      destinations: the range.
      sources: int32 [sources], the rows (owned + halo) at which its edges start; None for all rows.
      features: [edges, 3].
      lists: the edges, sorted for attention, by place in `sources` and in `destinations`.
    """

    destinations: slice
    sources: Tensor | None
    features: Tensor
    lists: EdgeLists


@dataclass(frozen=True, eq=False)
class Links:
    """One set of edges: the halo of its sources, without their rows, which the chunks have; destinations in chunks."""

    halo: Halo
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, eq=False)
class ShardedGraph:
    """What one rank computes on.

    Attributes:
      cells: [(cells/M) + halo, 4] where the cells are that feed this rank: sine and cosine of latitude and longitude;
        the first cells/M are its own.
      hidden: [hidden/M, 4] likewise.
      encoder, decoder: the edges.
      processor: what the processor prepared for itself; of edges with a halo, Links.
    """

    cells: Tensor
    hidden: Tensor
    encoder: Links
    processor: Any
    decoder: Links

    @property
    def owned_cells(self) -> int:
        """cells/M."""
        return self.encoder.halo.owned

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedGraph:
        """Copies of a model share the graph: it never changes, and process groups cannot be copied."""
        return self


@dataclass(frozen=True)
class Placement:
    """Where tensors of the graph live, of which type coordinates and edge features are, and for which kernel.

    Attributes: device; dtype; kernel: of attention; None for torch's.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    kernel: Layout | None = None

    def values(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def lists(self, source: NDArray[Any], destination: NDArray[Any], sources: int, destinations: int) -> EdgeLists:
        return EdgeLists.build(source, destination, sources, destinations, self.device, self.kernel)

    def places(self, coordinates: NDArray[np.float64]) -> Tensor:
        latitude, longitude = np.radians(coordinates).T
        parts = [np.sin(latitude), np.cos(latitude), np.sin(longitude), np.cos(longitude)]
        return self.values(np.stack(parts, axis=1))


def link(
    edges: Edges, bounds: Sequence[int], comm: Comm, placement: Placement, num_chunks: int = 1, part: str = "edges"
) -> Links:
    """Agree on the halo of these edges, and chunk their destinations. All ranks of the group call it together.

    Args:
      edges: that end at this rank's nodes.
      bounds: [M + 1], first source node of every rank.
      comm: the model group.
      placement: of the tensors.
      num_chunks: ranges of destinations.
      part: of the model; tag of the messages.
    """
    halo = build_halo(edges.source, bounds, comm, placement.device, part)
    source = halo.source.cpu().numpy()
    ends = balanced(edges.destinations, min(num_chunks, edges.destinations))
    chunks = tuple(cut_chunk(edges, source, halo.rows, slice(*pair), placement) for pair in pairwise(ends))
    return Links(replace(halo, source=halo.source.new_empty(0)), chunks)


def link_processor(graph: Graph, comm: Comm, placement: Placement) -> Links:
    """The processor's edges, with a halo."""
    return link(graph.processor, graph.hidden_bounds, comm, placement, part="processor")


def shard_graph(
    graph: Graph,
    comm: Comm | None = None,
    placement: Placement = Placement(),
    num_chunks: int = 1,
    prepare: Callable[[Graph, Comm, Placement], Any] = link_processor,
) -> ShardedGraph:
    """Agree on the halos and put the rank's part on the device. All ranks of the group call it together.

    Args:
      graph: of this rank.
      comm: the model group; default: one rank.
      placement: of the tensors.
      num_chunks: ranges of destinations that encoder and decoder compute one after the other.
      prepare: what the processor computes on.
    Raises: PlanError if num_chunks is less than 1; TopologyError if the ranks' cuts differ.
    """
    if num_chunks < 1:
        raise PlanError(f"num_chunks is {num_chunks}. Use 1 or more.")
    comm = comm or Alone()
    encoder = link(graph.encoder, graph.cells.bounds, comm, placement, num_chunks, "encoder")
    decoder = link(graph.decoder, graph.hidden_bounds, comm, placement, num_chunks, "decoder")
    return ShardedGraph(
        exchange(placement.places(graph.cell_coordinates), encoder.halo),
        placement.places(graph.hidden_coordinates),
        encoder,
        prepare(graph, comm, placement),
        decoder,
    )


def cut_chunk(edges: Edges, source: NDArray[Any], rows: int, destinations: slice, placement: Placement) -> Chunk:
    """The edges that end at a range of destinations; `source` has their rows, of so many."""
    first, last = np.searchsorted(edges.destination, [destinations.start, destinations.stop])
    source, destination = source[first:last], edges.destination[first:last] - destinations.start
    features, count = placement.values(edges.features[first:last]), destinations.stop - destinations.start
    if count == edges.destinations:
        return Chunk(destinations, None, features, placement.lists(source, destination, rows, count))
    needed, place = np.unique(source, return_inverse=True)
    if wants_tables(placement.kernel):  # which have their sources in a row
        order = by_degree(place, needed.size)
        needed, place = needed[order], np.argsort(order)[place]
    sources = torch.from_numpy(needed.astype(np.int32)).to(placement.device)
    return Chunk(destinations, sources, features, placement.lists(place, destination, needed.size, count))
