"""Attention cut by heads: all hidden nodes, some heads. The exchange from cut nodes to cut heads, and back.

    rank 0 has nodes 0 1 2, all heads       all-to-all       all nodes, heads 0 1
    rank 1 has nodes 3 4,   all heads    <------------->     all nodes, heads 2 3

Every row travels to all ranks, once in each direction: compare the halo (halo.py), of which only border rows travel.
It serves dense attention, where every node needs every other, and as a second opinion on the halo.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardio import balanced
from shardio.errors import TopologyError
from trainer.graph.graph import Edges, Graph


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """Attributes: the model group, the place of this rank in it, and the first node of every rank [M + 1]."""

    group: dist.ProcessGroup | None
    rank: int
    bounds: tuple[int, ...]

    def heads(self, heads: int) -> tuple[int, ...]:
        """First head of every rank [M + 1]."""
        ranks = len(self.bounds) - 1
        if heads < ranks:
            raise TopologyError(
                f"{heads} attention heads cannot be cut over {ranks} ranks. Use shard_strategy edges, or "
                f"num_heads of {ranks} or more."
            )
        return balanced(heads, ranks)

    @property
    def sizes(self) -> list[int]:
        """Nodes of every rank [M]."""
        return _sizes(self.bounds)


def _sizes(bounds: tuple[int, ...]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def to_heads(rows: Tensor, plan: HeadExchange) -> Tensor:
    """Forward: from cut nodes to cut heads. Backward: from cut heads to cut nodes.

    Args: rows: [batch, nodes/M, heads, channels].
    Returns: [batch, nodes, heads/M, channels].
    """
    cut: Tensor = _ToHeads.apply(rows, plan)  # type: ignore[no-untyped-call]
    return cut


def to_nodes(rows: Tensor, plan: HeadExchange, heads: int) -> Tensor:
    """Forward: from cut heads to cut nodes. Backward: from cut nodes to cut heads.

    Args: rows: [batch, nodes, heads/M, channels]; heads: of all ranks.
    Returns: [batch, nodes/M, heads, channels].
    """
    cut: Tensor = _ToNodes.apply(rows, plan, heads)  # type: ignore[no-untyped-call]
    return cut


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: HeadExchange) -> Tensor:
        ctx.plan, ctx.heads = plan, rows.shape[2]
        return _nodes_to_heads(rows, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _heads_to_nodes(gradient, ctx.plan, ctx.heads), None


class _ToNodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: HeadExchange, heads: int) -> Tensor:
        ctx.plan = plan
        return _heads_to_nodes(rows, plan, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _nodes_to_heads(gradient, ctx.plan), None, None


def _nodes_to_heads(rows: Tensor, plan: HeadExchange) -> Tensor:
    batch, nodes, heads, channels = rows.shape
    width = _sizes(plan.heads(heads))
    mine, sizes = width[plan.rank], plan.sizes
    sent = torch.cat([part.reshape(-1) for part in rows.split(width, dim=2)])
    received = rows.new_empty(batch * plan.bounds[-1] * mine * channels)
    unit = batch * channels
    _all_to_all(received, sent, [size * mine * unit for size in sizes], [nodes * w * unit for w in width], plan)
    parts = received.split([size * mine * unit for size in sizes])
    shaped = [part.view(batch, size, mine, channels) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(shaped, dim=1)


def _heads_to_nodes(rows: Tensor, plan: HeadExchange, heads: int) -> Tensor:
    batch, _, mine, channels = rows.shape
    width = _sizes(plan.heads(heads))
    nodes, unit, sizes = plan.sizes[plan.rank], batch * channels, plan.sizes
    sent = torch.cat([part.reshape(-1) for part in rows.split(sizes, dim=1)])
    received = rows.new_empty(batch * nodes * heads * channels)
    _all_to_all(received, sent, [nodes * w * unit for w in width], [size * mine * unit for size in sizes], plan)
    parts = received.split([nodes * w * unit for w in width])
    return torch.cat([part.view(batch, nodes, w, channels) for part, w in zip(parts, width, strict=True)], dim=2)


def _all_to_all(received: Tensor, sent: Tensor, receive: list[int], send: list[int], plan: HeadExchange) -> None:
    dist.all_to_all_single(received, sent, receive, send, group=plan.group)


def gather_edges(graph: Graph, group: dist.ProcessGroup | None, device: torch.device | str) -> Edges:
    """The processor's edges of all ranks: with cut heads a rank attends along every edge."""
    mine = graph.processor
    sources = _gather(torch.from_numpy(mine.source), graph, group, device)
    destinations = _gather(torch.from_numpy(mine.destination + graph.hidden.start), graph, group, device)
    features = _gather(torch.from_numpy(mine.features), graph, group, device)
    return Edges(sources.numpy(), destinations.numpy(), features.numpy(), graph.hidden_bounds[-1])


def _gather(part: Tensor, graph: Graph, group: dist.ProcessGroup | None, device: torch.device | str) -> Tensor:
    """The parts of all ranks, of any lengths, one after the other."""
    ranks, part = graph.cells.ranks, part.to(device)
    counts = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_to_all_single(counts, torch.full_like(counts, len(part)), group=group)
    lengths = [int(count) for count in counts.tolist()]
    every = part.new_empty((sum(lengths), *part.shape[1:]))
    sent = part.repeat(ranks, *[1] * (part.ndim - 1))
    dist.all_to_all_single(every, sent, lengths, [len(part)] * ranks, group=group)
    return every.cpu()
