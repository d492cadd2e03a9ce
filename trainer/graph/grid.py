"""Points on the unit sphere: where they are, the area each stands for, and the meshes to compute on.

Cell areas, in steradians, by the first of these that fits the grid:

  rows of a Gaussian grid         Gaussian weight of the row, shared by its cells: exact for polynomials in
                                  sin(latitude) up to degree 2 rows - 1; 4 pi in all
  rows of evenly spaced cells     band between the midpoints to the next rows, times the cells' width in longitude;
                                  closed rows that reach the poles give 4 pi in all, a limited area its own extent
  any other cells                 spherical Voronoi: all that is nearer to the cell than to any other; 4 pi in all.
                                  Cells at the border of a limited area, whose Voronoi cell would run over the rest
                                  of the globe, take the mean of the 3 nearest inner cells instead

The order of the cells plays no part. Cells at one and the same place share its area.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import QhullError, SphericalVoronoi, cKDTree
from scipy.special import roots_legendre

from shardio import octahedral
from shardio.errors import DatasetError, PlanError

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# A vertex of the Voronoi tessellation is the centre of an empty circle. These are radii of such circles, in mean
# distances of a cell on the circle to its 6 nearest cells: 0.6 on lattices.
LIMITED_AREA_HOLE = 5.0  # beyond it, for all cells on it, the grid does not cover the globe; 100,000 random points: 2.3
BORDER_HOLE = 2.0  # beyond it, a cell of a grid with such holes is at its border

LARGEST_UNEVENNESS = 0.01  # of the spacing: GRIB rounds coordinates to 1e-6 degrees, some files to float32
LARGEST_GAUSSIAN_ERROR = 0.02  # of the row spacing; rows at even distances are off by 0.25


@dataclass(frozen=True)
class Frames:
    """Where points are, and which way is east and north there.

    Attributes: position, east, north: [points, 3], unit vectors.
    """

    position: Float64
    east: Float64
    north: Float64

    @staticmethod
    def of(latitudes: Float64, longitudes: Float64) -> Frames:
        """Frames of the points at latitudes, longitudes [points], degrees."""
        latitude, longitude = np.radians(latitudes), np.radians(longitudes)
        sin_lat, cos_lat, sin_lon, cos_lon = np.sin(latitude), np.cos(latitude), np.sin(longitude), np.cos(longitude)
        zero = np.zeros_like(sin_lat)
        return Frames(
            np.stack([cos_lat * cos_lon, cos_lat * sin_lon, sin_lat], axis=1),
            np.stack([-sin_lon, cos_lon, zero], axis=1),
            np.stack([-sin_lat * cos_lon, -sin_lat * sin_lon, cos_lat], axis=1),
        )

    def towards(self, points: Float64) -> Float64:
        """How to get from each place to one of points [points, 3]: [points, 3] chord length, way east, way north."""
        chord = points - self.position
        return np.stack([np.sqrt(dot(chord, chord)), dot(chord, self.east), dot(chord, self.north)], axis=1)

    def __getitem__(self, index: slice | Int64) -> Frames:
        return Frames(self.position[index], self.east[index], self.north[index])


def dot(a: Float64, b: Float64) -> Float64:
    """[points], scalar products of a and b [points, 3], added in one order wherever a point stands in the array."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


def check_places(latitudes: Float64, longitudes: Float64, first: int = 0) -> None:
    """DatasetError unless both are [cells], finite, and the latitudes within -90 to 90 degrees; cells from `first`."""
    if latitudes.ndim != 1 or latitudes.shape != longitudes.shape:
        raise DatasetError(
            f"latitudes {latitudes.shape} and longitudes {longitudes.shape} must both be [cells]: flatten them."
        )
    bad = np.flatnonzero(~(np.isfinite(longitudes) & (np.abs(latitudes) <= 90.0)))
    if bad.size:
        latitude, longitude = latitudes[bad[0]], longitudes[bad[0]]
        raise DatasetError(
            f"{bad.size} cells have no place on the globe, the first is cell {first + bad[0]}: latitude {latitude}, "
            f"longitude {longitude}. Give degrees, latitudes within -90 to 90, and leave out cells without any."
        )


# ------------------------------------------------------------------------------------------------------------- areas
def cell_areas(latitudes: Float64, longitudes: Float64) -> Float64:
    """True area of every cell of any grid, by the rules at the head of this file.

    Args: latitudes, longitudes: [cells], degrees, the whole grid; slice what comes back to cells/M.
    Returns: [cells] float64 steradians, 4 pi in all where the grid covers the globe.
    Raises: DatasetError if coordinates are not finite, or the cells are too few or on one line.
    """
    check_places(latitudes, longitudes)
    rows = _find_rows(latitudes, longitudes)
    return _areas_by_voronoi(latitudes, longitudes) if rows is None else _areas_by_rows(rows)


