"""Softmax attention along the edges of a graph, forward and backward by gathering alone.

Softmax and sums run along the rows of tables of edges (edge_lists.py). Nobody scatters, so that sums have one order,
and no atomic operation is needed. Outputs and the gradients of query and tilt come from the incoming tables, those of
key and value from the outgoing ones. A table is worked off in blocks of nodes that fit the cache: no array of all edges
and all channels ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardio.errors import PlanError
from trainer.graph.edge_lists import Block, EdgeLists, Table
from trainer.model.kernels import cpp as attention_kernel

BLOCK = {"cpu": 2**19}  # numbers gathered at once: 2 MB of float32, so that a few such arrays fit the cache
BLOCK_ELSEWHERE = 2**25  # few large kernels


# A compiler would unroll all blocks; the linears around it are what it is good for.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, lists: EdgeLists
) -> tuple[Tensor, Tensor]:
    """Softmax attention along edges: logit = (query . key + tilt . features) / sqrt(depth).

    Edge weights W stay outside, exactly: query . (W a) = (W^T query) . a, the tilt, and
    sum p (value + W a) = sum p value + W sum p a. Sums are taken in float32 at least. Under autocast all but the
    features is computed from its type.

    Args:
      query: [batch, destinations, heads, depth].
      key, value: [batch, sources, heads, depth].
      tilt: [batch, destinations, heads, features].
      features: [edges, features], constant: they get no gradient; edges by destination, as in the lists.
      lists: the edges.

    Returns: sum over edges of p value [batch, destinations, heads, depth], and of p features
      [batch, destinations, heads, features]; zeros where no edge ends.
    Raises: PlanError if shapes do not fit.
    """
    batch, _, heads, depth = query.shape
    fits = {
        "query": (query, (batch, lists.destinations, heads, depth)),
        "key": (key, (batch, lists.sources, heads, depth)),
        "value": (value, (batch, lists.sources, heads, depth)),
        "tilt": (tilt, (batch, lists.destinations, heads, features.shape[-1])),
        "features": (features, (lists.edges, features.shape[-1])),
    }
    for name, (tensor, shape) in fits.items():
        if tensor.shape != shape:
            raise PlanError(
                f"{name} has shape {tuple(tensor.shape)}, not {shape}. Build one EdgeLists for each set of edges."
            )
    if features.requires_grad:
        raise PlanError("features want a gradient, but are taken as constant. Detach them, and learn the edge weights.")
    kind = query.device.type
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    query, key, value, tilt = [tensor.to(dtype).contiguous() for tensor in (query, key, value, tilt)]
    if torch.compiler.is_compiling():  # by torch.export: a program of torch's own functions, without gradients
        return _forward(query, key, value, tilt, features.to(_wide(dtype)), lists)[:2]
    attended: tuple[Tensor, Tensor] = _Attention.apply(query, key, value, tilt, features, lists)  # type: ignore[no-untyped-call]
    return attended


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, lists: EdgeLists
    ) -> tuple[Tensor, Tensor]:
        query, key, value, tilt = (tensor.contiguous() for tensor in (query, key, value, tilt))
        features = features.to(_wide(query.dtype)).contiguous()
        with torch.autocast(query.device.type, enabled=False):
            if lists.compiled and query.dtype in attention_kernel.TYPES:
                edges = lists.ends, lists.offsets, lists.most
                out, carried, offset = attention_kernel.forward(query, key, value, tilt, features, *edges)
            else:
                out, carried, offset = _forward(query, key, value, tilt, features, lists)
        ctx.lists = lists
        ctx.save_for_backward(query, key, value, tilt, features, offset)
        return out, carried

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        lists: EdgeLists = ctx.lists
        tensors: _Tensors = *ctx.saved_tensors, out.contiguous(), carried.contiguous()
        with torch.autocast(out.device.type, enabled=False):
            if lists.compiled and out.dtype in attention_kernel.TYPES:
                return *attention_kernel.backward(*tensors, lists.ends, lists.offsets, lists.most), None, None
            return *_backward(*tensors, lists), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(cut: Callable[[Table, int], Iterator[Block]], tables: tuple[Table, ...], rows: Tensor) -> Iterator[Block]:
    """Blocks for which so much is gathered at once of rows [batch, nodes, heads, depth] as is good for the device."""
    batch, _, heads, depth = rows.shape
    budget = BLOCK.get(rows.device.type, BLOCK_ELSEWHERE)
    for table in tables:
        size = max(1, budget // max(1, batch * heads * depth * table.width))
        # By torch.export, which would write down every block, all at once.
        yield from cut(table, len(table) if torch.compiler.is_compiling() else size)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """[batch, rows, ...] -> [batch, *index, ...], in the type in which sums are taken."""
    found = rows.index_select(1, index.reshape(-1)).to(_wide(rows.dtype))
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


def _forward(
    query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, lists: EdgeLists
) -> tuple[Tensor, Tensor, Tensor]:
    """The two sums, and log sum exp(logit) [batch, destinations, heads], with which p = exp(logit - it)."""
    lists = lists.for_torch()
    out, carried = _blank(query, lists.incoming), _blank(tilt, lists.incoming)
    offset = query.new_zeros(query.shape[:3], dtype=features.dtype)
    for block in _blocks(lists.blocks_in, lists.incoming, query):
        edge = _of(features, block)
        logits = _logits(_gather(query, block.nodes), _gather(key, block.ends), _gather(tilt, block.nodes), edge, block)
        top = logits.amax(2, keepdim=True)
        weight = (logits - top).exp_()
        total = weight.sum(2, keepdim=True)
        weight /= total
        offset.index_copy_(1, block.nodes, (total.log() + top).squeeze(2))
        mean = (_gather(value, block.ends) * weight.unsqueeze(-1)).sum(2)
        out.index_copy_(1, block.nodes, mean.to(out.dtype))
        carried.index_copy_(1, block.nodes, torch.einsum("bnwh,nwf->bnhf", weight, edge).to(out.dtype))
    return out, carried, offset


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tilt: Tensor,
    features: Tensor,
    offset: Tensor,
    out: Tensor,
    carried: Tensor,
    lists: EdgeLists,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, tilt, given those of the two sums."""
    lists = lists.for_torch()
    scale = query.shape[-1] ** -0.5
    d_query, d_tilt = _blank(query, lists.incoming), _blank(tilt, lists.incoming)
    d_key, d_value = _blank(key, lists.outgoing), _blank(value, lists.outgoing)
    # p, and the gradient of the logit times scale; behind the last edge there is room for empty places
    weights, slopes = offset.new_empty(2, query.shape[0], lists.edges + 1, query.shape[2])
    for block in _blocks(lists.blocks_in, lists.incoming, query):
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
    for block in _blocks(lists.blocks_out, lists.outgoing, key):
        for rows, factor, result in ((out, weights, d_value), (query, slopes, d_key)):
            terms = _gather(rows, block.ends) * _per_edge(factor, block).unsqueeze(-1)
            result.index_copy_(1, block.nodes, terms.sum(2).to(key.dtype))
    return d_query, d_key, d_value, d_tilt
