"""The order in which cells are stored: native, as the source has them, or compact, so that grid-chunks are regions.

    native: row after row        0  1  2  3     compact: half after half     0  1  4  5
                                 4  5  6  7                                  2  3  6  7
                                 8  9 10 11                                  8  9 12 13
                                12 13 14 15                                 10 11 14 15

A grid-chunk of a native order is a band around the globe, whose border does not get shorter however many ranks share
the globe; that of a compact order is. The array `cell_order` says where each stored cell was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.errors import DatasetError
from shardio.format.codec import crc32c
from shardio.format.scratch import Scratch
from shardio.source.source import Extra, Json, Source

CELL_ORDER = "cell_order"
ORDERS = ("compact", "native")
DESCRIBED = ("field_shape", "resolution")  # attributes that say how the cells lie; their native values are kept aside
LEAF = 64  # cells that stay in their native order: cutting a piece of that size gains nothing
MOST_SURVEYED = 2**17  # cells, for an estimate
NEIGHBOURHOOD = 32  # cells that are compared with one another, for an estimate
REACH = 6  # neighbours of a cell: the ring around it, on triangles as on squares with their corners

Int64 = NDArray[np.int64]


# ------------------------------------------------------------------------------------------------------- which order
def compact_order(latitudes: NDArray[np.float64], longitudes: NDArray[np.float64]) -> Int64:
    """[cell] the native place of every cell stored: halves of halves, each cut where it is widest; ties by place.

    Against a Hilbert curve on the cube this gives a quarter fewer rows of halo, and any number of cells is cut evenly.
    """
    order = np.empty(latitudes.size, np.int64)
    waiting = [(np.arange(latitudes.size), _positions(latitudes, longitudes), 0)]
    while waiting:
        cells, position, start = waiting.pop()
        if cells.size <= LEAF:
            order[start : start + cells.size] = cells
            continue
        along, half = position[np.argmax(np.ptp(position, axis=1))], cells.size // 2
        middle = np.partition(along, half)[half]
        low = along < middle
        low[np.flatnonzero(along == middle)[: half - np.count_nonzero(low)]] = True
        waiting.append((cells[low], position[:, low], start))
        waiting.append((cells[~low], position[:, ~low], start + half))
    return order


def _positions(latitudes: NDArray[np.float64], longitudes: NDArray[np.float64]) -> NDArray[np.float32]:
    """[3, cell], on the unit sphere to 0.3 %."""
    cosine = _sine(latitudes + 90.0)
    return np.stack([cosine * _sine(longitudes + 90.0), cosine * _sine(longitudes), _sine(latitudes)]).astype("f4")


def _sine(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bhaskara's: basic arithmetic, so that all workers find the same order; sines of libraries differ in bits."""
    turned = np.mod(degrees, 360.0)
    within = np.mod(turned, 180.0)
    product = within * (180.0 - within)
    return np.where(turned < 180.0, 4.0, -4.0) * product / (40500.0 - product)


def cell_order(source: Source) -> Int64 | None:
    """[cell] the native place of every cell of a source in compact order; None where it is in its native order.

    Raises: DatasetError where it does not name each cell once.
    """
    found = source.array(CELL_ORDER)
    if found is None:
        return None
    cells = source.extent.shape[3]
    if found.dtype.kind != "i" or not np.array_equal(np.sort(found), np.arange(cells)):
        raise DatasetError(
            f"{source.path}/{CELL_ORDER} does not name each of the {cells} cells once. "
            "Restore it from a copy, or make the dataset again."
        )
    return found.astype(np.int64)


def order_of(source: Source) -> str:
    """compact or native."""
    return "native" if cell_order(source) is None else "compact"


# -------------------------------------------------------------------------------------------------- in another order
def ordered(source: Source, wanted: str | None) -> Source:
    """The source with its cells in the `wanted` order; as it is where that is None, or the one it has."""
    if wanted is None or wanted == order_of(source):
        return source
    native = wanted == "native"
    return Reordered(source, None if native else compact_order(source.latitudes, source.longitudes))


