"""Softmax attention along the edges of a graph, forward and backward by gathering alone.

    edges  0>0 2>0 1>1 2>1 0>2       incoming   destinations 0 1: sources [[0 2] [1 2]]   destination 2: [[0]]
                                     outgoing   sources 0 2: destinations [[0 2] [0 1]]   source 1: [[1]]

Nodes with equally many edges make a bucket, whose edges are a table [nodes, width]: softmax and sums run along its
rows. Nobody scatters, so that sums have one order, and no atomic operation is needed. Outputs and the gradients of
query and tilt come from the incoming lists, those of key and value from the outgoing ones. A bucket is worked off in
blocks of nodes that fit the cache: no array of all edges and all channels ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardio.errors import PlanError

Int64 = NDArray[np.int64]
KERNELS = ("auto", "torch", "cpp")
PADDING = 8  # of the places in a bucket, one in so many may be empty
BLOCK = {"cpu": 2**19}  # numbers gathered at once: 2 MB of float32, what a core's cache holds
BLOCK_ELSEWHERE = 2**25  # few large kernels


@dataclass(frozen=True, eq=False)
class Bucket:
    """Nodes with about equally many edges, as a table.

    Attributes:
      nodes: int64 [nodes].
      ends: int64 [nodes, width], the other end of every edge; where empty, that of the node's last edge.
      edges: int64 [nodes, width], which edge it is; where empty, the number of edges.
      empty: bool [nodes, width, 1]; None if nothing is.
    """

    nodes: Tensor
    ends: Tensor
    edges: Tensor
    empty: Tensor | None

    def blocks(self, rows: int) -> Iterator[Bucket]:
        """Cut into buckets of at most that many nodes."""
        for first in range(0, len(self.nodes), rows):
            part = slice(first, first + rows)
            empty = None if self.empty is None else self.empty[part]
            yield Bucket(self.nodes[part], self.ends[part], self.edges[part], empty)


@dataclass(frozen=True, eq=False)
class EdgeLists:
    """Edges by destination and by source, built once, shared by all layers; nothing in a step depends on data.

    Attributes:
      sources, destinations: number of nodes at which edges may start and end.
      edges: number of edges.
      incoming: by destination; edges are counted as they were given.
      outgoing: by source; edges are counted in the order in which the tables of incoming list them, empty places too.
      kernel: torch or cpp.
    """

    sources: int
    destinations: int
    edges: int
    incoming: tuple[Bucket, ...]
    outgoing: tuple[Bucket, ...]
    kernel: str

    @staticmethod
    def build(
        source: Tensor | Int64,
        destination: Tensor | Int64,
        sources: int,
        destinations: int,
        device: torch.device | str = "cpu",
        kernel: str = "auto",
    ) -> EdgeLists:
        """Sort edges by their ends.

        Args:
          source, destination: int64 [edges], local ids, in any order; features are to be given in this order.
          sources, destinations: how many nodes there are; those without edges get zeros.
          device: where the lists live.
          kernel: torch, cpp (for CPUs, compiled when first used), or auto: cpp where it can be had.
        Raises: PlanError if an edge ends at no node, or the kernel is unknown.
        """
        if kernel not in KERNELS:
            raise PlanError(f"attention kernel {kernel!r} is unknown. Use one of: {', '.join(KERNELS)}.")
        start, end = (np.asarray(torch.as_tensor(ids).cpu(), dtype=np.int64) for ids in (source, destination))
        if start.shape != end.shape or start.ndim != 1:
            raise PlanError(f"edges have sources {start.shape} and destinations {end.shape}. Give one each per edge.")
        for name, ids, count in (("source", start, sources), ("destination", end, destinations)):
            if ids.size and not 0 <= ids.min() <= ids.max() < count:
                raise PlanError(
                    f"edges have {name}s {ids.min()} to {ids.max()}, but there are {count}. Give local ids of the "
                    f"nodes at hand, or more {name}s."
                )
        incoming = _buckets(end, start, np.arange(end.size), end.size)
        listed = [edges.ravel() for _, _, edges in incoming]
        slots = np.concatenate([*listed, np.empty(0, np.int64)])
        slot = np.empty(end.size + 1, np.int64)
        slot[slots] = np.arange(slots.size)
        outgoing = _buckets(start, end, slot[:-1], slots.size)
        lists = [
            tuple(_to(table, none, device) for table in tables)
            for tables, none in ((incoming, end.size), (outgoing, slots.size))
        ]
        return EdgeLists(sources, destinations, end.size, lists[0], lists[1], "torch")


Table = tuple[Int64, Int64, Int64]


def _buckets(node: Int64, end: Int64, edge: Int64, none: int) -> list[Table]:
    """Tables (nodes, ends, edges) of all nodes that have edges, widest first.

    From the widest down a bucket takes in nodes with fewer edges until one in PADDING of its places is empty: a few
    tables, however many different numbers of edges there are.
    """
    order = np.argsort(node, kind="stable")
    nodes, first, degrees = np.unique(node[order], return_index=True, return_counts=True)
    tables: list[Table] = []
    widths, counts = np.unique(degrees, return_counts=True)
    widths, counts = widths[::-1], counts[::-1]
    at = 0
    while at < widths.size:
        rows, edges = np.cumsum(counts[at:]), np.cumsum(counts[at:] * widths[at:])
        fits = (rows * widths[at] - edges) * PADDING <= rows * widths[at]
        last = at + (int(np.argmin(fits)) if not fits.all() else fits.size) - 1
        mine = np.flatnonzero((degrees <= widths[at]) & (degrees >= widths[last]))
        place = np.minimum(np.arange(widths[at]), degrees[mine, None] - 1)
        listed = order[first[mine, None] + place]
        empty = np.arange(widths[at]) >= degrees[mine, None]
        tables.append((nodes[mine], end[listed], np.where(empty, none, edge[listed])))
        at = last + 1
    return tables


def _to(table: Table, none: int, device: torch.device | str) -> Bucket:
    nodes, ends, edges = (torch.from_numpy(array).to(device) for array in table)
    empty = (edges == none).unsqueeze(-1)
    return Bucket(nodes, ends, edges, empty if bool(empty.any()) else None)


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
      features: [edges, features], constant: they get no gradient.
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
    kind = query.device.type
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    attended: tuple[Tensor, Tensor] = _Attention.apply(
        *(tensor.to(dtype).contiguous() for tensor in (query, key, value, tilt)), features, lists
    )  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, lists: EdgeLists
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            out, carried, offset = _forward(query, key, value, tilt, features, lists)
        ctx.lists = lists
        ctx.save_for_backward(query, key, value, tilt, features, offset)
        return out, carried

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(out.device.type, enabled=False):
            query, key, value, tilt, features, offset = ctx.saved_tensors
            gradients = _backward(
                query, key, value, tilt, features, offset, out.contiguous(), carried.contiguous(), ctx.lists
            )
        return *gradients, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(buckets: tuple[Bucket, ...], rows: Tensor) -> Iterator[Bucket]:
    """Blocks for which so much is gathered at once of rows [batch, nodes, heads, depth] as is good for the device."""
    batch, _, heads, depth = rows.shape
    budget = BLOCK.get(rows.device.type, BLOCK_ELSEWHERE)
    for bucket in buckets:
        yield from bucket.blocks(max(1, budget // max(1, batch * heads * depth * bucket.ends.shape[1])))


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """[batch, rows, ...] -> [batch, *index, ...], in the type in which sums are taken."""
    found = rows.index_select(1, index.reshape(-1)).to(_wide(rows.dtype))
    return found.view(rows.shape[0], *index.shape, *rows.shape[2:])


def _logits(query: Tensor, key: Tensor, tilt: Tensor, features: Tensor, block: Bucket) -> Tensor:
    """[batch, nodes, width, heads]. query and tilt are of the block's nodes, key and features of its edges."""
    logits = (query.unsqueeze(2) * key).sum(-1)
    logits += torch.einsum("bnhf,nwf->bnwh", tilt, features)
    logits *= query.shape[-1] ** -0.5
    return logits if block.empty is None else logits.masked_fill_(block.empty, -torch.inf)


