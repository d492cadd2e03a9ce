"""Bring the fields of a date to their place in a buffer, chunk by chunk: what is not wanted of a chunk is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardio.errors import ChunkError
from shardio.format.boxes import as_cut
from shardio.format.reader import NativeReader
from shardio.load.dataset import Dataset
from shardio.load.join import Part
from shardio.load.reading import meet, within
from shardio.write.output import CHECKSUMS


@dataclass(frozen=True, eq=False)
class Work:
    """What one chunk of a part gives to a date.

    Attributes:
      chunk: its number along the grid.
      places: of its variables in the buffer.
      stored: where the part stores them.
      cells: what is wanted of the chunk; span: where in the buffer that goes.
    """

    part: Part
    chunk: int
    places: tuple[int, ...]
    stored: tuple[int, ...]
    cells: slice
    span: slice


class Filler:
    """Fills [variables, members, cells] with fields of one date of a dataset; members are the first that it has.

    With `verify` each chunk is compared with its recorded crc32c.
    """

    def __init__(self, dataset: Dataset, verify: bool = False):
        self.dataset = dataset
        self._known: dict[tuple[tuple[int, ...], int, int], list[Work]] = {}
        if verify and not all(self._is_direct(part) for part in dataset.parts):
            raise ChunkError(
                "verify=True needs datasets of equal grid-chunks in local files: these cannot be checked by chunk. "
                "Rechunk them alike, or use verify=False and `shardio verify`."
            )
        self._checksums = {id(part): _checksums(part) for part in dataset.parts} if verify else {}

    def work(self, date: int, variables: tuple[int, ...], cells: slice) -> list[Work]:
        """All that these variables and cells of a date take."""
        key = (variables, cells.start, cells.stop)
        if key not in self._known:
            self._known[key] = [each for part in self.dataset.parts for each in self._work(part, variables, cells)]
        return [each for each in self._known[key] if each.part.rows[date] >= 0]

    def _work(self, part: Part, variables: tuple[int, ...], cells: slice) -> Iterator[Work]:
        wide, stored_at = self.dataset.chunk_cells, dict(zip(part.places, part.stored, strict=True))
        pairs = sorted(
            (stored_at[variable], place) for place, variable in enumerate(variables) if variable in stored_at
        )
        if not pairs or cells.start == cells.stop:
            return
        stored, places = zip(*pairs, strict=True)
        for chunk in range(cells.start // wide, -(-cells.stop // wide)):
            wanted = meet(slice(chunk * wide, (chunk + 1) * wide), cells)
            yield Work(part, chunk, places, stored, wanted, within(wanted, cells))

    def fill(self, target: NDArray[np.float32], work: Work, date: int) -> None:
        """Do one piece of work of a date, in `target` [variables, members, cells]; ChunkError names both."""
        row = int(work.part.rows[date])
        try:
            if self._is_direct(work.part):
                self._decode(target, work, row)
            else:
                self._read(target, work, row)
        except (ChunkError, OSError, ValueError) as error:
            raise ChunkError(f"date {self.dataset.dates[date]}, grid-chunk {work.chunk}: {error}") from error

    def _is_direct(self, part: Part) -> bool:
        """Whether its chunks hold all variables of the cells that are read at once."""
        layout = part.source.layout
        chunks = (1, *layout.shape[1:3], self.dataset.chunk_cells)
        return isinstance(part.source.reader, NativeReader) and layout.dtype == "<f4" and layout.chunks == chunks

    def _decode(self, target: NDArray[np.float32], work: Work, row: int) -> None:
        reader, (_, _, ensemble, wide) = work.part.source.reader, work.part.source.layout.chunks
        assert isinstance(reader, NativeReader)
        index = (row, 0, 0, work.chunk)
        expected = self._checksums.get(id(work.part))
        crc = None if expected is None else int(expected[row, work.chunk])
        first = work.cells.start - work.chunk * wide
        if target.shape == work.part.source.layout.chunks[1:] and work.places == work.stored:
            reader.read_chunk(index, target[None], crc)
            return
        rows = [
            (4 * ((stored * ensemble + member) * wide + first), target[place, member, work.span].view(np.uint8))
            for stored, place in zip(work.stored, work.places, strict=True)
            for member in range(target.shape[1])
        ]
        reader.read_rows(index, rows, crc)

    def _read(self, target: NDArray[np.float32], work: Work, row: int) -> None:
        box = (slice(row, row + 1), as_cut(work.stored), slice(0, target.shape[1]), work.cells)
        places = as_cut(work.places)
        if isinstance(places, slice):
            work.part.source.reader.read(box, target[None, places, :, work.span])
            return
        shape = (1, len(work.places), target.shape[1], work.cells.stop - work.cells.start)
        values = np.empty(shape, np.float32)
        work.part.source.reader.read(box, values)
        target[list(places), :, work.span] = values[0]


def _checksums(part: Part) -> NDArray[np.uint32]:
    values = part.source.array(CHECKSUMS)
    if values is None:
        raise ChunkError(f"{part.source.path} carries no checksums: shardio did not make it. Use verify=False.")
    return values
