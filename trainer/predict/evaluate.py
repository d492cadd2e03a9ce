"""How good forecasts are: error, bias and anomaly correlation, beside persistence and, if known, the exact solution.

Every rank reads its own cells of forecasts and truth and adds up weighted sums; one all-reduce of a few numbers per
variable and lead time makes the scores of the globe. No field is gathered.

  weights         true areas of the cells; cells where the truth has no value do not count, nor those without a value
                  at the initial date, which have none in the forecast either
  averages        over cells, members and initial dates together: squares first, roots last
  persistence     the initial field, at every lead time
  climatology     mean of each cell over up to 64 dates, spread over the period given; anomalies are departures from it
  acc             sum(w f' t') / sqrt(sum(w f'^2) sum(w t'^2)), f' and t' anomalies of forecast and truth
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio import Dataset, Reads, RossbyWaves, Wanted, open_dataset
from shardio.dates import between
from shardio.errors import DatasetError, SelectionError
from trainer.comm import Alone, Comm, sum_arrays
from trainer.graph.grid import cell_areas

Float64 = NDArray[np.float64]
CLIMATOLOGY_DATES = 64
METHODS, REFERENCES = ("forecast", "persistence"), ("truth", "exact")
SUMS = ("weight", "error", "squared_error", "anomaly_weight", "product", "forecast_square", "reference_square")


@dataclass(frozen=True)
class Scores:
    """Of all forecasts together; NaN where nothing could be compared.

    Attributes:
      variables: names.
      units: of the variables; empty where the dataset has none.
      hours: [leads], lead times.
      dates: initial dates.
      climatology: first and last date of it, and how many.
      rmse, bias, acc: float64 [method, reference, leads, variables], see METHODS and REFERENCES.
    """

    variables: tuple[str, ...]
    units: tuple[str, ...]
    hours: tuple[float, ...]
    dates: tuple[str, ...]
    climatology: tuple[str, str, int]
    rmse: Float64
    bias: Float64
    acc: Float64

    def rows(self) -> Iterator[dict[str, Any]]:
        """One per variable, lead time, method and reference."""
        for v, variable in enumerate(self.variables):
            for lead, hours in enumerate(self.hours):
                for m, method in enumerate(METHODS):
                    for r, reference in enumerate(REFERENCES):
                        at = (m, r, lead, v)
                        if np.isfinite(self.rmse[at]):
                            about = {"variable": variable, "units": self.units[v], "lead_hours": hours}
                            about |= {"method": method, "against": reference}
                            yield about | {name: float(getattr(self, name)[at]) for name in ("rmse", "bias", "acc")}

    def __str__(self) -> str:
        """The last lead time that has scores, of each variable."""
        first, last, count = self.climatology
        many = f"{len(self.dates)} forecast{'' if len(self.dates) == 1 else 's'}"
        scored = np.flatnonzero(np.isfinite(self.rmse).any(axis=(0, 1, 3)))
        lead = int(scored[-1]) if scored.size else -1
        lines = [f"{many}, {self.hours[lead]:g} h; climatology of {count} dates, {first} to {last}"]
        names = [f"{name} ({unit})" if unit else name for name, unit in zip(self.variables, self.units, strict=True)]
        wide = max(12, *(len(name) for name in names))
        lines.append(f"{'':{wide}}{'rmse':>12}{'persistence':>14}{'ratio':>8}{'bias':>13}{'acc':>8}")
        for v in range(len(self.variables)):
            known = np.isfinite(self.rmse[0, 0, lead, v])
            ours, theirs = ((m, 0 if known else 1, lead, v) for m in (0, 1))
            rmse, persistence = self.rmse[ours], self.rmse[theirs]
            ratio = rmse / persistence if persistence else np.nan
            lines.append(
                f"{names[v]:{wide}}{rmse:12.4g}{persistence:14.4g}{ratio:8.3f}{self.bias[ours]:13.4g}{self.acc[ours]:8.3f}"
            )
        return "\n".join(lines)

    def write(self, path: str | os.PathLike[str]) -> None:
        """As CSV; an acc that is not defined, as of constant fields, is empty."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            columns = ("variable", "units", "lead_hours", "method", "against", "rmse", "bias", "acc")
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            for row in self.rows():
                table.writerow({key: "" if value != value else value for key, value in row.items()})


