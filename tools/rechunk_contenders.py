"""One timed copy in a process of its own, for `tools.bench_rechunk`: shardio, its peers, and the limit of the codec.

python rechunk_contenders.py NAME '{"source": ..., "destination": ..., "cells": ..., "threads": ..., "fsync": false}'

Runs in the peers' environments too, so it imports nothing but the standard library and what each contender needs.
Every contender is a generator: what it does before its first `yield` (imports) is not timed, what comes after is.
Each gives blosc lz4 with shuffle, Zarr v2, one file per chunk of `cells` cells (shardio-v3: Zarr v3, one per date).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Copy:
    """What to copy: `chunks` pieces of at most `cells` cells per date; `fsync`: durable when the clock stops."""

    source: str
    destination: str
    cells: int
    chunks: int
    threads: int
    fsync: bool


def limit(copy: Copy) -> Iterator[None]:
    """One thread per core, every buffer reused: read, decode, encode, write. No gather, no checksum, no rename."""
    import numpy as np
    from numcodecs import blosc

    metadata = json.loads((Path(copy.source) / "data" / ".zarray").read_text())
    dates, nbytes = metadata["shape"][0], 4 * metadata["shape"][1] * metadata["shape"][2] * metadata["shape"][3]
    files = [Path(copy.source) / "data" / f"{date}.0.0.0" for date in range(dates)]
    largest = max(file.stat().st_size for file in files)
    queue = iter(range(dates))
    take = threading.Lock()
    failed: list[BaseException] = []

    def work() -> None:
        stored, decoded = np.empty(largest, np.uint8), np.empty(nbytes, np.uint8)
        pieces = np.array_split(decoded.view(np.float32), copy.chunks)
        while True:
            with take:
                date = next(queue, None)
            if date is None:
                return
            size = _read(files[date], stored)
            blosc.decompress(stored[:size], decoded)
            for number, piece in enumerate(pieces):
                _write(Path(copy.destination) / f"{date}.{number}", blosc.compress(piece, b"lz4", 5, 1), copy.fsync)

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    yield
    blosc.use_threads = False
    Path(copy.destination).mkdir()
    workers = [threading.Thread(target=guarded) for _ in range(copy.threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]


def _read(file: Path, buffer: Any) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    assert os.preadv(descriptor, [buffer[:size]], 0) == size
    os.close(descriptor)
    return size


def _write(file: Path, content: bytes, fsync: bool) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    assert os.write(descriptor, content) == len(content)
    if fsync:
        os.fsync(descriptor)
    os.close(descriptor)


def shardio_v2(copy: Copy) -> Iterator[None]:
    """`shardio rechunk` to Zarr v2: the whole dataset, with checksums, ledger, coordinates and statistics."""
    return _shardio(copy, 2)


def shardio_v3(copy: Copy) -> Iterator[None]:
    """`shardio rechunk` to Zarr v3: one file per date."""
    return _shardio(copy, 3)


def _shardio(copy: Copy, zarr_format: int) -> Iterator[None]:
    import google_crc32c  # noqa: F401, shardio imports these where it first needs them
    import numcodecs.blosc  # noqa: F401
    import zarr.codecs  # noqa: F401

    from shardio import keep_freed_memory
    from shardio.rechunk import Request, prepare, run

    yield
    keep_freed_memory()  # as the command does
    run(prepare(Request(copy.source, copy.destination, copy.chunks, zarr_format, sync=copy.fsync)))


def anemoi(copy: Copy) -> Iterator[None]:
    """`anemoi-datasets copy --rechunk`, as it comes: the whole dataset."""
    return _anemoi(copy, block_size=None, transfers=8)


def anemoi_tuned(copy: Copy) -> Iterator[None]:
    """The same with `--block-size 1 --transfers THREADS`, its best setting here."""
    return _anemoi(copy, block_size=1, transfers=copy.threads)


def _anemoi(copy: Copy, block_size: int | None, transfers: int) -> Iterator[None]:
    from anemoi.datasets.commands.copy import ZarrCopier

    yield
    rechunk = f"1,full,full,{copy.cells}"
    options = {"overwrite": False, "resume": False, "verbosity": 0, "nested": False, "obfuscate": False}
    ZarrCopier(
        copy.source, copy.destination, block_size=block_size, transfers=transfers, rechunk=rechunk, **options
    ).run()
    _sync_files(copy)


def dask(copy: Copy) -> Iterator[None]:
    """`dask.array` rechunk and to_zarr on threads: `data` only."""
    import dask.array
    import zarr

    yield
    source = zarr.open_array(copy.source, path="data", mode="r")
    target = _target(copy, source)
    array = dask.array.from_zarr(source)
    with dask.config.set(scheduler="threads", num_workers=copy.threads):
        array.rechunk(target.chunks).to_zarr(target)
    _sync_files(copy)


def zarr_python(copy: Copy) -> Iterator[None]:
    """zarr-python, `target[date] = source[date]` for one date after the other: `data` only."""
    return _zarr_python(copy, threads=1)


def zarr_python_threads(copy: Copy) -> Iterator[None]:
    """The same with one date per core at a time: what a tuned script does."""
    return _zarr_python(copy, copy.threads)


def _zarr_python(copy: Copy, threads: int) -> Iterator[None]:
    from concurrent.futures import ThreadPoolExecutor

    import zarr

    yield
    source = zarr.open_array(copy.source, path="data", mode="r")
    target = _target(copy, source)

    def move(date: int) -> None:
        target[date] = source[date]

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(move, range(source.shape[0])):
            pass
    _sync_files(copy)


def rechunker(copy: Copy) -> Iterator[None]:
    """rechunker with its dask executor on threads: `data` only."""
    import dask
    import numcodecs
    import rechunker
    import zarr

    yield
    source = zarr.open(copy.source, mode="r")["data"]
    chunks = (1, *source.shape[1:3], copy.cells)
    options = {"compressor": numcodecs.Blosc("lz4", 5, 1)}
    temporary = copy.destination + ".temporary"
    # max_mem is per task: three dates, so that no intermediate copy is planned
    plan = rechunker.rechunk(
        source,
        chunks,
        3 * source.nbytes // source.shape[0],
        copy.destination + "/data",
        target_options=options,
        temp_store=temporary,
    )
    with dask.config.set(scheduler="threads", num_workers=copy.threads):
        plan.execute()
    _sync_files(copy)


CONTENDERS: dict[str, Callable[[Copy], Iterator[None]]] = {
    "limit": limit,
    "shardio-v2": shardio_v2,
    "shardio-v3": shardio_v3,
    "anemoi": anemoi,
    "anemoi-tuned": anemoi_tuned,
    "dask": dask,
    "zarr-python": zarr_python,
    "zarr-python-threads": zarr_python_threads,
    "rechunker": rechunker,
}


def _target(copy: Copy, source: Any) -> Any:
    import numcodecs
    import zarr

    return zarr.create_array(
        copy.destination,
        name="data",
        shape=source.shape,
        chunks=(1, *source.shape[1:3], copy.cells),
        dtype=source.dtype,
        fill_value=float("nan"),
        compressors=numcodecs.Blosc("lz4", 5, 1),
        zarr_format=2,
        config={"write_empty_chunks": True},
    )


def _sync_files(copy: Copy) -> None:
    """What a peer leaves undone, where shardio makes its files durable."""
    for parent, _, names in os.walk(copy.destination) if copy.fsync else ():
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def measure(name: str, copy: Copy) -> dict[str, float]:
    """Seconds and processor seconds of the copy, and the largest resident size of this process before and after it."""
    steps = CONTENDERS[name](copy)
    next(steps)
    before, cpu, began = _peak(), time.process_time(), time.perf_counter()
    next(steps, None)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": _peak(), "peak_bytes_before": before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    result = measure(sys.argv[1], Copy(**json.loads(sys.argv[2])))
    print(json.dumps(result))
