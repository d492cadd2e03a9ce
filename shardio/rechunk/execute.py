"""Make a grid-chunk dataset: plan, run the tasks here or on a dask cluster, publish.

    source --tasks--> grid-chunks --record--> ledger

One task is a block of dates. A task that ran twice wrote the same bytes twice; a task that was lost is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardio.errors import OutputError
from shardio.format.files import sync_path
from shardio.format.store import LocalStore
from shardio.rechunk.blocks import execute_here
from shardio.rechunk.plan import Task
from shardio.rechunk.request import Prepared, Request
from shardio.write import output
from shardio.write.job import Job
from shardio.write.written import Written, WrittenDate

Json = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Told after every task: dates done of all, decoded bytes written so far by this run."""

    dates: int
    of: int
    nbytes: int


@dataclass(frozen=True)
class Result:
    """What a run did: `dates` written now, the rest was there before; all of it where it was complete already."""

    destination: str
    dates: int
    resumed_dates: int
    grid_chunks: int
    nbytes: int
    stored_bytes: int
    already_complete: bool = False


def run(prepared: Prepared, report: Callable[[Progress], None] = lambda _: None) -> Result:
    """Write what is not yet written, publish, and close the source; interrupted at any point, call it again.

    Raises: ChunkError where the source is damaged; OutputError where the output cannot be written, belongs to another
      run, or the source changed meanwhile.
    """
    request, layout = prepared.request, prepared.layout
    if prepared.is_complete:
        prepared.source.close()
        stored = sum(LocalStore(request.destination).sizes("data").values())
        return Result(request.destination, 0, layout.shape[0], layout.grid[3], 0, stored, already_complete=True)
    destination = Path(request.destination)
    with _explain(destination):
        job = Job(destination, prepared.identity, request.command, request.sync, request.overwrite)
        try:
            output.begin_data(job.dataset, layout, prepared.source.data_attributes)
            written = job.written(layout, with_moments=prepared.source.statistics is None)
            before = written.count
            todo = [task for task in prepared.plan.tasks if not _done(task, written)]
            bytes_of_date = layout.grid[3] * layout.chunk_bytes
            arrays = output.create_coordinates(job.dataset, prepared.source, layout)
            with ThreadPoolExecutor(1, "coordinates") as other:  # one thread, busy for a date's time at most
                coordinates = other.submit(output.write_coordinates, job.dataset, prepared.source, arrays)
                for dates in _execute(prepared, job.dataset / "data", todo):
                    written.add(dates)
                    job.record(dates, written)
                    report(Progress(written.count, layout.shape[0], (written.count - before) * bytes_of_date))
                    if coordinates.done():
                        coordinates.result()  # what is wrong with them is told now, not after days of fields
                job.sweep()  # of workers killed in this run
                if request.sync:
                    sync_path(job.dataset / "data")
            _check_unchanged(prepared)
            about, small = prepared.about, coordinates.result()
            output.finish_dataset(job.dataset, prepared.source, layout, written.crc, about, small, written.moments)
            job.publish()
            prepared.source.close()
        finally:
            job.close()
    done = written.count - before
    return Result(str(destination), done, before, layout.grid[3], done * bytes_of_date, written.stored_bytes)


def _execute(prepared: Prepared, folder: Path, todo: list[Task]) -> Iterator[list[WrittenDate]]:
    request, plan = prepared.request, prepared.plan
    if request.workers or request.scheduler:
        from shardio.rechunk.cluster import execute

        return execute(_elsewhere(request), prepared.layout, plan, folder, todo)
    return execute_here(prepared.source, prepared.layout, plan, folder, todo, request.sync)


def _elsewhere(request: Request) -> Request:
    """The request as another process needs it: absolute paths."""
    return request if "://" in request.source else replace(request, source=str(Path(request.source).absolute()))


def _check_unchanged(prepared: Prepared) -> None:
    source = prepared.source
    if (source.fingerprint(), source.changed()) != (prepared.fingerprint, prepared.changed):
        raise OutputError(
            f"{prepared.request.source} changed while it was read. Run again with --overwrite once it is at rest."
        )


def _done(task: Task, written: Written) -> bool:
    return bool(written.done[task.start : task.stop].all())


@contextmanager
def _explain(destination: Path) -> Iterator[None]:
    """Turn the errors of the operating system into one message with its remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {destination}: {error.strerror or error}. What is written is kept: "
            "make room or correct the cause, then run the same command again to continue."
        ) from error
