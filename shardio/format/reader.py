"""Read any box of `data[date, variable, ensemble, cell]` into your own buffer.

Three engines give the same values to the bit: NativeReader (local files in blosc, zstd, gzip or no codec: pread,
decode in place), TensorstoreReader (remote stores and other codecs), ZarrReader (what only zarr-python decodes).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardio.errors import REMEDY, ChunkError
from shardio.format.blocks import HEADER, BloscBlocks, Rows, streams
from shardio.format.boxes import Box, chunks_of, outer_index, overlap
from shardio.format.codec import crc32c
from shardio.format.layout import ArrayLayout
from shardio.format.scratch import Scratch
from shardio.format.store import SECONDS_TO_ANSWER, LocalStore, Store, kvstore_spec, remote_context
from shardio.format.stream import BloscRows
from shardio.format.threads import for_each

NO_CHUNK = 2**64 - 1
MOST_INDEXES = 4096  # of Zarr shards, kept in memory


class Reader(Protocol):
    """Reads boxes of one array; `out` has the shape of the box and may be strided."""

    layout: ArrayLayout

    def read(self, box: Box, out: NDArray[Any], pool: Executor | None = None) -> None:
        """Fill `out` with the values of `box`, cast to the dtype of `out`."""


class NativeReader:
    """Local files: each chunk is one pread and one decode, on the threads of the caller's pool."""

    def __init__(self, folder: Path, layout: ArrayLayout, fill_absent: bool = False):
        """`fill_absent`: chunks that are not stored hold the fill value, as Zarr has it, instead of an error."""
        self.folder, self.layout, self.fill_absent = folder, layout, fill_absent
        self._scratch = Scratch()
        self._indexes: dict[str, tuple[tuple[int, int], NDArray[np.uint64]]] = {}

    def read(self, box: Box, out: NDArray[Any], pool: Executor | None = None) -> None:
        touched = chunks_of(box, self.layout.chunks)
        for_each(lambda chunk: self._read_chunk(chunk, box, out), touched, pool)

    def stored(self, chunk: tuple[int, ...], most: int | None = None) -> NDArray[np.uint8] | None:
        """Stored bytes of a chunk, in a buffer of this thread that its next read overwrites; None where absent.

        `most`: as many bytes at most, from its begin.
        """
        with self._opened(chunk) as found:
            if found is None:
                return None
            descriptor, offset, nbytes, name = found
            if most is None:
                return self._pread(descriptor, offset, nbytes, name, "stored")
            return self._pread(descriptor, offset, min(most, nbytes), name, "begin")

    def stored_bytes(self, chunk: tuple[int, ...]) -> int:
        """How many bytes of a chunk are stored, without reading them; 0 where absent."""
        with self._opened(chunk) as found:
            return 0 if found is None else found[2]

    @contextmanager
    def _opened(self, chunk: tuple[int, ...]) -> Iterator[tuple[int, int, int, str] | None]:
        """Descriptor of the file of a chunk, offset and bytes of the chunk in it, and its name; None where absent."""
        name, place = self.layout.file_of(chunk)
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            status = os.fstat(descriptor)
            where = (0, status.st_size) if place is None else self._locate(descriptor, status, place, name)
            yield None if where is None else (descriptor, *where, name)
        finally:
            os.close(descriptor)

    def read_chunk(self, chunk: tuple[int, ...], out: NDArray[Any], crc: int | None = None) -> None:
        """Decode a whole chunk straight into contiguous `out` of its shape and dtype; `crc` is checked where given."""
        self.decode(self._required(chunk, crc), out, self.where(chunk))

    def read_rows(self, chunk: tuple[int, ...], rows: Rows, crc: int | None = None) -> None:
        """Decode parts of a chunk, each straight to its place where the codec allows; `crc` is checked where given."""
        assert self.layout.codec is not None
        stored, where = self._required(chunk, crc), self.where(chunk)
        if self.layout.codec.kind == "blosc":
            payload = self._payload(stored, where)
            if streams(payload, self.layout.chunk_bytes):
                blocks = BloscBlocks(payload, self.layout.chunk_bytes, where)
                return blocks.scatter(rows, self._scratch.take("block", blocks.size))
        decoded = self._scratch.take("decoded", self.layout.chunk_bytes)
        self.decode(stored, decoded, where)
        for begin, row in rows:
            row[:] = decoded[begin : begin + len(row)]

    def _required(self, chunk: tuple[int, ...], crc: int | None = None) -> NDArray[np.uint8]:
        """Stored bytes of a chunk, as `stored` has them; ChunkError where absent, or `crc` is not theirs."""
        stored = self.stored(chunk)
        if stored is None:
            raise ChunkError(f"{self.where(chunk)} is missing. {REMEDY}")
        if crc is not None and crc32c(stored[: len(stored) - 4 * self.layout.checked]) != crc:
            raise ChunkError(f"{self.where(chunk)}: the crc32c of its stored bytes is not the one recorded. {REMEDY}")
        return stored

    def streams(self, chunk: tuple[int, ...], largest_block: int) -> bool:
        """Whether `stream` can take a chunk: blosc, in blocks of at most `largest_block` decoded bytes."""
        if self.layout.codec is None or self.layout.codec.kind != "blosc":
            return False
        header = self.stored(chunk, HEADER)
        return header is not None and streams(header, largest_block)

    def stream(self, chunk: tuple[int, ...], begins: Sequence[int]) -> BloscRows:
        """Rows of a chunk that begin at bytes `begins`, to be taken on this thread before it reads again."""
        where = self.where(chunk)
        return BloscRows(self._payload(self._required(chunk), where), self.layout.chunk_bytes, begins, where)

    def where(self, chunk: tuple[int, ...]) -> str:
        """A chunk as messages name it."""
        return f"{self.folder / self.layout.file_of(chunk)[0]} (chunk {'.'.join(map(str, chunk))})"

    def decode(self, stored: NDArray[np.uint8], out: NDArray[Any], where: str) -> None:
        """Check and decode stored bytes into contiguous `out`; ChunkError names `where`."""
        assert self.layout.codec is not None
        payload = self._payload(stored, where)
        try:
            self.layout.codec.decode(memoryview(payload), out)
        except ChunkError as error:
            raise ChunkError(f"{where}: {error}. {REMEDY}") from error

    def _payload(self, stored: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
        """Stored bytes without their own crc32c, which is checked where there is one."""
        if not self.layout.checked:
            return stored
        payload, expected = stored[:-4], int.from_bytes(stored[-4:].tobytes(), "little")
        if crc32c(payload) != expected:
            raise ChunkError(f"{where}: the crc32c of the stored bytes does not match. {REMEDY}")
        return payload

    def _read_chunk(self, chunk: tuple[int, ...], box: Box, out: NDArray[Any]) -> None:
        layout, where = self.layout, self.where(chunk)
        overlaps = [overlap(cut, i, n) for cut, i, n in zip(box, chunk, layout.chunks, strict=True)]
        place, inner = (
            outer_index(side, shape)
            for side, shape in zip(zip(*overlaps, strict=True), (out.shape, layout.chunks), strict=True)
        )
        stored = self.stored(chunk)
        if stored is None:
            if not self.fill_absent:
                raise ChunkError(f"{where} is missing. {REMEDY}")
            out[place] = layout.fill_value if layout.fill_value is not None else 0
            return
        dtype = np.dtype(layout.dtype)
        if out.dtype == dtype and all(isinstance(cut, slice) for cut in box):
            target = out[place]
            if target.shape == layout.chunks and target.flags.c_contiguous:
                self.decode(stored, target, where)
                return
        decoded = self._scratch.take("decoded", layout.chunk_bytes).view(dtype).reshape(layout.chunks)
        self.decode(stored, decoded, where)
        cast(decoded[inner], out, place, where)

    def _locate(self, descriptor: int, status: os.stat_result, place: int, name: str) -> tuple[int, int] | None:
        """(offset, bytes) of an inner chunk, from its Zarr shard's index, kept while the file does not change."""
        version = (status.st_size, status.st_mtime_ns)
        known = self._indexes.get(name)
        if known is None or known[0] != version:
            if len(self._indexes) >= MOST_INDEXES:
                self._indexes.clear()
            known = self._indexes[name] = (version, self._read_index(descriptor, status.st_size, name))
        offset, length = known[1][place].tolist()
        if offset == NO_CHUNK and length == NO_CHUNK:
            return None
        if offset + length > status.st_size:
            raise ChunkError(
                f"{self.folder / name} is truncated: its index points to byte {offset + length} of "
                f"{status.st_size}. {REMEDY}"
            )
        return offset, length

    def _read_index(self, descriptor: int, size: int, name: str) -> NDArray[np.uint64]:
        """[inner chunks, 2]: offset and bytes of every chunk of a Zarr shard."""
        entries = int(np.prod(self.layout.chunks_per_zarr_shard))
        nbytes = 16 * entries + 4 * self.layout.index_checked
        if size < nbytes:
            raise ChunkError(f"{self.folder / name} has {size} bytes, less than its index of {nbytes}. {REMEDY}")
        start = size - nbytes if self.layout.index_at_end else 0
        index = self._pread(descriptor, start, nbytes, name, "index")
        if self.layout.index_checked and crc32c(index[:-4]) != int.from_bytes(index[-4:].tobytes(), "little"):
            raise ChunkError(f"{self.folder / name}: the crc32c of its chunk index does not match. {REMEDY}")
        return index[: 16 * entries].view("<u8").reshape(-1, 2).copy()

    def _pread(self, descriptor: int, offset: int, nbytes: int, name: str, purpose: str) -> NDArray[np.uint8]:
        buffer = self._scratch.take(purpose, nbytes, self.layout.chunk_bytes if purpose == "stored" else 0)
        done = 0
        while done < nbytes:
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
            if got == 0:
                raise ChunkError(f"{self.folder / name} ends at byte {offset + done} of {offset + nbytes}. {REMEDY}")
            done += got
        return buffer


class TensorstoreReader:
    """Whatever tensorstore opens: remote stores, and codecs the native reader does not know."""

    def __init__(self, url: str, layout: ArrayLayout, fill_absent: bool = False):
        import tensorstore as ts

        self.layout, self.url = layout, url
        self._remote = "://" in url
        driver = "zarr" if layout.zarr_format == 2 else "zarr3"
        spec: dict[str, Any] = {"driver": driver, "kvstore": kvstore_spec(url), "recheck_cached_data": "open"}
        if not fill_absent:
            spec["fill_missing_data_reads"] = False
        try:
            self._array = ts.open(spec, open=True, read=True, context=remote_context()).result(SECONDS_TO_ANSWER)
        except (ValueError, TimeoutError) as error:
            raise ChunkError(f"tensorstore cannot open {url}: {error}") from error

    def read(self, box: Box, out: NDArray[Any], pool: Executor | None = None) -> None:
        import tensorstore as ts

        dtype = np.dtype(self.layout.dtype).newbyteorder("=")
        # A remote answer may come after the time is up: never into a buffer that somebody else has by then.
        values = out if out.dtype == dtype and not self._remote else np.empty(out.shape, dtype)
        part = self._array.oindex[tuple(cut if isinstance(cut, slice) else list(cut) for cut in box)]
        reading = ts.array(values).write(part)
        try:
            reading.result(SECONDS_TO_ANSWER if self._remote else None)
        except TimeoutError as error:
            raise ChunkError(f"{self.url}: no answer in {SECONDS_TO_ANSWER:g} s. Is the server up?") from error
        except ValueError as error:
            raise ChunkError(f"{self.url}: {error}. {_remedy(str(error))}") from error
        if values is not out:
            cast(values, out, (...,), self.url)


def _remedy(problem: str) -> str:
    if "was ignored by server" in problem:
        return "Zarr shards need a server that answers byte ranges (nginx, Apache and object stores do)."
    return REMEDY


def cast(values: NDArray[Any], out: NDArray[Any], place: Any, where: str) -> None:
    """`out[place] = values` with NumPy's cast; ChunkError, never infinity, where finite numbers would overflow."""
    try:
        with np.errstate(over="raise"):
            out[place] = values
    except FloatingPointError as error:
        largest = np.nanmax(np.abs(np.where(np.isfinite(values), values, 0)))
        raise ChunkError(
            f"{where}: the value {largest:.6g} does not fit in {out.dtype}. Correct it in the source."
        ) from error


class ZarrReader:
    """Filters of numcodecs, in local files: zarr-python alone decodes them."""

    def __init__(self, folder: Path, layout: ArrayLayout, fill_absent: bool = False):
        import zarr

        self.layout, self._folder, self._fill_absent = layout, folder, fill_absent
        try:
            self._array: Any = zarr.open_array(folder, mode="r")
        except Exception as error:  # zarr and numcodecs have no exception of their own
            raise ChunkError(f"neither tensorstore nor zarr can open {folder}: {error}") from error

    def read(self, box: Box, out: NDArray[Any], pool: Executor | None = None) -> None:
        for chunk in () if self._fill_absent else chunks_of(box, self.layout.chunks):
            file = self._folder / self.layout.file_of(chunk)[0]
            if not file.exists():
                raise ChunkError(f"{file} is missing. {REMEDY}")
        try:
            values = self._array.oindex[tuple(cut if isinstance(cut, slice) else list(cut) for cut in box)]
        except Exception as error:
            raise ChunkError(f"{self._folder}: {error}. {REMEDY}") from error
        cast(values, out, (...,), str(self._folder))


def open_reader(store: Store, name: str, layout: ArrayLayout, fill_absent: bool = False) -> Reader:
    """The fastest reader for an array called `name` in a store."""
    if isinstance(store, LocalStore) and layout.native:
        return NativeReader(store.root / name, layout, fill_absent)
    try:
        return TensorstoreReader(f"{store.url}/{name}", layout, fill_absent)
    except ChunkError:
        if not isinstance(store, LocalStore):
            raise
        return ZarrReader(store.root / name, layout, fill_absent)
