"""Bring cells from the ranks that read them to the ranks that are to hold them: one all-to-all in the model group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardio.errors import TopologyError
from shardio.load.reading import Reading, meet, within
from shardio.load.topology import Topology

if TYPE_CHECKING:
    from shardio.load.batch import ShardedBatch


@torch.no_grad()
def redistribute(batch: ShardedBatch, group: Any, device: torch.device | str | None = None) -> Tensor:
    """The fields this rank is to hold, out of the chunks that the ranks of its model group read.

    Args:
      batch: with `pieces` of this rank; not differentiable, for it is input.
      group: process group of the model group, in the order of model ranks.
      device: where the exchange happens and the result lies. Default: the CPU.

    Returns:
      [batch, time, ensemble, cells/M, variables]; all cells where keep_batch_sharded is false.

    Raises:
      TopologyError if `group` is not the model group.
    """
    check_group(group, batch.reading.topology)
    size = batch.reading.topology.model_size
    device = torch.device("cpu" if device is None else device)
    per_cell = batch.shape[4] * batch.shape[2]
    me = dist.get_rank(group)
    sent = [sum(_cells(transfer) for transfer in _transfers(batch, me, to)) * per_cell for to in range(size)]
    received = [sum(_cells(transfer) for transfer in _transfers(batch, of, me)) * per_cell for of in range(size)]
    outgoing = torch.empty(sum(sent), device=device)
    _pack(batch, me, outgoing, per_cell)
    incoming = torch.empty(sum(received), device=device)
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    return _unpack(batch, me, incoming)


def check_group(group: Any, topology: Topology) -> None:
    """TopologyError unless `group` is the model group: another one would mix cells of different samples."""
    ranks = dist.get_process_group_ranks(group)
    ours = list(topology.model_ranks)
    # In a world that is not the one of the topology, size and place are all there is to compare.
    comparable = dist.get_world_size() == topology.world_size
    if len(ranks) != len(ours) or dist.get_rank(group) != topology.model_rank or (comparable and ranks != ours):
        raise TopologyError(
            f"the process group holds ranks {ranks}, the model group of rank {topology.rank} is {ours}. Give the "
            "loader dist.new_group of exactly these."
        )


def _transfers(batch: ShardedBatch, source: int, target: int) -> Iterator[tuple[int, int, slice]]:
    """(place in batch x time, chunk, cells) of all that `source` read and `target` wants, in the order it is sent."""
    reading: Reading = batch.reading
    dates = [date for sample in batch.indices for date in sample]
    for place, date in enumerate(dates):
        for chunk in reading.chunks_read(date, source):
            cells = meet(reading.cells_of(chunk), reading.wanted(target))
            if cells.stop > cells.start:
                yield place, chunk, cells


def _cells(transfer: tuple[int, int, slice]) -> int:
    return int(transfer[2].stop - transfer[2].start)


def _pack(batch: ShardedBatch, me: int, outgoing: Tensor, per_cell: int) -> None:
    _, _, ensemble, _, variables = batch.shape
    held = batch.pieces
    end = 0
    for target in range(batch.reading.topology.model_size):
        for place, _, cells in _transfers(batch, me, target):
            start, end = end, end + (cells.stop - cells.start) * per_cell
            block = outgoing[start:end].view(variables, ensemble, -1)
            piece = held[place]
            block.copy_(piece.values[..., within(cells, piece.cells)], non_blocking=True)


def _unpack(batch: ShardedBatch, me: int, incoming: Tensor) -> Tensor:
    samples, time, ensemble, cells_held, variables = batch.shape
    fields = torch.empty((samples * time, variables, ensemble, cells_held), device=incoming.device)
    wanted = batch.reading.wanted(me)
    end = 0
    for source in range(batch.reading.topology.model_size):
        for place, _, cells in _transfers(batch, source, me):
            start, end = end, end + (cells.stop - cells.start) * variables * ensemble
            fields[place, ..., within(cells, wanted)] = incoming[start:end].view(variables, ensemble, -1)
    return fields.view(samples, time, variables, ensemble, cells_held).permute(0, 1, 3, 4, 2)
