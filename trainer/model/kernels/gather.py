"""Attention by torch's own functions: softmax and sums along the rows of tables of edges (edge_lists.py).

Nobody scatters, so that sums have one order, and no atomic operation is needed. Outputs and the gradients of query and
tilt come from the incoming tables, those of key and value from the outgoing ones. A table is worked off in blocks of
nodes that fit the cache: no array of all edges and all channels ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from trainer.graph.edge_lists import Block, EdgeLists, Table
from trainer.model.kernels.kernel import Rows, wide

BLOCK = {"cpu": 2**19}  # numbers gathered at once: 2 MB of float32, so that a few such arrays fit the cache
BLOCK_ELSEWHERE = 2**25  # few large kernels
PLANNED_BLOCKS = 2  # of each table: the others are alike, and only neighbours overlap


@dataclass(frozen=True)
class GatherKernel:
    """Attributes.

    block: numbers gathered at once; None: what is good for the device.
    most_blocks: of each table that are computed; None: all of them.
    """

    block: int | None = None
    most_blocks: int | None = None
    tables = True

    def lacking(self, device: torch.device) -> str:
        """Never: torch is there."""
        return ""

    def supports(self, dtype: torch.dtype) -> bool:
        """Every type of floating point."""
        return True

    def planned(self, device: torch.device) -> GatherKernel:
        """Blocks as large as on that device, but only the first of each table."""
        block = None if device.type == "cpu" else BLOCK_ELSEWHERE
        return replace(self, block=block, most_blocks=PLANNED_BLOCKS)

    def forward(self, rows: Rows, features: Tensor, lists: EdgeLists) -> tuple[Tensor, Tensor, Tensor]:
        """The two sums, and log sum exp(logit) [batch, destinations, heads], with which p = exp(logit - it)."""
        (query, key, value, tilt), lists = rows, lists.with_tables()
        out, carried = _blank(query, lists.incoming), _blank(tilt, lists.incoming)
        offset = query.new_zeros(query.shape[:3], dtype=features.dtype)
        for block in self._blocks(lists.blocks_in, lists.incoming, query):
            edge = _of(features, block)
            queries, tilts = _gather(query, block.nodes), _gather(tilt, block.nodes)
            logits = _logits(queries, _gather(key, block.ends), tilts, edge, block)
            top = logits.amax(2, keepdim=True)
            weight = (logits - top).exp_()
            total = weight.sum(2, keepdim=True)
            weight /= total
            offset.index_copy_(1, block.nodes, (total.log() + top).squeeze(2))
            mean = (_gather(value, block.ends) * weight.unsqueeze(-1)).sum(2)
            out.index_copy_(1, block.nodes, mean.to(out.dtype))
            carried.index_copy_(1, block.nodes, torch.einsum("bnwh,nwf->bnhf", weight, edge).to(out.dtype))
        return out, carried, offset

    def backward(
        self, rows: Rows, features: Tensor, offset: Tensor, out: Tensor, carried: Tensor, lists: EdgeLists
    ) -> Rows:
        """Gradients of query, key, value, tilt, given those of the two sums."""
        (query, key, value, tilt), lists = rows, lists.with_tables()
        scale = query.shape[-1] ** -0.5
        d_query, d_tilt = _blank(query, lists.incoming), _blank(tilt, lists.incoming)
        d_key, d_value = _blank(key, lists.outgoing), _blank(value, lists.outgoing)
        # p, and the gradient of the logit times scale; behind the last edge there is room for empty places
        weights, slopes = offset.new_empty(2, query.shape[0], lists.edges + 1, query.shape[2])
        for block in self._blocks(lists.blocks_in, lists.incoming, query):
            edge, keys = _of(features, block), _gather(key, block.ends)
            logits = _logits(_gather(query, block.nodes), keys, _gather(tilt, block.nodes), edge, block)
            weight = (logits - _gather(offset, block.nodes).unsqueeze(2)).exp_()
            slope = (_gather(value, block.ends) * _gather(out, block.nodes).unsqueeze(2)).sum(-1)
            slope += torch.einsum("bnhf,nwf->bnwh", _gather(carried, block.nodes), edge)
            slope -= (weight * slope).sum(2, keepdim=True)
            slope *= weight * scale
            d_query.index_copy_(1, block.nodes, (keys * slope.unsqueeze(-1)).sum(2).to(query.dtype))
            d_tilt.index_copy_(1, block.nodes, torch.einsum("bnwh,nwf->bnhf", slope, edge).to(query.dtype))
            own = block.edges if block.empty is None else block.edges.masked_fill(block.empty.squeeze(-1), lists.edges)
            weights.index_copy_(1, own.reshape(-1), weight.flatten(1, 2))
            slopes.index_copy_(1, own.reshape(-1), slope.flatten(1, 2))
        for block in self._blocks(lists.blocks_out, lists.outgoing, key):
            for ends, factor, result in ((out, weights, d_value), (query, slopes, d_key)):
                terms = _gather(ends, block.ends) * _per_edge(factor, block).unsqueeze(-1)
                result.index_copy_(1, block.nodes, terms.sum(2).to(key.dtype))
        return Rows(d_query, d_key, d_value, d_tilt)

    def _blocks(
        self, cut: Callable[[Table, int], Iterator[Block]], tables: tuple[Table, ...], rows: Tensor
    ) -> Iterator[Block]:
        """Blocks for which so much is gathered at once of rows [batch, nodes, heads, depth] as suits the device."""
        batch, _, heads, depth = rows.shape
        budget = self.block or BLOCK.get(rows.device.type, BLOCK_ELSEWHERE)
        for table in tables:
            size = max(1, budget // max(1, batch * heads * depth * table.width))
            # By torch.export, which would write down every block, all at once.
            yield from islice(cut(table, len(table) if torch.compiler.is_compiling() else size), self.most_blocks)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """[batch, rows, ...] -> [batch, *index, ...], in the type in which sums are taken."""
    found = rows.index_select(1, index.reshape(-1)).to(wide(rows.dtype))
    return found.view(rows.shape[0], *index.shape, *rows.shape[2:])


def _logits(query: Tensor, key: Tensor, tilt: Tensor, features: Tensor, block: Block) -> Tensor:
    """[batch, nodes, width, heads]. query and tilt are of the block's nodes, key and features of its edges."""
    logits = (query.unsqueeze(2) * key).sum(-1)
    logits += torch.einsum("bnhf,nwf->bnwh", tilt, features)
    logits *= query.shape[-1] ** -0.5
    return logits if block.empty is None else logits.masked_fill_(block.empty, -torch.inf)


def _blank(like: Tensor, tables: tuple[Table, ...]) -> Tensor:
    """Room for results of all nodes [batch, nodes, ...]: zeros if some nodes are in no table."""
    filled = sum(len(table) for table in tables) == like.shape[1]
    return torch.empty_like(like) if filled else torch.zeros_like(like)


def _of(features: Tensor, block: Block) -> Tensor:
    """[nodes, width, features] of the block's edges."""
    return features.index_select(0, block.edges.reshape(-1)).view(*block.edges.shape, features.shape[1])


def _per_edge(values: Tensor, block: Block) -> Tensor:
    """[batch, nodes, width, heads] of values [batch, edges, heads], zero in empty places."""
    found = _gather(values, block.edges)
    return found if block.empty is None else found.masked_fill_(block.empty, 0.0)
