"""Several datasets as one: side by side by variables, or one after another in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates
from shardio.errors import DatasetError
from shardio.source.anemoi import AnemoiSource


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


@dataclass(frozen=True)
class Joined:
    """Several sources side by side, before anything is selected."""

    where: str
    parts: tuple[Part, ...]
    dates: Dates
    variables: tuple[str, ...]


def join(sources: Sequence[AnemoiSource]) -> Joined:
    """By variables where the dates are equal, in time where the variables are.

    Raises: DatasetError where neither are equal.
    """
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


def narrow(part: Part, dates: NDArray[np.int64], chosen: tuple[int, ...]) -> Part | None:
    """The part with the dates and variables chosen; None where nothing of it is left."""
    stored_at = dict(zip(part.places, part.stored, strict=True))
    pairs = [(place, stored_at[old]) for place, old in enumerate(chosen) if old in stored_at]
    rows = part.rows[dates]
    if not pairs or not (rows >= 0).any():
        return None
    return Part(part.source, rows, tuple(place for place, _ in pairs), tuple(stored for _, stored in pairs))
