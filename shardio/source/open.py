"""Open whatever gives fields: the one place that knows every kind of source."""

from __future__ import annotations

import os

from shardio.errors import DatasetError
from shardio.format.metadata import array_metadata
from shardio.format.store import REMOTE, LocalStore, open_store
from shardio.source.source import Selection, Source

ALL = Selection()


def open_source(path: str | os.PathLike[str], selection: Selection = ALL, fill_absent: bool = False) -> Source:
    """Open whatever `path` is; DatasetError says what it is not."""
    text = os.fspath(path)
    store = open_store(text)
    if isinstance(store, LocalStore) and not store.root.exists() and not any(c in text for c in "*?["):
        raise DatasetError(f"{text} does not exist. Check the path.")
    metadata = array_metadata(store, "data")
    shape = None if metadata is None else metadata.get("shape")
    if metadata is not None and (not isinstance(shape, list) or len(shape) == 4):
        from shardio.source.anemoi import AnemoiSource

        return AnemoiSource(store, selection, fill_absent)
    if text.startswith(REMOTE):
        raise DatasetError(f"{text} has no array `data` of 4 dimensions: it is not an anemoi dataset.")
    from shardio.source.cf import CFSource

    return CFSource(text, selection)
