"""Write one dataset from many ranks: each rank stores its own grid-chunks, nobody gathers, nothing is merged.

    OUT.zarr.partial/job.json            begun by the first rank, which holds the lock
    OUT.zarr.partial/chunks.RANK.jsonl   each rank notes its finished chunks: date, chunk, crc32c, bytes
    OUT.zarr.partial/dataset-ID/data/    one file per chunk (Zarr v2), written by the rank that owns it
    OUT.zarr                             the first rank renames, when all chunks are there

A run that was killed goes on where its ledgers end, on the same or on other ranks.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from shardio import output
from shardio.codec import named
from shardio.dates import Dates
from shardio.errors import OutputError
from shardio.job import Job, Json, WrittenDate, partial_of
from shardio.layout import ArrayLayout, grid_chunked
from shardio.reader import NativeReader
from shardio.source import Extra
from shardio.writer import ChunkWriter

Key = tuple[int, int]  # date, grid-chunk


@dataclass(frozen=True)
class Description:
    """Everything of a dataset but its fields.

    Attributes:
      dates: datetime64[s] [date].
      variables: names.
      latitudes, longitudes: float64 [cell], degrees.
      ensemble: members.
      chunk_cells: cells of one grid-chunk.
      statistics: mean, stdev, minimum, maximum, each float64 [variable].
      attributes: of the dataset.
    """

    dates: Dates
    variables: tuple[str, ...]
    latitudes: NDArray[np.float64]
    longitudes: NDArray[np.float64]
    ensemble: int
    chunk_cells: int
    statistics: dict[str, NDArray[np.float64]]
    attributes: Json
    missing: Dates = field(default_factory=lambda: np.empty(0, "datetime64[s]"))
    extras: tuple[Extra, ...] = ()

    @property
    def layout(self) -> ArrayLayout:
        """Zarr v2: one file per grid-chunk, so that no two ranks touch one file."""
        cells = len(self.latitudes)
        whole = grid_chunked((len(self.dates), len(self.variables), self.ensemble, cells), 1, 2, named("lz4"))
        return replace(whole, chunks=(*whole.chunks[:3], self.chunk_cells))


class ShardedWriter:
    """One rank's hand in a dataset that all ranks write. Use it in a `with`; it is published at the end of it.

    Args:
      path: of the dataset, ending in .zarr.
      about: what it is to be, the same on all ranks.
      identity: what must be equal for a run to go on with another's output; plain values.
      chunks: the grid-chunks of this rank; the ranks together have all of them, each once.
      rank: of those that write; the first begins and ends the job.
      barrier: waits for all that write; nothing for one rank.
      overwrite: replace a complete output, discard an unfinished one.
      ahead: dates that may wait to be written before `put` waits.
      command: that would finish the job, for messages.
      sync: make every file durable before it gets its name.

    Attributes:
      done: dates whose chunks are all written.
      waited: seconds that `put` and the end have waited for the disk.
      nbytes: that this rank has stored.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        about: Description,
        identity: Json,
        chunks: range,
        rank: int = 0,
        barrier: Callable[[], None] = lambda: None,
        overwrite: bool = False,
        ahead: int = 2,
        command: str = "the same command",
        sync: bool = True,
    ):
        self.path, self.about, self.layout, self.chunks, self.rank = Path(path), about, about.layout, chunks, rank
        self._barrier, self._job, self._sync = barrier, None, sync
        self._identity = {**identity, "dates": len(about.dates), "chunk_cells": about.chunk_cells}
        self._arguments = (command, sync, overwrite)
        self._permits = threading.Semaphore(ahead)
        self._pool = ThreadPoolExecutor(1, "shardio-write")
        self._writing: list[Future[None]] = []
        self.waited, self.nbytes = 0.0, 0

    _job: Job | None

    def __enter__(self) -> ShardedWriter:
        command, sync, overwrite = self._arguments
        if self.rank == 0:
            self._job = Job(self.path, self._identity, command, sync, overwrite)
            if not self._job.resumed:
                for ledger in self._job.folder.glob("chunks.*.jsonl"):
                    ledger.unlink()
            output.begin_data(self._job.dataset, self.layout, {})
            self._job.sweep()
        self._barrier()
        (dataset,) = partial_of(self.path).glob("dataset-*")
        self._dataset, self._folder = dataset, dataset / "data"
        self._writer = ChunkWriter(self._folder, self.layout, 1, sync, with_moments=False)
        self._chunks_done = self._read_ledgers()
        every = range(self.layout.grid[3])
        self.done = {
            date for date in range(len(self.about.dates)) if all((date, chunk) in self._chunks_done for chunk in every)
        }
        self._barrier()  # all have read the ledgers before one goes on writing them
        name = f"chunks.{self.rank}.jsonl"
        self._ledger = (partial_of(self.path) / name).open("a", encoding="utf-8")
        self._ledger.write("\n")  # a kill may have torn the last line
        return self

    def read(self, date: int, cells: slice) -> NDArray[np.float32]:
        """[variable, ensemble, cells] of a date that is done."""
        out = np.empty((1, *self.layout.shape[1:3], cells.stop - cells.start), np.float32)
        every = (slice(date, date + 1), slice(0, out.shape[1]), slice(0, out.shape[2]), cells)
        NativeReader(self._folder, self.layout).read(every, out)
        values: NDArray[np.float32] = out[0]
        return values

    def put(self, date: int, fields: NDArray[np.float32]) -> None:
        """Write this rank's cells of a date, on another thread; waits while too many dates are on the way.

        Args: fields: [variable, ensemble, cells of this rank's chunks]; not to be changed afterwards.
        Raises: what went wrong in an earlier write.
        """
        start = time.perf_counter()
        self._permits.acquire()
        self.waited += time.perf_counter() - start
        self._raise_failures()
        self._writing.append(self._pool.submit(self._store, date, fields))

    def _store(self, date: int, fields: NDArray[np.float32]) -> None:
        try:
            size, first = self.about.chunk_cells, self.chunks.start
            for chunk in self.chunks:
                if (date, chunk) in self._chunks_done:
                    continue
                cut = slice((chunk - first) * size, (chunk - first + 1) * size)
                stored = self._writer.store(date, chunk, np.ascontiguousarray(fields[..., cut]))
                self.nbytes += stored.nbytes
                self._ledger.write(json.dumps([date, chunk, stored.crc, stored.nbytes]) + "\n")
                self._ledger.flush()
        except OSError as error:
            raise OutputError(
                f"{self.path}: the fields of {self.about.dates[date]} cannot be written: {error}. Free space or repair "
                "the disk, then run the same command again: it goes on where it stopped."
            ) from error
        finally:
            self._permits.release()

    def _raise_failures(self) -> None:
        finished = [future for future in self._writing if future.done()]
        self._writing = [future for future in self._writing if not future.done()]
        for future in finished:
            future.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        start = time.perf_counter()
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        self.waited += time.perf_counter() - start
        try:
            if kind is None:
                for future in self._writing:
                    future.result()
                self._ledger.flush()
                os.fsync(self._ledger.fileno())
                self._barrier()
                if self._job is not None:
                    self._publish(self._job)
                self._barrier()
        finally:
            self._ledger.close()
            if self._job is not None:
                self._job.close()

    def _publish(self, job: Job) -> None:
        found = self._read_ledgers()
        written: dict[int, WrittenDate] = {}
        for date in range(len(self.about.dates)):
            absent = [chunk for chunk in range(self.layout.grid[3]) if (date, chunk) not in found]
            if absent:
                raise OutputError(
                    f"{self.path}: {self.about.dates[date]} has no grid-chunk {absent[0]}. Every rank has to `put` "
                    "every date."
                )
            pairs = [found[date, chunk] for chunk in range(self.layout.grid[3])]
            written[date] = WrittenDate(date, tuple(crc for crc, _ in pairs), tuple(n for _, n in pairs), None)
        about = {
            "format_version": output.FORMAT_VERSION,
            "grid_chunks": self.layout.grid[3],
            "chunk_cells": self.about.chunk_cells,
            "codec": "lz4",
            "source": self.about.attributes.get("model", {}),
            "source_fingerprint": json.dumps(self._identity, sort_keys=True),
        }
        output.finish_dataset(job.dataset, self.about, self.layout, written, about)  # type: ignore[arg-type]
        job.publish()

    def _read_ledgers(self) -> dict[Key, tuple[int, int]]:
        """crc32c and bytes of every chunk that a ledger says is written and whose file has that size."""
        found: dict[Key, tuple[int, int]] = {}
        for ledger in sorted(partial_of(self.path).glob("chunks.*.jsonl")):
            for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    date, chunk, crc, nbytes = json.loads(line)
                except (ValueError, TypeError):
                    continue  # torn by a kill
                found[date, chunk] = (crc, nbytes)
        with os.scandir(self._folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        return {key: pair for key, pair in found.items() if sizes.get(self._name(key)) == pair[1]}

    def _name(self, key: Key) -> str:
        return self.layout.file_of((key[0], 0, 0, key[1]))[0]


def chunk_cells_for(cells: int, ranks: int, chunk_cells: int) -> int:
    """Cells per grid-chunk so that every rank owns whole chunks: those given if they fit, else one chunk per rank."""
    if math.ceil(cells / chunk_cells) % ranks == 0:
        return chunk_cells
    size = math.ceil(cells / ranks)
    if math.ceil(cells / size) != ranks:
        raise OutputError(
            f"{cells} cells cannot be cut into {ranks} equal grid-chunks, one for each rank. Use fewer ranks."
        )
    return size


def own_chunks(grid_chunks: int, ranks: int, rank: int) -> range:
    """The grid-chunks of a rank, where the ranks divide them."""
    each = grid_chunks // ranks
    return range(rank * each, (rank + 1) * each)


__all__: Sequence[str] = ("Description", "ShardedWriter")
