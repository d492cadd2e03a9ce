"""Sources that xarray opens: NetCDF, CF Zarr (WeatherBench2, ARCO-ERA5), GRIB through cfgrib.

CF roles (cf_xarray finds them) become the axes of a dataset: variable x level -> `t_850`, latitude x longitude (or an
unstructured or curvilinear grid) -> cell, `number` or `realization` -> ensemble, `valid_time` or `time` -> date.
"""

from __future__ import annotations

import glob
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates, between, check_increasing
from shardio.errors import DatasetError, SelectionError
from shardio.plan import SourceExtent
from shardio.reader import cast
from shardio.source import Extra, Json, Selection
from shardio.store import LocalStore

if TYPE_CHECKING:
    import xarray as xr

ENSEMBLE = ("number", "realization", "member", "ensemble")


class MisfitError(Exception):
    """Why one variable cannot become fields on cells."""


@dataclass(frozen=True)
class Grid:
    """Where the cells are: `dims` one (unstructured) or two (rows first), coordinates flattened in that order."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    latitudes: NDArray[np.float64]
    longitudes: NDArray[np.float64]

    @property
    def cells_per_row(self) -> int:
        return math.prod(self.shape[1:])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and np.array_equal(self.latitudes, other.latitudes)
            and np.array_equal(self.longitudes, other.longitudes)
        )


@dataclass(frozen=True)
class Variable:
    """One variable of the file with the roles of its dimensions."""

    name: str
    array: xr.DataArray
    grid: Grid
    date_dims: tuple[str, ...]
    dates: Dates | None
    ensemble_dim: str | None
    level_dim: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """One name per level: t_1000, t_850; the bare name where there are no levels."""
        return tuple(f"{self.name}_{level}" for level in self.levels) if self.level_dim else (self.name,)

    @property
    def levels(self) -> tuple[str, ...]:
        assert self.level_dim
        coordinate = self.array[self.level_dim]
        scale = 0.01 if coordinate.attrs.get("units") == "Pa" else 1
        return tuple(f"{value * scale:.6g}" for value in coordinate.values.tolist())

    @property
    def ensemble(self) -> int:
        return int(self.array.sizes[self.ensemble_dim]) if self.ensemble_dim else 1

    def chunk_of(self, dim: str) -> int:
        """Extent of a stored chunk along `dim`; 1 where storage is contiguous and any slice is as cheap."""
        return int(self.array.encoding.get("preferred_chunks", {}).get(dim, 1))


class CFSource:
    """Fields on cells out of one file, a glob of files, or a CF Zarr."""

    def __init__(self, path: str, selection: Selection):
        self.path = path
        self._files = tuple(sorted(glob.glob(path))) if any(c in path for c in "*?[") else (path,)
        self._lock = threading.Lock()  # HDF5 and ecCodes serve one thread at a time
        datasets = _open(path, self._files)
        chosen = _wanted([variable for ds in datasets for variable in ds.data_vars.values()], selection, path)
        self._fields = _roles(chosen, path)
        names = [name for variable in self._fields for name in variable.names]
        self._places = _positions(_expand(selection, self._fields), names, path)
        self.variables = tuple(names[i] for i in self._places)
        self.grid = self._fields[0].grid
        self.latitudes, self.longitudes = self.grid.latitudes, self.grid.longitudes
        every_date = self._dates_of_all()
        self._selected = between(every_date, selection.start, selection.end, path)
        self.dates = every_date[self._selected.start : self._selected.stop]
        self.missing: Dates = self.dates[:0]
        self.ensemble = max(variable.ensemble for variable in self._fields)
        self.statistics: dict[str, NDArray[np.float64]] | None = None
        self.extras: tuple[Extra, ...] = ()
        self.zarr_format = 3
        self.data_attributes: Json = {}
        self.attributes = self._attributes(datasets[0].attrs)
        self.extent = self._extent(len(every_date))

    def fingerprint(self) -> str:
        digest = sha256(repr((self.variables, self.grid.shape)).encode())
        for name in self._files:
            if Path(name).is_dir():
                digest.update(repr(LocalStore(name).sizes()).encode())
            else:
                status = Path(name).stat()
                digest.update(f"{status.st_size}:{status.st_mtime_ns};".encode())
        return digest.hexdigest()

    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        width = self.grid.cells_per_row
        rows = slice(cells.start // width, -(-cells.stop // width))
        trim = slice(cells.start - rows.start * width, cells.stop - rows.start * width)
        first = self._selected.start
        wanted = {place: at for at, place in enumerate(self._places)}
        offset = 0
        for variable in self._fields:
            targets = [wanted[offset + level] for level in range(len(variable.names)) if offset + level in wanted]
            levels = [level for level in range(len(variable.names)) if offset + level in wanted]
            offset += len(variable.names)
            for part in _aligned(first + dates.start, first + dates.stop, variable):
                with self._lock:
                    values = _load(variable, part, levels, rows, self.grid)
                place = slice(part.start - first - dates.start, part.stop - first - dates.start)
                where = f"{self.path}: {variable.name} on {self.dates[dates][place][0]}"
                for level, target in enumerate(targets):
                    cast(values[:, level, :, trim], out, (place, target), where)

    def _dates_of_all(self) -> Dates:
        with_dates = [variable for variable in self._fields if variable.dates is not None]
        if not with_dates:
            raise DatasetError(f"{self.path} has no time coordinate. Add one, for example with xarray's expand_dims.")
        dates = max((variable.dates for variable in with_dates if variable.dates is not None), key=len)
        different = [
            v.name for v in with_dates if v.dates is not None and v.date_dims and not np.array_equal(v.dates, dates)
        ]
        if different:
            keep = ",".join(v.name for v in with_dates if v.name not in different)
            raise DatasetError(
                f"{self.path}: {', '.join(different)} have other dates than the rest. "
                f"Use --select {keep}, or --drop {','.join(different)}."
            )
        check_increasing(dates, self.path)
        return dates

    def _extent(self, dates: int) -> SourceExtent:
        shape = (dates, sum(len(v.names) for v in self._fields), self.ensemble, len(self.latitudes))
        timed = [v for v in self._fields if len(v.date_dims) == 1]
        span = max((v.chunk_of(v.date_dims[0]) for v in timed), default=1)
        rows = max(v.chunk_of(self.grid.dims[0]) for v in self._fields)
        cells = len(self.latitudes) if rows == 1 else rows * self.grid.cells_per_row
        levels = max(len(v.names) for v in self._fields)
        chunks = (min(span, dates), levels, self.ensemble, min(cells, shape[3]))
        itemsize = max(v.array.dtype.itemsize for v in self._fields)
        return SourceExtent(shape, chunks, itemsize, self._selected, self._places)

    def _attributes(self, attributes: Json) -> Json:
        metadata: Json = {}
        for variable in self._fields:
            about = {
                k: str(variable.array.attrs[k])
                for k in ("units", "long_name", "standard_name")
                if k in variable.array.attrs
            }
            levels = variable.levels if variable.level_dim else (None,)
            for name, level in zip(variable.names, levels, strict=True):
                mars = {"param": variable.name} | ({"levelist": float(level)} if level else {})
                if not variable.date_dims:
                    about["constant_in_time"] = "true"
                metadata[name] = {"mars": mars, **about}
        history = {
            key: str(value)
            for key, value in attributes.items()
            if key in ("title", "institution", "source", "Conventions")
        }
        return {
            "description": f"made by shardio from {Path(self.path).name}",
            "source_attributes": history,
            "variables_metadata": {name: metadata[name] for name in self.variables},
            "field_shape": list(self.grid.shape),
            "resolution": _resolution(self.grid),
            "flatten_grid": True,
            "ensemble_dimension": 2,
        }


def _open(path: str, files: Sequence[str]) -> list[xr.Dataset]:
    import xarray as xr

    if not files:
        raise DatasetError(f"no file matches {path}. Check the pattern.")
    try:
        if Path(files[0]).is_file() and Path(files[0]).read_bytes()[:4] == b"GRIB":
            return [ds for name in files for ds in _open_grib(name)]
        options: Json = {"decode_coords": "all", "decode_timedelta": False}
        if len(files) > 1:
            return [xr.open_mfdataset(list(files), combine="by_coords", **options)]
        if Path(path).is_dir():
            return [xr.open_zarr(path, chunks=None, **options)]
        return [xr.open_dataset(path, **options)]
    except DatasetError:
        raise
    except Exception as error:  # every backend of xarray has its own errors
        raise DatasetError(
            f"{path} is neither an anemoi dataset nor anything that xarray opens "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
        ) from error


def _open_grib(path: str) -> list[xr.Dataset]:
    try:
        import cfgrib
    except ImportError as error:
        raise DatasetError(f'{path} is GRIB, which needs cfgrib: pip install "shardio[grib]".') from error
    # No index file: it would be written beside the user's data.
    return list(cfgrib.open_datasets(path, backend_kwargs={"indexpath": "", "errors": "raise"}))


def _wanted(arrays: list[xr.DataArray], selection: Selection, path: str) -> list[xr.DataArray]:
    """Arrays that a selection can mean; a name may be a variable (t) or one of its levels (t_850)."""
    names = [str(array.name) for array in arrays]

    def means(name: str, choice: str) -> bool:
        return choice == name or (choice.startswith(f"{name}_") and choice not in names)

    unknown = [c for c in (*selection.select, *selection.drop) if not any(means(n, c) for n in names)]
    if unknown:
        raise SelectionError(f"{path} has no variable {', '.join(unknown)}. It has: {', '.join(names)}.")
    kept = [
        array
        for array, name in zip(arrays, names, strict=True)
        if name not in selection.drop
        and (not selection.select or any(means(name, choice) for choice in selection.select))
    ]
    if not kept:
        raise SelectionError(f"no variable of {path} is left. Drop fewer of: {', '.join(names)}.")
    return kept


def _expand(selection: Selection, variables: list[Variable]) -> Selection:
    """A selection in which variables with levels are replaced by their levels."""
    levels = {variable.name: variable.names for variable in variables}
    select = tuple(name for choice in selection.select for name in levels.get(choice, (choice,)))
    known = {name for variable in variables for name in variable.names}
    drop = tuple(name for choice in selection.drop for name in levels.get(choice, (choice,)) if name in known)
    return Selection(selection.start, selection.end, select, drop)


def _positions(selection: Selection, names: list[str], path: str) -> tuple[int, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DatasetError(f"{path} has several variables called {', '.join(repeated)}. Rename or --drop them.")
    return selection.variables(names, path)


def _roles(arrays: list[xr.DataArray], path: str) -> list[Variable]:
    """The role of every dimension of every variable; one error that names all that do not fit."""
    found: list[Variable] = []
    misfits: dict[str, str] = {}
    for array in arrays:
        try:
            variable = _role(array)
            if found and variable.grid != found[0].grid:
                raise MisfitError(
                    f"its grid {variable.grid.shape} is not that of {found[0].name} {found[0].grid.shape}"
                )
            if found and variable.ensemble not in (1, found[0].ensemble):
                raise MisfitError(
                    f"it has {variable.ensemble} ensemble members, {found[0].name} has {found[0].ensemble}"
                )
            found.append(variable)
        except MisfitError as misfit:
            misfits[str(array.name)] = str(misfit)
    if misfits:
        detail = "; ".join(f"{name}: {why}" for name, why in misfits.items())
        remedy = f"Use --drop {','.join(misfits)}" if found else "There is no other variable to select"
        if found:
            remedy += f", or --select {','.join(variable.name for variable in found)}"
        raise SelectionError(f"{path}: these variables do not fit: {detail}. {remedy}.")
    return found


def _role(array: xr.DataArray) -> Variable:
    if array.dtype.kind not in "fiub":
        raise MisfitError(f"it holds {array.dtype}, not numbers")
    grid = _grid(array)
    time = _time(array)
    date_dims = tuple(str(dim) for dim in time.dims) if time is not None else ()
    rest = [str(dim) for dim in array.dims if dim not in (*grid.dims, *date_dims)]
    ensemble = next((d for d in rest if d in ENSEMBLE or _standard_name(array, d) == "realization"), None)
    levels = [dim for dim in rest if dim != ensemble]
    if len(levels) > 1 or any(d not in array.coords or array[d].dtype.kind not in "fiu" for d in levels):
        raise MisfitError(f"its dimensions {levels} are neither time, ensemble, one numeric level, nor grid")
    dates = None
    if time is not None:
        if time.dtype.kind != "M":
            raise MisfitError(f"its time {time.name} is not of the standard calendar ({time.dtype})")
        dates = np.atleast_1d(time.values).reshape(-1).astype("datetime64[s]")
    return Variable(str(array.name), array, grid, date_dims, dates, ensemble, levels[0] if levels else None)


def _standard_name(array: xr.DataArray, dim: str) -> str | None:
    return array[dim].attrs.get("standard_name") if dim in array.coords else None


def _time(array: xr.DataArray) -> xr.DataArray | None:
    """`valid_time` where there is one (cfgrib calls the reference time `time`), else the CF time."""
    import cf_xarray  # noqa: F401, registers `.cf`

    names = ["valid_time", *array.cf.coordinates.get("time", []), *array.cf.axes.get("T", []), "time"]
    return next((array[name] for name in names if name in array.coords), None)


def _grid(array: xr.DataArray) -> Grid:
    import cf_xarray  # noqa: F401, registers `.cf`

    found = []
    for role, names in (("latitude", ("latitude", "lat", "nav_lat")), ("longitude", ("longitude", "lon", "nav_lon"))):
        known = [*array.cf.coordinates.get(role, []), *names]
        name = next((name for name in known if name in array.coords), None)
        if name is None:
            raise MisfitError(f"it has no {role} coordinate among {[str(c) for c in array.coords]}")
        found.append(array[name])
    lat, lon = found
    if not lat.dims or not lon.dims:
        raise MisfitError("its latitude and longitude are single points")
    dims = tuple(str(d) for d in (lat.dims if set(lat.dims) == set(lon.dims) else (*lat.dims, *lon.dims)))
    if any(dim not in array.dims for dim in dims) or len(dims) > 2:
        raise MisfitError(f"its grid dimensions {dims} are not among its dimensions {array.dims}")
    shape = tuple(array.sizes[dim] for dim in dims)
    if lat.dims != lon.dims and set(lat.dims) != set(lon.dims):
        lats, lons = np.broadcast_arrays(lat.values[:, None], lon.values[None, :])
    else:
        lats, lons = lat.transpose(*dims).values, lon.transpose(*dims).values
    return Grid(dims, shape, np.float64(lats).reshape(-1), np.float64(lons).reshape(-1))


def _aligned(start: int, stop: int, variable: Variable) -> list[slice]:
    """Date ranges that end where stored chunks do, so that no more than one chunk of dates is in memory."""
    span = variable.chunk_of(variable.date_dims[0]) if len(variable.date_dims) == 1 else 1
    edges = [start, *range((start // span + 1) * span, stop, span), stop]
    return [slice(a, b) for a, b in pairwise(edges)]


def _load(variable: Variable, dates: slice, levels: list[int], rows: slice, grid: Grid) -> NDArray[Any]:
    """[dates, levels, ensemble, cells of rows], constants repeated for every date."""
    index: dict[str, Any] = {grid.dims[0]: rows}
    if variable.level_dim:
        index[variable.level_dim] = levels
    if len(variable.date_dims) == 1:
        index[variable.date_dims[0]] = dates
    elif variable.date_dims:
        shape = tuple(variable.array.sizes[dim] for dim in variable.date_dims)
        place = np.unravel_index(dates.start, shape)
        index.update({dim: slice(int(i), int(i) + 1) for dim, i in zip(variable.date_dims, place, strict=True)})
    part = variable.array.isel(index)
    order = [*variable.date_dims, variable.level_dim, variable.ensemble_dim, *grid.dims]
    values = part.transpose(*(dim for dim in order if dim)).values
    cells = math.prod(part.sizes[dim] for dim in grid.dims)
    count = dates.stop - dates.start if variable.date_dims else 1
    return values.reshape(count, len(levels) if variable.level_dim else 1, variable.ensemble, cells)


def _resolution(grid: Grid) -> str:
    if len(grid.dims) == 2 and grid.shape[0] > 1:
        step = abs(float(grid.latitudes[grid.cells_per_row] - grid.latitudes[0]))
        return f"{step:g}"
    return f"{len(grid.latitudes)} cells"
