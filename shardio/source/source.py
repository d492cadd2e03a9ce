"""Anything that gives fields on cells: an anemoi dataset (`anemoi.py`), NetCDF, CF Zarr and GRIB (`cf.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates
from shardio.errors import SelectionError
from shardio.source.extent import SourceExtent

Json = dict[str, Any]
STATISTICS = ("mean", "stdev", "minimum", "maximum")


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


def units_of(attributes: Json, variable: str) -> str:
    """As the attributes of a dataset say; empty where they do not."""
    metadata = attributes.get("variables_metadata")
    about = metadata.get(variable) if isinstance(metadata, dict) else None
    return str(about.get("units", "")) if isinstance(about, dict) else ""