def ordered_like(source: Source, other: Source) -> Source:
    """The source with its cells in the order of another."""
    own, wanted = cell_order(source), cell_order(other)
    same = own is wanted if own is None or wanted is None else np.array_equal(own, wanted)
    return source if same else Reordered(source, wanted)


class Reordered(Source):
    """A source whose cells are in another order, `order`; None is native. Reads whole dates, whatever is asked for."""

    def __init__(self, source: Source, order: Int64 | None):
        own = cell_order(source)
        self.order, self._source = order, source
        self._cells = source.extent.shape[3]
        native = np.arange(self._cells) if own is None else np.argsort(own)  # where the source has each native cell
        self._places = native if order is None else native[order]
        self._scratch = Scratch()
        self.path, self.variables, self.zarr_format = source.path, source.variables, source.zarr_format
        self.dates, self.missing, self.statistics = source.dates, source.missing, source.statistics
        self.data_attributes = source.data_attributes
        self.groups = source.groups
        self.extent = replace(source.extent, whole_dates=True)
        self.latitudes, self.longitudes = source.latitudes[self._places], source.longitudes[self._places]
        travelling = {extra.name: extra for extra in source.extras}
        before = travelling.pop(CELL_ORDER, None)
        kept = source.attributes if before is None else before.attributes.get("native", {})
        described = {name: kept[name] for name in DESCRIBED if name in kept}
        self.extras = tuple(_taken(extra, self._places) for extra in travelling.values())
        if order is not None:
            self.extras += (Extra(CELL_ORDER, order, {"native": described}, ("cell",)),)
            resolution = described.get("resolution", f"{self._cells} cells")
            # Not to be taken for a raster, nor for the grid of that name.
            described = {"field_shape": [self._cells], "resolution": f"{resolution}, compact order"}
        old = {name: value for name, value in source.attributes.items() if name in described or name not in DESCRIBED}
        self.attributes: Json = old | described

    def fingerprint(self) -> str:
        order = "native" if self.order is None else f"compact {crc32c(self.order.tobytes()):08x}"
        return f"{self._source.fingerprint()}, {order}"

    def changed(self) -> str:
        return self._source.changed()

    def array(self, name: str) -> NDArray[Any] | None:
        return next((extra.values for extra in self.extras if extra.name == name), None)

    def close(self) -> None:
        self._source.close()

    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        whole = out if out.shape[3] == self._cells else np.empty((*out.shape[:3], self._cells), np.float32)
        self._source.read(dates, slice(0, self._cells), whole, pool)
        places = self._places[cells]

        def move(row: tuple[int, ...]) -> None:
            moved = self._scratch.take("row", 4 * places.size).view(np.float32)
            np.take(whole[row], places, out=moved, mode="clip")  # any other mode copies once more
            out[row] = moved

        for _ in (pool.map if pool else map)(move, np.ndindex(out.shape[:3])):
            pass


def _taken(extra: Extra, places: Int64) -> Extra:
    """An array with its cells in another order; without named dimensions, what is as long as the cells runs along them.

    Where its dimensions are named, `cell` are the cells.
    """
    values = extra.values
    for axis, length in enumerate(values.shape):
        if length == places.size if extra.dimensions is None else extra.dimensions[axis] == "cell":
            if length != places.size:
                raise DatasetError(
                    f"{extra.name} has {length} cells, the dataset has {places.size}. Rename its dimension `cell`, or "
                    "leave the order of the cells as it is."
                )
            values = np.take(values, places, axis)
    return replace(extra, values=values)


