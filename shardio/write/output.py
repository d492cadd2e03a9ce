"""Everything of an output dataset but its chunks: small arrays, attributes, and the mark that it is complete."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from numpy.typing import NDArray

from shardio.dates import frequency
from shardio.format.codec import Codec, crc32c
from shardio.format.layout import DIMENSIONS, ArrayLayout
from shardio.source.anemoi import AnemoiSource
from shardio.source.source import STATISTICS, Extra, Source
from shardio.write import statistics
from shardio.write.writer import atomic_file

Json = dict[str, Any]
FORMAT_VERSION = 1
CHECKSUMS = "shardio_crc32c"
COORDINATES = Codec("blosc", "lz4", 5, 1)  # zarr's own choice may be zstd: longer over 9 km than a date takes


def begin_data(folder: Path, layout: ArrayLayout, attributes: Json) -> None:
    """Write the metadata of `data`, before its first chunk."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    _remove_all_but_data(folder)
    attributes = {**attributes, "_ARRAY_DIMENSIONS": list(DIMENSIONS)}
    if layout.zarr_format == 2:
        files = {".zarray": layout.metadata(), ".zattrs": attributes}
    else:
        files = {"zarr.json": {**layout.metadata(), "attributes": attributes}}
    for name, content in files.items():
        with atomic_file(data / name, sync=True) as file:
            file.write([json.dumps(content, indent=2).encode()])


def write_coordinates(folder: Path, source: Source, layout: ArrayLayout) -> dict[str, int]:
    """Write the arrays that do not depend on the chunks; returns the checksum of each. May run beside the chunks."""
    with _group(folder, layout) as group:
        written = {"dates": _write_array(group, Extra("dates", source.dates, {}, ("time",)), layout.zarr_format)}
        for name in ("latitudes", "longitudes"):
            written[name] = _write_coordinate(group, folder, source, name, layout)
        for name, about_group in getattr(source, "groups", {}).items():
            group.require_group(name).attrs.put(about_group)
        return written | {extra.name: _write_array(group, extra, layout.zarr_format) for extra in source.extras}


def finish_dataset(
    folder: Path,
    source: Source,
    layout: ArrayLayout,
    crc: NDArray[np.uint32],
    about: Json,
    moments: statistics.Moments | None = None,
    coordinates: Mapping[str, int] | None = None,
) -> None:
    """Write what is not written yet, then the attributes with the complete flag, last.

    Args:
      crc: [date, grid-chunk], of what is stored.
      moments: of all values; None where the source has statistics.
      coordinates: what `write_coordinates` returned; None where it is to be called here.
    """
    import zarr

    coordinates = write_coordinates(folder, source, layout) if coordinates is None else coordinates
    values = source.statistics
    if values is None:
        assert moments is not None
        values = statistics.finish(moments)
    arrays = [
        *(Extra(name, values[name], {}, ("variable",)) for name in STATISTICS),
        Extra(CHECKSUMS, crc, {}, ("time", "grid_chunk")),
    ]
    attributes = _attributes(source, layout, moments, about["source_fingerprint"]) | {
        "shardio": {**about, "arrays": {**coordinates, **{extra.name: checksum(extra.values) for extra in arrays}}}
    }
    with _group(folder, layout) as group:
        for extra in arrays:
            _write_array(group, extra, layout.zarr_format)
        group.attrs.put(attributes | {"shardio": {**attributes["shardio"], "complete": True}})
        zarr.consolidate_metadata(folder, zarr_format=layout.zarr_format)  # type: ignore[arg-type]


@contextmanager
def _group(folder: Path, layout: ArrayLayout) -> Iterator[Any]:
    import zarr

    with warnings.catch_warnings():
        # zarr warns that consolidated metadata and some types are not in the v3 specification; readers cope.
        warnings.simplefilter("ignore")
        yield zarr.open_group(folder, mode="a", zarr_format=layout.zarr_format)  # type: ignore[arg-type]


