"""A dataset as one CF NetCDF file, written date by date: one date is in memory, however long the forecast."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
from numpy.typing import NDArray

from shardio import Dataset, atomic, open_dataset
from shardio.errors import OutputError

CONVENTIONS = "CF-1.8"
OWN = ("latitude", "longitude", "cell", "realization", "time", "forecast_reference_time", "forecast_period")
EPOCH = np.datetime64("1970-01-01", "s")


def refuse_own_names(variables: Iterable[str]) -> None:
    """OutputError where a variable is called as a dimension or coordinate of the files."""
    own = [name for name in variables if name in OWN]
    if own:
        raise OutputError(
            f"{', '.join(own)} cannot be written as NetCDF, where that is the name of a coordinate. Leave it out with "
            "--variables, or leave out --netcdf."
        )


def export(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> bool:
    """Write a dataset as NetCDF; false where that very file is there already.

    A field that was latitude x longitude before its cells were put in one row is so again; others keep one dimension,
    `cell`, with latitude and longitude of each. Values are those of the dataset, bit for bit.

    Args:
      source: path of a dataset, such as a forecast.
      path: of the file.
      overwrite: replace a file that is there.
      report: told after every date.
    Raises: OutputError if another file is there, or it cannot be written, or a variable is called as a coordinate.
    """
    dataset, target = open_dataset(source), Path(path)
    refuse_own_names(dataset.variables)
    identity = json.dumps(dataset.attributes.get("shardio", {}), sort_keys=True)
    origin = sha256(identity.encode()).hexdigest()
    if target.exists() and not overwrite:
        if _origin_of(target) == origin:
            return False
        raise OutputError(f"{target} exists and is something else. Use --overwrite to replace it, or move it.")
    try:
        with atomic(target) as partial, netCDF4.Dataset(partial, "w", format="NETCDF4") as file:
            _write(file, dataset, origin, report)
    except (OSError, RuntimeError) as error:  # netCDF4 reports a full disk as RuntimeError, and does not say so
        raise OutputError(
            f"{target} cannot be written: {error}. See that its folder is there, may be written, and has space, then "
            "run it again."
        ) from error
    return True


def _write(file: Any, dataset: Dataset, origin: str, report: Callable[[int, int], None]) -> None:
    about = dataset.attributes
    file.setncatts({"Conventions": CONVENTIONS, "title": about.get("description", ""), "source_digest": origin})
    file.setncatts({key: value for key, value in about.get("forecast", {}).items() if isinstance(value, str)})
    horizontal, shape, coordinates = _write_places(file, dataset)
    members = dataset.shape[2]
    time, of_forecast = _write_times(file, dataset, about.get("forecast", {}).get("initial_date"))
    if members > 1:
        file.createDimension("realization", members)
        number = file.createVariable("realization", "i4", ("realization",))
        number.setncatts({"standard_name": "realization", "units": "1"})
        number[:] = np.arange(members)
    front = ("time", "realization") if members > 1 else ("time",)
    chunks = (1,) * len(front) + shape
    variables = []
    for name in dataset.variables:
        made = file.createVariable(
            name, "f4", (*front, *horizontal), fill_value=np.float32(np.nan), zlib=True, complevel=1, chunksizes=chunks
        )
        made.setncatts(_attributes(dataset, name))
        if coordinates or of_forecast:
            made.coordinates = f"{coordinates} {of_forecast}".strip()
        variables.append(made)
    for date in range(len(dataset)):
        time[date] = (dataset.dates[date] - EPOCH).astype(np.int64)
        fields = np.full((len(variables), members, *shape), np.nan, np.float32)
        if not dataset.is_missing[date]:
            fields = dataset[date].reshape(fields.shape)
        for made, field in zip(variables, fields, strict=True):
            made[date] = field if members > 1 else field[0]
        report(date + 1, len(dataset))


def _write_places(file: Any, dataset: Dataset) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Names and sizes of the horizontal dimensions, and the coordinates that are no dimensions."""
    axes = _axes(dataset)
    if axes is None:
        file.createDimension("cell", dataset.shape[3])
        dimensions = {"latitude": ("cell", dataset.latitudes), "longitude": ("cell", dataset.longitudes)}
    else:
        file.createDimension("latitude", len(axes[0]))
        file.createDimension("longitude", len(axes[1]))
        dimensions = {"latitude": ("latitude", axes[0]), "longitude": ("longitude", axes[1])}
    for name, (dimension, values) in dimensions.items():
        made = file.createVariable(name, "f8", (dimension,))
        made.setncatts({"standard_name": name, "units": "degrees_north" if name == "latitude" else "degrees_east"})
        made[:] = values
    if axes is None:
        return ("cell",), (dataset.shape[3],), "latitude longitude"
    return ("latitude", "longitude"), (len(axes[0]), len(axes[1])), ""


def _axes(dataset: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Latitudes of the rows and longitudes of the columns; None where the cells are no such table."""
    shape = dataset.field_shape
    if len(shape) != 2 or shape[0] * shape[1] != dataset.shape[3]:
        return None
    latitudes, longitudes = (values.reshape(shape) for values in (dataset.latitudes, dataset.longitudes))
    if np.array_equal(latitudes, latitudes[:, :1].repeat(shape[1], 1)) and np.array_equal(
        longitudes, longitudes[:1].repeat(shape[0], 0)
    ):
        return latitudes[:, 0], longitudes[0]
    return None


def _write_times(file: Any, dataset: Dataset, initial: str | None) -> tuple[Any, str]:
    """The variable of the valid times, to be filled, and the coordinates of a forecast: initial date and lead times."""
    file.createDimension("time", None)
    time = file.createVariable("time", "i8", ("time",))
    units = {"units": "seconds since 1970-01-01 00:00:00", "calendar": "standard"}
    time.setncatts({"standard_name": "time", **units})
    if initial is None:
        return time, ""
    began = np.datetime64(initial, "s")
    start = file.createVariable("forecast_reference_time", "i8")
    start.setncatts({"standard_name": start.name, **units})
    start[...] = (began - EPOCH).astype(np.int64)
    period = file.createVariable("forecast_period", "f8", ("time",))
    period.setncatts({"standard_name": period.name, "units": "hours"})
    period[:] = (dataset.dates - began) / np.timedelta64(1, "h")
    return time, f"{start.name} {period.name}"


def _attributes(dataset: Dataset, name: str) -> dict[str, str]:
    """What the dataset says of a variable, as far as CF has a place for it."""
    about = dataset.variables_metadata([name]).get(name, {})
    return {key: str(about[key]) for key in ("units", "long_name", "standard_name", "cell_methods") if about.get(key)}


def _origin_of(path: Path) -> str | None:
    try:
        with netCDF4.Dataset(path) as file:
            whole = getattr(file, "shardio_origin", None)  # of files written before there was a digest
            origin: str | None = getattr(file, "source_digest", None)
            return sha256(whole.encode()).hexdigest() if whole else origin
    except (OSError, RuntimeError):
        return None
