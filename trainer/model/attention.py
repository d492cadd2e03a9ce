"""Softmax attention along the edges of a graph, by whichever kernel the lists of edges were made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardio.errors import PlanError
from trainer.graph.edge_lists import EdgeLists
from trainer.model.kernels.gather import GatherKernel
from trainer.model.kernels.kernel import Kernel, Rows, wide

TORCH = GatherKernel()  # for types that another does not know, and for torch.export


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
        return TORCH.forward(Rows(query, key, value, tilt), features.to(wide(dtype)), lists)[:2]
    attended: tuple[Tensor, Tensor] = _Attention.apply(query, key, value, tilt, features, lists)  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, lists: EdgeLists
    ) -> tuple[Tensor, Tensor]:
        rows = Rows(*(tensor.contiguous() for tensor in (query, key, value, tilt)))
        features = features.to(wide(query.dtype)).contiguous()
        kernel = _kernel_of(lists, query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            out, carried, offset = kernel.forward(rows, features, lists)
        ctx.lists = lists
        ctx.save_for_backward(*rows, features, offset)
        return out, carried

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        lists: EdgeLists = ctx.lists
        *rows, features, offset = ctx.saved_tensors
        given = features, offset, out.contiguous(), carried.contiguous()
        with torch.autocast(out.device.type, enabled=False):
            return *_kernel_of(lists, out.dtype).backward(Rows(*rows), *given, lists), None, None


def _kernel_of(lists: EdgeLists, dtype: torch.dtype) -> Kernel:
    kernel: Kernel = lists.kernel or TORCH
    return kernel if kernel.supports(dtype) else TORCH