# ---------------------------------------------------------------------------------------------------- what it is worth
def border_cells(source: Source, bounds: Sequence[int]) -> dict[str, int]:
    """About how many cells of other ranks lie beside those of a rank, for the rank that has most, by order.

    Beside a cell are its nearest, as far as `REACH` of them: whatever the grid, whatever the spacing there.

    Args: bounds: [ranks + 1], first cell of every rank, then the number of cells.
    """
    own = cell_order(source)
    native = slice(None) if own is None else np.argsort(own)
    step = math.ceil(len(source.latitudes) / MOST_SURVEYED)
    surveyed = np.arange(0, len(source.latitudes), step)
    if step > 1:  # in every run of cells another one: each step-th would thin out rows, but not their number
        surveyed += np.random.default_rng(0).integers(step, size=surveyed.size)
        surveyed = np.minimum(surveyed, len(source.latitudes) - 1)
    places = [values[native][surveyed] for values in (source.latitudes, source.longitudes)]
    ranks = np.searchsorted(np.array(bounds[1:]), surveyed, side="right")
    compact = np.empty_like(ranks)
    compact[compact_order(*places)] = ranks
    cells, beside = _neighbours(_positions(*places))

    def most(of: Int64) -> int:
        other = of[cells] != of[beside]
        met = np.unique(of[cells][other] * surveyed.size + beside[other])  # once, however many it is beside
        longer = math.sqrt(step)  # a border has as many more cells where all cells are counted
        return round(longer * int(np.bincount(met // surveyed.size, minlength=1).max()))

    return {"native": most(ranks), "compact": most(compact)}


def _neighbours(position: NDArray[np.float32]) -> Int64:
    """[2, pair] cells and those beside them, but for about one in a hundred."""
    # Neighbours share a neighbourhood, unless it is cut between them: three are cut differently, and none along an axis
    # of the globe, as rows of cells and compact regions are.
    turns = (
        np.array([[1, 2, 2], [2, 1, -2], [2, -2, 1]]) / 3.0,
        np.array([[2, 3, 6], [3, -6, 2], [6, 2, -3]]) / 7.0,
        np.array([[1, 4, 8], [4, 7, -4], [8, -4, 1]]) / 9.0,
    )
    groups = [_neighbourhoods(turn @ position) for turn in turns]
    apart = [_squared_distances(position[:, group]) for group in groups]
    reach = np.full(position.shape[1], np.inf, np.float32)
    for group, squared in zip(groups, apart, strict=True):
        nearest = min(REACH, group.shape[1] - 1)  # the first is the cell itself
        np.minimum.at(reach, group, np.partition(squared, nearest, axis=2)[..., nearest])
    found = []
    for group, squared in zip(groups, apart, strict=True):
        where, one, other = np.nonzero(squared <= 1.001 * reach[group][..., None])
        found.append(np.stack([group[where, one], group[where, other]]))
    return np.concatenate(found, axis=1)


def _neighbourhoods(position: NDArray[np.float64]) -> Int64:
    """[group, cell] halves of halves, each cut where it is widest; a cell of a smaller group may be there twice."""
    order, bounds = np.arange(position.shape[1]), np.array([0, position.shape[1]])
    while np.diff(bounds).max() > NEIGHBOURHOOD:
        group = np.repeat(np.arange(bounds.size - 1), np.diff(bounds))
        placed = position[:, order]
        extent = np.maximum.reduceat(placed, bounds[:-1], axis=1) - np.minimum.reduceat(placed, bounds[:-1], axis=1)
        along = placed[np.argmax(extent, axis=0)[group], np.arange(order.size)]
        order = order[np.argsort(4.0 * group + along)]  # groups stay together: all lies within -1 and 1
        bounds = np.sort(np.concatenate([bounds, (bounds[:-1] + bounds[1:]) // 2]))
    places = bounds[:-1, None] + np.arange(np.diff(bounds).max())
    groups: Int64 = order[np.minimum(places, bounds[1:, None] - 1)]
    return groups


def _squared_distances(position: NDArray[np.float32]) -> NDArray[np.float32]:
    """[group, cell, cell] of `position` [3, group, cell]."""
    squared = np.zeros((*position.shape[1:], position.shape[2]), np.float32)
    for along in position:
        squared += np.square(along[:, :, None] - along[:, None, :])
    return squared
