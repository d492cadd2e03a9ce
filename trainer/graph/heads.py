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
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardio import balanced
from shardio.errors import TopologyError
from trainer.comm import Comm
from trainer.graph.graph import Edges, Graph


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """Attributes: the model group, and the first node of every rank [M + 1]."""

    comm: Comm
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
        return _nodes_to_heads(rows, plan, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _heads_to_nodes(gradient, ctx.plan, ctx.heads, "backward"), None


class _ToNodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: HeadExchange, heads: int) -> Tensor:
        ctx.plan = plan
        return _heads_to_nodes(rows, plan, heads, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _nodes_to_heads(gradient, ctx.plan, "backward"), None, None


def _nodes_to_heads(rows: Tensor, plan: HeadExchange, way: str) -> Tensor:
    batch, nodes, heads, channels = rows.shape
    width = _sizes(plan.heads(heads))
    mine, sizes = width[plan.comm.rank], plan.sizes
    sent = torch.cat([part.reshape(-1) for part in rows.split(width, dim=2)])
    unit = batch * channels
    receive = [size * mine * unit for size in sizes]
    received = plan.comm.all_to_all(sent, [nodes * w * unit for w in width], receive, f"processor {way}")
    parts = received.split(receive)
    shaped = [part.view(batch, size, mine, channels) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(shaped, dim=1)


def _heads_to_nodes(rows: Tensor, plan: HeadExchange, heads: int, way: str) -> Tensor:
    batch, _, mine, channels = rows.shape
    width = _sizes(plan.heads(heads))
    nodes, unit, sizes = plan.sizes[plan.comm.rank], batch * channels, plan.sizes
    sent = torch.cat([part.reshape(-1) for part in rows.split(sizes, dim=1)])
    receive = [nodes * w * unit for w in width]
    received = plan.comm.all_to_all(sent, [size * mine * unit for size in sizes], receive, f"processor {way}")
    parts = received.split(receive)
    return torch.cat([part.view(batch, nodes, w, channels) for part, w in zip(parts, width, strict=True)], dim=2)


def gather_edges(graph: Graph, comm: Comm, device: torch.device | str) -> Edges:
    """The processor's edges of all ranks: with cut heads a rank attends along every edge."""
    mine = graph.processor
    parts = mine.source, mine.destination + graph.hidden.start, mine.features
    source, destination, features = (_gather(torch.from_numpy(part).to(device), comm) for part in parts)
    return Edges(source.numpy(), destination.numpy(), features.numpy(), graph.hidden_bounds[-1])


def _gather(part: Tensor, comm: Comm) -> Tensor:
    """The parts of all ranks, of any lengths, one after the other."""
    each = [1] * comm.ranks
    lengths = comm.all_to_all(torch.full((comm.ranks,), len(part), device=part.device), each, each, "edges").tolist()
    everyone = part.repeat(comm.ranks, *[1] * (part.ndim - 1))
    return comm.all_to_all(everyone, [len(part)] * comm.ranks, lengths, "edges").cpu()
