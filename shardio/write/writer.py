"""Write grid-chunks: encode, checksum, store. One file per chunk in Zarr v2, one Zarr shard per date in v3."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from shardio.format.codec import crc32c
from shardio.format.files import atomic
from shardio.format.layout import ENCODED_AHEAD, ArrayLayout
from shardio.format.scratch import Scratch
from shardio.write.statistics import Moments, moments

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class StoredChunk:
    """What is kept of a chunk: `crc` is of the stored bytes (in v3 without their own crc32c)."""

    crc: int
    nbytes: int
    moments: Moments | None


class ChunkWriter:
    """Encodes the grid-chunks of a layout and stores them below `folder`.

    `threads` + ENCODED_AHEAD chunks at most are encoded ahead of a Zarr shard; `sync` makes every file durable before
    it gets its name; `with_moments` computes statistics on the way.
    """

    def __init__(self, folder: Path, layout: ArrayLayout, threads: int, sync: bool, with_moments: bool):
        self.folder, self.layout, self.threads = folder, layout, threads
        self._sync, self._with_moments = sync, with_moments
        self._scratch = Scratch()

    def open_date(self, date: int) -> ChunkFiles | ZarrShard:
        """A writer for the chunks of one date, given in order of cells."""
        name, place = self.layout.file_of((date, 0, 0, 0))
        return ChunkFiles(self, date) if place is None else ZarrShard(self.folder / name, self, self._sync)

    def encode(self, fields: NDArray[np.float32]) -> tuple[list[bytes], StoredChunk]:
        """Compress `fields` [variable, ensemble, cells of one chunk or fewer]; short chunks are padded with NaN."""
        cells = fields.shape[-1]
        self.buffer()[..., :cells] = fields
        return self.encode_in_place(cells)

    def encode_in_place(self, cells: int) -> tuple[list[bytes], StoredChunk]:
        """Compress what lies in this thread's `buffer`, the first `cells` of it."""
        chunk = self.buffer()
        chunk[..., cells:] = self.layout.fill_value
        assert self.layout.codec is not None
        stored = self.layout.codec.encode(chunk)
        found = moments(chunk[..., :cells].reshape(len(chunk), -1)) if self._with_moments else None
        crc = crc32c(stored)
        if self.layout.checked:
            return [stored, crc.to_bytes(4, "little")], StoredChunk(crc, len(stored) + 4, found)
        return [stored], StoredChunk(crc, len(stored), found)

    def buffer(self) -> NDArray[np.float32]:
        """Where this thread gathers a chunk [variable, ensemble, cell]."""
        shape = self.layout.chunks[1:]
        return self._scratch.take("gathered", int(np.prod(shape)) * 4).view(np.float32).reshape(shape)

    def store(self, date: int, chunk: int, fields: NDArray[np.float32]) -> StoredChunk:
        """Encode one chunk into its own file."""
        return self.save(date, chunk, *self.encode(fields))

    def save(self, date: int, chunk: int, parts: list[bytes], stored: StoredChunk) -> StoredChunk:
        """Write an encoded chunk into its own file."""
        path = self.folder / self.layout.file_of((date, 0, 0, chunk))[0]
        with atomic(path, self._sync) as partial, partial.open("xb") as file:
            file.writelines(parts)
        return stored


class ChunkFiles:
    """The chunks of one date, each its own file, written on all threads of the pool."""

    def __init__(self, writer: ChunkWriter, date: int):
        self._writer, self._date = writer, date

    def write(self, first: int, fields: list[NDArray[np.float32]], pool: Executor) -> list[StoredChunk]:
        """Store consecutive chunks, the first of them number `first`."""
        numbers = range(first, first + len(fields))
        return list(pool.map(lambda chunk, values: self._writer.store(self._date, chunk, values), numbers, fields))

    def write_in_place(self, chunk: int, cells: int) -> StoredChunk:
        """Store what this thread has gathered in the writer's buffer."""
        return self._writer.save(self._date, chunk, *self._writer.encode_in_place(cells))

    def __enter__(self) -> ChunkFiles:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do: each file got its name when it was complete."""


class ZarrShard:
    """The chunks of one date in one file: encoded on all threads, appended in order, the index last."""

    def __init__(self, path: Path, writer: ChunkWriter, sync: bool):
        self._path, self._writer, self._sync = path, writer, sync
        self._index: list[tuple[int, int]] = []
        self._end = 0

    def write(self, first: int, fields: list[NDArray[np.float32]], pool: Executor) -> list[StoredChunk]:
        """Append consecutive chunks; `first` is the number of those already there."""
        assert first == len(self._index)
        ahead = self._writer.threads + ENCODED_AHEAD
        return [self._append(*encoded) for encoded in _lookahead(pool, self._writer.encode, fields, ahead)]

    def write_in_place(self, chunk: int, cells: int) -> StoredChunk:
        """Append what this thread has gathered in the writer's buffer; `chunk` is the number of those there."""
        assert chunk == len(self._index)
        return self._append(*self._writer.encode_in_place(cells))

    def _append(self, parts: list[bytes], stored: StoredChunk) -> StoredChunk:
        self._index.append((self._end, stored.nbytes))
        self._end += stored.nbytes
        self._file.writelines(parts)
        return stored

    def __enter__(self) -> ZarrShard:
        with ExitStack() as stack:
            partial = stack.enter_context(atomic(self._path, self._sync))
            self._file = stack.enter_context(partial.open("xb"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._open.__exit__(*error)
            return
        with self._open:
            index = np.array(self._index, "<u8").tobytes()
            self._file.writelines([index, crc32c(index).to_bytes(4, "little")])


class AtOnce(Executor):
    """Runs what is submitted at once, on the thread that submits it."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _lookahead(pool: Executor, function: Any, items: list[Any], ahead: int) -> Iterator[Any]:
    """`pool.map` with at most `ahead` results waiting, so that encoded chunks do not pile up in memory."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def chunk_slices(piece: slice, chunk_cells: int) -> list[slice]:
    """The grid-chunks of a piece, relative to its start."""
    cells = piece.stop - piece.start
    return [slice(start, min(start + chunk_cells, cells)) for start in range(0, cells, chunk_cells)]
