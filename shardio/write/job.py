"""An output in the making: `OUT.zarr.partial/` beside OUT.zarr, and the ledger that makes it resumable.

    OUT.zarr.partial/job.json       what is being made: arguments, fingerprint of the source
    OUT.zarr.partial/ledger.jsonl   one line per finished date: crc32c and size of its chunks
    OUT.zarr.partial/statistics.json   their sums, where the source has none
    OUT.zarr.partial/dataset-ID/    becomes OUT.zarr by one rename, when it is complete

A chunk counts as written when the ledger says so, never because a file exists.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from shardio.errors import ChunkError, DatasetError, HeldError, OutputError
from shardio.format.codec import crc32c
from shardio.format.files import atomic, lock, remove_temporary, sync_path
from shardio.format.layout import ArrayLayout
from shardio.format.reader import NativeReader
from shardio.write.written import STATISTICS, Written, WrittenDate

Json = dict[str, Any]
SECONDS_BETWEEN_SYNCS = 1.0
NOTES = 2  # version of what a job notes of its dates
LOCKS = {"lock", "ranks.lock"}


class Job:
    """One output in the making, held by one process at a time (a lock says so)."""

    def __init__(self, destination: Path, identity: Json, command: str, sync: bool, overwrite: bool = False):
        """Start, or continue, what `identity` says; OutputError where another run is unfinished or at work.

        With `overwrite` an unfinished run of another identity is discarded, and a complete output replaced at the end.
        """
        self.destination, self.sync, self.overwrite = destination, sync, overwrite
        self.folder = partial_of(destination)
        # Named after the job: a cluster's worker that outlived a discarded run cannot write into its successor.
        self.dataset = self.folder / f"dataset-{sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
        self.refuse_existing()  # before anything of this run is there
        self.folder.mkdir(exist_ok=True)
        self._open = ExitStack()
        self._open.enter_context(_hold(self.folder))
        try:
            self.refuse_existing()
            begun = self._begun(identity)
            self.resumed = begun is not None
            self.was_synced = bool(begun and begun["sync"])
            if begun is None:
                for notes in ("ledger.jsonl", STATISTICS):
                    (self.folder / notes).unlink(missing_ok=True)
                self._begin({"notes": NOTES, "identity": identity, "command": command, "sync": sync})
            elif begun["sync"] and not sync:
                self._begin({**begun, "sync": False})
            self._ledger = self._open.enter_context((self.folder / "ledger.jsonl").open("a+b"))
            self._end_torn_line()
        except BaseException:
            self._leave_nothing()
            self.close()
            raise
        self._synced_at = time.monotonic()

    def written(self, layout: ArrayLayout, with_moments: bool) -> Written:
        """Finished dates whose files are as the ledger says; everything else is to be written (again)."""
        self.sweep()
        written = Written(layout.shape[0], layout.grid[3])
        if with_moments:
            written.load_moments(self.folder / STATISTICS)
        folder = self.dataset / "data"
        reader = NativeReader(folder, layout)
        self._ledger.seek(0)
        for line in self._ledger:
            try:
                record = WrittenDate.from_line(line)
            except (ValueError, TypeError):
                continue  # torn by a kill
            if len(record.crc) != layout.grid[3] or not 0 <= record.date < layout.shape[0] or written.done[record.date]:
                continue
            # After power loss the sums may be older than the ledger.
            summed = written.summed[record.date] or not with_moments
            if summed and _sizes_match(record, folder, layout) and (self.was_synced or _crc_matches(record, reader)):
                written.add([record])
        return written

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        remove_temporary(self.dataset / "data")

    def record(self, dates: Iterable[WrittenDate], written: Written) -> None:
        """Note finished dates, which `written` has. A kill loses none; power loss the last second, written again."""
        written.save_moments(self.folder / STATISTICS, self.sync)  # before the ledger: it promises that they are there
        self._ledger.write(b"".join(date.to_line() for date in dates))
        self._ledger.flush()
        if self.sync and time.monotonic() - self._synced_at > SECONDS_BETWEEN_SYNCS:
            os.fsync(self._ledger.fileno())
            self._synced_at = time.monotonic()

    def publish(self) -> None:
        """Give the complete dataset its name. An output it replaces is removed only after that."""
        if self.sync:
            for parent, _, files in os.walk(self.dataset):
                for name in files if Path(parent) != self.dataset / "data" else ():
                    sync_path(Path(parent) / name)
                sync_path(Path(parent))
        self.refuse_existing()  # somebody else may have put it there meanwhile
        if os.path.lexists(self.destination):
            replaced = self.folder / f"replaced.{time.time_ns()}"
            os.replace(self.destination, replaced)
        os.replace(self.dataset, self.destination)
        if self.sync:
            sync_path(self.destination.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
        with suppress(OSError):  # NFS keeps the name of an open file, here the lock
            self.folder.rmdir()

    def _leave_nothing(self) -> None:
        """Remove the folder where nothing but locks is in it: nothing was begun."""
        with suppress(OSError):
            if {entry.name for entry in self.folder.iterdir()} <= LOCKS:
                shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another run continue."""
        self._open.close()

    def refuse_existing(self) -> None:
        """OutputError where the destination exists and may not be replaced."""
        if os.path.lexists(self.destination) and not self.overwrite:
            raise OutputError(
                f"{self.destination} exists. Use --overwrite to replace it, or choose another destination."
            )

    def _begun(self, identity: Json) -> Json | None:
        """The unfinished run to continue; None where there is none, or where it may be discarded."""
        try:
            begun = read_job(self.destination)
            if begun is not None and begun.get("notes") != NOTES:
                raise OutputError(
                    f"{self.folder} was begun by another version of shardio, whose notes this one cannot read. "
                    "Finish it with that version, or discard it with --overwrite."
                )
            if begun is not None and begun["identity"] != identity:
                raise OutputError(_difference(self.destination, begun, identity))
            return begun
        except OutputError:
            if not self.overwrite:
                raise
        for replaced in self.folder.glob("replaced.*"):  # killed between the two renames of `publish`
            if not os.path.lexists(self.destination):
                os.replace(replaced, self.destination)
        for dataset in self.folder.glob("dataset-*"):
            shutil.rmtree(dataset)
        return None

    def _begin(self, content: Json) -> None:
        with atomic(self.folder / "job.json") as partial:
            partial.write_text(json.dumps(content, indent=1))

    def _end_torn_line(self) -> None:
        if self._ledger.seek(0, os.SEEK_END):
            self._ledger.seek(-1, os.SEEK_END)
            if self._ledger.read() != b"\n":
                self._ledger.write(b"\n")


