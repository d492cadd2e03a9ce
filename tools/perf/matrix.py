"""Every grid x every work x 1 and 2 ranks: what is counted, and how long it takes; in processes of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from shardio.rechunk.allocator import keep_freed_memory
from tools.perf.calibration import Calibration
from tools.perf.counters import Counters, bytes_read, count, opens_below, peak_resident
from tools.perf.grids import Site
from tools.perf.works import Clocked, Rechunk, Split, Work, works
from tools.trainer_memory import living_tensors
from tools.trainer_step import on_ranks
from trainer.comm import Comm

RANKS = (1, 2)
WORKS = ("rechunk", "load", "train", "forecast")
# Of these counters the ranks' largest is kept, of all others their sum.
LARGEST = ("messages", "peak_bytes", "allocations")
Found = dict[str, dict[str, Any]]  # by case: counters, seconds, ratios, ...


def measure(sites: list[Site], repeats: int, tell: Callable[[str], None] = lambda _: None) -> Found:
    """The whole matrix, `grid/ranks/work`; without repeats nothing is timed."""
    found: Found = {}
    for site, ranks in product(sites, RANKS):  # fresh processes for each: none has memory of another
        tell(f"{site.name}, {ranks} rank{'s' if ranks > 1 else ''}")
        results = on_ranks(measure_rank, ranks, site, repeats)
        found |= {case: combine([result[case] for result in results]) for case in results[0]}
    tell("rechunking on 2 dask workers")
    found |= measure_cluster(sites, repeats)
    return dict(sorted(found.items()))


def measure_rank(comm: Comm, site: Site, repeats: int, only: Collection[str] = WORKS) -> Found:
    """What one rank finds; all ranks of the world call it together."""
    keep_freed_memory()  # as the command `trainer` does
    calibration, found, clocked = Calibration(), {}, Clocked(comm)
    for name, make in works(clocked, site):
        if name not in only:
            continue
        strangers = set(map(id, living_tensors()))
        work = make()
        work.once()  # what is made once, is made
        counters = count(work.once, site.folder, strangers) | work.outcome()
        times = timed(work, calibration, repeats, clocked) if repeats else {}
        found[f"{site.name}/{comm.ranks}/{name}"] = {"units": work.units, "counters": counters} | times
        del work
    return found


def timed(work: Work, calibration: Calibration, repeats: int, comm: Clocked | None = None) -> dict[str, Any]:
    """Seconds and ratios to the calibration kernel of every repeat, and where the seconds of the median went."""
    runs: list[tuple[float, Split, float]] = []
    peak_resident(reset=True)
    for _ in range(repeats):
        if comm is not None:
            comm.tell(None, "begin together")
            comm.seconds = 0.0
        before, split = calibration.seconds(), work.once()
        seconds = sum(split.values())
        kernel = (before + calibration.seconds()) / 2
        exchange = {"exchange": comm.seconds} if comm is not None and comm.ranks > 1 else {}
        runs.append((seconds, split | exchange, seconds / kernel))
    middle = sorted(runs, key=lambda run: run[0])[repeats // 2]
    return {
        "seconds": [run[0] for run in runs],
        "ratios": [run[2] for run in runs],
        "split": middle[1],
        "resident_bytes": peak_resident(),
    }


def combine(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the ranks: the counters of all, the times of the slowest."""
    counters: Counters = {}
    for name in results[0]["counters"]:
        numbers = [result["counters"][name] for result in results]
        counters[name] = max(numbers) if name in LARGEST else sum(numbers)
    slowest = max(results, key=lambda result: median(result.get("seconds", [0.0])))
    memory = {"resident_bytes": max(result["resident_bytes"] for result in results)} if "seconds" in slowest else {}
    return slowest | {"counters": counters} | memory


# ------------------------------------------------------------------------------------------- rechunking on two workers
def measure_cluster(sites: list[Site], repeats: int) -> Found:
    """Rechunking on a dask cluster of two processes, which lives as long as this takes."""
    found, calibration = {}, Calibration()
    with _cluster() as client:
        for site in sites:
            work = Rechunk(site, client.scheduler.address)
            for _ in range(2):  # so that both workers have imported what they need
                work.once()
            before = _read_everywhere(client, site.folder)
            work.once()
            after = _read_everywhere(client, site.folder)
            counters = {name: after[name] - before[name] for name in after} | work.outcome()
            times = timed(work, calibration, repeats) if repeats else {}
            if times:
                times["resident_bytes"] = max(client.run(peak_resident).values())
            found[f"{site.name}/2/rechunk"] = {"units": work.units, "counters": counters} | times
    return found


@contextmanager
def _cluster() -> Iterator[Any]:
    import dask
    import distributed

    dask.config.set({"distributed.admin.system-monitor.interval": "1h"})  # it reads /proc, which would count
    options = {
        "processes": True,
        "memory_limit": 0,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
    }
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster,  # type: ignore[no-untyped-call]
        distributed.Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        yield client


def _read_everywhere(client: Any, folder: Path) -> Counters:
    """Bytes read and files opened so far, by the workers and by this process."""
    each = [read_so_far(folder), *client.run(read_so_far, folder).values()]
    return {name: sum(one[name] for one in each) for name in each[0]}


def read_so_far(folder: Path) -> Counters:
    return {"bytes_read": bytes_read(), "opens": len(opens_below(folder))}
