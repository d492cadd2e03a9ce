"""Gradients of the whole from those of the ranks: the sum over the model group, the mean over the data group.

    rank             0      1      2      3          M = 2, D = 2
    cells of sample  k: a   k: b   l: a   l: b       each rank: the gradient of its own cells of its own sample
    gradient         (ka + kb + la + lb) / 2         one all-reduce over the world, divided by D

No parameter is an exception, so no parameter needs a name.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.comm import Comm

BUCKET_BYTES = 64 * 2**20


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], data_size: int, comm: Comm) -> None:
    """Replace each rank's gradients by the sum over the model group and the mean over the data group.

    All ranks of `comm` call it together, with the same parameters in the same order. A parameter without a gradient
    on this rank counts as zero, also where there is one rank. Buckets depend on the parameters alone: the
    order of sums is the same in every step.

    Args:
      parameters: of the model; those that are frozen are skipped.
      data_size: D.
      comm: model groups x data groups.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    _fill_gradients(trained)
    if comm.ranks == 1:
        return
    for bucket in _buckets(trained):
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        comm.sum(flat, "gradients")
        flat /= data_size
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


def _fill_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Zero where a parameter has no gradient: optimizers that decay weights treat zero and none differently.

    On several ranks none of them knows without a message whether another has a gradient; so that one rank trains as
    many do, it takes zeros too.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Neighbours of one type, up to BUCKET_BYTES together."""
    buckets: list[list[torch.nn.Parameter]] = []
    filled, kind = 0, None
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not buckets or filled + size > BUCKET_BYTES or parameter.dtype != kind:
            buckets.append([])
            filled, kind = 0, parameter.dtype
        buckets[-1].append(parameter)
        filled += size
    return buckets


def broadcast_parameters(tensors: Iterable[Tensor], comm: Comm) -> None:
    """Give all ranks the values of the first: what was drawn at random is then equal, whatever the ranks drew."""
    for tensor in tensors:
        comm.copy_first(tensor, "weights")
