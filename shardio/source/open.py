"""Open whatever gives fields: the one place that knows every kind of source.

A new kind is a file with a class that derives from `Source`, and a line in KINDS.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from shardio.errors import DatasetError
from shardio.format.metadata import array_metadata
from shardio.format.store import REMOTE, LocalStore, Store, open_store
from shardio.source.source import Selection, Source

ALL = Selection()
# Of a path and its store: the source, or None where they are of another kind.
Opener = Callable[[str, Store, Selection, bool], Source | None]


def open_source(path: str | os.PathLike[str], selection: Selection = ALL, fill_absent: bool = False) -> Source:
    """Open whatever `path` is.

    Args:
      path: of a file, a folder, a quoted pattern of files, or an address.
      selection: dates and variables.
      fill_absent: take chunks that are not stored as the fill value.
    Raises: DatasetError where there is nothing, or no kind of source knows it; SelectionError.
    """
    text = os.fspath(path)
    store = open_store(text)
    if isinstance(store, LocalStore) and not store.root.exists() and not any(c in text for c in "*?["):
        raise DatasetError(f"{text} does not exist. Check the path.")
    for kind in KINDS:
        source = kind(text, store, selection, fill_absent)
        if source is not None:
            return source
    raise DatasetError(f"{text} has no array `data` of 4 dimensions: it is not an anemoi dataset.")


def _open_anemoi(text: str, store: Store, selection: Selection, fill_absent: bool) -> Source | None:
    metadata = array_metadata(store, "data")
    shape = None if metadata is None else metadata.get("shape")
    if metadata is None or (isinstance(shape, list) and len(shape) != 4):
        return None
    from shardio.source.anemoi import AnemoiSource

    return AnemoiSource(store, selection, fill_absent)


def _open_cf(text: str, store: Store, selection: Selection, fill_absent: bool) -> Source | None:
    if text.startswith(REMOTE):
        return None
    from shardio.source.cf import CFSource

    return CFSource(text, selection)


# In this order: the last takes whatever xarray opens.
KINDS: tuple[Opener, ...] = (_open_anemoi, _open_cf)
