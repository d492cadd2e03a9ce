from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial import cKDTree

from shardio.errors import DatasetError, PlanError
from shardio.source.synthetic import gaussian_latitudes, octahedral
from trainer.graph.grid import Frames, build_mesh, cell_areas, mesh_nodes

Grid = tuple[np.ndarray, np.ndarray]
GLOBE = 4.0 * np.pi


def product(latitudes: np.ndarray, longitudes: np.ndarray) -> Grid:
    """Cells of all pairs, row by row."""
    rows, columns = np.meshgrid(latitudes, longitudes, indexing="ij")
    return rows.ravel(), columns.ravel()


def irregular(cells: int, seed: int = 0) -> Grid:
    random = np.random.default_rng(seed)
    return np.degrees(np.arcsin(random.uniform(-1, 1, cells))), random.uniform(-180, 180, cells)


def with_poles() -> Grid:
    return product(np.arange(90, -91, -2.5), np.arange(0, 360, 2.5))


def without_poles() -> Grid:
    return product(np.arange(-88.5, 90, 3), np.arange(-180, 180, 3))


def gaussian() -> Grid:
    return product(gaussian_latitudes(16), np.arange(0, 360, 5.625))


def turned(latitudes: np.ndarray, longitudes: np.ndarray) -> Grid:
    """The same cells after a rotation of the globe, which leaves no rows."""
    rotation, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))
    x, y, z = (Frames.of(latitudes, longitudes).position @ rotation).T
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))


def lambert(rows: int, columns: int, spacing: float) -> tuple[Grid, np.ndarray]:
    """A square lattice on the plane that touches the globe at 60 N, stereographically; and its exact cell areas."""
    y, x = (axis.ravel() for axis in np.mgrid[:rows, :columns] * spacing)
    x, y = x - x.mean(), y - y.mean()
    at = Frames.of(np.array([60.0]), np.array([15.0]))
    square = (x**2 + y**2)[:, None]
    plane = x[:, None] * at.east + y[:, None] * at.north
    points = (plane + (1 - square / 4) * at.position) / (1 + square / 4)
    latitudes, longitudes = np.degrees(np.arcsin(points[:, 2])), np.degrees(np.arctan2(points[:, 1], points[:, 0]))
    return (latitudes, longitudes), spacing**2 / (1 + square[:, 0] / 4) ** 2


@pytest.mark.parametrize(
    "grid",
    [
        lambda: octahedral("o16")[:2],
        gaussian,
        with_poles,
        without_poles,
        lambda: irregular(2000),
        lambda: irregular(30),
        lambda: turned(*octahedral("o8")[:2]),
        lambda: turned(*with_poles()),
    ],
    ids=["octahedral", "gaussian", "poles", "no-poles", "irregular", "few", "turned-octahedral", "turned-poles"],
)
def test_areas_of_a_global_grid_are_positive_and_sum_to_4_pi(grid: Callable[[], Grid]) -> None:
    areas = cell_areas(*grid())
    assert areas.dtype == np.float64
    assert (areas > 0).all()
    assert abs(areas.sum() / GLOBE - 1) < 1e-12


@pytest.mark.parametrize("cells", [gaussian(), octahedral("o16")[:2]], ids=["regular", "octahedral"])
def test_gaussian_areas_integrate_polynomials_in_sine_of_latitude_exactly(cells: Grid) -> None:
    sine, areas = np.sin(np.radians(cells[0])), cell_areas(*cells)
    for degree in range(64):  # 32 rows: exact up to degree 63
        exact = GLOBE / (degree + 1) if degree % 2 == 0 else 0.0
        assert abs(np.vdot(areas, sine**degree) - exact) < 1e-12
    assert abs(np.vdot(areas, sine**64) - GLOBE / 65) > 1e-20


@pytest.mark.parametrize("cells", [with_poles(), without_poles()], ids=["poles", "no-poles"])
def test_areas_of_even_rows_are_the_exact_bands(cells: Grid) -> None:
    latitudes, longitudes = cells
    spacing = np.diff(np.unique(latitudes))[0]
    north, south = (np.clip(latitudes + half, -90, 90) for half in (spacing / 2, -spacing / 2))
    bands = np.sin(np.radians(north)) - np.sin(np.radians(south))
    exact = bands * 2 * np.pi / np.unique(longitudes).size
    np.testing.assert_allclose(cell_areas(*cells), exact, rtol=1e-11)


def test_voronoi_areas_differ_from_exact_bands_by_2e_4_at_most() -> None:
    # Great circles, not parallels, part neighbours in latitude: that is the 2e-4, at 2.5 degrees.
    np.testing.assert_allclose(cell_areas(*turned(*with_poles())), cell_areas(*with_poles()), rtol=2e-4)


def test_areas_do_not_depend_on_the_order_of_cells_or_on_full_turns() -> None:
    for latitudes, longitudes in (octahedral("o8")[:2], irregular(500), with_poles()):
        order = np.random.default_rng(1).permutation(latitudes.size)
        areas = cell_areas(latitudes, longitudes)
        assert np.array_equal(cell_areas(latitudes[order], longitudes[order]), areas[order])
        np.testing.assert_allclose(cell_areas(latitudes, longitudes - 360), areas, rtol=1e-7)


