"""A rank's part of the graph made of counts alone, and a model group whose messages go nowhere.

Under FakeTensorMode a tensor has a shape and no numbers. What the trainer does with a graph depends on the numbers of
rows and edges alone, never on which they are, so that it runs on such a graph as on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.graph.edge_lists import EdgeLists, Table, ends_type
from trainer.graph.halo import Halo
from trainer.graph.heads import HeadExchange
from trainer.graph.sharded_graph import EDGE_FEATURES, NODE_FEATURES, Chunk, Links, ShardedGraph
from trainer.model.kernels import cpp as attention_kernel
from trainer.plan.counts import ChunkCounts, PartCounts, RankCounts

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


@contextmanager
def idle_kernel() -> Iterator[None]:
    """Within, the compiled kernel computes nothing."""
    with patch.object(attention_kernel, "_call", lambda *_: None):
        yield


def fake_graph(
    counts: RankCounts, comm: Comm, num_chunks: int, shard_strategy: str, dtype: torch.dtype, compiled: bool
) -> ShardedGraph:
    """As sharded_graph.shard_graph makes it of the real graph, tensor by tensor.

    Args:
      counts: of the rank.
      comm: its model group.
      num_chunks, shard_strategy: as there.
      dtype: of coordinates and edge features.
      compiled: whether the compiled kernel of CPUs is used, which needs no tables.
    """
    halos = {name: _halo(name, part, counts, comm) for name, part in counts.parts.items()}
    links = {
        name: Links(halos[name], tuple(_chunk(one, part, dtype, compiled) for one in part.chunks(num_chunks)))
        for name, part in counts.parts.items()
        if name != "processor"
    }
    heads, whole = None, counts.processor
    chunk = whole.ends.chunk(range(whole.destinations))
    halo = halos["processor"]
    if shard_strategy == "heads" and counts.ranks > 1:
        heads = HeadExchange(comm, counts.hidden_bounds)
        chunk = counts.all_processor_edges.chunk(range(counts.hidden_bounds[-1]))
        none = (0,) * counts.ranks
        halo = Halo(comm, "processor", halo.owned, _ids(0), none, none, _narrow(0))
    whole = PartCounts(counts.hidden_bounds, (), (), len(chunk.destinations), counts.processor.ends)
    return ShardedGraph(
        torch.empty(counts.owned_cells + counts.encoder.halo, NODE_FEATURES, dtype=dtype),
        torch.empty(counts.owned_hidden, NODE_FEATURES, dtype=dtype),
        links["encoder"],
        Links(halo, (_chunk(chunk, whole, dtype, compiled),)),
        links["decoder"],
        heads,
    )


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _halo(name: str, part: PartCounts, counts: RankCounts, comm: Comm) -> Halo:
    owned = part.bounds[counts.rank + 1] - part.bounds[counts.rank]
    return Halo(comm, name, owned, _ids(sum(part.lent)), part.lent, part.borrowed, _narrow(0))


def _chunk(counts: ChunkCounts, part: PartCounts, dtype: torch.dtype, compiled: bool) -> Chunk:
    destinations = counts.destinations
    needed = None if len(destinations) == part.destinations else _narrow(counts.sources)
    features = torch.empty(counts.edges, EDGE_FEATURES, dtype=dtype)
    return Chunk(slice(destinations.start, destinations.stop), needed, features, _lists(counts, compiled))


def _narrow(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _lists(counts: ChunkCounts, compiled: bool) -> EdgeLists:
    into, out = ([], []) if compiled else (counts.incoming, counts.outgoing)
    incoming = tuple(Table(_nodes(nodes), width, full) for nodes, width, full in into)
    outgoing = tuple(Table(_nodes(nodes), width, full, _narrow(len(nodes), width)) for nodes, width, full in out)
    destinations = len(counts.destinations)
    ends = torch.empty(counts.edges, dtype=ends_type(counts.sources, compiled))
    offsets = None if counts.regular else _narrow(destinations + 1)
    most = counts.incoming[0][1] if counts.incoming else 0
    return EdgeLists(counts.sources, destinations, ends, offsets, most, incoming, outgoing, compiled)


def _nodes(nodes: Tensor | range) -> Tensor | range:
    return nodes if isinstance(nodes, range) else _narrow(len(nodes))
