"""Anything that gives fields on cells: an anemoi dataset here, NetCDF, CF Zarr and GRIB in `cf.py`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardio.arrays import consolidated_names, small_array, stored_values
from shardio.codec import Codec
from shardio.dates import Dates, between, check_increasing
from shardio.errors import DatasetError, SelectionError
from shardio.layout import ArrayLayout, parse
from shardio.plan import SourceExtent
from shardio.reader import NativeReader, Reader, open_reader
from shardio.statistics import NAMES
from shardio.store import REMOTE, LocalStore, Store, open_store, read_json
from shardio.stream import BloscRows

Json = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """What of a source is wanted: dates from `start` to `end`, and variables by name."""

    start: str | None = None
    end: str | None = None
    select: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def variables(self, names: Sequence[str], where: str) -> tuple[int, ...]:
        """Indices of the selected variables, in the order of `select`, else of the source."""
        unknown = [name for name in (*self.select, *self.drop) if name not in names]
        if unknown:
            raise SelectionError(f"{where} has no variable {', '.join(unknown)}. It has: {', '.join(names)}.")
        repeated = sorted({name for name in self.select if self.select.count(name) > 1})
        if repeated:
            raise SelectionError(f"--select names {', '.join(repeated)} more than once. Name each variable once.")
        kept = [name for name in (self.select or names) if name not in self.drop]
        if not kept:
            raise SelectionError(f"no variable of {where} is left. Drop fewer of: {', '.join(names)}.")
        return tuple(list(names).index(name) for name in kept)


@dataclass(frozen=True)
class Extra:
    """An array that travels along: statistics_tendencies_*, masks, flags."""

    name: str
    values: NDArray[Any]
    attributes: Json
    dimensions: tuple[str, ...] | None


class Source(Protocol):
    """Fields on cells, for the dates and variables selected.

    Attributes:
      path: as the user named it.
      extent: shape, chunks and selection, for the planner.
      dates: datetime64[s] [date]; missing: those of them without data.
      statistics: float64 [variable] by name; None where they are to be computed.
      zarr_format: that of the source; 3 where it is not Zarr.
    """

    path: str
    extent: SourceExtent
    variables: tuple[str, ...]
    dates: Dates
    missing: Dates
    attributes: Json
    data_attributes: Json
    statistics: dict[str, NDArray[np.float64]] | None
    zarr_format: int

    @property
    def latitudes(self) -> NDArray[np.float64]:
        """[cell], degrees."""

    @property
    def longitudes(self) -> NDArray[np.float64]:
        """[cell], degrees."""

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Arrays that travel along."""

    def fingerprint(self) -> str:
        """Of what is there now: changes whenever metadata or the size of any stored chunk changes."""

    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        """Fill `out` [date, variable, ensemble, cell] with selected dates and variables."""


def open_source(path: str | os.PathLike[str], selection: Selection = Selection(), fill_absent: bool = False) -> Source:
    """Open whatever `path` is; DatasetError says what it is not."""
    text = os.fspath(path)
    store = open_store(text)
    if isinstance(store, LocalStore) and not store.root.exists() and not any(c in text for c in "*?["):
        raise DatasetError(f"{text} does not exist. Check the path.")
    metadata = array_metadata(store, "data")
    shape = None if metadata is None else metadata.get("shape")
    if metadata is not None and (not isinstance(shape, list) or len(shape) == 4):
        return AnemoiSource(store, selection, fill_absent)
    if text.startswith(REMOTE):
        raise DatasetError(f"{text} has no array `data` of 4 dimensions: it is not an anemoi dataset.")
    from shardio.cf import CFSource

    return CFSource(text, selection)


def array_metadata(store: Store, name: str) -> Json | None:
    """Metadata of an array in either Zarr format; None where there is none."""
    return read_json(store, f"{name}/zarr.json") or read_json(store, f"{name}/.zarray")


def group_attributes(store: Store, name: str = "") -> Json:
    """Attributes of a group or array in either Zarr format."""
    prefix = f"{name}/" if name else ""
    v3 = read_json(store, f"{prefix}zarr.json")
    found = v3.get("attributes", {}) if v3 is not None else read_json(store, f"{prefix}.zattrs") or {}
    if not isinstance(found, dict):
        raise DatasetError(f"the attributes of {store.url}/{name} are not a JSON object. Restore them from a copy.")
    return found


def units_of(attributes: Json, variable: str) -> str:
    """As the attributes of a dataset say; empty where they do not."""
    metadata = attributes.get("variables_metadata")
    about = metadata.get(variable) if isinstance(metadata, dict) else None
    return str(about.get("units", "")) if isinstance(about, dict) else ""


class AnemoiSource:
    """An anemoi dataset: Zarr v2 or v3, any chunking, Zarr-sharded or not."""

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
    def latitudes(self) -> NDArray[np.float64]:
        return self._coordinates("latitudes")

    @cached_property
    def longitudes(self) -> NDArray[np.float64]:
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
    def extras(self) -> tuple[Extra, ...]:
        return tuple(self._extra(name) for name in self.extra_names())

    @property
    def rows(self) -> range:
        """Stored rows of the selected dates."""
        return self._dates

    @property
    def stored_variables(self) -> tuple[int, ...]:
        """Stored places of the selected variables."""
        return self._variables

    @property
    def reader(self) -> Reader:
        """Reads boxes of the stored array."""
        return self._reader

    def fingerprint(self) -> str:
        # Read anew: this is asked again at the end of a run, whether the source changed meanwhile.
        store, digest = self._store, sha256()
        digest.update(repr((array_metadata(store, "data"), group_attributes(store))).encode())
        for folder in ("data", "dates", "latitudes", "longitudes"):
            digest.update(repr(store.sizes(folder)).encode())
        for name in store.sizes("dates"):
            digest.update(store.get(f"dates/{name}") or b"")
        return digest.hexdigest()

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
        """All values of one of the small arrays; None where there is no such array."""
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
        found = {name: self.array(name) for name in NAMES}
        index = list(self._variables)
        kept = {name: values[index].astype(np.float64) for name, values in found.items() if values is not None}
        return kept if len(kept) == len(NAMES) else None

    def extra_names(self) -> list[str]:
        """Of `extras`, without reading them."""
        if not isinstance(self._store, LocalStore):
            return consolidated_names(self._store)
        known = {"data", "dates", "latitudes", "longitudes", "shardio_crc32c", *NAMES}
        return sorted(name for name, is_array in self._members.items() if is_array and name not in known)

    @cached_property
    def groups(self) -> dict[str, Json]:
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


def as_cut(indices: tuple[int, ...]) -> slice | tuple[int, ...]:
    """The same indices as a slice where they are consecutive: that decodes in place."""
    first, n = indices[0], len(indices)
    return slice(first, first + n) if indices == tuple(range(first, first + n)) else indices
