"""How fast one rank gets its shard of a dataset: this loader, against the limit and against other ways to read it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from shardio.errors import REMEDY, ChunkError, SelectionError
from shardio.format.reader import NativeReader
from shardio.format.store import kvstore_spec
from shardio.format.threads import cores
from shardio.load.dataset import Dataset, open_dataset
from shardio.load.loader import ShardedDataLoader
from shardio.load.reading import Reading
from shardio.load.topology import Topology

Json = dict[str, Any]
ROUNDS = 5
PREFETCH = 3


def measure(path: str, ranks: int, rounds: int = ROUNDS, most_dates: int = 16) -> Json:
    """Seconds per date of rank 0 of `ranks`, by contender: medians of alternating rounds, page cache warm.

    `limit` preads and decodes the same bytes into reused buffers on all cores and does nothing else.

    Raises: SelectionError where there are too few dates, or files that are not local.
    """
    dataset = open_dataset(path)
    dates = [i for i in range(len(dataset)) if not dataset.is_missing[i]][:most_dates]
    if len(dates) < PREFETCH + 4:
        raise SelectionError(f"{path} has {len(dates)} dates; to measure takes {PREFETCH + 4} or more.")
    topology = Topology(ranks, 0, ranks)
    loader = ShardedDataLoader(dataset, topology, input_steps=1, target_steps=0, shuffle=False, prefetch=PREFETCH)
    reading = loader.reading
    contenders = _contenders(dataset, loader, dates)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            seconds[name].append((time.perf_counter() - began) / len(dates))
    loader.close()
    needed = _needed(dataset, reading, 0)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    return {
        "path": path,
        "ranks": ranks,
        "dates": len(dates),
        "grid_chunks": reading.grid_chunks,
        "cores": cores(),
        "bytes_per_rank": [
            {"rank": rank, "needed": _needed(dataset, reading, rank), "read": _read(dataset, reading, rank)}
            for rank in range(ranks)
        ],
        "contenders": {
            name: {"ms_per_date": 1e3 * value, "gb_per_s": needed / value / 1e9, "of_limit": medians["limit"] / value}
            for name, value in medians.items()
        },
    }


def _contenders(dataset: Dataset, loader: ShardedDataLoader, dates: list[int]) -> dict[str, Callable[[], None]]:
    source = dataset.parts[0].source
    if not isinstance(source.reader, NativeReader) or len(dataset.parts) > 1:
        raise SelectionError("the limit is that of local files in blosc, zstd or no codec: measure such a dataset.")
    chunks = loader.reading.chunks_read(0, 0)
    rows = [int(dataset.parts[0].rows[date]) for date in dates]
    last = dates[-1]
    everything = range(loader.reading.grid_chunks)
    return {
        "limit": _limit(source.reader, rows, chunks),
        "loader": lambda: _iterate(loader, last, touch=False),
        "loader, one tensor": lambda: _iterate(loader, last, touch=True),
        "tensorstore ring": _tensorstore(f"{source.path}/data", rows, loader.reading.wanted(0), source.zarr_format),
        "whole date": _limit(source.reader, rows, everything),
    }


def _iterate(loader: ShardedDataLoader, last: int, touch: bool) -> None:
    loader.set_epoch(-1)  # whatever was left of an epoch, begin at its start
    loader.set_epoch(0)
    for batch in loader:
        if touch:
            _ = batch.fields
        if batch.starts[0] == last:
            break


def _limit(reader: NativeReader, rows: list[int], chunks: range) -> Callable[[], None]:
    layout, codec = reader.layout, reader.layout.codec
    assert codec is not None
    ring = np.zeros((PREFETCH, len(chunks), *layout.chunks), layout.dtype)
    pool = ThreadPoolExecutor(cores())

    def one(job: tuple[int, int, int]) -> None:
        turn, row, place = job
        stored = reader.stored((row, 0, 0, chunks[place]))
        assert stored is not None
        codec.decode(memoryview(stored)[: len(stored) - 4 * layout.checked], ring[turn % len(ring), place])

    def everything() -> None:
        jobs = [(turn, row, place) for turn, row in enumerate(rows) for place in range(len(chunks))]
        deque(pool.map(one, jobs), maxlen=0)

    return everything


def _tensorstore(path: str, rows: list[int], cells: slice, zarr_format: int) -> Callable[[], None]:
    import tensorstore as ts

    driver = "zarr" if zarr_format == 2 else "zarr3"

    def answer(future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:
            raise ChunkError(f"tensorstore cannot read {path}: {error}. {REMEDY}") from error

    array = answer(ts.open({"driver": driver, "kvstore": kvstore_spec(path)}, open=True, read=True))

    def everything() -> None:
        ahead: deque[Any] = deque()
        for row in rows:
            ahead.append(array[row, :, :, cells].read())
            if len(ahead) >= PREFETCH:
                answer(ahead.popleft())
        while ahead:
            answer(ahead.popleft())

    return everything


def _needed(dataset: Dataset, reading: Reading, rank: int) -> int:
    cells = reading.wanted(rank)
    return int(cells.stop - cells.start) * dataset.shape[1] * dataset.shape[2] * 4


def _read(dataset: Dataset, reading: Reading, rank: int) -> int:
    cells: int = sum(
        int(reading.cells_of(chunk).stop - reading.cells_of(chunk).start) for chunk in reading.chunks_read(0, rank)
    )
    return cells * dataset.shape[1] * dataset.shape[2] * 4


def print_measurement(found: Json) -> None:
    """The measurement as tables on stdout."""
    from rich.table import Table

    from shardio.check.info import screen
    from shardio.units import size

    console = screen()
    console.print(
        f"{found['path']}: one of {found['ranks']} ranks, {found['grid_chunks']} grid-chunks, {found['cores']} cores"
    )
    table = Table("", "ms per date", "GB/s", "of the limit", box=None)
    for name, row in found["contenders"].items():
        table.add_row(name, f"{row['ms_per_date']:.2f}", f"{row['gb_per_s']:.2f}", f"{row['of_limit']:.2f}")
    console.print(table)
    read = Table("rank", "needed per date", "decoded per date", box=None)
    for row in found["bytes_per_rank"]:
        read.add_row(str(row["rank"]), size(row["needed"]), size(row["read"]))
    console.print(read)