def partial_of(destination: Path) -> Path:
    """Where an output lives until it is complete."""
    named = destination if destination.name else destination.absolute()  # `.` has no name
    return named.parent / f"{named.name}.partial"


def read_job(destination: Path) -> Json | None:
    """What an unfinished output is to become; None where nothing was begun.

    Raises: OutputError where that cannot be read.
    """
    try:
        content: Json = json.loads((partial_of(destination) / "job.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(
            f"{partial_of(destination)}/job.json is damaged ({error}). Remove {partial_of(destination)} to start anew."
        ) from error
    return content


def sweep_published(destination: Path) -> None:
    """Remove what a run leaves that was killed after it gave its output the name, or that never began."""
    folder = partial_of(destination)
    left = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if any(name.startswith("dataset-") for name in left) or not ("job.json" in left or left & LOCKS == left != set()):
        return
    with suppress(OutputError), _hold(folder):
        shutil.rmtree(folder, ignore_errors=True)


def refuse_unfinished(path: Path) -> None:
    """DatasetError where `path` is not there but its making has begun, with the command that finishes it."""
    path = path if path.name else path.absolute()  # `.` may be either folder
    destination = Path(str(path).removesuffix(".partial"))
    begun = read_job(destination)
    if begun is None or (path == destination and destination.exists()):
        return
    dates = int(begun["identity"]["dates"])
    done = bytearray(dates)
    with suppress(FileNotFoundError), (partial_of(destination) / "ledger.jsonl").open("rb") as ledger:
        for line in ledger:
            if (noted := re.match(rb"\[(\d+),.*\]$", line)) and int(noted[1]) < dates:
                done[int(noted[1])] = 1
    raise DatasetError(
        f"{destination} is incomplete: {sum(done)} of {dates} dates are written. Finish it with: {begun['command']}"
    )


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / "lock"))
        except HeldError:
            raise OutputError(f"another shardio process is writing {folder}. Wait for it, or stop it first.") from None
        except FileNotFoundError:
            raise OutputError(
                f"another shardio process has just finished {folder}. Look at its output first."
            ) from None
        yield


def _difference(destination: Path, begun: Json, identity: Json) -> str:
    return (
        f"{partial_of(destination)} is the unfinished output of another run: "
        f"{list_differences(begun['identity'], identity)}. "
        f"Finish that one with: {begun['command']}   or discard it with --overwrite."
    )


def list_differences(before: Json, now: Json) -> str:
    """`codec was 'lz4', now 'zstd'; ...`: what is not equal; empty where all is."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def _sizes_match(record: WrittenDate, folder: Path, layout: ArrayLayout) -> bool:
    sizes = record.nbytes
    if layout.zarr_shards:
        sizes = (sum(sizes) + 16 * len(sizes) + 4,)
    # Not as `Path`, which keeps the names of all files.
    files = (f"{folder}/{layout.file_of((record.date, 0, 0, chunk))[0]}" for chunk in range(len(sizes)))
    try:
        return all(os.stat(file).st_size == size for file, size in zip(files, sizes, strict=True))
    except FileNotFoundError:
        return False


def _crc_matches(record: WrittenDate, reader: NativeReader) -> bool:
    for chunk, crc in enumerate(record.crc):
        try:
            stored = reader.stored((record.date, 0, 0, chunk))
        except ChunkError:  # the index of the Zarr shard is damaged
            return False
        if stored is None:
            return False
        payload, inside = np.split(stored, [len(stored) - 4 * reader.layout.checked])
        if crc32c(payload) != crc or (reader.layout.checked and inside.tobytes() != crc.to_bytes(4, "little")):
            return False
    return True
