"""What each dimension of a variable is: date, ensemble, level or grid, by the CF conventions and common names.

    xr.DataArray --part_of--> Part  (one variable of one file, roles known)  --load--> [date, level, ensemble, cell]

Nothing is guessed: a variable with a dimension that has none of these roles is a misfit, and says why.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates

if TYPE_CHECKING:
    import xarray as xr

ENSEMBLE = ("number", "realization", "member", "ensemble", "ensemble_member")
NAMES = {"latitude": ("latitude", "lat", "nav_lat"), "longitude": ("longitude", "lon", "nav_lon")}
UNITS = {"latitude": re.compile(r"degrees?_?n(orth)?", re.I), "longitude": re.compile(r"degrees?_?e(ast)?", re.I)}
LEVEL = re.compile(
    r"(lev|plev|level|isobaric|pres|height|depth|altitude|hybrid|sigma|theta|model_level)[a-z_]*\d*", re.I
)
TIME = re.compile(r"t|times?|dates?|time_(counter|centered|instant)", re.I)
PRESSURE = {"Pa": 0.01, "hPa": 1.0, "mbar": 1.0, "mb": 1.0, "millibar": 1.0, "millibars": 1.0}
# Small loads spend their time in xarray: several stored chunks share one, up to this size.
BYTES_AT_ONCE = 2**20


class Misfit(NamedTuple):
    """Why a variable cannot become fields on cells, and what would make it fit."""

    why: str
    remedy: str


class MisfitError(Exception):
    """One variable is a misfit. Whoever keeps it keeps `what` alone: a traceback would keep files open."""

    def __init__(self, why: str, remedy: str):
        super().__init__(why)
        self.what = Misfit(why, remedy)


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the cells are, rows first. One object for all variables whose cells lie in the same places."""

    shape: tuple[int, ...]
    latitudes: NDArray[np.float64]
    longitudes: NDArray[np.float64]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cells_per_row(self) -> int:
        return math.prod(self.shape[1:])

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


Grids = dict[bytes, Grid]


class Extent(NamedTuple):
    """How many dates, levels and rows."""

    dates: int
    levels: int
    rows: int


@dataclass(frozen=True, eq=False)
class Part:
    """One variable as one file holds it.

    Attributes:
      values: lazy; attributes and encoding included.
      grid_dims: one (unstructured) or two (rows first).
      date_dims: none for a constant or a single date, two for reference time x forecast step.
      dates: in increasing order; empty without time. `order`: where each of them is stored, flattened.
      names: one per level (t_1000, t_850); the bare name where there are no levels.
    """

    file: str
    name: str
    values: xr.Variable
    grid: Grid
    grid_dims: tuple[str, ...]
    date_dims: tuple[str, ...]
    dates: Dates
    order: NDArray[np.intp]
    ensemble_dim: str | None
    level_dim: str | None
    names: tuple[str, ...]

    @property
    def ensemble(self) -> int:
        return int(self.values.sizes[self.ensemble_dim]) if self.ensemble_dim else 1

    def stored_chunk(self) -> Extent:
        """What is stored together; 1 where any slice is as cheap."""
        chunk = self.values.encoding.get("preferred_chunks") or {}

        def along(dim: str | None) -> int:
            return min(int(chunk.get(dim, 1)), int(self.values.sizes[dim])) if dim else 1

        dates = along(self.date_dims[0]) if len(self.date_dims) == 1 else 1
        return Extent(dates, along(self.level_dim), along(self.grid_dims[0]))

    def load_extent(self) -> Extent:
        """What to load at a time: one stored chunk, or several small ones."""
        dates, levels, rows = self.stored_chunk()
        row_bytes = self.ensemble * self.grid.cells_per_row * self.values.dtype.itemsize
        rows *= _times(rows, self.grid.rows, dates * levels * rows * row_bytes)
        levels *= _times(levels, len(self.names), dates * levels * rows * row_bytes)
        if len(self.date_dims) == 1:
            dates *= _times(dates, len(self.dates), dates * levels * rows * row_bytes)
        return Extent(dates, levels, rows)

    def load(self, dates: slice, levels: slice | tuple[int, ...], rows: slice) -> NDArray[Any]:
        """[date, level, ensemble, cell of rows]; one date of a part without date dimension."""
        index: dict[str, Any] = {self.grid_dims[0]: rows}
        if self.level_dim:
            index[self.level_dim] = levels if isinstance(levels, slice) else list(levels)
        if len(self.date_dims) == 1:
            index[self.date_dims[0]] = dates
        elif self.date_dims:
            stored = np.unravel_index(self.order[dates.start], [self.values.sizes[dim] for dim in self.date_dims])
            index |= {dim: slice(int(i), int(i) + 1) for dim, i in zip(self.date_dims, stored, strict=True)}
        part = self.values.isel(index)
        order = [*self.date_dims, self.level_dim, self.ensemble_dim, *self.grid_dims]
        values = part.transpose(*(dim for dim in order if dim)).values
        shape = (dates.stop - dates.start, part.sizes[self.level_dim] if self.level_dim else 1, self.ensemble, -1)
        return values.reshape(shape)