def test_rounded_coordinates_are_still_rows() -> None:
    latitudes, longitudes, _ = octahedral("o32")
    rounded = latitudes.astype(np.float32).astype(float), longitudes.astype(np.float32).astype(float)
    assert np.array_equal(cell_areas(*rounded), cell_areas(latitudes, longitudes))


def test_a_repeated_meridian_shares_the_area_of_its_cells() -> None:
    latitudes, longitudes = product(np.arange(-80, 81, 10.0), np.arange(0, 361, 10.0))
    areas = cell_areas(latitudes, longitudes)
    assert abs(areas.sum() / GLOBE - 1) < 1e-12
    np.testing.assert_allclose(2 * areas[longitudes == 0], areas[longitudes == 10], rtol=1e-9)
    np.testing.assert_allclose(areas[longitudes == 0], areas[longitudes == 360], rtol=1e-12)


def test_a_limited_area_in_rows_has_the_area_of_its_extent() -> None:
    areas = cell_areas(*product(np.arange(40, 60, 0.5), np.arange(-10, 20, 0.25)))
    exact = np.radians(30) * (np.sin(np.radians(59.75)) - np.sin(np.radians(39.75)))
    assert abs(areas.sum() / exact - 1) < 1e-12


def test_a_limited_area_without_rows_has_no_giant_cells_at_its_border() -> None:
    grid, exact = lambert(30, 40, spacing=0.005)
    error = np.abs(cell_areas(*grid) / exact - 1).reshape(30, 40)
    assert error[1:-1, 1:-1].max() < 1e-5
    assert error.max() < 2e-3


def test_a_limited_area_of_scattered_cells_has_about_the_area_of_its_disc() -> None:
    latitudes, longitudes = irregular(20000)
    inside = latitudes > 50
    areas = cell_areas(latitudes[inside], longitudes[inside])
    exact = 2 * np.pi * (1 - np.sin(np.radians(50)))
    assert abs(areas.sum() / exact - 1) < 0.02
    assert areas.max() < 10 * areas.mean()


@pytest.mark.parametrize(
    ("latitudes", "longitudes", "message"),
    [
        ([0.0, np.nan], [0.0, 1.0], "1 cells have no place on the globe, the first is cell 1"),
        ([91.0, 0.0], [0.0, 1.0], "within -90 to 90"),
        ([[0.0]], [[0.0]], "flatten them"),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 90.0, 180.0, 270.0], "on one circle"),
        ([1.0, 2.0, 3.5], [0.0, 1.0, 0.5], "fewer than 4"),
        ([1.0, 1.1, 2.2, 2.0], [0.0, 1.0, 0.1, 1.2], "at least 3 rows of 3 cells"),
    ],
)
def test_cells_without_an_area_are_refused(latitudes: list, longitudes: list, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        cell_areas(np.array(latitudes), np.array(longitudes))


def test_frames_are_right_handed_and_north_is_towards_the_pole() -> None:
    frames = Frames.of(*irregular(50))
    np.testing.assert_allclose(np.cross(frames.east, frames.north), frames.position, atol=1e-15)
    assert (frames.north[:, 2] > 0).all()
    assert np.abs(frames.east[:, 2]).max() == 0


@pytest.mark.parametrize("refinements", range(5))
def test_icosahedron_has_even_nodes_and_the_edges_of_its_triangles(refinements: int) -> None:
    mesh = build_mesh(f"ico{refinements}")
    position = Frames.of(mesh.latitudes, mesh.longitudes).position
    assert len(position) == mesh_nodes("ico", refinements)
    for level, edges in enumerate(mesh.levels):
        assert edges.shape == (2, 60 * 4**level)
        assert np.array_equal(np.unique(edges, axis=1), np.unique(edges[::-1], axis=1))
        lengths = np.linalg.norm(position[edges[0]] - position[edges[1]], axis=1)
        assert lengths.max() < 1.25 * lengths.min()
    degrees = np.bincount(mesh.levels[-1][1])
    assert (np.sort(degrees) == [5] * 12 + [6] * (len(position) - 12)).all()
    closest = cKDTree(position).query(position, k=2)[0][:, 1]
    assert abs(closest.mean() / mesh.spacing - 1) < 0.05


def test_octahedral_mesh_is_the_octahedral_grid() -> None:
    mesh = build_mesh("o5")
    assert mesh.latitudes.size == mesh_nodes("o", 5)
    assert np.array_equal(mesh.latitudes, octahedral("o5")[0])


@pytest.mark.parametrize("name", ["", "o", "o0", "O8", "ico", "ico-1", "n32", "ico4 "])
def test_unknown_mesh_is_refused_with_the_names_that_there_are(name: str) -> None:
    with pytest.raises(PlanError, match=r"names no hidden mesh. Use o1, o2"):
        build_mesh(name)
