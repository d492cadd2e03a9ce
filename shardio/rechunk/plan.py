"""What rechunk will do, before anything is done: source layout + target layout + memory -> tasks. Pure arithmetic.

A task is a block of consecutive dates. It is worked through piece by piece: a piece is a range of cells, whole
grid-chunks, read for all dates of the block into one buffer and written from there. Whole dates are the best
piece; smaller ones keep the memory bound where a source chunk spans many dates. Source chunks that several tasks
or pieces touch are read again each time: that is the read amplification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from shardio.errors import PlanError
from shardio.format.layout import ENCODED_AHEAD, ArrayLayout
from shardio.format.threads import cores
from shardio.source.extent import SourceExtent

# Tasks smaller than this spend their time on overhead: several small dates share one.
SMALLEST_TASK = 32 * 2**20
# Dates written piece by piece keep their files open.
MOST_OPEN_FILES = 256


@dataclass(frozen=True)
class Task:
    """The dates `[start, stop)` of the target, read and written by one worker."""

    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """An immutable list of tasks and what they cost.

    Attributes:
      tasks: in order of dates; each date is in exactly one.
      pieces: ranges of cells, whole grid-chunks, the same for every task.
      bytes_needed, bytes_read: decoded bytes wanted from, and read from, the source.
      bytes_written: decoded bytes of the target.
      peak_memory: bytes of all buffers at once, over all `workers`.
      workers, threads, in_flight: processes; per process, threads and tasks at a time.
      reason: why the amplification is more than it has to be; empty when it is not.
    """

    tasks: tuple[Task, ...]
    pieces: tuple[slice, ...]
    bytes_needed: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    workers: int
    threads: int
    in_flight: int
    reason: str = ""

    @property
    def amplification(self) -> float:
        """Bytes read for each byte needed."""
        return self.bytes_read / self.bytes_needed


@dataclass(frozen=True)
class _Cut:
    """A candidate: how many dates a block and how many grid-chunks a piece may have."""

    dates: int
    chunks: int
    in_flight: int
    bytes_read: int
    memory: int


def make_plan(
    source: SourceExtent, target: ArrayLayout, max_memory: int, workers: int = 1, threads: int | None = None
) -> Plan:
    """Choose the cut that reads least within `max_memory` bytes (over all workers), then the one that overlaps most.

    Raises: PlanError where the memory is too small for any cut.
    """
    threads = threads or max(1, cores() // workers)
    best_overlap = 2 + threads // 8
    cuts = list(_cuts(source, target, threads, best_overlap))
    fitting = [cut for cut in cuts if workers * cut.memory <= max_memory]
    if not fitting:
        least = min(workers * cut.memory for cut in cuts)
        raise PlanError(
            f"the memory bound of {max_memory:,} bytes is too small: {workers} workers with {threads} threads each "
            f"need at least {least:,} bytes. Use --max-memory {math.ceil(least / 2**20)}MiB, fewer --workers, "
            "or more grid-chunks."
        )
    best = min(fitting, key=lambda cut: (cut.bytes_read, -cut.in_flight, -cut.chunks, -cut.dates))
    ideal = min(cuts, key=lambda cut: (cut.bytes_read, cut.memory))
    reason = ""
    if best.bytes_read > ideal.bytes_read:
        reason = (
            f"each source chunk spans {source.chunks[0]} dates and {source.chunks[3]} cells; reading each once takes "
            f"--max-memory {math.ceil(workers * ideal.memory / 2**20)}MiB"
        )
    needed = len(source.dates) * len(source.variables) * source.shape[2] * source.shape[3] * source.itemsize
    return Plan(
        tasks=tuple(Task(start, stop) for start, stop in _blocks(source, best.dates)),
        pieces=tuple(_pieces(target, best.chunks)),
        bytes_needed=needed,
        bytes_read=best.bytes_read,
        bytes_written=math.prod(target.grid) * target.chunk_bytes,
        peak_memory=workers * best.memory,
        workers=workers,
        threads=threads,
        in_flight=best.in_flight,
        reason=reason,
    )


def _cuts(source: SourceExtent, target: ArrayLayout, threads: int, best_overlap: int) -> Iterator[_Cut]:
    bytes_of_date = math.prod(target.shape[1:]) * np.dtype(target.dtype).itemsize
    span = source.chunks[0]
    together = max(1, SMALLEST_TASK // (span * bytes_of_date))
    dates = {block: _dates_read(source, block) for block in [span * together, *_halvings(span)]}
    piece_chunks = [target.grid[3]] if source.whole_dates else _halvings(target.grid[3])
    cells = {chunks: _cells_read(source, target, chunks) for chunks in piece_chunks}
    values = _variables_read(source) * source.shape[2] * source.itemsize
    # A Zarr shard is written in order: chunks encoded ahead of it wait in memory.
    waiting = (threads + ENCODED_AHEAD) * target.chunk_bytes if target.zarr_shards else 0
    for block, chunks, in_flight in product(dates, cells, range(best_overlap, 0, -1)):
        if chunks < target.grid[3] and target.zarr_shards and block > max(1, MOST_OPEN_FILES // in_flight):
            continue
        readers = in_flight if source.one_at_a_time else threads
        memory = in_flight * (block * chunks * target.chunk_bytes + waiting)
        memory += readers * _source_scratch(source, target) + threads * 2 * target.chunk_bytes
        memory += _reordering(source, threads)
        yield _Cut(block, chunks, in_flight, dates[block] * cells[chunks] * values, memory)


def _source_scratch(source: SourceExtent, target: ArrayLayout) -> int:
    """Bytes per reading thread: a source chunk as stored and decoded. A writing one holds two grid-chunks."""
    source_chunk = math.prod(source.chunks) * source.itemsize
    whole_date = source.chunks == (1, *target.shape[1:]) and source.itemsize == np.dtype(target.dtype).itemsize
    return source_chunk * (1 if whole_date else 2)


def _reordering(source: SourceExtent, threads: int) -> int:
    """Bytes to put cells in another order: that order, and per thread a row of float32."""
    return (16 + threads * 4) * source.shape[3] if source.whole_dates else 0


def _dates_read(source: SourceExtent, block: int) -> int:
    first = source.dates.start
    return sum(_touched(source, 0, first + start, first + stop) for start, stop in _blocks(source, block))


def _variables_read(source: SourceExtent) -> int:
    chunk = source.chunks[1]
    held = {index // chunk for index in source.variables}
    return sum(_touched(source, 1, i * chunk, i * chunk + 1) for i in held)


def _cells_read(source: SourceExtent, target: ArrayLayout, chunks: int) -> int:
    return sum(_touched(source, 3, piece.start, piece.stop) for piece in _pieces(target, chunks))


def _touched(source: SourceExtent, axis: int, start: int, stop: int) -> int:
    """Extent along `axis` of the source chunks that `[start, stop)` touches."""
    chunk = source.chunks[axis]
    return min(math.ceil(stop / chunk) * chunk, source.shape[axis]) - start // chunk * chunk


def _blocks(source: SourceExtent, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of target dates; none crosses a boundary of source chunks unless it covers them whole."""
    span, first = source.chunks[0], source.dates.start
    period = max(block // span, 1) * span  # a block starts anew at every multiple of this
    start = first
    while start < source.dates.stop:
        end_of_period = (start // period + 1) * period
        stop = min(start + block, end_of_period, source.dates.stop)
        yield start - first, stop - first
        start = stop


def _pieces(target: ArrayLayout, chunks: int) -> Iterator[slice]:
    cells, step = target.shape[3], chunks * target.chunks[3]
    for start in range(0, cells, step):
        yield slice(start, min(start + step, cells))


def _halvings(n: int) -> list[int]:
    """n, ceil(n / 2), ..., 1."""
    steps = [n]
    while steps[-1] > 1:
        steps.append(math.ceil(steps[-1] / 2))
    return steps
