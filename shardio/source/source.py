"""Anything that gives fields on cells: an anemoi dataset (`anemoi.py`), NetCDF, CF Zarr and GRIB (`cf.py`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates
from shardio.errors import ChunkError, SelectionError
from shardio.format.codec import Codec
from shardio.format.layout import ArrayLayout
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
        """Indices of the selected variables, in the order of `select`, else of the source.

        Raises: SelectionError where a name is unknown or named twice, or none is left.
        """
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


class Rows(Protocol):
    """The fields of one date as rows [variable x ensemble], to be taken on one thread in the order of cells."""

    def take(self, out: NDArray[np.float32]) -> None:
        """Fill `out` [row, values] with what comes next of every row."""


class Source(Protocol):
    """Fields on cells, for the dates and variables selected. A new kind derives from it, and has what has no default.

    Attributes:
      path: as the user named it.
      extent: shape, chunks and selection, for the planner.
      dates: datetime64[s] [date]; missing: those of them without data.
      latitudes, longitudes: float64 [cell], degrees.
      attributes: of the dataset; data_attributes: of its array of fields; groups: of its sub-groups, by name.
      statistics: float64 [variable] by name; None where they are to be computed.
      extras: arrays that travel along.
      zarr_format: that of the source; 3 where it is not Zarr.
      layout: of the stored array [date, variable, ensemble, cell]; None where there is none.
    """

    path: str
    extent: SourceExtent
    variables: tuple[str, ...]
    dates: Dates
    latitudes: NDArray[np.float64]
    longitudes: NDArray[np.float64]
    attributes: Json
    missing: Dates = np.empty(0, "datetime64[s]")
    data_attributes: Mapping[str, Any] = MappingProxyType({})
    groups: Mapping[str, Json] = MappingProxyType({})
    statistics: dict[str, NDArray[np.float64]] | None = None
    extras: tuple[Extra, ...] = ()
    zarr_format: int = 3
    layout: ArrayLayout | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """Of what is there now: metadata, attributes, dates, and the size of every file. A copy has the same."""
        ...

    def changed(self) -> str:
        """When the files were last written, with a digest of the times of all; empty where the store has no times.

        It tells a value that was changed in place. A copy has the same where its times were kept.
        """
        return ""

    @abstractmethod
    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        """Fill `out` [date, variable, ensemble, cell] with selected dates and variables.

        Raises: ChunkError where stored bytes are missing or damaged, or a number does not fit in float32.
        """
        ...

    def streams(self, date: int, largest_block: int) -> bool:
        """Whether `stream` gives this date, and holds at most `largest_block` decoded bytes of a row."""
        return False

    def stream(self, date: int) -> Rows:
        """The fields of a date for which `streams` is true.

        Raises: ChunkError where it is damaged.
        """
        raise ChunkError(f"{self.path} does not stream date {date}. Use `read`.")

    def array(self, name: str) -> NDArray[Any] | None:
        """All values of a stored array, such as one of `extras`; None where there is no such array."""
        return None

    def stored_coordinates(self, name: str, codec: Codec) -> tuple[bytes, int] | None:
        """Stored bytes of `latitudes` or `longitudes` and the crc32c of the values; None where not in this codec."""
        return None

    def stored_files(self) -> dict[str, int]:
        """Bytes of every file that holds chunks of fields, by name; empty where the store cannot tell."""
        return {}

    def close(self) -> None:
        """Close the files that are open; what is read later opens them again."""
        return None


def tell_times(times: Mapping[str, int]) -> str:
    """The last of the times at which files were written, nanoseconds since 1970, and a digest of all."""
    last = np.datetime64(max(times.values()), "ns").astype("datetime64[s]")
    return f"{last}Z ({sha256(repr(sorted(times.items())).encode()).hexdigest()[:12]})"


def units_of(attributes: Json, variable: str) -> str:
    """As the attributes of a dataset say; empty where they do not."""
    metadata = attributes.get("variables_metadata")
    about = metadata.get(variable) if isinstance(metadata, dict) else None
    return str(about.get("units", "")) if isinstance(about, dict) else ""
