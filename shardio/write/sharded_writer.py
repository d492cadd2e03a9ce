"""Write one dataset from many ranks: each rank stores its own grid-chunks, nobody gathers, nothing is merged.

    OUT.zarr.partial/job.json            begun by the first rank, which holds the lock
    OUT.zarr.partial/ledger.jsonl        what was there when the run went on, and what the first rank has written since
    OUT.zarr.partial/ledger.RANK.jsonl   what another rank has written since: date, chunk, crc32c, bytes
    OUT.zarr.partial/dataset-ID/data/    one file per chunk (Zarr v2), written by the rank that owns it
    OUT.zarr                             the first rank renames, when all chunks are there

A run that was killed goes on where its ledgers end, on the same or on other ranks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates
from shardio.errors import OutputError
from shardio.format.codec import Codec, named
from shardio.format.layout import ArrayLayout, grid_chunked
from shardio.format.reader import NativeReader
from shardio.source.source import Extra, Source
from shardio.write import ledgers, output
from shardio.write.job import Job, Json, partial_of, read_job
from shardio.write.writer import ChunkWriter


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
    groups: dict[str, Json] = field(default_factory=dict)

    def stored_coordinates(self, name: str, codec: Codec) -> None:
        """Nowhere: they are encoded here."""

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
      tell: what every rank says to all others, on all of them, such as all_gather_object; one rank needs none.
      overwrite: replace a complete output, discard an unfinished one.
      ahead: dates that may be on their way to the disk before `put` waits.
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
        tell: Callable[[str], Sequence[str]] = lambda said: [said],
        overwrite: bool = False,
        ahead: int = 2,
        command: str = "the same command",
        sync: bool = True,
    ):
        if ahead < 1:
            raise OutputError(f"{ahead} dates may be on their way to the disk. Let it be 1 or more.")
        self.path, self.about, self.layout, self.chunks, self.rank = Path(path), about, about.layout, chunks, rank
        self._identity = full_identity(about, identity)
        self._command, self._sync, self._overwrite = command, sync, overwrite
        self._tell = tell
        self._job: Job | None = None
        self._permits = threading.Semaphore(ahead)
        self._pool = ThreadPoolExecutor(1, "shardio-write")
        self._writing: list[Future[None]] = []
        self._open = ExitStack()
        self.waited, self.nbytes = 0.0, 0

    # ------------------------------------------------------------------------------------------------------ the start
    def __enter__(self) -> ShardedWriter:
        try:
            self._together(self._begin if self.rank == 0 else lambda: None)
            self._together(self._join)
        except BaseException:
            self._open.close()
            raise
        return self

    def _begin(self) -> None:
        """Of the first rank: take the job up, or go on with it; then one ledger says what is written."""
        self._job = self._open.enter_context(
            closing(Job(self.path, self._identity, self._command, self._sync, self._overwrite))
        )
        folder = self._job.folder
        with ledgers.lock_ranks(folder, alone=True):  # ranks that outlived the first one would still write
            said = ledgers.read(folder) if self._job.resumed else {}
            output.begin_data(self._job.dataset, self.layout, {})
            self._job.sweep()
            # Without fsync power loss leaves files of the right size that hold something else.
            data, check = self._job.dataset / "data", not self._job.was_synced
            ledgers.merge(folder, ledgers.keep_intact(said, data, self.layout, check), self._sync)

    def _join(self) -> None:
        """Of every rank: see what is written, and be ready to write."""
        folder = partial_of(self.path)
        self._open.enter_context(ledgers.lock_ranks(folder, alone=False))
        begun = read_job(self.path)
        if begun is None or begun["identity"] != json.loads(json.dumps(self._identity)):
            raise OutputError(
                f"{self.path}: rank {self.rank} was asked for something else than rank 0. Ask them alike."
            )
        (dataset,) = folder.glob("dataset-*")
        self._folder = dataset / "data"
        self._writer = ChunkWriter(self._folder, self.layout, 1, self._sync, with_moments=False)
        self._chunks_done = set(ledgers.read(folder))
        every, dates = range(self.layout.grid[3]), range(len(self.about.dates))
        self.done = {date for date in dates if all((date, chunk) in self._chunks_done for chunk in every)}
        # It need not be durable: what it lacks after power loss is written again.
        self._ledger = self._open.enter_context(ledgers.name_of_rank(folder, self.rank).open("a", encoding="utf-8"))

    def _together(self, act: Callable[[], None]) -> None:
        """Act, then hear how it went elsewhere: all ranks go on, or all fail with the first one's cause."""
        failure: Exception | None = None
        try:
            act()
        except OSError as error:
            failure = self._of_the_disk("cannot be written", error)
        except Exception as error:
            failure = error
        said = [message for message in self._tell("" if failure is None else str(failure)) if message]
        if failure is not None:
            raise failure
        if said:
            raise OutputError(said[0])

    # ------------------------------------------------------------------------------------------------------- the work
    def read(self, date: int, cells: slice) -> NDArray[np.float32]:
        """[variable, ensemble, cells] of a date that is done."""
        out = np.empty((1, *self.layout.shape[1:3], cells.stop - cells.start), np.float32)
        every = (slice(date, date + 1), slice(0, out.shape[1]), slice(0, out.shape[2]), cells)
        NativeReader(self._folder, self.layout).read(every, out)
        values: NDArray[np.float32] = out[0]
        return values

    def put(self, date: int, fields: NDArray[np.float32]) -> None:
        """Write this rank's cells of a date, on another thread; waits while too many dates are on their way.

        Args: fields: [variable, ensemble, cells of this rank's chunks]; not to be changed afterwards.
        Raises: OutputError where a date or a shape is not that of this rank, and what went wrong in an earlier write.
        """
        size = self.about.chunk_cells
        cells = min(self.chunks.stop * size, self.layout.shape[3]) - self.chunks.start * size
        expected = (*self.layout.shape[1:3], cells)
        if fields.shape != expected:
            raise OutputError(f"{self.path}: fields {fields.shape} do not fit rank {self.rank}. Give {expected}.")
        start = time.perf_counter()
        self._permits.acquire()
        self.waited += time.perf_counter() - start
        finished = [future for future in self._writing if future.done()]
        for future in finished:
            self._writing.remove(future)
            future.result()
        self._writing.append(self._pool.submit(self._store, date, fields))

    def _store(self, date: int, fields: NDArray[np.float32]) -> None:
        try:
            size, first = self.about.chunk_cells, self.chunks.start
            for chunk in self.chunks:
                if (date, chunk) in self._chunks_done:
                    continue
                stored = self._writer.store(
                    date, chunk, fields[..., (chunk - first) * size : (chunk - first + 1) * size]
                )
                self.nbytes += stored.nbytes
                self._ledger.write(ledgers.to_line(date, chunk, stored.crc, stored.nbytes))
                self._ledger.flush()
        except OSError as error:
            raise self._of_the_disk(f"{self.about.dates[date]} cannot be written", error) from error
        finally:
            self._permits.release()

    def _of_the_disk(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: {what}: {error}. Free space or repair the disk, then run the same command again: it goes on "
            "where it stopped."
        )

    # -------------------------------------------------------------------------------------------------------- the end
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            start = time.perf_counter()
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
            self.waited += time.perf_counter() - start
            if kind is None:
                self._together(self._drain)
                self._together(self._publish)

    def _drain(self) -> None:
        for future in self._writing:
            future.result()
        self._ledger.close()  # over NFS only then others see all of it

    def _publish(self) -> None:
        if self._job is None:
            return
        found = ledgers.keep_intact(ledgers.read(self._job.folder), self._folder, self.layout)
        chunks = range(self.layout.grid[3])
        crc = np.zeros((len(self.about.dates), len(chunks)), np.uint32)
        for date in range(len(crc)):
            absent = [chunk for chunk in chunks if (date, chunk) not in found]
            if absent:
                raise OutputError(
                    f"{self.path}: {self.about.dates[date]} has no grid-chunk {absent[0]}. Every rank has to `put` "
                    "every date."
                )
            crc[date] = [found[date, chunk][0] for chunk in chunks]
        about = {
            "format_version": output.FORMAT_VERSION,
            "grid_chunks": self.layout.grid[3],
            "chunk_cells": self.about.chunk_cells,
            "codec": str(self.layout.codec),
            "source": self.about.attributes.get("description", ""),
            "source_fingerprint": json.dumps(self._identity, sort_keys=True),
        }
        folder, described = self._job.dataset, cast(Source, self.about)  # of a source all but its fields is asked for
        arrays = output.create_coordinates(folder, described, self.layout)
        small = output.write_coordinates(folder, described, arrays)
        output.finish_dataset(folder, described, self.layout, crc, about, small)
        self._job.publish()


def full_identity(about: Description, identity: Json) -> Json:
    """With what the cut adds."""
    return {**identity, "dates": len(about.dates), "chunk_cells": about.chunk_cells}


def is_complete(path: str | os.PathLike[str], about: Description, identity: Json) -> bool:
    """Whether that very dataset is there already, however it is cut."""
    try:
        attributes = json.loads((Path(path) / ".zattrs").read_text())["shardio"]
        found = json.loads(attributes["source_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = json.loads(json.dumps(full_identity(about, identity)))
    return bool(attributes.get("complete")) and {**wanted, "chunk_cells": 0} == {**found, "chunk_cells": 0}


def begun_chunk_cells(path: str | os.PathLike[str]) -> int | None:
    """Cells of the grid-chunks of an unfinished output: who goes on with it has to keep them."""
    begun = read_job(Path(path)) if partial_of(Path(path)).is_dir() else None
    return None if begun is None else begun["identity"].get("chunk_cells")
