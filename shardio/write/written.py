"""What is known of the dates that are written: a line of the ledger each, and their statistics, summed up.

    ledger.jsonl      [date, crc32c and bytes of its grid-chunks in base64], 16 bytes per grid-chunk
    statistics.json   which dates are summed up, and their moments; replaced whenever dates are added

Sums are exact, so it does not matter in which order dates come, nor that one is written twice.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardio.format.codec import crc32c
from shardio.format.files import atomic
from shardio.write.statistics import Moments, merge
from shardio.write.writer import StoredChunk

STATISTICS = "statistics.json"
CHUNK = np.dtype([("crc", "<u4"), ("nbytes", "<u8")])


@dataclass(frozen=True)
class WrittenDate:
    """One date: crc32c and stored bytes of each grid-chunk, and the moments of its variables."""

    date: int
    crc: tuple[int, ...]
    nbytes: tuple[int, ...]
    moments: Moments | None

    @classmethod
    def of(cls, date: int, chunks: list[StoredChunk]) -> WrittenDate:
        """Of the date's grid-chunks, in order."""
        crc, nbytes = tuple(chunk.crc for chunk in chunks), tuple(chunk.nbytes for chunk in chunks)
        return cls(date, crc, nbytes, merge(chunk.moments for chunk in chunks))

    def to_line(self) -> bytes:
        """Its line in the ledger, which leaves the moments to `Written`."""
        chunks = np.array(list(zip(self.crc, self.nbytes, strict=True)), CHUNK)
        return json.dumps([self.date, b64encode(chunks.tobytes()).decode()]).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> WrittenDate:
        """ValueError or TypeError where a kill has torn the line."""
        date, chunks = json.loads(line)
        found = np.frombuffer(b64decode(chunks, validate=True), CHUNK)
        return cls(int(date), tuple(found["crc"].tolist()), tuple(found["nbytes"].tolist()), None)


class Written:
    """All dates of an output.

    Attributes:
      done: bool [date].
      crc: uint32 [date, grid-chunk].
      stored_bytes: of the dates that are done.
      summed: bool [date]: whose values are in `moments`; a kill may leave dates that are summed and not done.
      moments: of them all; None where there are none yet, or the source has statistics.
    """

    def __init__(self, dates: int, grid_chunks: int):
        self.done, self.summed = np.zeros(dates, bool), np.zeros(dates, bool)
        self.crc = np.zeros((dates, grid_chunks), np.uint32)
        self.stored_bytes = 0
        self.moments: Moments | None = None

    @property
    def count(self) -> int:
        """Dates that are done."""
        return int(np.count_nonzero(self.done))

    def add(self, dates: Iterable[WrittenDate]) -> None:
        """Also dates that are done: a task is written again as a whole, and gives the same bytes."""
        for written in dates:
            if not self.done[written.date]:
                self.stored_bytes += sum(written.nbytes)
            self.done[written.date] = True
            self.crc[written.date] = written.crc
            if written.moments is not None and not self.summed[written.date]:
                self.moments = merge((self.moments, written.moments))
                self.summed[written.date] = True

    def save_moments(self, file: Path, sync: bool) -> None:
        """Keep the sums for a run that goes on after this one."""
        if self.moments is None:
            return
        dates = b64encode(np.packbits(self.summed).tobytes()).decode()
        content = json.dumps([dates, self.moments.to_json()]).encode()
        with atomic(file, sync) as partial:
            partial.write_bytes(b"%d\n" % crc32c(content) + content)

    def load_moments(self, file: Path) -> None:
        """What `save_moments` kept; nothing where power loss left half of it."""
        try:
            check, content = file.read_bytes().split(b"\n")
        except (FileNotFoundError, ValueError):
            return
        if check == b"%d" % crc32c(content):
            dates, moments = json.loads(content)
            bits = np.frombuffer(b64decode(dates), np.uint8)
            self.summed = np.unpackbits(bits, count=len(self.done)).astype(bool)
            self.moments = Moments.from_json(moments)
