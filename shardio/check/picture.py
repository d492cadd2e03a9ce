"""One field of one date on the sphere, with its grid-chunks: what a rank would read, at a glance."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardio.dates import parse_start
from shardio.errors import SelectionError
from shardio.source.open import open_source
from shardio.source.source import Selection, units_of
from shardio.write.job import refuse_unfinished

MOST_POINTS = 60_000  # more cannot be told apart in the picture
PANEL = 100_000.0  # of each of its halves, in square points
NO_CELLS = 60.0  # degrees of longitude without a cell: more than that, and the area is limited


def draw(path: str, variable: str, date: str | None, output: str) -> None:
    """Write a PNG: left the field, right the grid-chunk of every cell.

    Raises: SelectionError where the date or the variable is not there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    refuse_unfinished(Path(path))
    with closing(open_source(path, Selection(select=(variable,)))) as source:
        at = 0 if date is None else int(np.searchsorted(source.dates, parse_start(date)))
        if at == len(source.dates) or (date is not None and source.dates[at] != parse_start(date)):
            raise SelectionError(f"{path} has no date {date}. It holds {source.dates[0]} to {source.dates[-1]}.")
        cells = len(source.latitudes)
        fields = np.empty((1, 1, source.extent.shape[2], cells), np.float32)
        source.read(slice(at, at + 1), slice(0, cells), fields)
    shown = slice(0, cells, max(1, cells // MOST_POINTS))
    latitudes, longitudes = source.latitudes[shown], unbroken(source.longitudes[shown])
    chunk_cells = cells if source.layout is None else source.layout.chunks[3]
    chunks = np.arange(cells)[shown] // chunk_cells
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", sharey=True)
    area = max(3.0, PANEL / len(latitudes))
    points = left.scatter(longitudes, latitudes, c=fields[0, 0, 0, shown], s=area, lw=0, cmap="RdYlBu_r")
    figure.colorbar(points, ax=left, label=_label(source.attributes, variable))
    left.set_title(f"{variable}, {str(source.dates[at])[:16]}")
    colours = matplotlib.colormaps["tab20"](chunks % 20)
    right.scatter(longitudes, latitudes, c=colours, s=area, lw=0)
    right.set_title(f"{chunks[-1] + 1} grid-chunks of {chunk_cells} cells")
    for axes in (left, right):
        axes.set(xlim=limits(longitudes, 180), ylim=limits(latitudes, 90), xlabel="longitude")
    left.set_ylabel("latitude")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def unbroken(longitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """In degrees from -180, or for a limited area from its western edge, so that the dateline does not part it."""
    turned = (longitudes + 180) % 360 - 180
    distinct = np.unique(turned)
    gaps = np.diff(distinct, append=distinct[0] + 360)
    if gaps.max() < NO_CELLS:
        return turned
    west = distinct[(np.argmax(gaps) + 1) % len(distinct)]
    return np.where(turned < west, turned + 360, turned)


def limits(degrees: NDArray[np.float64], most: float) -> tuple[float, float]:
    """Of an axis: around the cells, or -most to most where they leave out less than a quarter of that."""
    low, high = float(degrees.min()), float(degrees.max())
    if high - low > 1.5 * most:
        return -most, most
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin


def _label(attributes: dict[str, object], variable: str) -> str:
    units = units_of(attributes, variable)
    return f"{variable} ({units})" if units else variable
