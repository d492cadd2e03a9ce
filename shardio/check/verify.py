"""Prove that a grid-chunk dataset is what was written: checksums of every chunk, equality with its source, repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.errors import ChunkError, DatasetError, OutputError
from shardio.format.codec import crc32c
from shardio.format.reader import NativeReader
from shardio.format.store import LocalStore, open_store
from shardio.rechunk.blocks import Buffers, write_block
from shardio.rechunk.plan import Task
from shardio.source.anemoi import AnemoiSource
from shardio.source.open import open_source
from shardio.source.order import ordered_like
from shardio.source.source import Selection, Source
from shardio.write.job import refuse_unfinished
from shardio.write.output import CHECKSUMS, checksum
from shardio.write.writer import ChunkWriter

Json = dict[str, Any]
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it was written."""

    file: str
    date: str | None
    grid_chunk: int | None
    problem: str

    def __str__(self) -> str:
        place = "" if self.date is None else f"date {self.date}, grid-chunk {self.grid_chunk}, "
        return f"{place}file {self.file}: {self.problem}"

    def to_json(self) -> Json:
        return asdict(self)


class Stored:
    """A dataset made by shardio, opened for checking."""

    def __init__(self, path: str):
        refuse_unfinished(Path(path))
        store = open_store(path)
        if not isinstance(store, LocalStore) or not store.root.is_dir():
            raise DatasetError(f"{path} is not a local dataset. Check the path.")
        about = _about(store, path)
        self.path, self.store = path, store
        self.source = AnemoiSource(store, Selection(), fill_absent=True)
        self.layout = self.source.layout
        self.about: Json = about
        self.crc = _checksums(self, path)
        self.reader = NativeReader(store.root / "data", self.layout)

    @property
    def grid_chunks(self) -> int:
        return self.layout.grid[3]


def check(path: str, report: Report = lambda done, of: None) -> list[Fault]:
    """Compare the stored bytes of every chunk with their recorded crc32c; needs no source.

    Raises: DatasetError where shardio did not make it.
    """
    stored = Stored(path)
    faults = _small_arrays(stored)
    dates = range(stored.layout.shape[0])
    with ThreadPoolExecutor(thread_name_prefix="verify") as pool:
        for done, found in enumerate(pool.map(lambda date: list(_faults_of(stored, date)), dates), start=1):
            faults += found
            report(done, len(dates))
    return faults


def compare(path: str, source: str, report: Report = lambda done, of: None) -> list[Fault]:
    """Compare every value with the source, bit for bit, NaN payloads included (after the cast to float32).

    Raises: DatasetError where the source is of another shape, or shardio did not make the dataset.
    """
    stored = Stored(path)
    _, variables, ensemble, cells = stored.layout.shape
    ours = np.empty((1, variables, ensemble, cells), np.float32)
    theirs = np.empty_like(ours)
    with _open_original(stored, source) as original, ThreadPoolExecutor(thread_name_prefix="verify") as pool:
        faults = _small_differences(stored.source, original, path)
        for date in range(stored.layout.shape[0]):
            here = slice(date, date + 1)
            try:
                stored.source.read(here, slice(0, cells), ours, pool)
                original.read(here, slice(0, cells), theirs, pool)
            except ChunkError as error:
                faults.append(Fault(_file(stored, date, 0), str(stored.source.dates[date]), None, str(error)))
                continue
            faults += _differences(stored, date, ours, theirs)
            report(date + 1, stored.layout.shape[0])
    return faults


def repair(path: str, source: str, faults: list[Fault]) -> int:
    """Write the dates of faulty chunks again from the source; returns how many. Nothing else is touched.

    Raises: OutputError where something else than chunks is damaged, the source is another, or gives other bytes.
    """
    stored = Stored(path)
    lost = [fault for fault in faults if fault.date is None]
    if lost:
        raise OutputError(
            f"{lost[0]}: only chunks can be repaired. Make the dataset again: shardio rechunk --overwrite."
        )
    bad: dict[int, set[int]] = {}
    index = {str(date): i for i, date in enumerate(stored.source.dates)}
    for fault in faults:
        every = range(stored.grid_chunks)  # a fault of a date that names no grid-chunk may be in any of them
        bad.setdefault(index[str(fault.date)], set()).update(every if fault.grid_chunk is None else [fault.grid_chunk])
    with _open_original(stored, source) as original, ThreadPoolExecutor(thread_name_prefix="repair") as pool:
        if original.fingerprint() != stored.about["source_fingerprint"]:
            raise OutputError(
                f"{source} is not what {path} was made from (its fingerprint differs). Make the dataset again instead."
            )
        writer = ChunkWriter(stored.store.root / "data", stored.layout, threads=2, sync=True, with_moments=False)
        for date, chunks in bad.items():
            _rewrite(stored, original, writer, pool, date, chunks)
    return len(bad)


def _rewrite(
    stored: Stored, original: Source, writer: ChunkWriter, pool: ThreadPoolExecutor, date: int, chunks: set[int]
) -> None:
    """Zarr v2: only the faulty files. Zarr v3: the file of the date, which has one writer."""
    if stored.layout.zarr_shards:
        everything = (slice(0, stored.layout.shape[3]),)
        written = write_block(original, writer, Task(date, date + 1), everything, pool, Buffers(1))[0]
        crc = dict(enumerate(written.crc))
    else:
        crc = {}
        for chunk in sorted(chunks):
            cells = _cells(stored, chunk)
            fields = np.empty((1, *stored.layout.shape[1:3], cells.stop - cells.start), np.float32)
            original.read(slice(date, date + 1), cells, fields, pool)
            crc[chunk] = writer.store(date, chunk, fields[0]).crc
    for chunk, value in crc.items():
        if value != stored.crc[date, chunk]:
            raise OutputError(
                f"date {stored.source.dates[date]}, grid-chunk {chunk}: written again, but its bytes are not those "
                "recorded (another version of the codec, or a source that changed). Make the dataset again."
            )


