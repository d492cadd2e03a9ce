"""Open files with xarray, keep the variables asked for, and join what the files hold into fields over all dates.

files --open_files--> (file, variable) --choose--> --join--> Field: parts, one after the other in time
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardio.dates import Dates, check_increasing
from shardio.errors import DatasetError, SelectionError
from shardio.source.cf_roles import Grid, Grids, Misfit, MisfitError, Part, part_of
from shardio.source.source import Selection

if TYPE_CHECKING:
    import xarray as xr

GRIB_SUFFIXES = (".grib", ".grib1", ".grib2", ".grb", ".grb1", ".grb2")
# A variable, and the file it is in.
Found = tuple[str, "xr.DataArray"]
NO_DATES: Dates = np.empty(0, "datetime64[s]")


@dataclass(frozen=True, eq=False)
class Field:
    """A variable over all dates: the parts that the files hold, one after the other; no dates where constant."""

    parts: tuple[Part, ...]
    dates: Dates

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return self.parts[0].names

    @property
    def grid(self) -> Grid:
        return self.parts[0].grid

    @property
    def ensemble(self) -> int:
        return self.parts[0].ensemble

    @property
    def constant(self) -> bool:
        return len(self.dates) == 0

    @property
    def undated(self) -> bool:
        """One part without date dimension: a constant, or a single date."""
        return len(self.parts) == 1 and not self.parts[0].date_dims

    def between(self, start: int, stop: int) -> Iterator[tuple[Part, slice, slice]]:
        """(part, its dates, where they go) for each part that holds some of the dates `[start, stop)`."""
        if self.constant:
            yield self.parts[0], slice(0, 1), slice(0, stop - start)
            return
        first = 0
        for part in self.parts:
            a, b = max(start, first), min(stop, first + len(part.dates))
            if a < b:
                yield part, slice(a - first, b - first), slice(a - start, b - start)
            first += len(part.dates)


def open_files(path: str, files: Sequence[str]) -> list[tuple[str, xr.Dataset]]:
    """Everything that xarray finds in the files, nothing of it loaded; DatasetError where it cannot."""
    if not files:
        raise DatasetError(f"no file matches {path}. Check the pattern.")
    opened = []
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a backend warns of, its user did not ask for
                opened += [(file, ds) for ds in (_open_grib(file) if _is_grib(file) else [_open(file)])]
        except DatasetError:
            raise
        except Exception as error:  # every backend of xarray has its own errors
            reason = str(error).strip().split("\n")[0].split(". ")[0] or "no reason given"
            raise DatasetError(
                f"{file} cannot be opened: it is no anemoi dataset, and xarray says: {type(error).__name__}: {reason}. "
                "Name a NetCDF, GRIB or Zarr file; if it is one, it is damaged: copy it again from its source."
            ) from error
    return opened


def _open(file: str) -> xr.Dataset:
    import xarray as xr

    # chunks=None: without dask, which the runner already uses around us.
    options: dict[str, Any] = {"chunks": None, "decode_coords": "all", "decode_timedelta": False}
    if not Path(file).is_dir():
        return xr.open_dataset(file, **options)
    zarr = xr.open_dataset(file, engine="zarr", **options)
    return zarr[sorted(map(str, zarr.data_vars))]  # Zarr lists its arrays in any order, another each time


def _is_grib(file: str) -> bool:
    if not Path(file).is_file():
        return False
    with open(file, "rb") as opened:
        return opened.read(4) == b"GRIB" or file.lower().endswith(GRIB_SUFFIXES)


def _open_grib(file: str) -> list[xr.Dataset]:
    try:
        from cfgrib.xarray_store import open_variable_datasets  # unmerged: join() does that
    except (ImportError, RuntimeError) as error:  # RuntimeError: the ecCodes library is not found
        raise DatasetError(f'{file} is GRIB, which needs cfgrib ({error}). Use: pip install "shardio[grib]"') from error
    # No index file: it would be written beside the user's data.
    datasets = open_variable_datasets(file, backend_kwargs={"indexpath": "", "errors": "raise"})
    for array in [array for ds in datasets for array in ds.data_vars.values()]:
        # A GRIB message is one field, always decoded whole.
        grid = {"latitude", "longitude", "y", "x", "values"} & {str(dim) for dim in array.dims}
        array.encoding |= {"preferred_chunks": {dim: array.sizes[dim] for dim in grid}, "absent": _absent(array)}
    return list(datasets)


def _absent(array: xr.DataArray) -> str:
    """Which messages the hypercube of a variable lacks: cfgrib would fill them with NaN, and say nothing."""
    stored: Any = array.variable._data
    while not hasattr(stored, "field_id_index"):  # xarray wraps the array of cfgrib several times
        stored = stored.array
    wanted = math.prod(stored.shape[: -stored.geo_ndim])
    absent = wanted - len(stored.field_id_index)
    return f"{absent} of {wanted}" if absent else ""


def choose(found: list[Found], selection: Selection, path: str) -> list[Found]:
    """Variables that a selection can mean; a name may be that of a variable (t) or of one of its levels (t_850).

    Raises: SelectionError where a name is unknown, or none is left.
    """
    names = list(dict.fromkeys(str(array.name) for _, array in found))

    def find_meant(choice: str) -> set[str]:
        return {choice} if choice in names else {name for name in names if choice.startswith(f"{name}_")}

    unknown = [choice for choice in (*selection.select, *selection.drop) if not find_meant(choice)]
    if unknown:
        raise SelectionError(f"{path} has no variable {', '.join(unknown)}. It has: {', '.join(names) or 'none'}.")
    selected = {name for choice in selection.select for name in find_meant(choice)} or set(names)
    kept = [(file, array) for file, array in found if array.name in selected and array.name not in selection.drop]
    if not kept:
        raise SelectionError(f"no variable of {path} is left. Drop fewer of: {', '.join(names)}.")
    return kept


def positions(selection: Selection, fields: Sequence[Field], dropped: set[str], path: str) -> tuple[int, ...]:
    """Places of the selected names among those of all fields; the name of a variable means all its levels.

    Raises: DatasetError where two variables have one name; SelectionError.
    """
    names = [name for field in fields for name in field.names]
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise DatasetError(
            f"{path} has several variables called {', '.join(repeated)}. Rename one with xarray and save the result, "
            f"or use --drop {','.join(repeated)}."
        )
    levels: dict[str, tuple[str, ...]] = {}
    for field in fields:
        levels[field.name] = levels.get(field.name, ()) + field.names
    select = tuple(name for choice in selection.select for name in levels.get(choice, (choice,)))
    drop = tuple(name for choice in selection.drop if choice not in dropped for name in levels.get(choice, (choice,)))
    return replace(selection, select=select, drop=drop).variables(names, path)


def join(found: list[Found], selection: Selection, path: str) -> list[Field]:
    """Fields of one grid, one ensemble and one series of dates; one error names all variables that do not fit.

    Raises: SelectionError, which names all variables that do not fit; DatasetError where nothing has a time.
    """
    parts: dict[tuple[str, ...], list[Part]] = {}
    misfits: dict[str, Misfit] = {}
    grids: Grids = {}
    for file, array in found:
        try:
            part = part_of(array, file, grids)
            parts.setdefault(part.names, []).append(part)
        except MisfitError as misfit:
            misfits[str(array.name)] = misfit.what
    fields = []
    for same in parts.values():
        try:
            fields.append(_field(same))
        except MisfitError as misfit:
            misfits[same[0].name] = misfit.what
    fields = _with_common(fields, misfits)
    if misfits:
        raise SelectionError(_explain(misfits, [field.name for field in fields], selection, path))
    if all(field.constant for field in fields):
        raise DatasetError(
            f"{path} has no time coordinate. Add one with xarray first: "
            "ds.expand_dims(time=[np.datetime64('2020-01-01', 'ns')]).to_netcdf('new.nc')"
        )
    return fields


def _field(parts: list[Part]) -> Field:
    """Parts of the same name in the order of their dates."""
    first = parts[0]
    for part in parts:
        if part.grid is not first.grid:
            raise MisfitError(
                f"its grid is {first.grid} in {first.file}, another ({part.grid}) in {part.file}",
                "Convert each grid on its own",
            )
        if part.ensemble != first.ensemble:
            raise MisfitError(
                f"it has {first.ensemble} ensemble members in {first.file}, {part.ensemble} in {part.file}",
                "Convert each on its own",
            )
        if (len(part.dates) == 0) != (len(first.dates) == 0):
            raise MisfitError(f"of {first.file} and {part.file} only one has a time", "Add it where it is absent")
        if len(part.dates) == 0 and not _equal(part, first):
            raise MisfitError(f"it has no time, and differs between {first.file} and {part.file}", "Keep one of them")
    if len(first.dates) == 0:
        return Field((first,), NO_DATES)
    parts = sorted(parts, key=lambda part: part.dates[0])
    for before, after in pairwise(parts):
        if after.dates.min() <= before.dates.max():
            raise MisfitError(
                f"{before.file} and {after.file} both hold it on {after.dates[0]}, and it cannot be both",
                "Name files that do not overlap, and variables that differ",
            )
    check_increasing(dates := np.concatenate([part.dates for part in parts]), f"{first.file}: {first.name}")
    return Field(tuple(parts), dates)


def _equal(one: Part, other: Part) -> bool:
    return one is other or np.array_equal(one.values.values, other.values.values, equal_nan=True)


def _with_common(fields: list[Field], misfits: dict[str, Misfit]) -> list[Field]:
    """The fields that share the grid, ensemble and dates most of them have; the rest are misfits."""
    if not fields:
        return []
    grid = Counter(field.grid for field in fields).most_common(1)[0][0]
    members = max(field.ensemble for field in fields if field.grid is grid)
    dated = [field for field in fields if not field.constant and not field.undated] or fields
    series = Counter(field.dates.tobytes() for field in dated if not field.constant)
    common = max(series, key=lambda dates: (series[dates], len(dates)), default=b"")
    dates = np.frombuffer(common, "datetime64[s]")
    kept = []
    for field in fields:
        if field.undated and field.dates.tobytes() != common:
            field = Field(field.parts, NO_DATES)  # a time that dates nothing: orography in a forecast
        if field.grid is not grid:
            why = f"its grid is {field.grid}, that of others {grid}"
        elif field.ensemble not in (1, members):
            why = f"it has {field.ensemble} ensemble members, others have {members}"
        elif not field.constant and field.dates.tobytes() != common:
            why = f"its dates are {_series(field.dates)}, those of others {_series(dates)}"
        else:
            kept.append(field)
            continue
        misfits[field.name] = Misfit(why, "Convert each on its own")
    return [field for field in kept if field.name not in misfits]


def _series(dates: Dates) -> str:
    return f"{len(dates)} from {dates[0]} to {dates[-1]}"


def _explain(misfits: dict[str, Misfit], fitting: list[str], selection: Selection, path: str) -> str:
    reasons: dict[str, list[str]] = {}
    for name, misfit in misfits.items():
        reasons.setdefault(misfit.why, []).append(name)
    detail = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    remedy = next(iter(misfits.values())).remedy
    if fitting:
        drop = ",".join([*selection.drop, *misfits])
        remedy = f"Use --drop {drop}, or --select {','.join(dict.fromkeys(fitting))}"
    return f"{path}: these variables do not fit: {detail}. {remedy}."
