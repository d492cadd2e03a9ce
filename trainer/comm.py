"""Who says what to whom: every message between ranks leaves through here.

    Alone         one rank: there is nobody to tell
    TorchComm     the ranks of a process group
    Counting      the same, and bytes are counted by tag

A message carries a tag, such as `encoder forward`, so that bytes are counted by what they are for. All ranks of a
group send the same messages in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


class Comm(Protocol):
    """The ranks of a group, as one of them sees it.

    Attributes:
      rank, ranks: this one, and how many.
      device: on which tensors travel.
      group: of torch.distributed, for libraries that ask for it; None for one rank, or for all there are.
    """

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def group(self) -> dist.ProcessGroup | None: ...

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], tag: str) -> Tensor:
        """Of [sum of send, ...] the first send[0] rows to rank 0, and so on.

        Returns: [sum of receive, ...], the rows of rank 0 first.
        """
        ...

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        """Over the ranks, in the place of the tensor, which is contiguous."""
        ...

    def copy_first(self, tensor: Tensor, tag: str) -> Tensor:
        """The values of rank 0, in the place of the tensor."""
        ...

    def gather(self, thing: T, tag: str) -> list[T]:
        """The things of all ranks, by rank. For small things: every rank gets all of them."""
        ...

    def tell(self, thing: T, tag: str) -> T:
        """The thing of rank 0; what the others give is not looked at."""
        ...


class Alone:
    """One rank."""

    rank, ranks, device = 0, 1, torch.device("cpu")
    group: dist.ProcessGroup | None = None

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], tag: str) -> Tensor:
        return rows

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        return tensor

    def copy_first(self, tensor: Tensor, tag: str) -> Tensor:
        return tensor

    def gather(self, thing: T, tag: str) -> list[T]:
        return [thing]

    def tell(self, thing: T, tag: str) -> T:
        return thing


class TorchComm:
    """The ranks of a process group.

    Args: group: whose; None for all ranks there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        on_gpus = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], tag: str) -> Tensor:
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, list(receive), list(send), group=self.group)
        return received

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def copy_first(self, tensor: Tensor, tag: str) -> Tensor:
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def gather(self, thing: T, tag: str) -> list[T]:
        things: list[Any] = [None] * self.ranks
        dist.all_gather_object(things, thing, group=self.group)
        return things

    def tell(self, thing: T, tag: str) -> T:
        told = [thing if self.rank == 0 else None]
        dist.broadcast_object_list(told, group=self.group, group_src=0)
        return told[0]  # type: ignore[return-value]


class Counting:
    """Another communicator, and what this rank sends through it to others.

    Attributes:
      sent: bytes by tag; a sum counts as the ring that it is at best. Of things (`gather`, `tell`) nothing is known.
      rows: by tag, bytes of a row, summed over the exchanges.
      messages: exchanges and sums by tag.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm, self.rank, self.ranks = comm, comm.rank, comm.ranks
        self.device, self.group = comm.device, comm.group
        self.sent: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], tag: str) -> Tensor:
        row = rows.element_size() * rows.shape[1:].numel()
        self.sent[tag] += (sum(send) - send[self.rank]) * row
        self.rows[tag] += row
        self.messages[tag] += 1
        return self.comm.all_to_all(rows, send, receive, tag)

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        self._count_ring(tensor, 2 * (self.ranks - 1), tag)
        return self.comm.sum(tensor, tag)

    def copy_first(self, tensor: Tensor, tag: str) -> Tensor:
        self._count_ring(tensor, self.ranks - 1, tag)
        return self.comm.copy_first(tensor, tag)

    def _count_ring(self, tensor: Tensor, shares: int, tag: str) -> None:
        self.sent[tag] += shares * tensor.numel() * tensor.element_size() // self.ranks
        self.messages[tag] += 1

    def gather(self, thing: T, tag: str) -> list[T]:
        self.messages[tag] += 1
        return self.comm.gather(thing, tag)

    def tell(self, thing: T, tag: str) -> T:
        self.messages[tag] += 1
        return self.comm.tell(thing, tag)


def sum_arrays(comm: Comm, array: NDArray[Any], tag: str) -> NDArray[Any]:
    """The sum over the ranks of arrays that live on the host, wherever tensors travel."""
    total = torch.from_numpy(array).to(comm.device, copy=True).contiguous()
    summed: NDArray[Any] = comm.sum(total, tag).cpu().numpy()
    return summed


def join_world(timeout: timedelta | None = None) -> Comm:
    """All ranks that torch.distributed knows; alone where it was not begun, or with one.

    Args: timeout: after which a rank gives up waiting for another; default: that of torch's own group.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Alone()
    return TorchComm(dist.new_group(timeout=timeout) if timeout else None)


def join_group(size: int, timeout: timedelta | None) -> Comm:
    """The `size` neighbouring ranks to which this one belongs: every rank makes all groups, in the same order."""
    if size == 1:
        return Alone()
    firsts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in firsts]
    return TorchComm(groups[dist.get_rank() // size])
