"""An anemoi dataset as a source: Zarr v2 or v3, any chunking."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates, between, check_increasing
from shardio.errors import DatasetError
from shardio.format.arrays import consolidated_names, small_array, stored_values
from shardio.format.boxes import as_cut
from shardio.format.codec import Codec
from shardio.format.layout import ArrayLayout, parse
from shardio.format.metadata import array_metadata, group_attributes
from shardio.format.reader import NativeReader, Reader, open_reader
from shardio.format.store import LocalStore, Store
from shardio.format.stream import BloscRows
from shardio.source.extent import SourceExtent
from shardio.source.source import STATISTICS, Extra, Json, Selection, Source, tell_times


class AnemoiSource(Source):
    """An anemoi dataset: Zarr v2 or v3, any chunking, Zarr-sharded or not; large arrays are read when asked for."""

    def __init__(self, store: Store, selection: Selection, fill_absent: bool):
        self.path = store.url
        self._store = store
        self._metadata = array_metadata(store, "data") or {}
        self.layout: ArrayLayout = parse(self._metadata, f"{self.path}/data")
        self.zarr_format = self.layout.zarr_format
        self.attributes = group_attributes(store)
        self.data_attributes = group_attributes(store, "data")
        names = self._variable_names()
        every_date = self.required("dates", self.layout.shape[0]).astype("datetime64[s]")
        check_increasing(every_date, self.path)
        self._dates = between(every_date, selection.start, selection.end, self.path)
        self._variables = selection.variables(names, self.path)
        self.variables = tuple(names[i] for i in self._variables)
        self.dates = every_date[self._dates.start : self._dates.stop]
        self.missing = self.dates[np.isin(self.dates, self._listed_missing())]
        for name in ("latitudes", "longitudes"):
            self._check_length(name, (array_metadata(store, name) or {}).get("shape"), self.layout.shape[3])
        self.statistics = self._statistics()
        self._cut = as_cut(self._variables)
        self.extent = _extent_of(self.layout, self._dates, self._variables)
        self._reader = open_reader(store, "data", self.layout, fill_absent)
        # A missing date has a row but may have no chunks: there the fill value is what the source says.
        self._reader_of_missing = open_reader(store, "data", self.layout, fill_absent=True)

    @cached_property
    def latitudes(self) -> NDArray[np.float64]:  # type: ignore[override]
        return self._coordinates("latitudes")

    @cached_property
    def longitudes(self) -> NDArray[np.float64]:  # type: ignore[override]
        return self._coordinates("longitudes")

    def _coordinates(self, name: str) -> NDArray[np.float64]:
        """Read when first asked for: at 9 km they are 50 MB each, and who only reads fields need not have them."""
        layout = parse(array_metadata(self._store, name) or {}, f"{self.path}/{name}")
        known = layout.codec is not None and layout.zarr_shards is None
        values = small_array(self._store, name) if known else self.required(name, self.layout.shape[3])
        assert values is not None
        return values.astype(np.float64, copy=False)

    def stored_coordinates(self, name: str, codec: Codec) -> tuple[bytes, int] | None:
        """Stored bytes of `latitudes` or `longitudes` and the crc32c of the values; None where not in this codec."""
        return stored_values(self._store, name, codec)

    @cached_property
    def extras(self) -> tuple[Extra, ...]:  # type: ignore[override]
        return tuple(self._extra(name) for name in self.extra_names())

    @property
    def rows(self) -> range:
        """Stored rows of the selected dates."""
        return self._dates

    @property
    def reader(self) -> Reader:
        """Reads boxes of the stored array."""
        return self._reader

    def fingerprint(self) -> str:
        # Read anew: this is asked again at the end of a run, whether the source changed meanwhile.
        store, digest = self._store, sha256()
        digest.update(repr((array_metadata(store, "data"), group_attributes(store))).encode())
        for folder in self._folders():
            digest.update(repr((folder, store.sizes(folder))).encode())
        dates = self.array("dates")
        digest.update(b"" if dates is None else dates.astype("datetime64[s]").tobytes())
        return digest.hexdigest()

    def changed(self) -> str:
        times = {
            f"{folder}/{name}": when for folder in self._folders() for name, when in self._store.times(folder).items()
        }
        if times:
            return tell_times(times)
        # Of a server one is asked of a few: each is a request.
        names = ["latitudes", "longitudes", "data", "data"]
        chunks = [(0,), (0,), *((row, 0, 0, 0) for row in (self._dates[0], self._dates[-1]))]
        layouts = [parse(array_metadata(self._store, name) or {}, f"{self.path}/{name}") for name in names]
        files = [layout.file_of(chunk)[0] for layout, chunk in zip(layouts, chunks, strict=True)]
        versions = [self._store.version(f"{name}/{file}") for name, file in zip(names, files, strict=True)]
        return sha256(repr(versions).encode()).hexdigest()[:12]

    def _folders(self) -> list[str]:
        """Of all arrays that go into a copy."""
        return ["data", "dates", "latitudes", "longitudes", *STATISTICS, *self.extra_names()]

    def stored_files(self) -> dict[str, int]:
        """Bytes of every file that holds chunks of `data`, by name; empty where the store cannot tell."""
        sizes = self._store.sizes("data")
        return {name: size for name, size in sizes.items() if name not in ("zarr.json", ".zarray", ".zattrs")}

    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        first = self._dates.start + dates.start
        for reader, start, stop in self._runs_of_dates(dates):
            box = (slice(first + start, first + stop), self._cut, slice(0, self.layout.shape[2]), cells)
            reader.read(box, out[start:stop], pool)

    def streams(self, date: int, largest_block: int) -> bool:
        """Whether `stream` gives this date: it is one chunk of blocks of at most `largest_block` decoded bytes."""
        whole = self.layout.chunks == (1, *self.layout.shape[1:]) and np.dtype(self.layout.dtype) == np.float32
        if not whole or not isinstance(self._reader, NativeReader) or self.dates[date] in self.missing:
            return False
        return self._reader.streams(self._chunk(date), largest_block)

    def stream(self, date: int) -> BloscRows:
        """The fields of a date as rows [variable x ensemble], to be taken on this thread in the order of cells."""
        assert isinstance(self._reader, NativeReader)
        _, _, ensemble, cells = self.layout.shape
        begins = [4 * cells * (variable * ensemble + i) for variable in self._variables for i in range(ensemble)]
        return self._reader.stream(self._chunk(date), begins)

    def _chunk(self, date: int) -> tuple[int, int, int, int]:
        return self._dates.start + date, 0, 0, 0

    def _runs_of_dates(self, dates: slice) -> list[tuple[Reader, int, int]]:
        """Runs of dates that are missing, or are not: (reader, first, last + 1), relative to `dates.start`."""
        gone = np.isin(self.dates[dates], self.missing)
        edges = [0, *(np.flatnonzero(np.diff(gone)) + 1).tolist(), len(gone)]
        readers = (self._reader, self._reader_of_missing)
        return [(readers[int(gone[a])], a, b) for a, b in pairwise(edges)]

    def _variable_names(self) -> list[str]:
        names = self.attributes.get("variables")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DatasetError(
                f"{self.path} has no list of names as its attribute `variables`: it is no anemoi dataset."
            )
        if len(set(names)) != len(names) or len(names) != self.layout.shape[1]:
            raise DatasetError(
                f"{self.path}: the attribute `variables` names {len(set(names))} different variables, `data` has "
                f"{self.layout.shape[1]}. Restore the attributes from a copy."
            )
        if not isinstance(self.attributes.get("variables_metadata", {}), dict):
            raise DatasetError(f"{self.path}: the attribute `variables_metadata` is not a JSON object. Correct it.")
        return names

    def _listed_missing(self) -> Dates:
        try:
            return np.array(self.attributes.get("missing_dates", []), "datetime64[s]")
        except (TypeError, ValueError) as error:
            raise DatasetError(
                f"{self.path}: the attribute `missing_dates` is not a list of dates: {error}."
            ) from error

    def array(self, name: str) -> NDArray[Any] | None:
        """All values of one of the small arrays; None where there is no such array.

        Raises: DatasetError where it is damaged.
        """
        if not isinstance(self._store, LocalStore):
            return small_array(self._store, name)
        import zarr

        try:
            return np.asarray(zarr.open_array(self.path, path=name, mode="r")[...])
        except FileNotFoundError:
            return None
        except Exception as error:  # zarr has no exception of its own for damaged chunks
            raise DatasetError(f"{self.path}/{name} cannot be read: {error}") from error

    def required(self, name: str, length: int) -> NDArray[Any]:
        """All values of one of the small arrays; DatasetError where it has not this length."""
        values = self.array(name)
        self._check_length(name, None if values is None else values.shape, length)
        assert values is not None
        return values

    def _check_length(self, name: str, shape: Sequence[int] | None, length: int) -> None:
        if shape is None or list(shape) != [length]:
            found = "is absent" if shape is None else f"has shape {list(shape)}"
            raise DatasetError(
                f"{self.path}: the array `{name}` {found}, expected [{length}]. It is not an anemoi dataset."
            )

    def _statistics(self) -> dict[str, NDArray[np.float64]] | None:
        found = {name: self.array(name) for name in STATISTICS}
        index = list(self._variables)
        kept = {name: values[index].astype(np.float64) for name, values in found.items() if values is not None}
        return kept if len(kept) == len(STATISTICS) else None

    def extra_names(self) -> list[str]:
        """Of `extras`, without reading them."""
        if not isinstance(self._store, LocalStore):
            return consolidated_names(self._store)
        known = {"data", "dates", "latitudes", "longitudes", "shardio_crc32c", *STATISTICS}
        return sorted(name for name, is_array in self._members.items() if is_array and name not in known)

    @cached_property
    def groups(self) -> Mapping[str, Json]:  # type: ignore[override]
        """Attributes of the sub-groups, by name."""
        if not isinstance(self._store, LocalStore):
            return {}
        return {name: group_attributes(self._store, name) for name, is_array in self._members.items() if not is_array}

    @cached_property
    def _members(self) -> dict[str, bool]:
        """Whether each member is an array. What lies there counts: consolidated metadata may be older."""
        import zarr

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # files that are no part of the dataset
                group = zarr.open_group(self.path, mode="r", use_consolidated=False)
                return {name: isinstance(member, zarr.Array) for name, member in group.members(max_depth=None)}
        except Exception as error:
            raise DatasetError(f"the arrays of {self.path} cannot be listed: {error}") from error

    def _extra(self, name: str) -> Extra:
        attributes = group_attributes(self._store, name)
        metadata = array_metadata(self._store, name) or {}
        values = self.array(name)
        assert values is not None
        dimensions = metadata.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS")
        dimensions = tuple(dimensions) if dimensions else _guessed_dimensions(name, values, self.layout.shape)
        for axis, dimension in enumerate(dimensions or ()):
            if dimension == "variable" and values.shape[axis] == self.layout.shape[1]:
                values = np.take(values, self._variables, axis)
            if dimension == "time" and values.shape[axis] == self.layout.shape[0]:
                values = np.take(values, self._dates, axis)
        return Extra(name, values, attributes, dimensions)


def _guessed_dimensions(name: str, values: NDArray[Any], shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """Arrays of anemoi without named dimensions: the ones below are known to run along the variables."""
    per_variable = ("statistics_", "count", "sums", "squares", "has_nans")
    if values.shape == (shape[1],) and name.startswith(per_variable):
        return ("variable",)
    return None


def _extent_of(layout: ArrayLayout, dates: range, variables: tuple[int, ...]) -> SourceExtent:
    chunks = tuple(min(c, n) for c, n in zip(layout.chunks, layout.shape, strict=True))
    itemsize = np.dtype(layout.dtype).itemsize
    return SourceExtent(layout.shape, chunks, itemsize, dates, variables)  # type: ignore[arg-type]
