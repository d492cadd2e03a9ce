"""A rank's part of the graph as the model uses it: tensors on the device, halos agreed, destinations in chunks.

    Graph (numpy, graph.py)  ->  Links of encoder, processor, decoder  ->  one Chunk for each range of destinations

All of it is built once, before the first step, and shared by all layers and steps.
"""

from __future__ import annotations

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
from trainer.graph.edge_lists import EdgeLists, by_degree, is_compiled
from trainer.graph.graph import Edges, Graph
from trainer.graph.halo import Halo, build_halo, exchange
from trainer.graph.heads import HeadExchange, gather_edges

NODE_FEATURES = 4
EDGE_FEATURES = 3
SHARD_STRATEGIES = ("edges", "heads")


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
      encoder, processor, decoder: the edges.
      heads: how the processor's heads are spread over the ranks; None with shard_strategy edges.
    """

    cells: Tensor
    hidden: Tensor
    encoder: Links
    processor: Links
    decoder: Links
    heads: HeadExchange | None = None

    @property
    def owned_cells(self) -> int:
        """cells/M."""
        return self.encoder.halo.owned

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedGraph:
        """Copies of a model share the graph: it never changes, and process groups cannot be copied."""
        return self


def shard_graph(
    graph: Graph,
    comm: Comm | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_chunks: int = 1,
    shard_strategy: str = "edges",
    kernel: str = "auto",
) -> ShardedGraph:
    """Agree on the halos and put the rank's part on the device. All ranks of the group call it together.

    Args:
      graph: of this rank.
      comm: the model group.
      device: where the tensors live.
      dtype: of coordinates and edge features.
      num_chunks: ranges of destinations that encoder and decoder compute one after the other.
      shard_strategy: of the processor: `edges` (halo) or `heads` (every rank has all hidden nodes, but only some of
        the attention heads, while it attends).
      kernel: of attention, see EdgeLists.build.
    Raises: PlanError if shard_strategy, num_chunks or kernel are not to be had.
    """
    if shard_strategy not in SHARD_STRATEGIES:
        raise PlanError(f"shard_strategy {shard_strategy!r} is unknown. Use one of: {', '.join(SHARD_STRATEGIES)}.")
    if num_chunks < 1:
        raise PlanError(f"num_chunks is {num_chunks}. Use 1 or more.")
    put, comm = _Put(device, dtype, kernel), comm or Alone()
    encoder_halo = build_halo(graph.encoder.source, graph.cells.bounds, comm, device, "encoder")
    decoder_halo = build_halo(graph.decoder.source, graph.hidden_bounds, comm, device, "decoder")
    if shard_strategy == "heads" and graph.cells.ranks > 1:
        edges = gather_edges(graph, comm, device)
        processor_halo = build_halo(np.empty(0, np.int64), graph.hidden_bounds, comm, device, "processor")
        every = slice(0, edges.destinations)
        processor = Links(processor_halo, (_chunk(edges, edges.source, edges.destinations, every, put),))
        heads = HeadExchange(comm, graph.hidden_bounds)
    else:
        processor_halo = build_halo(graph.processor.source, graph.hidden_bounds, comm, device, "processor")
        processor, heads = _links(graph.processor, processor_halo, 1, put), None
    return ShardedGraph(
        exchange(put.places(graph.cell_coordinates), encoder_halo),
        put.places(graph.hidden_coordinates),
        _links(graph.encoder, encoder_halo, num_chunks, put),
        processor,
        _links(graph.decoder, decoder_halo, num_chunks, put),
        heads,
    )


@dataclass(frozen=True)
class _Put:
    device: torch.device | str
    dtype: torch.dtype
    kernel: str

    def values(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def lists(self, source: NDArray[Any], destination: NDArray[Any], sources: int, destinations: int) -> EdgeLists:
        return EdgeLists.build(source, destination, sources, destinations, self.device, self.kernel)

    def places(self, coordinates: NDArray[np.float64]) -> Tensor:
        latitude, longitude = np.radians(coordinates).T
        parts = [np.sin(latitude), np.cos(latitude), np.sin(longitude), np.cos(longitude)]
        return self.values(np.stack(parts, axis=1))


def _links(edges: Edges, halo: Halo, num_chunks: int, put: _Put) -> Links:
    source = halo.source.cpu().numpy()
    bounds = balanced(edges.destinations, min(num_chunks, edges.destinations))
    chunks = tuple(_chunk(edges, source, halo.rows, slice(*ends), put) for ends in pairwise(bounds))
    return Links(replace(halo, source=halo.source.new_empty(0)), chunks)


def _chunk(edges: Edges, source: NDArray[Any], rows: int, destinations: slice, put: _Put) -> Chunk:
    first, last = np.searchsorted(edges.destination, [destinations.start, destinations.stop])
    source, destination = source[first:last], edges.destination[first:last] - destinations.start
    features, count = put.values(edges.features[first:last]), destinations.stop - destinations.start
    if count == edges.destinations:
        return Chunk(destinations, None, features, put.lists(source, destination, rows, count))
    needed, place = np.unique(source, return_inverse=True)
    if not is_compiled(put.kernel, torch.device(put.device)):  # whose tables have their sources one after the other
        order = by_degree(place, needed.size)
        needed, place = needed[order], np.argsort(order)[place]
    sources = torch.from_numpy(needed.astype(np.int32)).to(put.device)
    return Chunk(destinations, sources, features, put.lists(place, destination, needed.size, count))
