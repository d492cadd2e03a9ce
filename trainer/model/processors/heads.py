"""The graph transformer cut by heads: while it attends a rank has all hidden nodes, but only some of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shardio import balanced
from trainer.comm import Alone, Comm
from trainer.graph.counts import RankCounts
from trainer.graph.graph import Graph
from trainer.graph.heads import HeadExchange, gather_edges, to_heads, to_nodes
from trainer.graph.pretend import Pretence
from trainer.graph.sharded_graph import EDGE_FEATURES, Chunk, Placement, cut_chunk
from trainer.model.layers import along_edges, maybe_checkpoint
from trainer.model.processors.layers import BlockList


@dataclass(frozen=True, eq=False)
class HeadLinks:
    """Attributes: the exchange from cut nodes to cut heads, and all edges of the processor as one chunk."""

    heads: HeadExchange
    chunks: tuple[Chunk]


class HeadsProcessor(BlockList):
    """All layers, one after the other."""

    def forward(self, hidden: Tensor, links: HeadLinks) -> Tensor:
        """[batch, hidden/M, channels], of all layers one after the other."""
        alone = links.heads.comm.ranks == 1
        attention = along_edges if alone else partial(_attend_by_heads, links.heads)
        for block in self:
            hidden = maybe_checkpoint(self.checkpointing, block, hidden, hidden, links.chunks[0], attention)
        return hidden


def _attend_by_heads(
    heads: HeadExchange, query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, chunk: Chunk
) -> tuple[Tensor, Tensor]:
    depth, every = query.shape[-1], query.shape[2]
    packed = to_heads(torch.cat([query, key, value, tilt], dim=-1), heads)
    query, key, value, tilt = packed.split([depth, depth, depth, EDGE_FEATURES], dim=-1)
    attended = along_edges(query, key, value, tilt, chunk)
    values, sums = to_nodes(torch.cat(attended, dim=-1), heads, every).split([depth, EDGE_FEATURES], dim=-1)
    return values, sums


def link_heads(graph: Graph, comm: Comm, placement: Placement) -> HeadLinks:
    """All ranks' edges of the processor, on every rank."""
    edges = graph.processor if comm.ranks == 1 else gather_edges(graph, comm, placement.device)
    chunk = cut_chunk(edges, edges.source, edges.destinations, slice(0, edges.destinations), placement)
    return HeadLinks(HeadExchange(comm, graph.hidden_bounds), (chunk,))


def pretend_heads(counts: RankCounts, pretence: Pretence) -> HeadLinks:
    """As link_heads makes them."""
    nodes = counts.hidden_bounds[-1]
    chunk = pretence.chunk(counts.all_processor_edges.chunk(range(nodes)), nodes)
    return HeadLinks(HeadExchange(pretence.comm, counts.hidden_bounds), (chunk,))


def check_heads(heads: int, ranks: int) -> None:
    """TopologyError if there are fewer attention heads than ranks."""
    HeadExchange(Alone(), balanced(ranks, ranks)).heads(heads)
