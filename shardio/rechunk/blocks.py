"""Run tasks on the cores of this process.

    source --read piece--> buffer [date, variable, ensemble, cell] --encode--> grid-chunks

Where the source stores a date as one chunk, a thread takes it from there grid-chunk by grid-chunk instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.format.layout import ArrayLayout
from shardio.rechunk.plan import Plan, Task
from shardio.source.source import Source
from shardio.write.writer import AtOnce, ChunkWriter, StoredChunk, chunk_slices
from shardio.write.written import WrittenDate


def execute_here(
    source: Source, layout: ArrayLayout, plan: Plan, folder: Path, todo: list[Task], sync: bool
) -> Iterator[list[WrittenDate]]:
    """All cores of this process: a date per thread where the source streams, else `in_flight` blocks on all threads."""
    writer = ChunkWriter(folder, layout, plan.threads, sync, source.statistics is None)
    streamed = _has_dates_for_threads(plan, layout, todo) and _streams(source, layout, todo[0])
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
    return [WrittenDate.of(date, done) for date, done in zip(dates, chunks, strict=True)]


def _write_streams(source: Source, writer: ChunkWriter, task: Task, *otherwise: Any) -> list[WrittenDate]:
    """The same on this thread alone, grid-chunk by grid-chunk, for dates that the source streams."""
    if not _streams(source, writer.layout, task):
        return write_block(source, writer, task, *otherwise)
    written: list[WrittenDate] = []
    for date in range(task.start, task.stop):
        rows = source.stream(date)
        chunks: list[StoredChunk] = []
        with writer.open_date(date) as file:
            for number, cut in enumerate(chunk_slices(slice(0, writer.layout.shape[3]), writer.layout.chunks[3])):
                fields = writer.buffer()[..., : cut.stop - cut.start]
                rows.take(fields.reshape(-1, fields.shape[-1]))
                chunks.append(file.write_in_place(number, fields.shape[-1]))
        written.append(WrittenDate.of(date, chunks))
    return written


def _has_dates_for_threads(plan: Plan, layout: ArrayLayout, todo: list[Task]) -> bool:
    """Whether every thread may work on a date of its own."""
    whole_dates = len(plan.pieces) == 1
    enough = len(todo) >= plan.threads  # with fewer, all threads work on one
    # What streams hold of their rows, a grid-chunk at most, takes the memory of the blocks that they do without.
    fits = plan.threads <= plan.in_flight * layout.grid[3]
    return whole_dates and enough and fits


def _streams(source: Source, layout: ArrayLayout, task: Task) -> bool:
    """Whether the source streams all dates of a task, and holds no more of a row than its part of a grid-chunk."""
    dates = range(task.start, task.stop)
    return all(source.streams(date, 4 * layout.chunks[3]) for date in dates)


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
