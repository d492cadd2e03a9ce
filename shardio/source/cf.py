"""Sources that xarray opens: NetCDF, CF Zarr (WeatherBench2, ARCO-ERA5), GRIB through cfgrib; one file or many.

    files --cf_fields--> fields --choose dates and variables--> CFSource --read--> [date, variable, ensemble, cell]

variable x level -> `t_850`, latitude x longitude (or an unstructured or curvilinear grid) -> cell,
`number` or `realization` -> ensemble, `valid_time` or `time` -> date.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardio.dates import between
from shardio.errors import ChunkError
from shardio.format.boxes import as_cut
from shardio.format.reader import cast
from shardio.format.store import LocalStore
from shardio.format.threads import for_each
from shardio.source.cf_fields import choose, join, open_files, positions
from shardio.source.cf_roles import Grid, Part
from shardio.source.extent import SourceExtent
from shardio.source.source import Json, Selection, Source, tell_times

if TYPE_CHECKING:
    import xarray as xr

ONE_AT_A_TIME = threading.Lock()  # HDF5 and ecCodes serve one thread of a process
KEPT_OF_VARIABLE = ("units", "long_name", "standard_name")
KEPT_OF_FILE = ("title", "institution", "source", "Conventions")


@dataclass(frozen=True, eq=False)
class Box:
    """One load: some dates, levels and rows of a part, and where its dates and levels go in the output."""

    part: Part
    dates: slice
    levels: tuple[int, ...]
    rows: slice
    to_dates: slice
    to_variables: tuple[int, ...]


class CFSource(Source):
    """Fields on cells out of one file, a glob of files, or a CF Zarr."""

    def __init__(self, path: str, selection: Selection):
        self.path = path
        self._files = tuple(sorted(glob.glob(path))) if any(c in path for c in "*?[") else (path,)
        # Zarr decodes on many threads at once.
        self._parallel = all(Path(file).is_dir() for file in self._files)
        self._datasets = datasets = open_files(path, self._files)
        try:
            self._take(datasets, selection)
        except BaseException:
            self.close()
            raise

    def _take(self, datasets: list[tuple[str, xr.Dataset]], selection: Selection) -> None:
        """Choose what is wanted of everything there is."""
        path = self.path
        found = [(file, array) for file, ds in datasets for array in ds.data_vars.values()]
        self._fields = join(choose(found, selection, path), selection, path)
        dropped = {str(array.name) for _, array in found} & set(selection.drop)
        self._places = positions(selection, self._fields, dropped, path)
        names = [name for field in self._fields for name in field.names]
        self.variables = tuple(names[i] for i in self._places)
        self.grid = self._fields[0].grid
        self.latitudes, self.longitudes = self.grid.latitudes, self.grid.longitudes
        every_date = next(field.dates for field in self._fields if not field.constant)
        self._selected = between(every_date, selection.start, selection.end, path)
        self.dates = every_date[self._selected.start : self._selected.stop]
        self.attributes = self._attributes(datasets[0][1].attrs)
        self.extent = self._extent(len(every_date))

    def fingerprint(self) -> str:
        digest = sha256(repr((self.variables, self.grid.shape)).encode())
        for values in (self.dates, self.latitudes, self.longitudes):
            digest.update(values.tobytes())
        for file in self._files:
            sizes = LocalStore(file).sizes() if Path(file).is_dir() else Path(file).stat().st_size
            digest.update(repr((Path(file).name, sizes)).encode())
        return digest.hexdigest()

    def changed(self) -> str:
        times: dict[str, int] = {}
        for file in map(Path, self._files):
            inside = LocalStore(file).times() if file.is_dir() else {"": file.stat().st_mtime_ns}
            times |= {f"{file.name}/{name}": when for name, when in inside.items()}
        return tell_times(times)

    def close(self) -> None:
        # Not left to the garbage collector, which would close them in any thread, and crash HDF5.
        with nullcontext() if self._parallel else ONE_AT_A_TIME:
            for _, ds in self._datasets:
                ds.close()

    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        boxes = self._boxes(dates, cells)
        for_each(lambda box: self._read_box(box, cells, out), boxes, pool if self._parallel else None)

    def _boxes(self, dates: slice, cells: slice) -> Iterator[Box]:
        """What to load, cut along stored chunks, so that each thread holds one load at a time."""
        first = self._selected.start
        width = self.grid.cells_per_row
        rows = slice(cells.start // width, -(-cells.stop // width))
        to = {place: at for at, place in enumerate(self._places)}
        offset = 0
        for field in self._fields:
            wanted = [level for level in range(len(field.names)) if offset + level in to]
            for part, stored, place in field.between(first + dates.start, first + dates.stop):
                extent = part.load_extent()
                for some in _aligned(stored, extent.dates):
                    begin = place.start + some.start - stored.start
                    to_dates = place if field.constant else slice(begin, begin + some.stop - some.start)
                    for levels in _together(wanted, extent.levels):
                        to_variables = tuple(to[offset + level] for level in levels)
                        for strip in _aligned(rows, extent.rows):
                            yield Box(part, some, levels, strip, to_dates, to_variables)
            offset += len(field.names)

    def _read_box(self, box: Box, cells: slice, out: NDArray[np.float32]) -> None:
        where = f"{box.part.file}: {box.part.name}"
        try:
            with nullcontext() if self._parallel else ONE_AT_A_TIME:
                values = box.part.load(box.dates, as_cut(box.levels), box.rows)
        except Exception as error:  # every backend of xarray has its own errors
            raise ChunkError(
                f"{where} cannot be read ({type(error).__name__}: {error}). The file is damaged or was changed: "
                "copy it again from its source."
            ) from error
        width = self.grid.cells_per_row
        start, stop = max(box.rows.start * width, cells.start), min(box.rows.stop * width, cells.stop)
        kept = slice(start - box.rows.start * width, stop - box.rows.start * width)
        to_cells = slice(start - cells.start, stop - cells.start)
        for level, variable in enumerate(box.to_variables):
            cast(values[:, level, :, kept], out, (box.to_dates, variable, slice(None), to_cells), where)

    def _extent(self, dates: int) -> SourceExtent:
        members = max(field.ensemble for field in self._fields)
        names = sum(len(field.names) for field in self._fields)
        stored = [part.stored_chunk() for field in self._fields for part in field.parts]
        span, levels, rows = (max(extents) for extents in zip(*stored, strict=True))
        itemsize = max(field.parts[0].values.dtype.itemsize for field in self._fields)
        return SourceExtent(
            (dates, names, members, len(self.latitudes)),
            (min(span, dates), levels, members, rows * self.grid.cells_per_row),
            itemsize,
            self._selected,
            self._places,
            one_at_a_time=True,
        )

    def _attributes(self, attributes: Json) -> Json:
        metadata: Json = {}
        for field in self._fields:
            described = field.parts[0].values.attrs
            about: Json = {key: str(described[key]) for key in KEPT_OF_VARIABLE if key in described}
            if field.constant:
                about["constant_in_time"] = True
            for name in field.names:
                level = name.removeprefix(field.name).removeprefix("_")
                mars = {"param": field.name} | ({"levelist": _number(level)} if level else {})
                metadata[name] = {"mars": mars, **about}
        return {
            "description": f"made by shardio from {Path(self.path).name}",
            "source_attributes": {key: str(attributes[key]) for key in KEPT_OF_FILE if key in attributes},
            "variables_metadata": {name: metadata[name] for name in self.variables},
            "field_shape": list(self.grid.shape),
            "resolution": _resolution(self.grid),
            "flatten_grid": True,
            "ensemble_dimension": 2,
        }


def _aligned(cut: slice, step: int) -> Iterator[slice]:
    """`cut` at the multiples of `step`."""
    edges = [cut.start, *range((cut.start // step + 1) * step, cut.stop, step), cut.stop]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _together(levels: list[int], step: int) -> Iterator[tuple[int, ...]]:
    """Levels that are loaded together."""
    return (tuple(group) for _, group in groupby(levels, lambda level: level // step))


def _number(level: str) -> int | float:
    value = float(level)
    return int(value) if value.is_integer() else value


def _resolution(grid: Grid) -> str:
    """Degrees between the rows of a regular grid, else the number of cells."""
    if len(grid.shape) == 2 and grid.rows > 1:
        columns = grid.latitudes.reshape(grid.shape)
        if (columns == columns[:, :1]).all():
            return f"{abs(float(columns[1, 0] - columns[0, 0])):g}"
    return f"{len(grid.latitudes)} cells"
