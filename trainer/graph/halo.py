"""Copies of the rows that a rank's edges need from other ranks: agreed once, exchanged in every layer.

    rank 0 owns 0 1 2, its edges start at 0 2 4     ->  rows   0 1 2 | 4      edges start at rows 0 2 3
    rank 1 owns 3 4,   its edges start at 1 3 4     ->  rows   3 4 | 1        edges start at rows 2 0 1

The graph may be directed, bipartite and as asymmetric as it likes: a rank knows what it needs, and asks for it. Who
sends what is settled in build_halo; nothing in a step depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardio.errors import PlanError, TopologyError
from trainer.comm import Comm


@dataclass(frozen=True)
class Traffic:
    """Rows (or bytes) that one exchange costs one rank in forward; backward has sent and received swapped.

    Attributes:
      sent: to all other ranks.
      received: from all other ranks.
      all_gather: what the rank would send to give its rows to all others.
    """

    sent: int
    received: int
    all_gather: int


@dataclass(frozen=True, eq=False)
class Halo:
    """Who sends which rows to whom, as one rank sees it.

    Attributes:
      comm: the model group.
      part: of the model, whose rows these are; the tag of the messages.
      owned: rows that this rank owns, nodes/M.
      send: int64 [sent], owned rows that others need, by receiver, then by id.
      send_counts, receive_counts: [M], rows for and from every rank.
      source: int32 [edges/M], where each edge starts in the rows that `exchange` returns; empty where lists of edges
        say it.
    """

    comm: Comm
    part: str
    owned: int
    send: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    source: Tensor

    @property
    def ranks(self) -> int:
        return len(self.send_counts)

    @property
    def rows(self) -> int:
        """Owned and halo rows."""
        return self.owned + sum(self.receive_counts)

    def traffic(self, row_bytes: int = 1) -> Traffic:
        """Bytes of an exchange of rows of that many bytes; with 1, rows."""
        rows = sum(self.send_counts), sum(self.receive_counts), self.owned * (self.ranks - 1)
        return Traffic(*(count * row_bytes for count in rows))


def build_halo(
    source: NDArray[np.signedinteger[Any]],
    bounds: Sequence[int],
    comm: Comm,
    device: torch.device | str = "cpu",
    part: str = "rows",
) -> Halo:
    """Agree on the halo: every rank tells the owners which rows it needs. All ranks of the group call it together.

    Args:
      source: [edges/M], global ids of the nodes at which this rank's edges start, in any order.
      bounds: [M + 1], first node that every rank owns, then the number of nodes; the same on all ranks.
      comm: the model group.
      device: where the indices live, and, for the backend's sake, travel.
      part: of the model, whose rows these are.

    Raises: TopologyError if there are other ranks than the bounds say, or they have other bounds; PlanError if a
      source is no node.
    """
    _check_ranks(comm, len(bounds) - 1)
    rank = comm.rank
    first, last = bounds[rank], bounds[rank + 1]
    if source.size and not 0 <= source.min() <= source.max() < bounds[-1]:
        raise PlanError(
            f"edges start at nodes {source.min()} to {source.max()}, but there are nodes 0 to {bounds[-1] - 1}. "
            "Give the bounds of the nodes at which the edges start."
        )
    remote = (source < first) | (source >= last)
    needed = np.unique(source[remote]).astype(np.int64)  # owners hold contiguous ids: this is by owner, then by id
    receive_counts = np.diff(np.searchsorted(needed, bounds))
    local = np.where(remote, last - first + np.searchsorted(needed, source), source - first)
    wanted, send_counts = _ask(needed, receive_counts, comm, device)
    if wanted.numel() and not first <= wanted.min() <= wanted.max() < last:
        raise TopologyError(
            f"rank {rank} owns nodes {first} to {last - 1}, but is asked for {wanted.min()} to {wanted.max()}. "
            "Give the same bounds on all ranks."
        )
    counts = tuple(send_counts), tuple(receive_counts.tolist())
    rows = torch.from_numpy(local.astype(np.int32)).to(device)
    return Halo(comm, part, last - first, wanted - first, *counts, rows)


def _ask(
    needed: NDArray[np.int64],
    receive_counts: NDArray[np.int64],
    comm: Comm,
    device: torch.device | str,
) -> tuple[Tensor, list[int]]:
    """Send to every rank the ids needed of it. Returns the ids [sent] that the ranks need of this one, and how many."""
    if receive_counts.size == 1:
        return torch.empty(0, dtype=torch.int64, device=device), [0]
    asked = torch.from_numpy(receive_counts).to(device)
    each = [1] * comm.ranks
    send_counts = comm.all_to_all(asked, each, each, "halo").tolist()
    wanted = comm.all_to_all(torch.from_numpy(needed).to(device), receive_counts.tolist(), send_counts, "halo")
    return wanted, send_counts


def exchange(owned: Tensor, halo: Halo) -> Tensor:
    """Forward: fetch halo rows from their owners. Backward: return their gradients, and add the sum over the borrowers.

    All ranks of the group call it together, also those that need nothing or are asked for nothing. On one rank it
    returns `owned` itself.

    Args:
      owned: [..., nodes/M, channels], the rows this rank owns; leading dimensions alike on all ranks.
      halo: of the nodes whose rows these are.

    Returns: [..., nodes/M + halo, channels]; owned rows first, halo rows by owner, then by id.
    Raises: TopologyError if `halo` was built for another group size or another number of owned rows.
    """
    if halo.ranks == 1:
        _check_rows(owned, halo)
        return owned
    return torch.cat([owned, fetch(owned, halo)], dim=-2)


def fetch(owned: Tensor, halo: Halo) -> Tensor:
    """The halo rows of `exchange` alone, [..., halo, channels]: what to keep where a layer is computed twice."""
    _check_rows(owned, halo)
    if halo.ranks == 1:
        return owned[..., :0, :]
    _check_ranks(halo.comm, halo.ranks)
    fetched: Tensor = _Fetch.apply(owned, halo)  # type: ignore[no-untyped-call]
    return fetched


def _check_rows(owned: Tensor, halo: Halo) -> None:
    if owned.ndim < 2 or owned.shape[-2] != halo.owned:
        raise TopologyError(
            f"owned has shape {tuple(owned.shape)}, but the halo was built for [..., {halo.owned}, channels]. "
            "Build one halo for each node set and cut."
        )


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owned: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        rows = owned.movedim(-2, 0).index_select(0, halo.send).contiguous()
        received = halo.comm.all_to_all(rows, halo.send_counts, halo.receive_counts, f"{halo.part} forward")
        return received.movedim(0, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        halo: Halo = ctx.halo
        lent = gradient.movedim(-2, 0).contiguous()
        returned = halo.comm.all_to_all(lent, halo.receive_counts, halo.send_counts, f"{halo.part} backward")
        owned = lent.new_zeros((halo.owned, *lent.shape[1:]))
        # A rank asks for a row once, so that no index occurs twice in one index_add_: the order of sums is fixed.
        counts = list(halo.send_counts)
        for index, part in zip(torch.split(halo.send, counts), torch.split(returned, counts), strict=True):
            owned.index_add_(0, index, part)
        return owned.movedim(0, -2), None


def _check_ranks(comm: Comm, ranks: int) -> None:
    if comm.ranks != ranks:
        raise TopologyError(
            f"the halo is for {ranks} ranks, the model group has {comm.ranks}. Give the model group, and build the "
            "halo anew when it changes."
        )
