"""A rank's part of the graph made of counts alone, and a model group whose messages go nowhere but are counted.

Under FakeTensorMode a tensor has a shape and no numbers. What the trainer does with a graph depends on the numbers of
rows and edges alone, never on which they are, so that it runs on such a graph as on a real one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.graph.edge_lists import Bucket, EdgeLists
from trainer.graph.halo import Halo
from trainer.graph.heads import HeadExchange
from trainer.graph.sharded_graph import EDGE_FEATURES, NODE_FEATURES, Chunk, Links, ShardedGraph
from trainer.model.kernels import cpp as attention_kernel
from trainer.model.kernels.cpp import Rows
from trainer.plan.counts import ChunkCounts, PartCounts, RankCounts, Tables


@dataclass(frozen=True)
class Peers:
    """Stands for a process group.

    Attributes:
      part: of the model, whose messages these are.
      rank, ranks: this one, and how many.
      bounds: of the rows that it moves [ranks + 1]; None where there are none.
    """

    part: str
    rank: int
    ranks: int
    bounds: tuple[int, ...] | None = None


@dataclass
class Messages:
    """Attributes.

    sent: bytes to other ranks, by part and direction; an all-reduce counts as the ring that it is at best.
    gathered: what would have been sent if every rank gave its rows to all, and their gradients back.
    calls: number of collectives.
    backward: whether the step goes backward just now.
    """

    sent: Counter[str] = field(default_factory=Counter)
    gathered: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    backward: bool = False

    def all_to_all_single(
        self, received: Tensor, given: Tensor, receive: Any = None, send: list[int] | None = None, *, group: Peers
    ) -> None:
        assert send is not None
        row = given.element_size() * (given.numel() // max(1, len(given)))
        sent = gathered = (sum(send) - send[group.rank]) * row
        if group.bounds is not None:
            owned = group.bounds[group.rank + 1] - group.bounds[group.rank]
            width = row  # of a received row that is empty nothing is known
            gathered = width * (group.bounds[-1] - owned if self.backward else owned * (group.ranks - 1))
        self._count(f"{group.part} {'backward' if self.backward else 'forward'}", sent, gathered)

    def all_reduce(self, tensor: Tensor, *_: Any, group: Peers) -> None:
        nbytes = 2 * (group.ranks - 1) * tensor.numel() * tensor.element_size() // group.ranks
        self._count(group.part, nbytes, nbytes)

    def _count(self, key: str, sent: int, gathered: int) -> None:
        self.sent[key] += sent
        self.gathered[key] += gathered
        self.calls += 1


@contextmanager
def pretended(messages: Messages) -> Iterator[None]:
    """Within, collectives are counted instead of run, and the compiled kernel computes nothing."""
    stand_ins: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda group=None: group.ranks,
        "all_to_all_single": messages.all_to_all_single,
        "all_reduce": messages.all_reduce,
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(dist, name, stand_in))
        stack.enter_context(patch.object(attention_kernel, "_call", lambda *_: None))
        yield


def fake_graph(
    counts: RankCounts, num_chunks: int, shard_strategy: str, dtype: torch.dtype, rows: bool
) -> ShardedGraph:
    """As sharded_graph.shard_graph makes it of the real graph, tensor by tensor.

    Args:
      counts: of the rank.
      num_chunks, shard_strategy: as there.
      dtype: of coordinates and edge features.
      rows: whether the compiled kernel of CPUs is used, which has lists of its own.
    """
    halos = {name: _halo(name, part, counts) for name, part in counts.parts.items()}
    links = {
        name: Links(halos[name], tuple(_chunk(one, part, dtype, rows) for one in part.chunks(num_chunks)))
        for name, part in counts.parts.items()
        if name != "processor"
    }
    heads, whole = None, counts.processor
    chunk = whole.ends.chunk(range(whole.destinations))
    halo = halos["processor"]
    if shard_strategy == "heads" and counts.ranks > 1:
        peers = Peers("processor", counts.rank, counts.ranks)
        heads = HeadExchange(peers, counts.rank, counts.hidden_bounds)  # type: ignore[arg-type]
        chunk = counts.all_processor_edges.chunk(range(counts.hidden_bounds[-1]))
        none = (0,) * counts.ranks
        halo = Halo(halo.group, halo.owned, _ids(0), none, none, _ids(0))
    whole = PartCounts(counts.hidden_bounds, (), (), len(chunk.destinations), counts.processor.ends)
    return ShardedGraph(
        torch.empty(counts.owned_cells + counts.encoder.halo, NODE_FEATURES, dtype=dtype),
        torch.empty(counts.owned_hidden, NODE_FEATURES, dtype=dtype),
        links["encoder"],
        Links(halo, (_chunk(chunk, whole, dtype, rows),)),
        links["decoder"],
        heads,
    )


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _halo(name: str, part: PartCounts, counts: RankCounts) -> Halo:
    owned = part.bounds[counts.rank + 1] - part.bounds[counts.rank]
    peers: Any = Peers(name, counts.rank, counts.ranks, part.bounds)
    return Halo(peers, owned, _ids(sum(part.lent)), part.lent, part.borrowed, _ids(part.ends.edges))


def _chunk(counts: ChunkCounts, part: PartCounts, dtype: torch.dtype, rows: bool) -> Chunk:
    destinations = counts.destinations
    needed = None if len(destinations) == part.destinations else _ids(counts.sources)
    features = torch.empty(counts.edges, EDGE_FEATURES, dtype=dtype)
    return Chunk(slice(destinations.start, destinations.stop), needed, features, _lists(counts, rows))


def _lists(counts: ChunkCounts, rows: bool) -> EdgeLists:
    into, out = (tuple(_buckets(tables)) for tables in (counts.incoming, counts.outgoing))
    destinations, sources, edges = len(counts.destinations), counts.sources, counts.edges
    lists = tuple(Rows(_ids(nodes + 1), _ids(edges), _ids(edges)) for nodes in (destinations, sources))
    return EdgeLists(sources, destinations, edges, into, out, (lists[0], lists[1]) if rows else None)


def _buckets(tables: Tables) -> Iterator[Bucket]:
    for nodes, width, holes in tables:
        empty = torch.empty(nodes, width, 1, dtype=torch.bool) if holes else None
        yield Bucket(_ids(nodes), _ids(nodes, width), _ids(nodes, width), empty)
