"""Small arrays, in the types that weather datasets use: of remote datasets, and large ones of local datasets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.errors import ChunkError, DatasetError
from shardio.format.blocks import streams
from shardio.format.boxes import overlap
from shardio.format.codec import Codec, crc32c
from shardio.format.layout import ArrayLayout, parse
from shardio.format.metadata import array_metadata
from shardio.format.store import Store, read_json
from shardio.format.stream import BloscRows

STREAMED = 2**20  # bytes of a buffer; blocks of blosc are smaller


def small_array(store: Store, name: str) -> NDArray[Any] | None:
    """All values of the array `name`; None where there is none.

    Raises: DatasetError where it is damaged, or stored in a way that is not known here.
    """
    metadata = array_metadata(store, name)
    if metadata is None:
        return None
    layout, dtype = _with_dates(metadata, f"{store.url}/{name}")
    if layout.codec is None or layout.zarr_shards is not None:
        raise DatasetError(
            f"{store.url}/{name} is stored in a way that remote reading does not know. Copy it here first."
        )
    values = np.empty(layout.shape, layout.dtype)
    for chunk in itertools.product(*(range(n) for n in layout.grid)):
        stored = store.get(f"{name}/{layout.file_of(chunk)[0]}")
        _fill(values, chunk, stored, layout, f"{store.url}/{name}")
    return values.view(dtype)


def stored_values(store: Store, name: str, codec: Codec) -> tuple[bytes, int] | None:
    """Stored bytes of float64 [cell] in one chunk of `codec`, and the crc32c of the values; None where it is not that.

    The values pass through a small buffer: those of a 9 km grid are 50 MB, and fresh memory takes longer than decoding.
    """
    where = f"{store.url}/{name}"
    layout = parse(array_metadata(store, name) or {}, where)
    plain = layout.chunks == layout.shape and layout.zarr_shards is None and not layout.checked
    if layout.codec != codec or not plain or np.dtype(layout.dtype) != np.dtype("<f8"):
        return None
    stored = store.get(f"{name}/{layout.file_of((0,))[0]}")
    chunk = np.frombuffer(bytearray(stored or b""), np.uint8)
    if stored is None or not streams(chunk, STREAMED):
        return None
    buffer, crc = np.empty((1, STREAMED // 4), np.float32), 0
    try:
        rows = BloscRows(chunk, layout.chunk_bytes, [0], where)
        for begin in range(0, layout.chunk_bytes // 4, buffer.size):
            values = buffer[:, : layout.chunk_bytes // 4 - begin]
            rows.take(values)
            crc = crc32c(values[0], crc)
    except ChunkError:
        return None  # who reads it as a whole tells what is wrong with it
    return stored, crc


def consolidated_names(store: Store) -> list[str]:
    """Names of extra arrays as far as consolidated metadata tells: a web server cannot list."""
    v3 = (read_json(store, "zarr.json") or {}).get("consolidated_metadata") or {}
    v2 = (read_json(store, ".zmetadata") or {}).get("metadata", {})
    names = [*v3.get("metadata", {}), *(key.removesuffix("/.zarray") for key in v2 if key.endswith("/.zarray"))]
    return sorted(name for name in names if name.startswith("statistics_") or name == "cell_order")


def _with_dates(metadata: dict[str, Any], where: str) -> tuple[ArrayLayout, np.dtype[Any]]:
    """The layout with dates as the 64-bit integers that they are stored as, and their real type."""
    kind = metadata.get("data_type", metadata.get("dtype"))
    if isinstance(kind, dict) and kind.get("name") == "numpy.datetime64":
        configuration = kind["configuration"]
        dtype = np.dtype(f"datetime64[{configuration['scale_factor']}{configuration['unit']}]")
        return parse({**metadata, "data_type": "int64"}, where), dtype
    layout = parse(metadata, where)
    dtype = np.dtype(layout.dtype)
    if dtype.kind == "M":
        layout = replace(layout, dtype="<i8", fill_value=None)
    return layout, dtype


def _fill(values: NDArray[Any], chunk: tuple[int, ...], stored: bytes | None, layout: ArrayLayout, where: str) -> None:
    assert layout.codec is not None
    whole = tuple(slice(0, n) for n in layout.shape)
    pairs = [overlap(cut, i, n) for cut, i, n in zip(whole, chunk, layout.chunks, strict=True)]
    place, inner = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    if stored is None:
        values[place] = 0 if layout.fill_value is None else layout.fill_value
        return
    in_place = layout.chunks == layout.shape
    decoded = values if in_place else np.empty(layout.chunks, layout.dtype)
    payload = memoryview(stored)[: len(stored) - 4 * layout.checked]
    if layout.checked and crc32c(payload) != int.from_bytes(stored[-4:], "little"):
        raise DatasetError(f"{where} cannot be read: the crc32c of the stored bytes does not match. Restore a copy.")
    try:
        layout.codec.decode(payload, decoded)
    except ChunkError as error:
        raise DatasetError(f"{where} cannot be read: {error}") from error
    if not in_place:
        values[place] = decoded[inner]