@dataclass(frozen=True)
class _Rows:
    latitudes: Float64  # [rows], south to north
    row: Int64  # [cells], row of each cell
    cells: Int64  # [rows], cells of each row
    width: Float64  # [rows], degrees of longitude of a cell


def _find_rows(latitudes: Float64, longitudes: Float64) -> _Rows | None:
    """The rows of equal latitude, if all cells are in rows with even spacing; else None."""
    row_latitudes, row, counts = np.unique(latitudes, return_inverse=True, return_counts=True)
    if not 2 <= row_latitudes.size <= latitudes.size / 2:
        return None
    east = np.mod(longitudes, 360.0)
    order = np.lexsort((east, row))
    width = np.empty(row_latitudes.size)
    for i, members in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        found = _row_width(east[members], row_latitudes[i])
        if found is None:
            return None
        width[i] = found
    return _Rows(row_latitudes, row, counts, width)


def _row_width(east: Float64, latitude: float) -> float | None:
    """Degrees of longitude of each cell of a row, east [cells of the row] ascending; None if they are uneven."""
    if abs(latitude) > 90.0 - 1e-9:  # the pole: all are at one place, and share it
        return 360.0 / east.size
    if east.size < 3:
        return None
    gaps = np.diff(east, append=east[0] + 360.0)
    widest = gaps.argmax()  # in a limited area, the way round the globe
    others = np.delete(gaps, widest)
    width = float(others.mean())
    if np.abs(others - width).max() > LARGEST_UNEVENNESS * width:
        return None
    closed = gaps[widest] - width <= LARGEST_UNEVENNESS * width
    return 360.0 / east.size if closed else width


def _areas_by_rows(rows: _Rows) -> Float64:
    weights = _gaussian_weights(rows)
    if weights is None:
        weights = np.diff(np.sin(np.radians(_row_edges(rows.latitudes))))
    area: Float64 = weights * np.radians(rows.width)
    return area[rows.row]


def _gaussian_weights(rows: _Rows) -> Float64 | None:
    """[rows], 2 in all, if these are the closed rows of a Gaussian grid; else None."""
    count = rows.latitudes.size
    if np.abs(rows.width * rows.cells - 360.0).max() > 1e-9:
        return None
    sines, weights = roots_legendre(count)
    error = np.abs(np.degrees(np.arcsin(sines)) - rows.latitudes).max()
    return 2.0 * weights / weights.sum() if error < LARGEST_GAUSSIAN_ERROR * 180.0 / count else None


def _row_edges(latitudes: Float64) -> Float64:
    """[rows + 1] degrees: midpoints; beyond the last row half a spacing, or the pole if no further row would fit."""
    south, north = latitudes[1] - latitudes[0], latitudes[-1] - latitudes[-2]
    first = -90.0 if latitudes[0] - south < -90.0 else latitudes[0] - south / 2
    last = 90.0 if latitudes[-1] + north > 90.0 else latitudes[-1] + north / 2
    return np.concatenate([[first], (latitudes[1:] + latitudes[:-1]) / 2, [last]])


def _areas_by_voronoi(latitudes: Float64, longitudes: Float64) -> Float64:
    position = Frames.of(latitudes, longitudes).position
    key = np.round(position, 9) + 0.0  # one place written in two ways, as 0 and 360 degrees
    _, first, site, cells = np.unique(key, axis=0, return_index=True, return_inverse=True, return_counts=True)
    sites = position[first]
    try:
        voronoi = SphericalVoronoi(sites, threshold=1e-9)
        area: Float64 = voronoi.calculate_areas()
    except (QhullError, ValueError) as error:
        raise DatasetError(
            f"{len(sites)} different places do not span an area: they are fewer than 4, or on one circle. "
            "Use a grid that extends in latitude and longitude."
        ) from error
    border = _border(sites, voronoi)
    if border.all():
        raise DatasetError(
            f"none of {len(sites)} different places has others on all sides, so that no cell has an area. "
            "Use a grid of at least 3 rows of 3 cells."
        )
    if border.any():
        inner = np.flatnonzero(~border)
        nearest = cKDTree(sites[inner]).query(sites[border], k=np.arange(1, min(3, inner.size) + 1))[1]
        area[border] = area[inner][nearest].mean(axis=1)
    return (area / cells)[site]


