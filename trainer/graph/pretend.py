"""A rank's part of the graph made of counts alone, and a model group whose messages go nowhere.

Under FakeTensorMode a tensor has a shape and no numbers. What the trainer does with a graph depends on the numbers of
rows and edges alone, never on which they are, so that it runs on such a graph as on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.graph.counts import ChunkCounts, PartCounts, RankCounts
from trainer.graph.edge_lists import EdgeLists, Layout, Table, ends_type
from trainer.graph.halo import Halo
from trainer.graph.sharded_graph import EDGE_FEATURES, NODE_FEATURES, Chunk, Links, ShardedGraph

T = TypeVar("T")


@dataclass(frozen=True)
class FakeComm:
    """A model group whose messages go nowhere: what comes of them has its shape. Attributes: as of Comm."""

    rank: int
    ranks: int
    group: None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], tag: str) -> Tensor:
        return rows.new_empty((sum(receive), *rows.shape[1:]))

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        return tensor

    def copy_first(self, tensor: Tensor, tag: str) -> Tensor:
        return tensor

    def gather(self, thing: T, tag: str) -> list[T]:
        return [thing] * self.ranks

    def tell(self, thing: T, tag: str) -> T:
        return thing


@dataclass(frozen=True)
class Pretence:
    """Makes what a rank would have, of counts.

    Attributes:
      comm: the model group.
      dtype: of coordinates and edge features.
      kernel: of attention.
    """

    comm: Comm
    dtype: torch.dtype
    kernel: Layout

    def links(self, name: str, part: PartCounts, num_chunks: int) -> Links:
        """As sharded_graph.link makes them."""
        owned = part.bounds[self.comm.rank + 1] - part.bounds[self.comm.rank]
        halo = Halo(self.comm, name, owned, _ids(sum(part.lent)), part.lent, part.borrowed, _narrow(0))
        return Links(halo, tuple(self.chunk(one, part.destinations) for one in part.chunks(num_chunks)))

    def chunk(self, counts: ChunkCounts, destinations: int) -> Chunk:
        """As sharded_graph.cut_chunk makes it, for a rank with so many destinations."""
        ends = counts.destinations
        needed = None if len(ends) == destinations else _narrow(counts.sources)
        features = torch.empty(counts.edges, EDGE_FEATURES, dtype=self.dtype)
        return Chunk(slice(ends.start, ends.stop), needed, features, _lists(counts, self.kernel))


def pretend_graph(
    counts: RankCounts, pretence: Pretence, num_chunks: int, pretend: Callable[[RankCounts, Pretence], Any]
) -> ShardedGraph:
    """As sharded_graph.shard_graph makes it of the real graph, tensor by tensor.

    Args:
      counts: of the rank.
      pretence: how.
      num_chunks: as there.
      pretend: what the processor computes on.
    """
    return ShardedGraph(
        torch.empty(counts.owned_cells + counts.encoder.halo, NODE_FEATURES, dtype=pretence.dtype),
        torch.empty(counts.owned_hidden, NODE_FEATURES, dtype=pretence.dtype),
        pretence.links("encoder", counts.encoder, num_chunks),
        pretend(counts, pretence),
        pretence.links("decoder", counts.decoder, num_chunks),
    )


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _narrow(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _lists(counts: ChunkCounts, kernel: Layout) -> EdgeLists:
    into, out = (counts.incoming, counts.outgoing) if kernel.tables else ([], [])
    incoming = tuple(Table(_nodes(nodes), width, full) for nodes, width, full in into)
    outgoing = tuple(Table(_nodes(nodes), width, full, _narrow(len(nodes), width)) for nodes, width, full in out)
    destinations = len(counts.destinations)
    ends = torch.empty(counts.edges, dtype=ends_type(counts.sources, kernel))
    offsets = None if counts.regular else _narrow(destinations + 1)
    most = counts.incoming[0][1] if counts.incoming else 0
    return EdgeLists(counts.sources, destinations, ends, offsets, most, incoming, outgoing, kernel)


def _nodes(nodes: Tensor | range) -> Tensor | range:
    return nodes if isinstance(nodes, range) else _narrow(len(nodes))
