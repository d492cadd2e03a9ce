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
from shardio.format.files import atomic
from shardio.format.layout import DIMENSIONS, ArrayLayout
from shardio.source.source import STATISTICS, Extra, Source
from shardio.write import statistics

Json = dict[str, Any]
FORMAT_VERSION = 1
CHECKSUMS = "shardio_crc32c"
PLACES = ("latitudes", "longitudes")
COORDINATES = Codec("blosc", "lz4", 5, 1)  # zarr's own choice may be zstd: longer over 9 km than a date takes


def begin_data(folder: Path, layout: ArrayLayout, attributes: Mapping[str, Any]) -> None:
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
        with atomic(data / name) as partial:
            partial.write_text(json.dumps(content, indent=2))


def create_coordinates(folder: Path, source: Source, layout: ArrayLayout) -> Json:
    """Create the arrays that do not depend on the chunks, by name, without their values.

    On the thread that began the run: zarr warns of what it creates, and filters of warnings belong to the process.
    """
    with _group(folder, layout) as group:
        for name, about in source.groups.items():
            group.require_group(name).attrs.put(about)
        given = (Extra("dates", source.dates, {}, ("time",)), *source.extras)
        arrays: Json = {
            name: _create_array(group, Extra(name, np.empty(0), {}, ("cell",)), (layout.shape[3],), layout.zarr_format)
            for name in PLACES
        }
        return arrays | {e.name: _create_array(group, e, e.values.shape, layout.zarr_format) for e in given}


def write_coordinates(folder: Path, source: Source, arrays: Json) -> dict[str, int]:
    """Write the values of what `create_coordinates` made; returns the checksum of each. May run beside the chunks."""
    given = {"dates": source.dates, **{extra.name: extra.values for extra in source.extras}}
    written = {name: _fill(arrays[name], values) for name, values in given.items()}
    return written | {name: _fill_places(arrays[name], folder, source, name) for name in PLACES}


def finish_dataset(
    folder: Path,
    source: Source,
    layout: ArrayLayout,
    crc: NDArray[np.uint32],
    about: Json,
    coordinates: Mapping[str, int],
    moments: statistics.Moments | None = None,
) -> None:
    """Write what is not written yet, then the attributes with the complete flag, last.

    Args:
      crc: [date, grid-chunk], of what is stored.
      coordinates: what `write_coordinates` returned.
      moments: of all values; None where the source has statistics.
    """
    import zarr

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
            _create_array(group, extra, extra.values.shape, layout.zarr_format)[...] = extra.values
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


def _fill_places(array: Any, folder: Path, source: Source, name: str) -> int:
    """Write one of them; returns its checksum. What the source stores as it is stored here is copied as it is."""
    stored = source.stored_coordinates(name, COORDINATES)
    if stored is None:
        return _fill(array, getattr(source, name))
    chunk = folder / name / array.metadata.encode_chunk_key((0,))
    chunk.parent.mkdir(exist_ok=True)
    chunk.write_bytes(stored[0])
    return stored[1]


def _fill(array: Any, values: NDArray[Any]) -> int:
    """Write one; returns its checksum."""
    array[...] = values
    return checksum(values)


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
