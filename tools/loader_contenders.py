"""One way to read a rank's shard of every date, timed in a process of its own.

python tools/loader_contenders.py CONTENDER PATH FIRST STOP      prints JSON: ms per date

CONTENDER is anemoi (runs in the peer's environment), dataloader, wait, overhead or memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

ROUNDS = 4


def anemoi(path: str, cells: slice) -> dict:
    """`anemoi.datasets.open_dataset`, date after date, in one process: as its own data loaders read."""
    from anemoi.datasets import open_dataset

    dataset = open_dataset(path)
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for date in range(len(dataset)):
            dataset[date, :, :, cells]
        rounds.append((time.perf_counter() - began) / len(dataset))
    return {"ms_per_date": 1e3 * statistics.median(rounds[1:])}


class Shard:
    """A plain torch dataset over zarr-python."""

    def __init__(self, path: str, cells: slice):
        self.path, self.cells, self.array = path, cells, None

    def __len__(self) -> int:
        import zarr

        return zarr.open_array(self.path, path="data", mode="r").shape[0]

    def __getitem__(self, date: int):
        import torch
        import zarr

        if self.array is None:
            self.array = zarr.open_array(self.path, path="data", mode="r")
        return torch.from_numpy(self.array[date, :, :, self.cells])


def dataloader(path: str, cells: slice) -> dict:
    """A stock torch DataLoader with two worker processes."""
    from torch.utils.data import DataLoader

    options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "forkserver"}
    loader = DataLoader(Shard(path, cells), batch_size=1, prefetch_factor=2, **options)
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in loader:
            pass
        rounds.append((time.perf_counter() - began) / len(loader))
    return {"ms_per_date": 1e3 * statistics.median(rounds[1:])}


def _loader(path: str, ranks: int, **options):
    from shardio import ShardedDataLoader, Topology, open_dataset

    return ShardedDataLoader(
        open_dataset(path), Topology(ranks, 0, ranks), input_steps=1, target_steps=0, shuffle=False, **options
    )


def _ranks(path: str, cells: slice) -> int:
    from shardio import open_dataset

    return open_dataset(path).shape[3] // (cells.stop - cells.start)


def wait(path: str, cells: slice) -> dict:
    """Share of the time that a consumer waits for batches, when it works for as long as reading a batch takes."""
    loader = _loader(path, _ranks(path, cells))
    for _ in loader:  # warm
        pass
    began = time.perf_counter()
    for _ in loader:
        pass
    read = (time.perf_counter() - began) / len(loader)
    return {
        "ms_per_read": 1e3 * read,
        "wait_on_device": _share_of_waiting(loader, lambda: time.sleep(read)),
        "wait_on_this_cpu": _share_of_waiting(loader, lambda: _busy(read)),
    }


def _busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        sum(range(1000))


def _share_of_waiting(loader, work) -> float:
    waited = worked = 0.0
    for _ in range(ROUNDS):
        batches = iter(loader)
        next(batches)  # nothing could be read ahead of the first
        for _ in range(len(loader) - 1):
            began = time.perf_counter()
            work()
            finished = time.perf_counter()
            next(batches)
            worked += finished - began
            waited += time.perf_counter() - finished
    return waited / (waited + worked)


def memory(path: str, cells: slice) -> dict:
    """Peak resident memory above the open dataset, in batches, over several epochs."""
    loader = _loader(path, _ranks(path, cells))
    next(iter(_loader(str(Path(path).with_name("tiny.zarr")), 1)))  # what threads and libraries need once is no batch
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports
    before = _resident("VmRSS")
    for _ in range(ROUNDS):
        for _ in loader:
            pass
    _, variables, members, _ = loader.dataset.shape
    nbytes = variables * members * (cells.stop - cells.start) * 4
    return {"batches": (_resident("VmHWM") - before) / nbytes, "bound": loader.prefetch + 2}


def _resident(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))


def overhead(path: str, cells: slice) -> dict:
    """Microseconds per batch where there is next to nothing to read: 10,000 tiny batches."""
    loader = _loader(path, 1)
    batches, began = 0, time.perf_counter()
    while batches < 10_000:
        for _ in loader:
            batches += 1
    return {"us_per_batch": 1e6 * (time.perf_counter() - began) / batches}


if __name__ == "__main__":
    contender, path, first, stop = sys.argv[1:]
    print(json.dumps(globals()[contender](path, slice(int(first), int(stop)))))