def _border(sites: Float64, voronoi: SphericalVoronoi) -> NDArray[np.bool_]:
    """[sites], those at the border of a limited area; none where the sites cover the globe."""
    neighbours = cKDTree(sites).query(sites, k=np.arange(2, min(7, len(sites)) + 1))[0]
    spacing = neighbours.mean(axis=1)
    corners = np.array([len(region) for region in voronoi.regions])
    vertex, site = np.concatenate(voronoi.regions), np.repeat(np.arange(len(sites)), corners)
    radius = np.linalg.norm(voronoi.vertices[vertex] - sites[site], axis=1)
    coarsest = np.zeros(len(voronoi.vertices))
    np.maximum.at(coarsest, vertex, spacing[site])
    if (radius <= LIMITED_AREA_HOLE * coarsest[vertex]).all():
        return np.zeros(len(sites), bool)
    return np.bincount(site, radius > BORDER_HOLE * spacing[site], len(sites)) > 0


# ------------------------------------------------------------------------------------------------------------ meshes
@dataclass(frozen=True)
class Mesh:
    """A quasi-uniform mesh on the globe, to compute on.

    Attributes:
      name: `oN` or `icoR`.
      latitudes, longitudes: [nodes], degrees.
      levels: of an icosahedron, the edges of refinement 0 to R, each [2, edges], both ways; none of an octahedral grid.
    """

    name: str
    latitudes: Float64
    longitudes: Float64
    levels: tuple[Int64, ...] = ()

    @property
    def spacing(self) -> float:
        """Side of the square that has a node's mean area, in radians."""
        return float(np.sqrt(4.0 * np.pi / self.latitudes.size))


def mesh_nodes(family: str, size: int) -> int:
    """Nodes of the mesh `o<size>` or `ico<size>`."""
    return 4 * size * (size + 9) if family == "o" else 10 * 4**size + 2


def build_mesh(name: str) -> Mesh:
    """The mesh of that name: `oN`, octahedral with N rows to the equator, or `icoR`, icosahedron refined R times.

    Raises: PlanError if there is no mesh of that name.
    """
    match = re.fullmatch(r"(o)([1-9][0-9]*)|(ico)(0|[1-9][0-9]?)", name)
    if match is None:
        raise PlanError(
            f"{name!r} names no hidden mesh. Use o1, o2, ..., octahedral (o96 has 40,320 nodes), or "
            "ico0, ico1, ..., an icosahedron refined so often (ico6 has 40,962 nodes)."
        )
    if match[1]:
        latitudes, longitudes, _ = octahedral(name)
        return Mesh(name, latitudes, longitudes)
    return _icosahedron(name, int(match[4]))


def _icosahedron(name: str, refinements: int) -> Mesh:
    """Each refinement cuts every triangle into four, and pushes the new nodes out to the sphere."""
    ring, east = np.arange(5), np.linspace(0.0, 288.0, 5)
    ends, corner = (
        np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]),
        float(np.degrees(np.arctan(0.5))),
    )  # latitude of the two rings
    upper = Frames.of(np.full(5, corner), east).position
    lower = Frames.of(np.full(5, -corner), east + 36.0).position
    nodes, after = np.concatenate([ends, upper, lower]), (ring + 1) % 5
    north, south = np.zeros(5, int), np.ones(5, int)
    rings = [(north, 2 + ring, 2 + after), (2 + ring, 7 + ring, 2 + after)]
    rings += [(7 + ring, 7 + after, 2 + after), (south, 7 + after, 7 + ring)]
    faces = np.concatenate([np.stack(triangles, axis=1) for triangles in rings])
    levels = []
    for level in range(refinements + 1):
        sides = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
        edges, middle = np.unique(sides, axis=0, return_inverse=True)
        levels.append(np.concatenate([edges, edges[:, ::-1]]).T)
        if level < refinements:
            sums = nodes[edges[:, 0]] + nodes[edges[:, 1]]
            (a, b, c), (ab, bc, ca) = faces.T, (len(nodes) + middle.reshape(-1, 3)).T
            quarters = [(a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca)]
            faces = np.concatenate([np.stack(quarter, axis=1) for quarter in quarters])
            nodes = np.concatenate([nodes, sums / np.linalg.norm(sums, axis=1, keepdims=True)])
    x, y, z = nodes.T
    latitudes, longitudes = np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x)) % 360.0
    return Mesh(name, latitudes, longitudes, tuple(levels))