def _times(extent: int, most: int, nbytes: int) -> int:
    """How often `extent` may be taken: up to `most`, and up to BYTES_AT_ONCE where once is `nbytes`."""
    return max(1, min(-(-most // extent), BYTES_AT_ONCE // max(nbytes, 1)))


def part_of(array: xr.DataArray, file: str, grids: Grids) -> Part:
    """The roles of all dimensions of a variable; MisfitError where one has none. `grids` collects the grids met."""
    if array.dtype.kind not in "fiub":
        raise MisfitError(f"it holds {array.dtype}, not numbers", "Convert it to numbers with xarray first")
    if array.encoding.get("absent"):
        raise MisfitError(
            f"{array.encoding['absent']} GRIB messages (levels x dates x members) are absent",
            "Fetch them, or split the file by level or date with grib_copy",
        )
    grid, grid_dims = _grid(array, grids)
    date_dims, dates, order = _dates(array)
    if set(date_dims) & set(grid_dims):
        raise MisfitError("its time changes from cell to cell", "Put the observations on a grid first")
    rest = [str(dim) for dim in array.dims if dim not in (*grid_dims, *date_dims)]
    ensemble = next(
        (dim for dim in rest if dim.lower() in ENSEMBLE or _standard_name(array, dim) == "realization"), None
    )
    levels = [dim for dim in rest if dim != ensemble]
    unknown = [dim for dim in levels if not _is_level(array, dim)]
    if unknown or len(levels) > 1:
        raise MisfitError(
            f"its dimensions {', '.join(unknown or levels)} are neither time, ensemble, grid, nor one numeric level",
            "Choose one index along each with xarray's isel, and save the result",
        )
    level = levels[0] if levels else None
    names = _names(array, level)
    return Part(file, str(array.name), array.variable, grid, grid_dims, date_dims, dates, order, ensemble, level, names)


def _standard_name(array: xr.DataArray, coordinate: str) -> str:
    return str(array[coordinate].attrs.get("standard_name", "")) if coordinate in array.coords else ""


def _is_level(array: xr.DataArray, dim: str) -> bool:
    if dim not in array.coords or array[dim].dtype.kind not in "fiu":
        return False
    attributes = array[dim].attrs
    named = LEVEL.fullmatch(dim) or LEVEL.fullmatch(_standard_name(array, dim).removeprefix("air_"))
    vertical = attributes.get("axis") == "Z" or attributes.get("positive") in ("up", "down")
    return bool(named or vertical or attributes.get("units") in PRESSURE)


def _names(array: xr.DataArray, level: str | None) -> tuple[str, ...]:
    """t_850 for a level of several, and for the one pressure level of a file: files of one level each stay apart."""
    if level is None:
        level = next((str(c) for c in array.coords if array[c].ndim == 0 and _is_pressure(array[c])), None)
    if level is None:
        return (str(array.name),)
    scale = PRESSURE.get(str(array[level].attrs.get("units")), 1.0)
    return tuple(f"{array.name}_{value * scale:.6g}" for value in np.atleast_1d(array[level].values).tolist())


def _is_pressure(coordinate: xr.DataArray) -> bool:
    return coordinate.attrs.get("units") in PRESSURE and coordinate.dtype.kind in "fiu"


def _dates(array: xr.DataArray) -> tuple[tuple[str, ...], Dates, NDArray[np.intp]]:
    """(dimensions, dates in order, where each is stored): `valid_time` (cfgrib calls the reference `time`), or time."""
    times = [str(name) for name, c in array.coords.items() if c.dtype.kind == "M" or "calendar" in c.encoding]
    named = [name for name in times if _standard_name(array, name) == "time"]
    axis = [name for name in times if array[name].attrs.get("axis") == "T"]
    called = [name for name in times if TIME.fullmatch(name)]
    name = next((name for name in ("valid_time", *named, *axis, *called) if name in times), None)
    if name is None:
        return (), np.empty(0, "datetime64[s]"), np.empty(0, np.intp)
    time = array[name]
    if time.dtype.kind != "M":
        convert = f"convert_calendar('standard', dim='{name}', align_on='year', use_cftime=False)"
        assign = f"assign_coords({name}=({time.dims}, dates)), with dates of dtype datetime64[ns]"
        raise MisfitError(
            f"its {name} has the calendar {time.encoding['calendar']}",
            f"Convert it with xarray first: ds.{convert if name in array.dims else assign}",
        )
    if bool(np.isnat(time.values).any()):
        raise MisfitError(f"its {name} has gaps (NaT)", f"Drop them with xarray first: ds.dropna('{name}')")
    dates = (np.atleast_1d(time.values).reshape(-1) + np.timedelta64(500, "ms")).astype("datetime64[s]")
    order = np.argsort(dates, kind="stable") if time.ndim > 1 else np.arange(len(dates))
    repeated = dates[order][1:][np.diff(dates[order]) == np.timedelta64(0, "s")]
    if time.ndim > 1 and repeated.size:
        raise MisfitError(
            f"{' x '.join(map(str, time.dims))} reaches {repeated[0]} more than once",
            f"Choose one {time.dims[-1]} for each date with xarray's isel, and save the result",
        )
    return tuple(map(str, time.dims)), dates[order], order


def _grid(array: xr.DataArray, grids: Grids) -> tuple[Grid, tuple[str, ...]]:
    lat, lon = (_coordinate(array, role) for role in ("latitude", "longitude"))
    if not lat.dims or not lon.dims:
        raise MisfitError("its latitude and longitude are single points", "Expand them with xarray's expand_dims first")
    separate = set(lat.dims) != set(lon.dims)
    dims = tuple(map(str, (*lat.dims, *lon.dims) if separate else lat.dims))
    if len(dims) > 2 or len(set(dims)) < len(dims):
        raise MisfitError(
            f"its latitude {lat.dims} and longitude {lon.dims} span more than two dimensions",
            "If the grid does not move, keep one copy of it with xarray's isel",
        )
    lats, lons = _degrees(lat), _degrees(lon if separate else lon.transpose(*dims))
    shape = tuple(array.sizes[dim] for dim in dims)
    key = sha256(repr((separate, shape)).encode() + lats.tobytes() + lons.tobytes()).digest()
    if key not in grids:
        if separate:
            lats, lons = np.repeat(lats, len(lons)), np.tile(lons, len(lats))
        grids[key] = Grid(shape, lats.reshape(-1), lons.reshape(-1))
    return grids[key], dims


def _coordinate(array: xr.DataArray, role: str) -> xr.DataArray:
    coordinates = [str(name) for name in array.coords]
    found = [name for name in coordinates if _standard_name(array, name) == role]
    found += [name for name in coordinates if UNITS[role].fullmatch(str(array[name].attrs.get("units", "")))]
    found += [name for name in coordinates if name.lower() in NAMES[role]]
    if not found:
        raise MisfitError(
            f"it has no {role} among its coordinates ({', '.join(coordinates) or 'none'})",
            "Give it true latitudes and longitudes with xarray's assign_coords, along one or two of its dimensions; "
            "cartopy and pyproj compute them from rotated or projected ones",
        )
    return array[found[0]]


def _degrees(coordinate: xr.DataArray) -> NDArray[np.float64]:
    values = np.asarray(coordinate.values, np.float64)
    return np.rad2deg(values) if str(coordinate.attrs.get("units", "")).startswith("rad") else values
