"""Make a grid-chunk dataset: plan, run the tasks here or on a dask cluster, publish.

    source --read piece--> buffer [date, variable, ensemble, cell] --encode--> grid-chunks --record--> ledger

Where the source stores a date as one chunk, a thread takes it from there grid-chunk by grid-chunk instead.

One task is a block of dates. A task that ran twice wrote the same bytes twice; a task that was lost is run again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio import output, statistics
from shardio.allocator import keep_freed_memory
from shardio.codec import named
from shardio.errors import OutputError, ShardioError
from shardio.job import Job, WrittenDate, partial_of, sweep_published
from shardio.layout import ArrayLayout, grid_chunked
from shardio.order import order_of, ordered
from shardio.plan import Plan, Task, make_plan
from shardio.source import AnemoiSource, Selection, Source, open_source
from shardio.writer import AtOnce, ChunkWriter, StoredChunk, chunk_slices, sync_folder

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
      order: of the cells, compact or native; None is that of the source.
      opener: where given, makes the source instead of `source`, in any process.
    """

    source: str
    destination: str
    grid_chunks: int
    zarr_format: int | None = None
    codec: str = "lz4"
    selection: Selection = field(default_factory=Selection)
    max_memory: int = 4 * 2**30
    workers: int | None = None
    scheduler: str | None = None
    overwrite: bool = False
    sync: bool = True
    fill_absent: bool = False
    order: str | None = None
    command: str = ""
    opener: Callable[[], Source] | None = field(default=None, compare=False)

    def open_source(self) -> Source:
        """The source, in whatever process this runs."""
        keep_freed_memory()  # from here on: coordinates are read and hashed, and every chunk is encoded into new bytes
        source = self.opener() if self.opener else open_source(self.source, self.selection, self.fill_absent)
        return ordered(source, self.order)


@dataclass(frozen=True)
class Prepared:
    """A checked request: nothing is written yet."""

    request: Request
    source: Source
    fingerprint: str
    layout: ArrayLayout
    plan: Plan

    @property
    def identity(self) -> Json:
        """What must be equal for a run to continue another."""
        r, chosen = self.request, self.request.selection
        return {
            "source": r.source if "://" in r.source else str(Path(r.source).absolute()),
            "source fingerprint": self.fingerprint,
            "grid-chunks": r.grid_chunks,
            "zarr-format": self.layout.zarr_format,
            "codec": r.codec,
            "order": order_of(self.source),
            "start": chosen.start,
            "end": chosen.end,
            "select": list(chosen.select),
            "drop": list(chosen.drop),
            "dates": len(self.source.dates),
            "variables": list(self.source.variables),
        }


@dataclass(frozen=True)
class Progress:
    """Told after every task: dates done of all, decoded bytes written so far by this run."""

    dates: int
    of: int
    nbytes: int


