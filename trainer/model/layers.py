"""The graph-transformer block: attend along edges, then a perceptron at every node, each added to what was there.

A block knows rows, not ranks: whoever calls it has put the halo rows behind the owned ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainer.graph.sharded_graph import EDGE_FEATURES, Chunk
from trainer.model.attention import attend

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Chunk], tuple[Tensor, Tensor]]


def along_edges(query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Attention of rows that are all here; see `attend`."""
    attended: tuple[Tensor, Tensor] = attend(query, key, value, tilt, chunk.features, chunk.lists)
    return attended


class Block(nn.Module):
    """Graph-transformer block with edge features.

    The weights are those of Shi et al. (2021), Masked label prediction, as the field uses them: key and value of an
    edge are those of its source plus a projection of its features. Biases that softmax or the projection absorb are
    left out.

    Args:
      channels: of all rows.
      num_heads: of attention; divides channels.
      mlp_ratio: width of the perceptron's inner layer, in channels.
      one_node_set: sources and destinations are the same nodes, and share a normalisation.
    """

    def __init__(self, channels: int, num_heads: int, mlp_ratio: int = 4, one_node_set: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.norm_source = nn.LayerNorm(channels)
        self.norm_destination = self.norm_source if one_node_set else nn.LayerNorm(channels)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.query_self = nn.Linear(channels, 2 * channels)
        self.edge = nn.Parameter(torch.empty(num_heads, channels // num_heads, EDGE_FEATURES))
        nn.init.uniform_(self.edge, -(EDGE_FEATURES**-0.5), EDGE_FEATURES**-0.5)
        self.project = nn.Linear(channels, channels)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels), nn.GELU(), nn.Linear(mlp_ratio * channels, channels)
        )

    def forward(self, source: Tensor, destination: Tensor, chunk: Chunk, attention: Attention = along_edges) -> Tensor:
        """One update of the destinations.

        Args:
          source: [batch, sources, channels], of the chunk.
          destination: [batch, destinations, channels], of the chunk.
          chunk: the edges between them.
          attention: of queries, keys, values and tilts along those edges.
        Returns: [batch, destinations, channels].
        """
        normed = self.norm_destination(destination)
        query, own = self.query_self(normed).chunk(2, dim=-1)
        normed = normed if source is destination and self.norm_source is self.norm_destination else None
        key, value = self.key_value(self.norm_source(source) if normed is None else normed).chunk(2, dim=-1)
        edge = torch.block_diag(*self.edge)  # [channels, heads x features]
        tilt = query @ edge
        query, key, value, tilt = [rows.unflatten(-1, (self.num_heads, -1)) for rows in (query, key, value, tilt)]
        values, sums = attention(query, key, value, tilt, chunk)
        attended = values.flatten(-2) + sums.flatten(-2) @ edge.T
        rows = destination + self.project(attended + own)
        updated: Tensor = rows + self.mlp(self.norm_mlp(rows))
        return updated


def maybe_checkpoint(active: bool, function, *inputs):  # type: ignore[no-untyped-def]
    """function(*inputs); if active, what it computes on the way is computed again in backward instead of kept."""
    if active and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def take(rows: Tensor, index: Tensor | None) -> Tensor:
    """Forward: rows [..., index, :] of different indices. Backward: gradients back in their places, zero elsewhere."""
    if index is None:
        return rows
    taken: Tensor = _Take.apply(rows, index)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """As index_select, whose backward adds, atomically on CUDA: here no index occurs twice, and nothing is added."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.rows = rows.shape[-2]
        return rows.index_select(-2, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        whole = gradient.new_zeros((*gradient.shape[:-2], ctx.rows, gradient.shape[-1]))
        return whole.index_copy_(-2, index.long(), gradient), None
