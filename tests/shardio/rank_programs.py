"""What one rank runs. `test_ranks.py` starts this file once per rank and sends it names of the functions below."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from loading_fixtures import bytes_read

RANK = int(sys.argv[1]) if __name__ == "__main__" else 0
GROUPS: dict[tuple[int, ...], Any] = {}


def make_groups(groups: list[tuple[int, ...]]) -> None:
    """Process groups of these ranks; all ranks of the world make all of them, as torch has it."""
    import torch.distributed as dist

    for ranks in groups:
        GROUPS[ranks] = dist.new_group(list(ranks))


def group_of(ranks: Any) -> Any:
    return GROUPS[tuple(ranks)]


def topology_of(sizes: tuple[int, ...]) -> Any:
    from shardio import Topology

    return Topology(sizes[0], RANK, *sizes[1:])


def load(path: str, sizes: tuple[int, ...], sharing: bool = True, epochs: int = 1, **options: Any) -> dict[str, Any]:
    """Epochs of this rank: of every batch its dates, cells and fields; and the bytes read meanwhile."""
    from shardio import ShardedDataLoader, open_dataset

    topology = topology_of(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it costs not to share
        group = group_of(topology.model_ranks) if sharing else None
        loader = ShardedDataLoader(open_dataset(path), topology, group=group, threads=1, **options)
    before = bytes_read()
    batches = [
        {
            "indices": batch.indices,
            "padding": batch.padding.tolist(),
            "cells": batch.cells,
            "fields": batch.fields.numpy().copy(),
            "shape": batch.shape,
        }
        for _ in range(epochs)
        for batch in loader
    ]
    read = bytes_read() - before
    state = loader.state_dict()
    loader.close()
    return {
        "batches": batches,
        "read": read,
        "state": state,
        "length": len(loader),
        "exchanges": loader.reading.exchanges,
    }


def read_only(path: str, sizes: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """The bytes that this rank reads of each date once, without what the exchange does."""
    from shardio import ShardedDataLoader, open_dataset

    topology = topology_of(sizes)
    dataset = open_dataset(path)
    group = group_of(topology.model_ranks)
    loader = ShardedDataLoader(dataset, topology, group=group, threads=1, shuffle=False, target_steps=0, **options)
    before = bytes_read()
    exchanged = 0
    for batch in loader:
        exchanged += batch.fields.numel()
    read = bytes_read() - before
    loader.close()
    return {"read": read, "exchanged": exchanged}


def with_group(path: str, sizes: tuple[int, ...], ranks: dict[int, list[int]]) -> str:
    """What the loader says to a process group that holds `ranks`."""
    from shardio import ShardedDataLoader, open_dataset

    group = group_of(ranks[RANK])
    try:
        ShardedDataLoader(open_dataset(path), topology_of(sizes), group=group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def fault(path: str, sizes: tuple[int, ...], **options: Any) -> tuple[int, str]:
    """(batches before the first error, the error) of a loader without a group."""
    from shardio import ShardedDataLoader, open_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = ShardedDataLoader(open_dataset(path), topology_of(sizes), threads=1, shuffle=False, **options)
    count = 0
    try:
        for _ in loader:
            count += 1
    except Exception as error:
        return count, f"{type(error).__name__}: {error}"
    return count, ""


def main(world: int, meeting: str, address: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=RANK, world_size=world)
    with Client(address) as parent:
        parent.send(RANK)
        while (job := parent.recv()) is not None:
            name, arguments, options = job
            try:
                parent.send((True, globals()[name](*arguments, **options)))
            except BaseException:
                parent.send((False, traceback.format_exc()))
    os._exit(0)  # gloo waits for peers that may be gone


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[3], sys.argv[4])