def _faults_of(stored: Stored, date: int) -> Iterator[Fault]:
    for chunk in range(stored.grid_chunks):
        problem = _problem(stored, date, chunk)
        if problem:
            yield Fault(_file(stored, date, chunk), str(stored.source.dates[date]), chunk, problem)
    extra = _unexpected_bytes(stored, date)
    if extra:
        yield Fault(_file(stored, date, 0), str(stored.source.dates[date]), 0, extra)


def _problem(stored: Stored, date: int, chunk: int) -> str:
    try:
        content = stored.reader.stored((date, 0, 0, chunk))
    except (ChunkError, OSError) as error:
        return str(error)
    if content is None:
        return "the chunk is missing"
    payload = content[: len(content) - 4] if stored.layout.checked else content
    if len(payload) < len(content) and int.from_bytes(content[-4:].tobytes(), "little") != crc32c(payload):
        return "the crc32c inside the chunk does not match its bytes"
    found, expected = crc32c(payload), int(stored.crc[date, chunk])
    if found != expected:
        return f"crc32c of the {len(content)} stored bytes is {found:08x}, recorded was {expected:08x}"
    return ""


def _unexpected_bytes(stored: Stored, date: int) -> str:
    """A Zarr shard holds its chunks and its index and nothing else: bytes beyond were not written by shardio."""
    if not stored.layout.zarr_shards:
        return ""
    try:
        lengths = [stored.reader.stored_bytes((date, 0, 0, chunk)) for chunk in range(stored.grid_chunks)]
        size = (stored.store.root / "data" / stored.layout.file_of((date, 0, 0, 0))[0]).stat().st_size
    except (ChunkError, OSError):
        return ""  # said by the chunk itself
    expected = sum(lengths) + 16 * stored.grid_chunks + 4
    return f"the file has {size} bytes, its chunks and index {expected}" if size != expected else ""


def _small_arrays(stored: Stored) -> list[Fault]:
    recorded: Json = stored.about.get("arrays", {})
    faults = []
    for name, crc in recorded.items():
        try:
            values = stored.source.array(name)
        except DatasetError as error:
            faults.append(Fault(f"{stored.path}/{name}", None, None, str(error)))
            continue
        if values is None:
            faults.append(Fault(f"{stored.path}/{name}", None, None, "the array is missing"))
        elif checksum(values) != crc:
            faults.append(Fault(f"{stored.path}/{name}", None, None, "its values are not those recorded"))
    return faults


def _small_differences(ours: Source, theirs: Source, path: str) -> list[Fault]:
    faults = []
    for name in ("variables", "dates", "latitudes", "longitudes", "missing"):
        if not np.array_equal(np.asarray(getattr(ours, name)), np.asarray(getattr(theirs, name))):
            faults.append(Fault(path, None, None, f"{name} differ from the source"))
    for name, values in (theirs.statistics or {}).items():
        if ours.statistics is None or not np.array_equal(ours.statistics[name], values, equal_nan=True):
            faults.append(Fault(path, None, None, f"the statistics `{name}` differ from the source"))
    return faults


def _differences(stored: Stored, date: int, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> list[Fault]:
    unequal = ours[0].view(np.uint32) != theirs[0].view(np.uint32)
    faults = []
    for chunk in range(stored.grid_chunks) if unequal.any() else ():
        count = int(unequal[..., _cells(stored, chunk)].sum())
        if count:
            problem = f"{count} values differ from the source"
            faults.append(Fault(_file(stored, date, chunk), str(stored.source.dates[date]), chunk, problem))
    return faults


@contextmanager
def _open_original(stored: Stored, source: str) -> Iterator[Source]:
    """The source with the selection that the dataset was made with, its cells in the order of the dataset."""
    chosen = stored.about["selection"]
    selection = Selection(chosen["start"], chosen["end"], tuple(chosen["select"]), tuple(chosen["drop"]))
    with closing(open_source(source, selection, fill_absent=True)) as original:
        shape = (len(original.dates), len(original.variables), original.extent.shape[2], original.extent.shape[3])
        if shape != stored.layout.shape:
            raise DatasetError(
                f"{source} has shape {list(shape)}, {stored.path} has {list(stored.layout.shape)}. Check --source."
            )
        yield ordered_like(original, stored.source)


def _about(store: LocalStore, path: str) -> Json:
    from shardio.format.metadata import array_metadata, group_attributes

    if array_metadata(store, "data") is None:
        raise DatasetError(f"{path} is not a dataset: it has no array `data`.")
    about: Json | None = group_attributes(store).get("shardio")
    if not about or not about.get("complete"):
        raise DatasetError(
            f"{path} carries no checksums: shardio did not make it. Make a grid-chunk dataset with: shardio rechunk."
        )
    return about


def _checksums(stored: Stored, path: str) -> NDArray[np.uint32]:
    values = stored.source.array(CHECKSUMS)
    expected = (stored.layout.shape[0], stored.layout.grid[3])
    if values is None or values.shape != expected:
        raise DatasetError(f"{path}/{CHECKSUMS} is missing or not of shape {list(expected)}. Use --source to compare.")
    return values


def _cells(stored: Stored, chunk: int) -> slice:
    size = stored.layout.chunks[3]
    return slice(chunk * size, min((chunk + 1) * size, stored.layout.shape[3]))


def _file(stored: Stored, date: int, chunk: int) -> str:
    return f"{stored.path}/data/{stored.layout.file_of((date, 0, 0, chunk))[0]}"
