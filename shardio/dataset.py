"""`open_dataset`: one or several anemoi datasets as one array [date, variable, ensemble, cell], read on demand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates, between, format_step, frequency, frequency_seconds, parse_step
from shardio.errors import DatasetError, SelectionError
from shardio.job import refuse_unfinished
from shardio.source import AnemoiSource, Selection, array_metadata, as_cut
from shardio.statistics import NAMES
from shardio.store import REMOTE, open_store

Names = str | Sequence[str] | None


class ReadCostWarning(UserWarning):
    """Reading works, but decodes more than is needed."""


@dataclass(frozen=True)
class Part:
    """One stored dataset within the whole.

    Attributes:
      rows: int64 [date], stored row of every date of the whole; -1 where this part has none.
      places: the places that its variables take in the whole.
      stored: where the source stores these variables.
    """

    source: AnemoiSource
    rows: NDArray[np.int64]
    places: tuple[int, ...]
    stored: tuple[int, ...]


class Dataset:
    """Fields of a dataset, behind an index of dates, variables, members and cells."""

    def __init__(self, parts: Sequence[Part], dates: Dates, variables: Sequence[str], statistics: Mapping[str, Any]):
        self.parts, self.dates, self.variables = tuple(parts), dates, tuple(variables)
        self.statistics: dict[str, NDArray[np.float64]] = dict(statistics)
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
        return frequency(self.dates)

    @property
    def chunk_cells(self) -> int:
        """Cells of one grid-chunk; of the coarsest part where they differ."""
        return max(part.source.layout.chunks[3] for part in self.parts)

    @property
    def field_shape(self) -> tuple[int, ...]:
        """Shape of a field before its cells were put in one row."""
        return tuple(self.parts[0].source.attributes.get("field_shape", (self.shape[3],)))

    @property
    def resolution(self) -> str | None:
        """Name of the grid."""
        return self.parts[0].source.attributes.get("resolution")

    def statistics_tendencies(self, delta: str | None = None) -> dict[str, NDArray[np.float64]]:
        """Statistics of the change over `delta` (default: the frequency), float64 [variable] by name."""
        prefix = f"statistics_tendencies_{delta or self.frequency}_"
        found = {}
        for name in NAMES:
            found[name] = np.full(self.shape[1], np.nan)
            for part in self._joined:
                found[name][list(part.places)] = _extra(part.source, prefix + name)[list(part.stored)]
        return found

    def __len__(self) -> int:
        return len(self.dates)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """NumPy semantics along all four axes; only the chunks that hold the answer are read."""
        wanted = _expand(index, len(self.shape))
        cuts, inner = zip(*(_outer(item, n) for item, n in zip(wanted, self.shape, strict=True)), strict=True)
        self.check_present(cuts[0])
        values = np.empty(tuple(len(cut) for cut in cuts), np.float32)
        if values.size:
            self._read(cuts, values)
        answer: NDArray[np.float32] = values[inner]
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
            box = (as_cut(rows), as_cut(stored), as_cut(tuple(members)), as_cut(tuple(cells)))
            values = np.empty((len(rows), len(stored), len(members), len(cells)), np.float32)
            part.source.reader.read(box, values)
            out[np.ix_(here, own)] = values

    @cached_property
    def _joined(self) -> list[Part]:
        """One part for each set of variables."""
        return list({part.places: part for part in self.parts}.values())

    def __repr__(self) -> str:
        dates, variables, members, cells = self.shape
        return (
            f"Dataset({dates} dates {self.dates[0]} to {self.dates[-1]}, {variables} variables, {members} members, "
            f"{cells} cells in chunks of {self.chunk_cells})"
        )


def open_dataset(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    start: str | int | None = None,
    end: str | int | None = None,
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
      start, end: first and last date, both included: 2020, "2020-03", "2020-03-01", "2020-03-01T06:00".
      frequency: a coarser step, "24h", counted from the first date.
      select, drop: stored names of variables to keep (in this order) or to leave out.
      rename: new names by stored names.
      statistics: take the statistics of another dataset.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not several:
        raise SelectionError("no dataset is named. Give one path, or a list of paths.")
    sources = [_open(os.fspath(path)) for path in several]
    joined = _join(sources)
    names, dates = joined.variables, joined.dates
    chosen = Selection(select=_names(select), drop=_names(drop)).variables(names, joined.where)
    kept = _every(frequency, dates, _between(dates, start, end, joined.where))
    new_names = _renamed([names[i] for i in chosen], rename or {})
    parts = [part for old in joined.parts if (part := _narrow(old, kept, chosen)) is not None]
    origins = sources if statistics is None else [_open(os.fspath(statistics))]
    return Dataset(parts, dates[kept], new_names, _statistics(origins, [names[i] for i in chosen]))


@dataclass(frozen=True)
class Joined:
    """Several sources side by side, before anything is selected."""

    where: str
    parts: tuple[Part, ...]
    dates: Dates
    variables: tuple[str, ...]


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
    _tell_cost(source)
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
            stacklevel=4,
        )


def _join(sources: Sequence[AnemoiSource]) -> Joined:
    """By variables where the dates are equal, in time where the variables are."""
    first = sources[0]
    for other in sources[1:]:
        if not (
            np.array_equal(first.latitudes, other.latitudes)
            and np.array_equal(first.longitudes, other.longitudes)
            and first.layout.shape[2] == other.layout.shape[2]
        ):
            raise DatasetError(
                f"{first.path} and {other.path} are not on the same cells and members: "
                f"{first.layout.shape[2:]} and {other.layout.shape[2:]}. Join datasets of one grid."
            )
    if all(np.array_equal(first.dates, other.dates) for other in sources):
        return _side_by_side(sources)
    if all(first.variables == other.variables for other in sources):
        return _one_after_another(sources)
    raise DatasetError(
        f"{', '.join(source.path for source in sources)} have neither the same dates (to join variables) nor the same "
        "variables (to concatenate in time). Select the common ones first."
    )


def _side_by_side(sources: Sequence[AnemoiSource]) -> Joined:
    names = [name for source in sources for name in source.variables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"several of the datasets have {', '.join(twice)}. Keep each variable in one of them.")
    parts, first = [], 0
    for source in sources:
        count = len(source.variables)
        rows = np.arange(len(source.dates))
        parts.append(Part(source, rows, tuple(range(first, first + count)), tuple(range(count))))
        first += count
    return Joined(sources[0].path, tuple(parts), sources[0].dates, tuple(names))


def _one_after_another(sources: Sequence[AnemoiSource]) -> Joined:
    ordered = sorted(sources, key=lambda source: source.dates[0])
    for before, after in pairwise(ordered):
        if after.dates[0] <= before.dates[-1]:
            raise DatasetError(
                f"{before.path} ends on {before.dates[-1]}, after {after.path} begins on {after.dates[0]}. "
                "Concatenate datasets whose dates do not overlap."
            )
    dates = np.concatenate([source.dates for source in ordered])
    parts = []
    for source in ordered:
        rows = np.full(len(dates), -1)
        first = int(np.searchsorted(dates, source.dates[0]))
        rows[first : first + len(source.dates)] = np.arange(len(source.dates))
        places = tuple(range(len(source.variables)))
        parts.append(Part(source, rows, places, places))
    return Joined(ordered[0].path, tuple(parts), dates, ordered[0].variables)


def _narrow(part: Part, dates: NDArray[np.int64], chosen: tuple[int, ...]) -> Part | None:
    """The part with the dates and variables chosen; None where nothing of it is left."""
    stored_at = dict(zip(part.places, part.stored, strict=True))
    pairs = [(place, stored_at[old]) for place, old in enumerate(chosen) if old in stored_at]
    rows = part.rows[dates]
    if not pairs or not (rows >= 0).any():
        return None
    return Part(part.source, rows, tuple(place for place, _ in pairs), tuple(stored for _, stored in pairs))


def _between(dates: Dates, start: str | int | None, end: str | int | None, where: str) -> range:
    return between(dates, None if start is None else str(start), None if end is None else str(end), where)


def _every(step: str | None, dates: Dates, kept: range) -> NDArray[np.int64]:
    """Indices of the dates that lie a multiple of `step` after the first one kept."""
    indices = np.arange(kept.start, kept.stop)
    base = frequency_seconds(dates)
    if step is None or base is None:
        return indices
    seconds = parse_step(step)
    if seconds % base:
        raise SelectionError(
            f"frequency {step} is not a multiple of {format_step(base)}, the step of the dataset. "
            f"Use {format_step(base)}, {format_step(2 * base)}, {format_step(4 * base)}, ..."
        )
    since = (dates[indices] - dates[indices[0]]).astype(np.int64)
    kept_indices: NDArray[np.int64] = indices[since % seconds == 0]
    return kept_indices


def _renamed(names: list[str], rename: Mapping[str, str]) -> list[str]:
    unknown = sorted(set(rename) - set(names))
    if unknown:
        raise SelectionError(f"rename names {', '.join(unknown)}, which is not selected. Selected: {', '.join(names)}.")
    new = [rename.get(name, name) for name in names]
    twice = sorted({name for name in new if new.count(name) > 1})
    if twice:
        raise SelectionError(f"after rename several variables are called {', '.join(twice)}. Choose other names.")
    return new


def _statistics(sources: Sequence[AnemoiSource], names: list[str]) -> dict[str, NDArray[np.float64]]:
    """Of several datasets in time the first has the statistics, as for the field's other tools."""
    found: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    for source in reversed(sources):
        for key, values in (source.statistics or {}).items():
            found[key].update(zip(source.variables, values.tolist(), strict=True))
    lacking = [name for name in names if name not in found["mean"]]
    if lacking:
        raise DatasetError(
            f"{sources[0].path} has no statistics of {', '.join(lacking)}. Name another dataset with statistics=."
        )
    return {key: np.array([values[name] for name in names]) for key, values in found.items()}


