"""The closed forms are held to the equations they solve, by finite differences on other code paths."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardio.errors import ShardioError
from shardio.source.synthetic import (
    EARTH_RADIUS,
    EARTH_ROTATION,
    SOLID_BODY_ROTATION,
    RossbyWaves,
    gaussian_latitudes,
    octahedral,
    variable_units,
)

PSI, VO, U, V, T, LSM, LATITUDE = range(7)
STEP = 1e-3  # radians; central differences of degree-8 harmonics are then good to about 1e-5
TIME_STEP = 100.0  # s; the fastest wave turns by less than 5e-3 radians
SOME_TIME = 1.0e6  # s
SEEDS = (0, 1, 2)


def evaluate(latitudes, longitudes, time_seconds=SOME_TIME, seed=0, dtype=np.float64):
    """All variables [7, ...] at cells of any shape, given in radians."""
    shape = np.broadcast_shapes(np.shape(latitudes), np.shape(longitudes))
    degrees = [np.degrees(np.broadcast_to(x, shape)).ravel() for x in (latitudes, longitudes)]
    out = np.full((7, degrees[0].size), np.nan, dtype)
    RossbyWaves(*degrees, seed).fields(time_seconds, slice(None), out)
    return out.reshape(7, *shape)


def some_cells(count=200):
    """Irregular cells, in radians, away from the poles where finite differences in longitude fail."""
    random = np.random.default_rng(42)
    return random.uniform(-1.4, 1.4, count), random.uniform(0.0, 2.0 * np.pi, count)


def small_against(residual, terms, tolerance):
    """Whether a sum that should vanish is small against the largest of its terms."""
    return np.abs(residual).max() < tolerance * max(np.abs(term).max() for term in terms)


@pytest.mark.parametrize("rows_to_equator", [1, 2, 3, 16, 48])
def test_gaussian_latitudes_equal_leggauss(rows_to_equator):
    roots = np.polynomial.legendre.leggauss(2 * rows_to_equator)[0][::-1]
    latitudes = gaussian_latitudes(rows_to_equator)
    assert np.abs(latitudes - np.degrees(np.arcsin(roots))).max() < 1e-12


def test_gaussian_latitudes_of_o2560_descend_and_start_at_the_first_bessel_zero():
    latitudes = gaussian_latitudes(2560)
    assert (np.diff(latitudes) < 0).all()
    assert (latitudes == -latitudes[::-1]).all()
    # Next to the pole, P_n(cos(theta)) is J_0((n + 1/2) theta) up to O(1 / n^2).
    first_zero_of_bessel_j0 = 2.404825557695773
    assert np.radians(90 - latitudes[0]) * 5120.5 == pytest.approx(first_zero_of_bessel_j0, rel=1e-7)


@pytest.mark.parametrize(("name", "cells"), [("o1", 40), ("o96", 40_320), ("O96", 40_320), ("o1280", 6_599_680)])
def test_octahedral_grid_has_4_n_n_plus_9_cells(name, cells):
    latitudes, longitudes, field_rows = octahedral(name)
    assert latitudes.shape == longitudes.shape == (cells,)
    assert field_rows.sum() == cells


def test_octahedral_rows_run_north_to_south_and_eastward_from_zero():
    latitudes, longitudes, field_rows = octahedral("o3")
    assert field_rows.tolist() == [20, 24, 28, 28, 24, 20]
    starts = np.cumsum(field_rows) - field_rows
    assert (longitudes[starts] == 0).all()
    assert longitudes.max() < 360
    assert (latitudes[starts] == gaussian_latitudes(3)).all()
    for start, count in zip(starts, field_rows, strict=True):
        assert np.allclose(np.diff(longitudes[start : start + count]), 360 / count)
        assert np.ptp(latitudes[start : start + count]) == 0


@pytest.mark.parametrize("name", ["n96", "o", "o0", "96", "o96.5", "o-4", " o96", ""])
def test_bad_grid_name_is_refused_with_a_remedy(name):
    with pytest.raises(ShardioError, match=r"names no octahedral grid.*as in o96"):
        octahedral(name)


@pytest.fixture(scope="module")
def o48():
    latitudes, longitudes, _ = octahedral("o48")  # 10,944 cells: two blocks
    waves = RossbyWaves(latitudes, longitudes, seed=5)
    whole = np.empty((7, latitudes.size))  # float64, as rounding to float32 would hide differences
    waves.fields(SOME_TIME, slice(None), whole)
    return waves, whole


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 10_944), max_size=5))
def test_bits_do_not_depend_on_how_cells_are_cut(o48, cuts):
    waves, whole = o48
    edges = [0, *sorted(cuts), whole.shape[1]]
    pieces = np.full_like(whole, np.nan)
    for first, last in pairwise(edges):
        waves.fields(SOME_TIME, slice(first, last), pieces[:, first:last])
    assert pieces.tobytes() == whole.tobytes()


def test_bits_of_one_cell_do_not_depend_on_the_range_around_it(o48):
    waves, whole = o48
    for cell in (0, 1, 7, 8191, 8192, 10_943):
        for first, last in ((cell, cell + 1), (max(cell - 3, 0), cell + 1), (max(cell - 64, 0), cell + 5)):
            last = min(last, whole.shape[1])
            piece = np.empty((7, last - first))
            waves.fields(SOME_TIME, slice(first, last), piece)
            assert (piece[:, cell - first] == whole[:, cell]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_wind_is_the_numerical_derivative_of_the_stream_function(seed):
    lat, lon = some_cells()
    fields = evaluate(lat, lon, seed=seed)
    north, south = (evaluate(lat + d, lon, seed=seed)[PSI] for d in (STEP, -STEP))
    east, west = (evaluate(lat, lon + d, seed=seed)[PSI] for d in (STEP, -STEP))
    u = -(north - south) / (2 * STEP * EARTH_RADIUS)
    v = (east - west) / (2 * STEP * EARTH_RADIUS * np.cos(lat))
    assert small_against(u - fields[U], [u], tolerance=3e-5)
    assert small_against(v - fields[V], [v], tolerance=3e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_vorticity_is_the_numerical_laplacian_of_the_stream_function(seed):
    lat, lon = some_cells()
    centre = evaluate(lat, lon, seed=seed)
    north, south = (evaluate(lat + d, lon, seed=seed)[PSI] for d in (STEP, -STEP))
    east, west = (evaluate(lat, lon + d, seed=seed)[PSI] for d in (STEP, -STEP))
    along_meridian = np.cos(lat + STEP / 2) * (north - centre[PSI])
    along_meridian -= np.cos(lat - STEP / 2) * (centre[PSI] - south)
    along_circle = (east - 2 * centre[PSI] + west) / np.cos(lat)
    laplacian = (along_meridian + along_circle) / (np.cos(lat) * (STEP * EARTH_RADIUS) ** 2)
    assert small_against(laplacian - centre[VO], [laplacian], tolerance=3e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_linearised_vorticity_equation_holds(seed):
    lat, lon = some_cells()
    advected, beta_v = material_change(VO, lat, lon, seed), evaluate(lat, lon, seed=seed)[V]
    beta_v *= 2 * (EARTH_ROTATION + SOLID_BODY_ROTATION) * np.cos(lat) / EARTH_RADIUS
    assert small_against(advected + beta_v, [beta_v], tolerance=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_tracer_equation_holds(seed):
    lat, lon = some_cells()
    circle = np.arange(16) * (2 * np.pi / 16)  # 16 points average out all orders up to 8, and more
    north, south = (evaluate((lat + d)[:, None], circle, seed=seed)[T].mean(axis=1) for d in (STEP, -STEP))
    mean_gradient = (north - south) / (2 * STEP * EARTH_RADIUS)
    advected, lifted = material_change(T, lat, lon, seed), evaluate(lat, lon, seed=seed)[V] * mean_gradient
    assert small_against(advected + lifted, [lifted], tolerance=1e-4)


def material_change(variable, lat, lon, seed):
    """d/dt + omega0 d/dlongitude of one variable, by central differences."""
    later, earlier = (evaluate(lat, lon, SOME_TIME + d, seed)[variable] for d in (TIME_STEP, -TIME_STEP))
    east, west = (evaluate(lat, lon + d, seed=seed)[variable] for d in (STEP, -STEP))
    return (later - earlier) / (2 * TIME_STEP) + SOLID_BODY_ROTATION * (east - west) / (2 * STEP)


def test_waves_are_distinct_and_within_the_promised_degrees():
    for seed in range(50):
        waves = RossbyWaves(np.zeros(1), np.zeros(1), seed).waves
        assert len({(wave.degree, wave.order) for wave in waves}) == 6
        assert all(1 <= wave.order <= wave.degree and 2 <= wave.degree <= 8 for wave in waves)


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_square_wind_is_that_of_six_waves_of_3_to_5_metres_per_second(seed):
    roots, weights = np.polynomial.legendre.leggauss(24)
    lat, circle = np.arcsin(roots)[:, None], np.arange(24) * (2 * np.pi / 24)
    fields = evaluate(lat, circle, seed=seed)
    departure = fields[U] - EARTH_RADIUS * SOLID_BODY_ROTATION * np.cos(lat)
    mean_square = ((departure**2 + fields[V] ** 2).mean(axis=1) * weights).sum() / 2
    waves = RossbyWaves(np.zeros(1), np.zeros(1), seed).waves
    winds = [np.sqrt(-wave.laplacian) * wave.amplitude for wave in waves]
    assert all(3 <= wind <= 5 for wind in winds)
    assert mean_square == pytest.approx(sum(wind**2 for wind in winds), rel=1e-12)


def test_same_seed_gives_same_fields_and_another_seed_others():
    lat, lon = some_cells()
    first, again, other = (evaluate(lat, lon, seed=seed) for seed in (7, 7, 8))
    assert first.tobytes() == again.tobytes()
    for variable in (PSI, VO, U, V, T, LSM):
        assert not np.array_equal(first[variable], other[variable])


def test_constants_are_constant_in_time_and_nothing_else_is():
    lat, lon = some_cells()
    now, later = (evaluate(lat, lon, time, dtype=np.float32) for time in (0.0, 6 * 3600.0))
    for k, name in enumerate(RossbyWaves.variables):
        assert np.array_equal(now[k], later[k]) == variable_units[name]["constant"]
    assert np.array_equal(now[LATITUDE], np.degrees(lat).astype(np.float32))


@pytest.mark.parametrize("seed", range(10))
def test_values_are_plausible(seed):
    latitudes, longitudes, _ = octahedral("o16")
    out = evaluate(np.radians(latitudes), np.radians(longitudes), 1e9, seed, np.float32)
    assert 15 < np.abs(out[[U, V]]).max() < 100
    assert 200 < out[T].min() < out[T].max() < 330
    assert out[LSM].min() == 0
    assert out[LSM].max() == 1
    assert 0.1 < np.average(out[LSM], weights=np.cos(np.radians(latitudes))) < 0.6


def test_poles_are_finite():
    lon = np.linspace(0, 2 * np.pi, 7)
    for pole in (np.pi / 2, -np.pi / 2):
        at, near = evaluate(pole, lon), evaluate(pole * (1 - 1e-9), lon)
        assert np.isfinite(at).all()
        assert np.allclose(at[U:T], near[U:T], atol=1e-5)


def test_every_variable_has_its_metadata():
    assert RossbyWaves.variables == ("psi", "vo", "u", "v", "t", "lsm", "latitude")
    for metadata in variable_units.values():
        assert set(metadata) == {"units", "long_name", "constant"}


def test_wrong_shapes_are_refused_with_the_right_ones(o48):
    waves, whole = o48
    with pytest.raises(ShardioError, match=r"\(7, 5\)"):
        waves.fields(0.0, slice(0, 5), whole[:, :4])
    with pytest.raises(ShardioError, match="without a step"):
        waves.fields(0.0, slice(0, 8, 2), whole[:, :4])
    with pytest.raises(ShardioError, match="one of each per cell"):
        RossbyWaves(np.zeros(3), np.zeros(4))
