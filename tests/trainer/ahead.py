"""A dataset whose fields come only to those who have asked for the next ones too."""

from __future__ import annotations

import threading
from typing import Any

from shardio import Dataset, open_dataset
from shardio.errors import ChunkError


class Chained:
    """The reader of a dataset, that ends no read before one of another date has begun after it."""

    def __init__(self, reader: Any, last: set[int]):
        """`last`: rows after which nothing has to be read."""
        self.layout, self.rows = reader.layout, []
        self._reader, self._last, self._changed = reader, last, threading.Condition()

    def read(self, box: Any, out: Any, pool: Any = None) -> None:
        row = box[0].start
        with self._changed:
            if row not in self.rows:
                self.rows.append(row)
            self._changed.notify_all()
            place = self.rows.index(row)
            followed = row in self._last or self._changed.wait_for(lambda: len(self.rows) > place + 1, timeout=10)
            if not followed:
                raise ChunkError(f"nothing was read ahead of row {row}")
        self._reader.read(box, out)


def chained(path: str, *last: int) -> tuple[Dataset, Chained]:
    """The dataset, and what reads it; nothing has to be read after rows `last`."""
    dataset = open_dataset(path)
    source = dataset.parts[0].source
    source._reader = Chained(source._reader, set(last))
    return dataset, source._reader