def _features(features: Tensor, like: Tensor) -> Tensor:
    """With a row of zeros for the edge that an empty place has."""
    return torch.nn.functional.pad(features.to(_wide(like.dtype)), (0, 0, 0, 1))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, lists: EdgeLists
) -> tuple[Tensor, Tensor, Tensor]:
    """The two sums, and log sum exp(logit) [batch, destinations, heads], with which p = exp(logit - it)."""
    features = _features(features, query)
    out, carried = torch.zeros_like(query), torch.zeros_like(tilt)
    offset = query.new_zeros(query.shape[:3], dtype=_wide(query.dtype))
    for block in _blocks(lists.incoming, query):
        edge = features[block.edges]
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
    features = _features(features, query)
    scale = query.shape[-1] ** -0.5
    d_query, d_key, d_value, d_tilt = (torch.zeros_like(tensor) for tensor in (query, key, value, tilt))
    weights, slopes = [], []  # p and the gradient of the logit times scale, of every place in the incoming tables
    for block in _blocks(lists.incoming, query):
        edge, keys = features[block.edges], _gather(key, block.ends)
        logits = _logits(_gather(query, block.nodes), keys, _gather(tilt, block.nodes), edge, block)
        weight = (logits - _gather(offset, block.nodes).unsqueeze(2)).exp_()
        slope = (_gather(value, block.ends) * _gather(out, block.nodes).unsqueeze(2)).sum(-1)
        slope += torch.einsum("bnhf,nwf->bnwh", _gather(carried, block.nodes), edge)
        slope -= (weight * slope).sum(2, keepdim=True)
        slope *= weight * scale
        d_query.index_copy_(1, block.nodes, (keys * slope.unsqueeze(-1)).sum(2).to(query.dtype))
        d_tilt.index_copy_(1, block.nodes, torch.einsum("bnwh,nwf->bnhf", slope, edge).to(query.dtype))
        weights.append(weight.flatten(1, 2))
        slopes.append(slope.flatten(1, 2))
    nothing = offset.new_zeros(offset.shape[0], 1, offset.shape[2])  # of an empty place
    weight, slope = torch.cat([*weights, nothing], 1), torch.cat([*slopes, nothing], 1)
    for block in _blocks(lists.outgoing, key):
        for rows, factor, result in ((out, weight, d_value), (query, slope, d_key)):
            terms = _gather(rows, block.ends) * _gather(factor, block.edges).unsqueeze(-1)
            result.index_copy_(1, block.nodes, terms.sum(2).to(key.dtype))
    return d_query, d_key, d_value, d_tilt
