"""Make a grid-chunk dataset: plan, run the tasks here or on a dask cluster, publish.

    source --tasks--> grid-chunks --record--> ledger

One task is a block of dates. A task that ran twice wrote the same bytes twice; a task that was lost is run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

from shardio import output
from shardio.allocator import keep_freed_memory
from shardio.blocks import execute_here
from shardio.codec import named
from shardio.errors import OutputError, ShardioError
from shardio.job import Job, WrittenDate, partial_of, sweep_published
from shardio.layout import ArrayLayout, grid_chunked
from shardio.order import order_of, ordered
from shardio.plan import Plan, Task, make_plan
from shardio.source import Selection, Source, open_source
from shardio.writer import sync_folder

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
            with ThreadPoolExecutor(1, "coordinates") as other:  # one thread, busy for a date's time at most
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


def _execute(prepared: Prepared, folder: Path, todo: list[Task]) -> Iterator[list[WrittenDate]]:
    request, plan = prepared.request, prepared.plan
    if request.workers or request.scheduler:
        from shardio.cluster import execute

        return execute(_elsewhere(request), prepared.layout, plan, folder, todo)
    return execute_here(prepared.source, prepared.layout, plan, folder, todo, request.sync)


def _elsewhere(request: Request) -> Request:
    """The request as another process needs it: absolute paths."""
    return request if "://" in request.source else replace(request, source=str(Path(request.source).absolute()))


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
    if request.source and not request.opener and "://" not in request.source:
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