def evaluate(
    forecasts: Sequence[str | os.PathLike[str]],
    truth: Dataset,
    cells: slice | None = None,
    comm: Comm | None = None,
    period: tuple[Any, Any] | None = None,
    mine: slice = slice(None),
) -> Scores:
    """Scores of forecasts that `trainer predict` wrote. All ranks of `comm` call it together.

    Args:
      forecasts: paths, all with the same variables and lead times, the same on all ranks.
      truth: dataset with the initial dates; lead times that it lacks are compared with the exact solution only.
      cells: of this rank; the ranks together have all cells, for each forecast. Default: all.
      comm: all ranks.
      period: first and last date of the climatology, None for open; default: before the first initial date, or all.
      mine: the forecasts that this rank reads its cells of.
    """
    opened = [open_dataset(path) for path in forecasts]
    first, starts = opened[0], [initial_date(one) for one in opened]
    _check_alike(opened, truth)
    cells = cells or slice(0, truth.shape[3])
    reader = Reader(truth, first.variables, cells)
    for start in starts:  # all of them on all ranks: none must wait for one that has failed
        if not reader.has(start):
            raise SelectionError(f"the truth lacks {start}, an initial date. Give the dataset that it started from.")
    if not any(reader.knows(date) for one in opened for date in one.dates):
        last = max(one.dates[-1] for one in opened)
        raise SelectionError(
            f"there is no truth to compare with: {truth.paths[0]} ends {truth.dates[-1]}, and has none of "
            f"the lead times until {last}. Give a dataset that has, or forecast from an earlier date."
        )
    usual, about = reader.climatology(_period(truth, period, min(starts)))
    areas = cell_areas(truth.latitudes, truth.longitudes)[cells]
    sums = np.zeros((len(SUMS), len(METHODS), len(REFERENCES), len(first), len(first.variables)))
    pairs = list(zip(opened, starts, strict=True))[mine]
    reads = Reads(reader.wanted_of(pairs), cells, ahead=2)
    for dataset, _ in pairs:
        initial = next(reads)
        for lead, date in enumerate(dataset.dates):
            given = next(reads)  # [variables, ensemble, cells/M]
            true = next(reads) if reader.has(date) else None
            for r, reference in enumerate((true, reader.exact(date))):
                if reference is not None:
                    there = np.where(np.isfinite(initial), reference, np.nan)  # else there is nothing to persist
                    sums[:, 0, r, lead] += _sums(given, np.where(np.isnan(given), there, reference), usual, areas)
                    sums[:, 1, r, lead] += _sums(initial, there, usual, areas)
    sums = sum_arrays(comm or Alone(), sums, "scores")
    hours = tuple((first.dates - starts[0]).astype("timedelta64[s]").astype(float) / 3600.0)
    about_variables = truth.variables_metadata(first.variables)
    units = tuple(str(about_variables.get(name, {}).get("units", "")) for name in first.variables)
    return Scores(first.variables, units, hours, tuple(map(str, starts)), about, *_scores(sums))


def initial_date(forecast: Dataset) -> np.datetime64:
    """Of a forecast that `trainer predict` wrote."""
    about = forecast.attributes.get("forecast")
    if about is None:
        raise DatasetError(f"{forecast.paths[0]} is no forecast of `trainer predict`. Give one of its outputs.")
    return np.datetime64(about["initial_date"], "s")


def _sums(fields: Any, reference: Any, usual: Float64, areas: Float64) -> Float64:
    """[sums, variables], of SUMS; a forecast that is not finite where the reference is makes them so."""
    fields, reference = fields.astype(np.float64), np.broadcast_to(reference, fields.shape).astype(np.float64)
    known = np.isfinite(reference)
    error = np.where(known, fields - reference, 0.0)
    compared = known & np.isfinite(usual)
    ours, theirs = (np.where(compared, values - usual, 0.0) for values in (fields, reference))
    terms = (known, error, error**2, compared, ours * theirs, ours**2, theirs**2)
    return np.stack([(term * areas).sum(axis=(1, 2)) for term in terms])


def _scores(sums: Float64) -> tuple[Float64, Float64, Float64]:
    weight, error, squares, _, product, ours, theirs = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(squares / weight), error / weight, product / np.sqrt(ours * theirs)