def _extra(source: AnemoiSource, name: str) -> NDArray[Any]:
    values = {extra.name: extra.values for extra in source.extras}
    if name not in values:
        have = ", ".join(sorted(key for key in values if "tendencies" in key)) or "none"
        raise SelectionError(f"{source.path} has no {name}. It has: {have}.")
    return values[name]


def _names(names: Names) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _expand(index: Any, ndim: int) -> tuple[Any, ...]:
    """One item per axis: an ellipsis and absent trailing axes become whole slices."""
    items = index if isinstance(index, tuple) else (index,)
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > ndim:
        raise IndexError(f"{len(items)} indices for the {ndim} axes date, variable, member, cell")
    at = dots[0] if dots else len(items)
    fill = (slice(None),) * (ndim - len(items) + len(dots))
    return (*items[:at], *fill, *items[at + len(dots) :])


def _outer(item: Any, n: int) -> tuple[Sequence[int], Any]:
    """(indices to read along one axis, increasing and without repeats; the index that picks the answer from them)."""
    if isinstance(item, slice):
        wanted = range(*item.indices(n))
        return (wanted, slice(None)) if wanted.step > 0 else (wanted[::-1], slice(None, None, -1))
    array = np.asarray(item)
    if array.dtype.kind == "b":
        if array.shape != (n,):
            raise IndexError(f"a mask of shape {array.shape} for an axis of {n}")
        array = np.flatnonzero(array)
    if array.size == 0:
        return (), array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise IndexError(f"{item!r} is neither an integer, a slice, a list of integers nor a mask")
    if array.min() < -n or array.max() >= n:
        raise IndexError(
            f"index {array.min() if array.min() < -n else array.max()} is out of bounds for an axis of {n}"
        )
    unique, inverse = np.unique(np.where(array < 0, array + n, array), return_inverse=True)
    inner: Any = int(inverse.reshape(-1)[0]) if array.ndim == 0 else inverse.reshape(array.shape)
    return unique.tolist(), inner
