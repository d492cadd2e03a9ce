"""A ring of reusable buffers, one date each: filled on a few threads, handed out again only when nobody looks at it.

A chunk is decoded straight into its place in the buffer of its date; batches are made of views. A view keeps its
buffer: when the last one is gone, the buffer is free, and still holds its date for whoever asks for it next.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.errors import ChunkError
from shardio.format.boxes import as_cut
from shardio.format.reader import NativeReader
from shardio.load.dataset import Dataset
from shardio.load.join import Part
from shardio.load.reading import Reading, within
from shardio.write.output import CHECKSUMS

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
    copied: torch.cuda.Event | None = None

    def settled(self) -> bool:
        """Whether neither a read nor a copy to the device is under way."""
        copied = self.copied is None or bool(self.copied.query())
        return copied and all(read.done() for read in self.reads)

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

    def __init__(self, spare: int = 2) -> None:
        """`spare`: most that are kept although nobody looks at them."""
        self._free: deque[torch.Tensor] = deque(maxlen=spare)

    def take(self, length: int) -> torch.Tensor:
        """A float32 tensor of `length` values, not initialised."""
        try:
            memory = self._free.popleft()
        except IndexError:
            memory = torch.empty(length)
        if memory.numel() != length:
            memory = torch.empty(length)
        window = memory.numpy()[:]
        weakref.finalize(window, self._free.append, memory).atexit = False
        return torch.from_numpy(window)


class Ring:
    """Buffers of dates. `lease(date)` begins to read a date, or finds it already there."""

    def __init__(
        self,
        dataset: Dataset,
        reading: Reading,
        pool: Executor,
        verify: bool = False,
        pin: bool = False,
        spare: int | None = None,
    ):
        """`spare`: most buffers that are kept although nobody looks at them."""
        self._dataset, self._reading, self._pool, self._pin, self._spare = dataset, reading, pool, pin, spare
        self._lock = threading.Lock()
        # A lease ends by garbage collection, on any thread, in the middle of anything: that only appends here.
        self._returned: deque[Slot] = deque()
        self._free: OrderedDict[int, Slot] = OrderedDict()
        self._busy: dict[int, Slot] = {}
        self._layouts: dict[range, list[list[_Place]]] = {}
        self._longest = 0
        for turn in range(reading.topology.model_size):  # dates beyond that repeat
            self._longest = max(self._longest, self._add_layout(reading.chunks_read(turn, reading.topology.model_rank)))
        places = [place for layout in self._layouts.values() for part in layout for place in part]
        if verify and not all(place.direct for place in places):
            raise ChunkError(
                "verify=True needs datasets of equal grid-chunks in local files: these cannot be checked by chunk. "
                "Rechunk them alike, or use verify=False and `shardio verify`."
            )
        self._checksums = {id(part): _checksums(part) for part in dataset.parts} if verify else {}

    def lease(self, date: int) -> Lease:
        chunks = self._reading.chunks_read(date, self._reading.topology.model_rank)
        places = self._places(chunks, date)
        with self._lock:
            self._collect()
            slot = self._busy.get(date) or self._free.pop(date, None)
            if slot is None or not slot.intact():
                slot = self._claim(self._longest if places else 0)
                slot.date = date
                slot.reads = [self._pool.submit(self._fill, slot.buffer, place, date) for place in places]
            slot.users += 1
            self._busy[date] = slot
        return Lease(slot, places, self._returned.append)

    def collect(self) -> None:
        """Take back the buffers that nobody looks at any more; reads into them that have not begun are dropped."""
        with self._lock:
            self._collect()

    @property
    def buffers(self) -> int:
        """Buffers in memory, in use or spare."""
        with self._lock:
            self._collect()
            return len(self._busy) + len(self._free)

    def _collect(self) -> None:
        while self._returned:
            slot = self._returned.popleft()
            slot.users -= 1
            if slot.users:
                continue
            for read in slot.reads:
                read.cancel()
            if self._pin:  # its last user may have begun a copy that has not finished
                slot.copied = torch.cuda.current_stream().record_event()
            if self._busy.get(slot.date) is slot:
                del self._busy[slot.date]
            self._free[slot.date if slot.intact() else -1 - id(slot)] = slot
        while self._spare is not None and len(self._free) > self._spare:
            self._free.popitem(last=False)

    def _claim(self, length: int) -> Slot:
        """The buffer that is free for the longest time, else a new one: what is looked at is never overwritten."""
        for date, slot in self._free.items():
            if slot.settled() and slot.buffer.numel() == length:
                return self._free.pop(date)
        return Slot(torch.empty(length, dtype=torch.float32, pin_memory=self._pin), -1)

    def _add_layout(self, chunks: range) -> int:
        """Where each chunk goes, the same for all dates that a part covers; returns the length of the buffer."""
        self._layouts[chunks], length = _layout(self._dataset.parts, chunks, self._reading)
        return length

    def _places(self, chunks: range, date: int) -> list[_Place]:
        parts = zip(self._dataset.parts, self._layouts[chunks], strict=True)
        return list(itertools.chain.from_iterable(places for part, places in parts if part.rows[date] >= 0))

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
    length = 0
    # Parts that are concatenated in time have no date in common, so they use the same place.
    in_time = len({part.places for part in parts}) == 1
    for part in parts:
        offset = 0 if in_time else length
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
        length = max(length, offset)
    return by_part, length


def _checksums(part: Part) -> NDArray[np.uint32]:
    values = part.source.array(CHECKSUMS)
    if values is None:
        raise ChunkError(f"{part.source.path} carries no checksums: shardio did not make it. Use verify=False.")
    return values


def put(target: Tensor, piece: Piece) -> None:
    """Copy a piece to its variables of `target` [variables, ensemble, cells of the piece]."""
    if isinstance(piece.places, slice):
        target[piece.places].copy_(piece.values, non_blocking=True)
    else:
        target[list(piece.places)] = piece.values.to(target.device)
