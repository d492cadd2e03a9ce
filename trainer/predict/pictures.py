"""Pictures of forecasts: skill over lead time, and maps of forecast, truth and difference.

No rank has the globe: each puts its own cells into bins of a coarse grid, and the sums of the bins are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio import Dataset, open_dataset
from shardio.errors import SelectionError
from trainer.comm import Alone, Comm, sum_arrays
from trainer.graph.grid import cell_areas
from trainer.predict.evaluate import METHODS, REFERENCES, Reader, Scores, initial_date

Float64 = NDArray[np.float64]
MOST_ROWS = 90
CELLS_PER_BIN = 4  # fewer leave holes
MOST_CURVES, MOST_MAPS = 8, 4  # variables in a picture
COLORS = {"forecast": "tab:blue", "persistence": "tab:gray"}


@dataclass(frozen=True, eq=False)
class Bins:
    """Rows of even latitude; each has fewer bins towards the poles, so that all are about as large.

    Attributes:
      rows: their number.
      south, north, west, east: degrees.
      columns: [rows], bins of each.
    """

    rows: int
    south: float
    north: float
    west: float
    east: float
    columns: NDArray[np.int64]

    @staticmethod
    def over(latitudes: Float64, longitudes: Float64) -> Bins:
        """For the cells of a whole grid, of the globe or a part of it."""
        south, north = _ends(latitudes, 90.0)
        south, north = max(south, -90.0), min(north, 90.0)
        west, east = _extent(longitudes)
        middle = math.cos(math.radians((south + north) / 2.0)) if east - west < 360.0 else 2.0 / math.pi
        ratio = max((east - west) * middle / (north - south), 0.05)  # width over height
        rows = int(np.clip(math.sqrt(latitudes.size / CELLS_PER_BIN / ratio), 4, MOST_ROWS))
        height = (north - south) / rows
        centres = np.radians(south + (np.arange(rows) + 0.5) * height)
        columns = np.maximum(np.round(np.cos(centres) * (east - west) / height), 1).astype(np.int64)
        return Bins(rows, south, north, west, east, columns)

    def place(self, latitudes: Float64, longitudes: Float64) -> NDArray[np.int64]:
        """[cells], the bin of each."""
        height, width = (self.north - self.south) / self.rows, self.east - self.west
        row = np.clip(((latitudes - self.south) / height).astype(np.int64), 0, self.rows - 1)
        across = np.mod(longitudes - self.west, 360.0) / width
        column = np.minimum((across * self.columns[row]).astype(np.int64), self.columns[row] - 1)
        placed: NDArray[np.int64] = (np.cumsum(self.columns) - self.columns)[row] + column
        return placed

    def image(self, values: Float64) -> Float64:
        """[rows, widest row], of values [bins]."""
        widest = int(self.columns.max())
        starts = np.cumsum(self.columns) - self.columns
        across = (np.arange(widest) + 0.5) / widest
        shown: Float64 = values[starts[:, None] + (across * self.columns[:, None]).astype(np.int64)]
        return shown


def coarsen(fields: Any, latitudes: Float64, longitudes: Float64, areas: Float64, bins: Bins, comm: Comm) -> Float64:
    """[fields, bins], area-weighted means of fields [fields, cells/M] of all ranks; NaN in bins without a value.

    Args: fields, latitudes, longitudes, areas: of this rank's cells.
    """
    place, count = bins.place(latitudes, longitudes), int(bins.columns.sum())
    known = np.isfinite(fields)
    weighted = np.where(known, fields, 0.0) * areas
    sums = np.stack(
        [
            [np.bincount(place, row, count) for row in weighted],
            [np.bincount(place, row, count) for row in known * areas],
        ]
    )
    sums = sum_arrays(comm, sums, "maps")
    with np.errstate(invalid="ignore"):
        means: Float64 = sums[0] / sums[1]
    return means


def draw_maps(
    path: Path,
    forecast: str | Path,
    truth: Dataset,
    cells: slice | None = None,
    comm: Comm | None = None,
    variables: Sequence[str] | None = None,
    lead: int | None = None,
    shown: bool = True,
) -> None:
    """Forecast, truth and difference of some variables at one lead time, of the first member.

    Args:
      path: of the PNG.
      forecast: path of a forecast.
      truth: dataset; where it lacks the lead time, the exact solution if one is known.
      cells: of this rank; the ranks of `comm` together have all.
      comm: the ranks that read this forecast.
      variables: default: the first four that are forecast.
      lead: which lead time; default: the last whose truth is known.
      shown: whether this rank writes the picture.
    """
    dataset, cells = open_dataset(forecast), cells or slice(0, truth.shape[3])
    names = list(variables or dataset.variables[:MOST_MAPS])
    reader = Reader(truth, names, cells)
    known = [at for at in (range(len(dataset)) if lead is None else [lead]) if reader.knows(dataset.dates[at])]
    if not known:
        raise SelectionError(f"no truth is known for {dataset.dates[lead or 0]}. Draw an earlier lead time.")
    at = known[-1]
    date = dataset.dates[at]
    found = reader.truth(date, 1)
    reference: Any = reader.exact(date) if found is None else found
    given = dataset[at, [dataset.variables.index(name) for name in names], 0, cells].astype(np.float64)
    both = np.concatenate([given, reference[:, 0]])  # [forecasts, then truths; cells/M]
    bins = Bins.over(truth.latitudes, truth.longitudes)
    areas = cell_areas(truth.latitudes, truth.longitudes)[cells]
    coarse = coarsen(both, truth.latitudes[cells], truth.longitudes[cells], areas, bins, comm or Alone())
    if shown:
        hours = (date - initial_date(dataset)) / np.timedelta64(1, "h")
        title = f"{initial_date(dataset)} + {hours:g} h"
        units = {name: _units(truth, name) for name in names}
        _draw_panels(path, title, units, bins, coarse[: len(names)], coarse[len(names) :])


def _draw_panels(
    path: Path, title: str, units: dict[str, str], bins: Bins, forecasts: Float64, truths: Float64
) -> None:
    from matplotlib.figure import Figure

    height = np.clip(4.5 * (bins.north - bins.south) / (bins.east - bins.west), 1.5, 4.5) + 0.4
    figure = Figure(figsize=(15.0, height * len(units) + 0.4), layout="constrained")
    extent = (bins.west, bins.east, bins.south, bins.north)
    for i, (name, unit) in enumerate(units.items()):
        low, high = np.nanmin(truths[i]), np.nanmax(truths[i])
        most = float(np.nanmax(np.abs(forecasts[i] - truths[i]))) or 1.0
        panels = (
            ("forecast", forecasts[i], "viridis", low, high),
            ("truth", truths[i], "viridis", low, high),
            ("difference", forecasts[i] - truths[i], "RdBu_r", -most, most),
        )
        for k, (what, values, colors, least, greatest) in enumerate(panels):
            axes = figure.add_subplot(len(units), 3, 3 * i + k + 1)
            image = axes.imshow(
                bins.image(values), origin="lower", extent=extent, cmap=colors, vmin=least, vmax=greatest, aspect="auto"
            )
            axes.set_title(f"{name}: {what}")
            figure.colorbar(image, ax=axes, label=unit)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def draw_skill(path: Path, scores: Scores) -> None:
    """Root mean square error and anomaly correlation over lead time, of the first variables."""
    from matplotlib.figure import Figure

    names = scores.variables[:MOST_CURVES]
    figure = Figure(figsize=(3.2 * len(names), 5.4), layout="constrained")
    days = np.array(scores.hours) / 24.0
    for v, name in enumerate(names):
        for row, (what, values) in enumerate((("rmse", scores.rmse), ("acc", scores.acc))):
            axes = figure.add_subplot(2, len(names), row * len(names) + v + 1)
            for m, method in enumerate(METHODS):
                for r, reference in enumerate(REFERENCES):
                    curve = values[m, r, :, v]
                    if np.isfinite(curve).any() and (r == 0 or not np.isfinite(values[m, 0, :, v]).all()):
                        label = method if r == 0 else f"{method}, against the {reference} solution"
                        axes.plot(days, curve, color=COLORS[method], ls="-" if r == 0 else ":", label=label)
            unit = scores.units[v]
            axes.set(title=f"{name}: {what}{f' ({unit})' if unit and row == 0 else ''}", xlabel="days")
            axes.grid(alpha=0.3)
            if v == 0 and axes.lines:
                axes.legend()
    figure.savefig(path, dpi=100)


def _units(dataset: Dataset, name: str) -> str:
    return str(dataset.variables_metadata([name]).get(name, {}).get("units", ""))


def _ends(values: Float64, most: float) -> tuple[float, float]:
    """First and last value, half a mean distance further out."""
    different = np.unique(values)
    half = (different[-1] - different[0]) / max(different.size - 1, 1) / 2.0 or min(1.0, most)
    return float(different[0] - half), float(different[-1] + half)


def _extent(longitudes: Float64) -> tuple[float, float]:
    """West and east end; 0 and 360 where the cells go round the globe."""
    east = np.unique(np.mod(longitudes, 360.0))
    gaps = np.diff(east, append=east[0] + 360.0)
    widest = int(gaps.argmax())
    if gaps[widest] < 60.0 or east.size == 1:
        return 0.0, 360.0
    west = float(east[(widest + 1) % east.size])
    if west > 180.0:
        west -= 360.0
    return west, west + 360.0 - float(gaps[widest])
