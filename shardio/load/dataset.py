"""`open_dataset`: one or several anemoi datasets as one array [date, variable, ensemble, cell], read on demand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates, format_step, frequency_seconds, parse_step
from shardio.errors import DatasetError, SelectionError
from shardio.format.boxes import as_cut
from shardio.format.metadata import array_metadata
from shardio.format.store import REMOTE, open_store
from shardio.load.digest import digest_grid
from shardio.load.indexing import expand, outer
from shardio.load.join import Part, join, narrow
from shardio.load.period import When, keep_between, keep_every
from shardio.load.statistics import statistics_of, tendencies_of
from shardio.source.anemoi import AnemoiSource
from shardio.source.order import CELL_ORDER
from shardio.source.source import Extra, Selection
from shardio.write.job import refuse_unfinished

Names = str | Sequence[str] | None


class ReadCostWarning(UserWarning):
    """Reading works, but decodes more than is needed."""


class Dataset:
    """Fields of a dataset, behind an index of dates, variables, members and cells.

    Attributes:
      step: seconds between dates; None for a single date.
      statistics: float64 [variable] by name.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        dates: Dates,
        variables: Sequence[str],
        step: int | None,
        origins: Sequence[AnemoiSource],
        stored_names: Sequence[str],
    ):
        """`origins` have the statistics, under `stored_names`."""
        self.parts, self.dates, self.variables, self.step = tuple(parts), dates, tuple(variables), step
        self._origins, self._stored_names = tuple(origins), tuple(stored_names)
        self.statistics: dict[str, NDArray[np.float64]] = statistics_of(origins, stored_names)
        first = self.parts[0].source
        self.latitudes, self.longitudes = first.latitudes, first.longitudes
        self.shape = (len(dates), len(self.variables), first.layout.shape[2], first.layout.shape[3])
        self.dtype = np.dtype(np.float32)
        gone = np.zeros(len(dates), bool)
        for part in self.parts:
            absent = np.isin(dates, part.source.missing) & (part.rows >= 0)
            gone |= absent
        self.is_missing: NDArray[np.bool_] = gone

    @property
    def attributes(self) -> dict[str, Any]:
        """As stored; those of the first of several datasets."""
        return self.parts[0].source.attributes

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the datasets that it is made of, as they were named."""
        return tuple(dict.fromkeys(part.source.path for part in self.parts))

    @property
    def stored_variables(self) -> int:
        """How many variables a grid-chunk holds, wanted or not."""
        return len(self.parts[0].source.variables)

    @property
    def missing(self) -> set[int]:
        """Indices of the dates that have no data."""
        return set(np.flatnonzero(self.is_missing).tolist())

    @property
    def name_to_index(self) -> dict[str, int]:
        """Place of every variable."""
        return {name: i for i, name in enumerate(self.variables)}

    @property
    def frequency(self) -> str | None:
        """Step between dates: 6h."""
        return None if self.step is None else format_step(self.step)

    @property
    def chunk_cells(self) -> int:
        """Cells of one grid-chunk; of the coarsest part where they differ."""
        return max(part.source.layout.chunks[3] for part in self.parts)

    @property
    def field_shape(self) -> tuple[int, ...]:
        """Shape of a field before its cells were put in one row."""
        return tuple(self.attributes.get("field_shape", (self.shape[3],)))

    @property
    def resolution(self) -> str | None:
        """Name of the grid."""
        return self.attributes.get("resolution")

    @property
    def cell_order(self) -> tuple[Extra, ...]:
        """What has to go along with these cells, so that `rechunk --order native` brings them back; often nothing."""
        return tuple(extra for extra in self.parts[0].source.extras if extra.name == CELL_ORDER)

    @property
    def constants(self) -> tuple[str, ...]:
        """Variables that the dataset says are constant in time."""
        about = self.variables_metadata(self.variables)
        return tuple(name for name in self.variables if about.get(name, {}).get("constant_in_time"))

    def variables_metadata(self, variables: Sequence[str]) -> dict[str, Any]:
        """What the dataset says about those variables, by name."""
        about: dict[str, Any] = {}
        for part in reversed(self.parts):
            about |= part.source.attributes.get("variables_metadata") or {}
        stored = dict(zip(self.variables, self._stored_names, strict=True))
        return {name: about[stored[name]] for name in variables if about.get(stored[name])}

    def statistics_tendencies(self, delta: str | None = None) -> dict[str, NDArray[np.float64]]:
        """Statistics of the change over `delta` (default: the frequency), float64 [variable] by name.

        SelectionError where the dataset has none for exactly that time, be it written as 24h or as 1d.
        """
        return tendencies_of(self._origins, self._stored_names, parse_step(delta or str(self.frequency)))

    @cached_property
    def grid_digest(self) -> str:
        """Of the places of all cells, in any order: found once, as it sorts the grid."""
        return digest_grid(self.latitudes, self.longitudes)

    def __len__(self) -> int:
        return len(self.dates)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """NumPy semantics along all four axes; only the chunks that hold the answer are read."""
        wanted, dots = expand(index, len(self.shape))
        cuts, inner = zip(*(outer(item, n) for item, n in zip(wanted, self.shape, strict=True)), strict=True)
        self.check_present(cuts[0])
        values = np.empty(tuple(len(cut) for cut in cuts), np.float32)
        if values.size:
            self._read(cuts, values)
        picked = inner if dots is None else (*inner[:dots], Ellipsis, *inner[dots:])
        answer: NDArray[np.float32] = values[picked]
        return answer

    def check_present(self, dates: Sequence[int]) -> None:
        """DatasetError that names the first of `dates` without data."""
        gone = [i for i in dates if self.is_missing[i]]
        if gone:
            raise DatasetError(
                f"date {self.dates[gone[0]]} (index {gone[0]}) is missing in the dataset. "
                "Leave it out: `dataset.missing` lists all such indices."
            )

    def _read(self, cuts: Sequence[Sequence[int]], out: NDArray[np.float32]) -> None:
        dates, variables, members, cells = cuts
        for part in self.parts:
            stored_at = dict(zip(part.places, part.stored, strict=True))
            own = [i for i, variable in enumerate(variables) if variable in stored_at]
            stored = tuple(stored_at[variables[i]] for i in own)
            here = [i for i, date in enumerate(dates) if part.rows[date] >= 0]
            if not own or not here:
                continue
            rows = tuple(int(part.rows[dates[i]]) for i in here)
            box = (as_cut(rows), as_cut(stored), _cut(members), _cut(cells))
            if len(here) == len(dates) and len(own) == len(variables):
                part.source.reader.read(box, out)
                continue
            values = np.empty((len(rows), len(stored), len(members), len(cells)), np.float32)
            part.source.reader.read(box, values)
            out[np.ix_(here, own)] = values

    def __repr__(self) -> str:
        dates, variables, members, cells = self.shape
        return (
            f"Dataset({dates} dates {self.dates[0]} to {self.dates[-1]}, {variables} variables, {members} members, "
            f"{cells} cells in chunks of {self.chunk_cells})"
        )


def open_dataset(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    start: When = None,
    end: When = None,
    frequency: str | None = None,
    select: Names = None,
    drop: Names = None,
    rename: Mapping[str, str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Open a dataset that `shardio rechunk` or anemoi-datasets made.

    Args:
      paths: one path or address (`s3://`, `gs://`, `http://`), or several: joined by variables where their dates are
        the same, concatenated in time where their variables are.
      start, end: first and last date, both included: 2020, "2020-03", "2020-03-01", "2020-03-01T06:00", or a date,
        datetime or datetime64.
      frequency: a coarser step, "24h", counted from the first date.
      select, drop: stored names of variables to keep (in this order) or to leave out.
      rename: new names by stored names.
      statistics: take the statistics, also those of tendencies, of another dataset.
    Raises: DatasetError where there is no such dataset, or it is incomplete or damaged; SelectionError where what is
      selected is not in it.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not several:
        raise SelectionError("no dataset is named. Give one path, or a list of paths.")
    sources = [_open(os.fspath(path)) for path in several]
    for source in sources:
        _tell_cost(source)
    joined = join(sources)
    names, dates = joined.variables, joined.dates
    chosen = Selection(select=_names(select), drop=_names(drop)).variables(names, joined.where)
    kept = keep_every(frequency, dates, keep_between(dates, start, end, joined.where))
    new_names = _renamed([names[i] for i in chosen], rename or {})
    parts = [part for old in joined.parts if (part := narrow(old, kept, chosen)) is not None]
    origins = sources if statistics is None else [_open(os.fspath(statistics))]
    step = frequency_seconds(dates) if frequency is None else parse_step(frequency)
    return Dataset(parts, dates[kept], new_names, step, origins, [names[i] for i in chosen])


def _open(path: str) -> AnemoiSource:
    if not path.startswith(REMOTE):
        refuse_unfinished(Path(path))
        if not Path(path).exists():
            raise DatasetError(f"{path} does not exist. Check the path.")
    store = open_store(path)
    if array_metadata(store, "data") is None:
        raise DatasetError(f"{path} is not an anemoi dataset: it has no array `data`. Make one with shardio rechunk.")
    source = AnemoiSource(store, Selection(), fill_absent=False)
    about = source.attributes.get("shardio")
    if about is not None and not about.get("complete"):
        raise DatasetError(f"{path} is incomplete. Make it again with: shardio rechunk --overwrite.")
    return source


def _tell_cost(source: AnemoiSource) -> None:
    layout = source.layout
    dates, _, _, cells = layout.chunks
    if dates > 1 or (cells >= layout.shape[3] > 1 and "shardio" not in source.attributes):
        what = f"{dates} dates" if dates > 1 else "a whole date"
        warnings.warn(
            f"{source.path} stores {what} in one chunk: reading any shard of a date decodes all of it. "
            f"shardio rechunk {source.path} OUT.zarr --grid-chunks 16 makes shards cheap.",
            ReadCostWarning,
            stacklevel=3,
        )


def _renamed(names: list[str], rename: Mapping[str, str]) -> list[str]:
    unknown = sorted(set(rename) - set(names))
    if unknown:
        raise SelectionError(f"rename names {', '.join(unknown)}, which is not selected. Selected: {', '.join(names)}.")
    new = [rename.get(name, name) for name in names]
    twice = sorted({name for name in new if new.count(name) > 1})
    if twice:
        raise SelectionError(f"after rename several variables are called {', '.join(twice)}. Choose other names.")
    return new


def _cut(indices: Sequence[int]) -> slice | tuple[int, ...]:
    """As `as_cut`, without a list of all cells where a whole range is wanted."""
    if isinstance(indices, range) and indices.step == 1:
        return slice(indices.start, indices.stop)
    return as_cut(tuple(indices))


def _names(names: Names) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)
