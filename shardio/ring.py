"""A ring of reusable buffers, one date each: filled on a few threads, handed out again only when nobody looks at it.

A chunk is decoded straight into its place in the buffer of its date; batches are made of views. A view keeps its
buffer: when the last one is gone, the buffer is free, and still holds its date for whoever asks for it next.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from shardio.dataset import Dataset, Part
from shardio.errors import ChunkError
from shardio.output import CHECKSUMS
from shardio.reader import NativeReader
from shardio.reading import Reading, within
from shardio.source import as_cut

ALIGNMENT = 64  # bytes; a cache line


@dataclass(frozen=True)
class Piece:
    """A chunk of a date as this rank holds it: `values` [variables of the part, ensemble, cells]."""

    chunk: int
    cells: slice
    places: slice | tuple[int, ...]
    values: torch.Tensor

    def trimmed(self, cells: slice) -> Piece:
        """The part of it that holds `cells`."""
        return replace(self, cells=cells, values=self.values[..., within(cells, self.cells)])


@dataclass(frozen=True)
class _Place:
    """Where in a buffer a chunk of a part is decoded, and which values of it are handed out."""

    part: Part
    chunk: int
    cells: slice
    offset: int
    shape: tuple[int, ...]
    view: tuple[slice | list[int], ...]
    direct: bool


@dataclass
class Slot:
    """One buffer: the date it holds, the reads that fill it, and how many leases look at it."""

    buffer: torch.Tensor
    date: int
    reads: list[Future[None]] = field(default_factory=list)
    users: int = 0

    def settled(self) -> bool:
        return all(read.done() for read in self.reads)

    def intact(self) -> bool:
        return not any(read.done() and (read.cancelled() or read.exception()) for read in self.reads)


class Lease:
    """The right to look at one date; `pieces()` after `wait()`."""

    def __init__(self, slot: Slot, places: Sequence[_Place], release: Callable[[Slot], None]):
        self._slot, self._places = slot, places
        window = slot.buffer.numpy()[:]
        # torch keeps `window` as long as any view of it lives; then the slot is free.
        weakref.finalize(window, release, slot).atexit = False
        self._tensor = torch.from_numpy(window)

    def wait(self) -> None:
        """Until all chunks are decoded; raises what went wrong in a read."""
        for read in self._slot.reads:
            try:
                read.result()
            except CancelledError as error:
                raise ChunkError("the read was cancelled: the loader was closed. Make a new iterator.") from error

    def cancel(self) -> None:
        """Drop reads that have not begun."""
        for read in self._slot.reads:
            read.cancel()

    def pieces(self) -> list[Piece]:
        """Views of the buffer, by chunk."""
        return [
            Piece(
                place.chunk,
                place.cells,
                as_cut(place.part.places),
                self._tensor[place.offset : place.offset + int(np.prod(place.shape))].view(place.shape)[place.view],
            )
            for place in self._places
        ]


class Recycler:
    """Tensors whose memory is used again when nobody looks at them any more."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, length: int) -> torch.Tensor:
        """A float32 tensor of `length` values, not initialised."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(length)
        if memory.numel() != length:
            memory = torch.empty(length)
        window = memory.numpy()[:]
        weakref.finalize(window, self._free.append, memory).atexit = False
        return torch.from_numpy(window)


class Ring:
    """Buffers of dates. `lease(date)` begins to read a date, or finds it already there."""

    def __init__(self, dataset: Dataset, reading: Reading, pool: Executor, verify: bool = False, pin: bool = False):
        self._dataset, self._reading, self._pool, self._pin = dataset, reading, pool, pin
        self._lock = threading.RLock()  # a lease may end in the middle of anything, by garbage collection
        self._free: OrderedDict[int, Slot] = OrderedDict()
        self._busy: dict[int, Slot] = {}
        self._layouts: dict[range, tuple[list[list[_Place]], int]] = {}
        self._checksums = {id(part): _checksums(part) for part in dataset.parts} if verify else {}

    def lease(self, date: int) -> Lease:
        chunks = self._reading.chunks_read(date, self._reading.topology.model_rank)
        places, length = self._places(chunks, date)
        with self._lock:
            slot = self._busy.get(date) or self._free.pop(date, None)
            if slot is None or not slot.intact():
                slot = self._claim(length)
                slot.date = date
                slot.reads = [self._pool.submit(self._fill, slot.buffer, place, date) for place in places]
            slot.users += 1
            self._busy[date] = slot
        return Lease(slot, places, self._release)

    def _claim(self, length: int) -> Slot:
        """The buffer that is free for the longest time, else a new one: what is looked at is never overwritten."""
        for date, slot in self._free.items():
            if slot.settled() and slot.buffer.numel() >= length:
                return self._free.pop(date)
        return Slot(torch.empty(length, dtype=torch.float32, pin_memory=self._pin), -1)

    def _release(self, slot: Slot) -> None:
        with self._lock:
            slot.users -= 1
            if slot.users == 0:
                if self._busy.get(slot.date) is slot:
                    del self._busy[slot.date]
                self._free[slot.date if slot.intact() else -1 - id(slot)] = slot

    def _places(self, chunks: range, date: int) -> tuple[list[_Place], int]:
        """Where each chunk goes; the same for all dates that a part covers, so computed once."""
        if chunks not in self._layouts:
            self._layouts[chunks] = _layout(self._dataset.parts, chunks, self._reading)
        by_part, length = self._layouts[chunks]
        parts = zip(self._dataset.parts, by_part, strict=True)
        return list(itertools.chain.from_iterable(places for part, places in parts if part.rows[date] >= 0)), length

    def _fill(self, buffer: torch.Tensor, place: _Place, date: int) -> None:
        size = int(np.prod(place.shape))
        target = buffer.numpy()[place.offset : place.offset + size].reshape(place.shape)
        try:
            self._read(target, place, int(place.part.rows[date]))
        except (ChunkError, OSError, ValueError) as error:
            raise ChunkError(f"date {self._dataset.dates[date]}, grid-chunk {place.chunk}: {error}") from error

    def _read(self, target: NDArray[np.float32], place: _Place, row: int) -> None:
        source = place.part.source
        if place.direct:
            reader = source.reader
            assert isinstance(reader, NativeReader)
            index = (row, 0, 0, place.chunk)
            expected = self._checksums.get(id(place.part))
            crc = None if expected is None else int(expected[row, place.chunk])
            reader.read_chunk(index, target[None], crc)
            return
        members = slice(0, source.layout.shape[2])
        box = (slice(row, row + 1), as_cut(place.part.stored), members, place.cells)
        source.reader.read(box, target[None])


def _layout(parts: Sequence[Part], chunks: range, reading: Reading) -> tuple[list[list[_Place]], int]:
    rank = reading.topology.model_rank
    by_part: list[list[_Place]] = []
    longest = 0
    offset = 0
    for part in parts:
        layout = part.source.layout
        direct = (
            isinstance(part.source.reader, NativeReader)
            and layout.dtype == "<f4"
            and layout.chunks == (1, *layout.shape[1:3], reading.owners.chunk_cells)
        )
        places = []
        for chunk in chunks:
            cells = reading.cells_kept(chunk, rank)
            trim = within(cells, reading.cells_of(chunk))
            if direct:
                shape: tuple[int, ...] = layout.chunks[1:]
                cut = as_cut(part.stored)
                view = (cut if isinstance(cut, slice) else list(cut), slice(None), trim)
            else:
                shape = (len(part.stored), layout.shape[2], cells.stop - cells.start)
                view = (slice(None),) * 3
            places.append(_Place(part, chunk, cells, offset, shape, view, direct))
            offset += -(-int(np.prod(shape)) * 4 // ALIGNMENT) * ALIGNMENT // 4
        by_part.append(places)
        longest = max(longest, offset)
    return by_part, longest


def _checksums(part: Part) -> NDArray[np.uint32]:
    values = part.source.array(CHECKSUMS)
    if values is None:
        raise ChunkError(f"{part.source.path} carries no checksums: shardio did not make it. Use verify=False.")
    return values