def _attributes(source: Source, layout: ArrayLayout, moments: statistics.Moments | None, fingerprint: str) -> Json:
    """The attributes of the source, those that describe the cut refreshed, those that are absent derived."""
    dates = [str(date) for date in source.dates]
    found = dict(source.attributes)
    derived: Json = {
        "resolution": f"{layout.shape[3]} cells",
        "field_shape": [layout.shape[3]],
        "frequency": frequency(source.dates),
        "statistics_start_date": dates[0],
        "statistics_end_date": dates[-1],
        "allow_nans": bool(len(source.missing)) or moments is None or _has_nan(moments, layout),
        "variables_metadata": {},
        "ensemble_dimension": 2,
        "flatten_grid": True,
    }
    kept_metadata = {
        name: about for name, about in found.get("variables_metadata", {}).items() if name in source.variables
    }
    refreshed = {
        "variables": list(source.variables),
        "variables_metadata": kept_metadata,
        "chunks": list(layout.chunks),
        "shape": list(layout.shape),
        "dtype": "float32",
        "start_date": dates[0],
        "end_date": dates[-1],
        "missing_dates": [str(date) for date in source.missing],
    }
    if "uuid" in found or source.statistics is None:
        # The same source cut the same way is the same dataset, on whatever day it is cut.
        refreshed["uuid"] = str(
            uuid5(NAMESPACE_URL, f"{fingerprint}:{layout}:{source.variables}:{dates[0]}:{dates[-1]}")
        )
    if source.statistics is None:
        refreshed |= {"statistics_start_date": dates[0], "statistics_end_date": dates[-1]}
    return derived | found | refreshed


def _has_nan(moments: statistics.Moments, layout: ArrayLayout) -> bool:
    return bool((moments.count < layout.shape[0] * layout.shape[2] * layout.shape[3]).any())


def _write_coordinate(group: Any, folder: Path, source: Source, name: str, layout: ArrayLayout) -> int:
    """Write one; returns its checksum. What the source stores as it is stored here is copied as it is."""
    stored = source.stored_coordinates(name, COORDINATES) if isinstance(source, AnemoiSource) else None
    if stored is None:
        return _write_array(group, Extra(name, getattr(source, name), {}, ("cell",)), layout.zarr_format)
    array = _create_array(group, Extra(name, np.empty(0), {}, ("cell",)), (layout.shape[3],), layout.zarr_format)
    chunk = folder / name / array.metadata.encode_chunk_key((0,))
    chunk.parent.mkdir(exist_ok=True)
    chunk.write_bytes(stored[0])
    return stored[1]


def _write_array(group: Any, extra: Extra, zarr_format: int) -> int:
    """Write one; returns its checksum."""
    _create_array(group, extra, extra.values.shape, zarr_format)[...] = extra.values
    return checksum(extra.values)


def _create_array(group: Any, extra: Extra, shape: tuple[int, ...], zarr_format: int) -> Any:
    """An array like `extra`, of any shape, without values yet."""
    # One chunk: a reader wants these arrays whole. Overwritten, because a killed run may have begun them.
    named: Json = {"dimension_names": extra.dimensions} if zarr_format == 3 else {}
    if extra.values.dtype.kind == "f":
        itemsize = extra.values.dtype.itemsize
        named["compressors"] = COORDINATES.v3_metadata(itemsize) if zarr_format == 3 else [COORDINATES.v2_metadata()]
    attributes = {key: value for key, value in extra.attributes.items() if key != "_ARRAY_DIMENSIONS"}
    if zarr_format == 2 and extra.dimensions:
        attributes["_ARRAY_DIMENSIONS"] = list(extra.dimensions)
    return group.create_array(
        extra.name,
        shape=shape,
        dtype=extra.values.dtype,
        chunks=tuple(max(n, 1) for n in shape) or (),
        overwrite=True,
        attributes=attributes,
        config={"write_empty_chunks": True},
        **named,
    )


def checksum(values: NDArray[Any]) -> int:
    """crc32c of a small array; of its text where memory holds only pointers to it (strings of any length)."""
    text = values.dtype.kind in "OT"
    return crc32c(repr(values.tolist()).encode() if text else np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _remove_all_but_data(folder: Path) -> None:
    """A run killed while it wrote the small arrays leaves half of them, and temporary files of zarr."""
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "data":
            shutil.rmtree(entry)
        elif entry.is_file():
            entry.unlink()