@dataclass(frozen=True)
class Result:
    """What a run did: `dates` written now, the rest was there before."""

    destination: str
    dates: int
    resumed_dates: int
    grid_chunks: int
    nbytes: int
    stored_bytes: int


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked before the first byte is written, and make the plan."""
    _check_destination(request)
    codec = named(request.codec)
    source = request.open_source()
    shape = (len(source.dates), len(source.variables), source.extent.shape[2], source.extent.shape[3])
    layout = grid_chunked(shape, request.grid_chunks, request.zarr_format or source.zarr_format, codec)
    plan = make_plan(source.extent, layout, request.max_memory, request.workers or 1)
    return Prepared(request, source, source.fingerprint(), layout, plan)


def run(prepared: Prepared, report: Callable[[Progress], None] = lambda _: None) -> Result:
    """Write what is not yet written, then publish; interrupted at any point, call it again."""
    request, layout = prepared.request, prepared.layout
    destination = Path(request.destination)
    with _explained(destination):
        job = Job(destination, prepared.identity, request.command, request.sync, request.overwrite)
        try:
            output.begin_data(job.dataset, layout, prepared.source.data_attributes)
            written = job.written(layout)
            before = len(written)
            todo = [task for task in prepared.plan.tasks if not _done(task, written)]
            bytes_of_date = layout.grid[3] * layout.chunk_bytes
            with ThreadPoolExecutor(1, "coordinates") as other:  # one thread busy for as long as a date takes
                coordinates = other.submit(output.write_coordinates, job.dataset, prepared.source, layout)
                for dates in _execute(prepared, job.dataset / "data", todo):
                    job.record(dates)
                    written.update((date.date, date) for date in dates)
                    report(Progress(len(written), layout.shape[0], (len(written) - before) * bytes_of_date))
                    if coordinates.done():
                        coordinates.result()  # what is wrong with them is told now, not after days of fields
                job.sweep()  # of workers killed in this run
                if request.sync:
                    sync_folder(job.dataset / "data")
            _check_unchanged(prepared)
            about, small = _about(prepared), coordinates.result()
            output.finish_dataset(job.dataset, prepared.source, layout, written, about, small)
            job.publish()
        finally:
            job.close()
    stored = sum(sum(date.nbytes) for date in written.values())
    count = len(written)
    return Result(str(destination), count - before, before, layout.grid[3], (count - before) * bytes_of_date, stored)


def write_block(
    source: Source,
    writer: ChunkWriter,
    task: Task,
    pieces: tuple[slice, ...],
    pool: Executor,
    buffers: Buffers,
) -> list[WrittenDate]:
    """Run one task: read each piece of its dates, write its grid-chunks."""
    _, variables, ensemble, _ = writer.layout.shape
    dates = range(task.start, task.stop)
    chunks: list[list[StoredChunk]] = [[] for _ in dates]
    with ExitStack() as stack:
        # Dates written in one piece open and close one file after the other, inside the loop.
        files = [] if len(pieces) == 1 else [stack.enter_context(writer.open_date(date)) for date in dates]
        for piece in pieces:
            with buffers.borrow((len(dates), variables, ensemble, piece.stop - piece.start)) as block:
                source.read(slice(task.start, task.stop), piece, block, pool)
                cuts = chunk_slices(piece, writer.layout.chunks[3])
                first = piece.start // writer.layout.chunks[3]
                for i, fields in enumerate(block):
                    opened: AbstractContextManager[Any] = nullcontext(files[i]) if files else writer.open_date(dates[i])
                    with opened as file:
                        chunks[i] += file.write(first, [fields[..., cut] for cut in cuts], pool)
    return [WrittenDate.of(date, done, _merged(done)) for date, done in zip(dates, chunks, strict=True)]


def _write_streams(source: Source, writer: ChunkWriter, task: Task, *otherwise: Any) -> list[WrittenDate]:
    """The same on this thread alone, grid-chunk by grid-chunk, for dates that the source streams."""
    if not _streams(source, writer.layout, task):
        return write_block(source, writer, task, *otherwise)
    assert isinstance(source, AnemoiSource)
    written: list[WrittenDate] = []
    for date in range(task.start, task.stop):
        rows = source.stream(date)
        chunks: list[StoredChunk] = []
        with writer.open_date(date) as file:
            for number, cut in enumerate(chunk_slices(slice(0, writer.layout.shape[3]), writer.layout.chunks[3])):
                fields = writer.buffer()[..., : cut.stop - cut.start]
                rows.take(fields.reshape(-1, fields.shape[-1]))
                chunks += file.write(number, [fields], AtOnce())
        written.append(WrittenDate.of(date, chunks, _merged(chunks)))
    return written


def _streams(source: Source, layout: ArrayLayout, task: Task) -> bool:
    """Whether the source streams all dates of a task, and holds no more of a row than its part of a grid-chunk."""
    dates = range(task.start, task.stop)
    return isinstance(source, AnemoiSource) and all(source.streams(date, 4 * layout.chunks[3]) for date in dates)


class Buffers:
    """Reused block buffers, `count` at most: a task waits for one. Fresh memory costs as much as decoding."""

    def __init__(self, count: int) -> None:
        self._permits = threading.Semaphore(count)
        self._free: list[NDArray[np.uint8]] = []

    @contextmanager
    def borrow(self, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
        """A float32 array of `shape`, for the time of the `with`."""
        nbytes = int(np.prod(shape)) * 4
        with self._permits:
            try:
                buffer = self._free.pop()
            except IndexError:  # asking first would race with another task
                buffer = np.empty(0, np.uint8)
            if buffer.nbytes < nbytes:
                buffer = np.empty(nbytes, np.uint8)
            yield buffer[:nbytes].view(np.float32).reshape(shape)
            self._free.append(buffer)


def _execute(prepared: Prepared, folder: Path, todo: list[Task]) -> Iterator[list[WrittenDate]]:
    request, plan = prepared.request, prepared.plan
    if request.workers or request.scheduler:
        from shardio.cluster import execute

        return execute(_elsewhere(request), prepared.layout, plan, folder, todo)
    return execute_here(prepared.source, prepared.layout, plan, folder, todo, request.sync)


def _elsewhere(request: Request) -> Request:
    """The request as another process needs it: absolute paths."""
    return request if "://" in request.source else replace(request, source=str(Path(request.source).absolute()))


def execute_here(
    source: Source, layout: ArrayLayout, plan: Plan, folder: Path, todo: list[Task], sync: bool
) -> Iterator[list[WrittenDate]]:
    """All cores of this process: a date per thread where the source streams, else `in_flight` blocks on all threads."""
    writer = ChunkWriter(folder, layout, plan.threads, sync, source.statistics is None)
    # With fewer dates than threads, all threads work on one. What streams hold of their rows, a grid-chunk at most,
    # takes the memory of the blocks that they do without.
    fits = len(plan.pieces) == 1 and len(todo) >= plan.threads <= plan.in_flight * layout.grid[3]
    streamed = fits and _streams(source, layout, todo[0])
    work: Callable[..., list[WrittenDate]] = _write_streams if streamed else write_block
    at_once = plan.threads if streamed else plan.in_flight
    with ExitStack() as stack:
        pool: Executor = AtOnce() if streamed else stack.enter_context(ThreadPoolExecutor(plan.threads, "chunk"))
        blocks = stack.enter_context(ThreadPoolExecutor(at_once, "block"))
        for executor in (pool, blocks):  # an interrupt drops what has not begun
            stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        tools = (plan.pieces, pool, Buffers(plan.in_flight))
        waiting: set[Future[list[WrittenDate]]] = set()
        for task in todo:
            waiting.add(blocks.submit(work, source, writer, task, *tools))
            if len(waiting) > at_once:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _check_destination(request: Request) -> None:
    destination = Path(request.destination)
    if "://" in request.destination:
        raise OutputError(f"{request.destination} is remote. Write to a local or shared file system, then copy.")
    if destination.suffix != ".zarr":
        raise OutputError(f"{destination} does not end in .zarr. Name the output {destination}.zarr.")
    if not destination.parent.is_dir():
        raise OutputError(f"the folder {destination.parent} does not exist. Create it first.")
    if not os.access(destination.parent, os.W_OK):
        raise OutputError(f"the folder {destination.parent} is not writable. Choose another destination.")
    if not request.opener and "://" not in request.source:
        for path in glob(request.source) or [request.source]:
            _check_apart(Path(path), destination)
    if os.path.lexists(destination) and not request.overwrite:
        sweep_published(destination)
        raise OutputError(f"{destination} exists. Use --overwrite to replace it, or choose another destination.")


def _check_apart(source: Path, destination: Path) -> None:
    """OutputError where writing one would touch the other: the same path, also through a link, or one inside."""
    here, there = source.resolve(), destination.resolve()
    if here == there or (source.exists() and destination.exists() and source.samefile(destination)):
        raise OutputError(f"source and destination are the same: {there}. Choose another destination.")
    if here in there.parents:
        raise OutputError(f"{destination} lies inside its source {source}. Choose a destination outside.")
    if {there, partial_of(there)} & {here, *here.parents}:
        raise OutputError(f"the source {source} lies inside the destination {destination}. Choose another destination.")


def _check_unchanged(prepared: Prepared) -> None:
    if prepared.source.fingerprint() != prepared.fingerprint:
        raise OutputError(
            f"{prepared.request.source} changed while it was read. Run again with --overwrite once it is at rest."
        )


def _done(task: Task, written: Mapping[int, WrittenDate]) -> bool:
    return all(date in written for date in range(task.start, task.stop))


def _merged(chunks: list[StoredChunk]) -> NDArray[np.float64] | None:
    parts = [chunk.moments for chunk in chunks]
    return None if parts[0] is None else statistics.merge(part for part in parts if part is not None)


def _about(prepared: Prepared) -> Json:
    layout = prepared.layout
    return {
        "format_version": output.FORMAT_VERSION,
        "grid_chunks": layout.grid[3],
        "chunk_cells": layout.chunks[3],
        "codec": str(layout.codec),
        "source": prepared.request.source,
        "source_fingerprint": prepared.fingerprint,
        "selection": asdict(prepared.request.selection),
    }


class _explained:  # noqa: N801, used as a function
    """Turn the errors of the operating system into one message with its remedy."""

    def __init__(self, destination: Path):
        self._destination = destination

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, ShardioError):
            raise OutputError(
                f"cannot write {self._destination}: {error.strerror or error}. What is written is kept: "
                "make room or correct the cause, then run the same command again to continue."
            ) from error
