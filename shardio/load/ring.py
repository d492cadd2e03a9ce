"""Dates under way: read on a few threads into buffers that are used again when nobody looks at them.

A chunk is decoded straight into its place in the buffer of its lease, and all that a lease holds is one array.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardio.errors import ChunkError
from shardio.format.reader import NativeReader
from shardio.format.threads import cores
from shardio.load.dataset import Dataset
from shardio.load.fill import Filler, Work
from shardio.load.memory import Buffer, Memory

MOST_LOCAL_THREADS = 8
REMOTE_THREADS = 16  # they wait for the network, not for a core

Futures = list[Future[None]]


@dataclass(frozen=True)
class Key:
    """Fields of one date: places of the variables in the dataset, how many members."""

    date: int
    variables: tuple[int, ...]
    members: int


class Lease:
    """Fields under way, their holder's own after `wait()`.

    Attributes:
      keys: which they are.
      buffer: all of them, one after another.
      fields: of each [variables, members, cells], views of it.
    """

    def __init__(self, keys: Sequence[Key], buffer: Buffer, cells: Sequence[int], lock: threading.Lock):
        """`cells`: how many of each; `lock`: of who gives out leases."""
        self.keys, self.buffer, self._lock = tuple(keys), buffer, lock
        shapes = [(len(key.variables), key.members, count) for key, count in zip(keys, cells, strict=True)]
        ends = itertools.accumulate(map(math.prod, shapes), initial=0)
        cuts = zip(itertools.pairwise(ends), shapes, strict=True)
        self.fields = [buffer.values[start:stop].reshape(shape) for (start, stop), shape in cuts]
        self.reads: list[Futures] = []
        self.copies: Futures = []
        self.handed_out = False

    def wait(self) -> None:
        """Until all chunks are decoded; raises what went wrong in a read."""
        with self._lock:
            self.handed_out = True
        for read in itertools.chain.from_iterable(self.reads):
            try:
                read.result()
            except CancelledError as error:
                raise ChunkError("the read was cancelled: the loader was closed. Make a new iterator.") from error
        for copy in self.copies:  # its holder may write into it from now on
            with suppress(CancelledError):
                copy.exception()

    def intact(self, place: int) -> bool:
        """Whether no read of a date has failed so far."""
        return not any(read.done() and (read.cancelled() or read.exception()) for read in self.reads[place])


class Ring:
    """Gives out leases, and begins their reads.

    Args:
      filler: of the dataset.
      cells: that are read of each date.
      pool: threads that read.
      memory: where to.
      recent: leases in which a date is looked for before it is read again.
    """

    def __init__(self, filler: Filler, cells: Callable[[int], slice], pool: Executor, memory: Memory, recent: int):
        self._filler, self._cells, self._pool, self._memory = filler, cells, pool, memory
        self._lock = threading.Lock()
        # A lease ends by garbage collection, on any thread, in the middle of anything: that only appends here.
        self._ended: deque[list[Futures]] = deque()
        self._recent: deque[weakref.ref[Lease]] = deque(maxlen=recent)

    def lease(self, keys: Sequence[Key]) -> Lease:
        """Begin to read."""
        cells = [self._cells(key.date) for key in keys]
        counts = [span.stop - span.start for span in cells]
        length = sum(len(key.variables) * key.members * count for key, count in zip(keys, counts, strict=True))
        with self._lock:
            self._collect()
            lease = Lease(keys, self._memory.take(length), counts, self._lock)
            self._recent.append(weakref.ref(lease))
            weakref.finalize(lease, self._ended.append, lease.reads).atexit = False
            for key, span, target in zip(keys, cells, lease.fields, strict=True):
                lease.reads.append(self._begin(key, span, target))
        return lease

    def collect(self) -> None:
        """Drop reads that have not begun and that nobody waits for any more."""
        with self._lock:
            self._collect()

    def _begin(self, key: Key, cells: slice, target: NDArray[np.float32]) -> Futures:
        """Reads of one date; where a lease that nobody has yet is to hold it too, it is copied from there."""
        work = self._filler.work(key.date, key.variables, cells)
        found = self._find(key) if work else None
        if found is None:
            return [self._pool.submit(self._filler.fill, target, each, key.date) for each in work]
        source, place = found
        source.copies.append(
            self._pool.submit(self._copy, source.reads[place], source.fields[place], target, work, key.date)
        )
        return source.copies[-1:]

    def _find(self, key: Key) -> tuple[Lease, int] | None:
        for lease in (reference() for reference in reversed(self._recent)):
            if lease is not None and not lease.handed_out and key in lease.keys[: len(lease.reads)]:
                place = lease.keys.index(key)
                return (lease, place) if lease.intact(place) else None
        return None

    def _copy(
        self, reads: Futures, source: NDArray[np.float32], target: NDArray[np.float32], work: list[Work], date: int
    ) -> None:
        try:
            for read in reads:  # these threads were given them before this: one of them waits, at most, not all
                read.result()
        except CancelledError:  # nobody waits for that lease any more
            for each in work:
                self._filler.fill(target, each, date)
        else:
            target[...] = source

    def _collect(self) -> None:
        while self._ended:
            for read in itertools.chain.from_iterable(self._ended.popleft()):
                read.cancel()


def threads_for(dataset: Dataset) -> int:
    """That read it: the cores of this rank; for remote stores more, for they wait for the network."""
    if any(not isinstance(part.source.reader, NativeReader) for part in dataset.parts):
        return REMOTE_THREADS
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_LOCAL_THREADS, cores() // ranks_here))