class Reader:
    """Truth, exact solution and climatology on this rank's cells.

    Args: truth; variables: of the forecasts; cells: of this rank.
    """

    def __init__(self, truth: Dataset, variables: Sequence[str], cells: slice):
        self._truth, self._cells = truth, cells
        self._places = [truth.variables.index(name) for name in variables]
        about = truth.attributes.get("synthetic")
        self._waves = None
        if about is not None and set(variables) <= set(RossbyWaves.variables):
            self._waves = RossbyWaves(truth.latitudes[cells], truth.longitudes[cells], about["seed"])
            self._epoch = np.datetime64(about["epoch"], "s")
            self._names = [RossbyWaves.variables.index(name) for name in variables]

    def truth(self, date: np.datetime64, members: int) -> NDArray[np.float32] | None:
        """[variables, ensemble, cells/M]; None where the dataset does not have the date."""
        if not self.has(date):
            return None
        (fields,) = Reads([self._wanted(date, members)], self._cells)
        return fields

    def wanted_of(self, forecasts: Sequence[tuple[Dataset, np.datetime64]]) -> list[Wanted]:
        """What evaluation reads: of each forecast the initial truth, then every lead time and its truth, if known."""
        wanted = []
        for forecast, start in forecasts:
            members = forecast.shape[2]
            wanted.append(self._wanted(start, members))
            for lead, date in enumerate(forecast.dates):
                wanted.append(Wanted(forecast, lead))
                if self.has(date):
                    wanted.append(self._wanted(date, members))
        return wanted

    def _wanted(self, date: np.datetime64, members: int | None) -> Wanted:
        return Wanted(self._truth, int(np.searchsorted(self._truth.dates, date)), self._places, members)

    def has(self, date: np.datetime64) -> bool:
        """Whether the dataset has the date."""
        at = int(np.searchsorted(self._truth.dates, date))
        return at < len(self._truth) and self._truth.dates[at] == date and not self._truth.is_missing[at]

    def knows(self, date: np.datetime64) -> bool:
        """Whether the dataset has the date, or an exact solution is known."""
        return self._waves is not None or self.has(date)

    def exact(self, date: np.datetime64) -> Float64 | None:
        """[variables, 1, cells/M]; None where no exact solution is known."""
        if self._waves is None:
            return None
        seconds = float((date - self._epoch).astype("timedelta64[s]").astype(np.int64))
        values = np.empty((len(RossbyWaves.variables), self._cells.stop - self._cells.start))
        self._waves.fields(seconds, slice(0, values.shape[1]), values)
        return values[self._names][:, None]

    def climatology(self, period: range) -> tuple[Float64, tuple[str, str, int]]:
        """[variables, 1, cells/M], mean of the values there are of dates and members; and of which dates."""
        there = np.array([date for date in period if not self._truth.is_missing[date]])
        chosen = there[np.unique(np.linspace(0, len(there) - 1, CLIMATOLOGY_DATES).round().astype(int))]
        total, count = np.zeros((2, len(self._places), 1, self._cells.stop - self._cells.start))
        for read in Reads([self._wanted(self._truth.dates[date], None) for date in chosen], self._cells):
            fields = read.astype(np.float64)
            count += np.isfinite(fields).sum(axis=1, keepdims=True)
            total += np.nansum(fields, axis=1, keepdims=True)
        dates = self._truth.dates[chosen]
        with np.errstate(invalid="ignore"):
            return total / count, (str(dates[0]), str(dates[-1]), len(dates))


def _period(truth: Dataset, period: tuple[Any, Any] | None, start: np.datetime64) -> range:
    if period is not None:
        first, last = (None if date is None else str(date) for date in period)
        return between(truth.dates, first, last, "the truth")
    earlier = int(np.searchsorted(truth.dates, start))
    return range(earlier if earlier > 1 else len(truth))


def _check_alike(forecasts: Sequence[Dataset], truth: Dataset) -> None:
    first = forecasts[0]
    path = first.paths[0]
    for other in forecasts:
        if other.variables != first.variables or other.shape != first.shape:
            raise SelectionError(
                f"{other.paths[0]} {other.shape} and {path} {first.shape} have other variables, lead times "
                "or members. Evaluate forecasts of one kind together."
            )
    if not np.array_equal(first.latitudes, truth.latitudes) or not np.array_equal(first.longitudes, truth.longitudes):
        raise SelectionError(f"{path} and the truth are on different grids. Give the dataset that it started from.")
    lacking = [name for name in first.variables if name not in truth.variables]
    if lacking:
        raise SelectionError(f"the truth lacks {', '.join(lacking)}. It has: {', '.join(truth.variables)}.")
