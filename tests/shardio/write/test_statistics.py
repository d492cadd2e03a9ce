"""Statistics are those of exact sums: the same to the bit however the data are cut, and in whatever order they come."""

import math
import shutil
import warnings
from fractions import Fraction

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given
from hypothesis import strategies as st

from shardio import STATISTICS
from shardio.write import statistics

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
GRIDS = {"spread": 20, "wide": 60, "everything": 280}


def exact(values):
    """Mean and standard deviation of finite numbers, in fractions, rounded once."""
    fractions = [Fraction(float(value)) for value in values]
    mean = sum(fractions) / len(fractions)
    variance = sum((value - mean) ** 2 for value in fractions) / len(fractions)
    return math.fsum(map(float, values)) / len(values), math.sqrt(variance)


def found(*parts):
    """Statistics of one variable, given in parts."""
    merged = statistics.merge(statistics.moments(np.array(part, np.float32)[None]) for part in parts)
    return {name: value[0] for name, value in statistics.finish(merged).items()}


def bits(values):
    return {name: np.asarray(value, np.float64).tobytes() for name, value in values.items()}


def expected(values):
    """[variable, n] in float64."""
    wide = values.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reducers = {"mean": np.nanmean, "stdev": np.nanstd, "minimum": np.nanmin, "maximum": np.nanmax}
        return {name: reduce(wide, axis=1) for name, reduce in reducers.items()}


def assert_equal(found, values, tolerance=1e-12):
    for name, wanted in expected(values).items():
        np.testing.assert_allclose(found[name], wanted, rtol=tolerance, atol=0, err_msg=name)


def numbers(spread, size, seed=0):
    """float32 of magnitudes over `spread` powers of 2, of both signs, some of them 0."""
    random = np.random.default_rng(seed)
    exponents = random.integers(-min(spread // 2, 149), min(-(-spread // 2), 127) + 1, size)
    values = np.ldexp(random.standard_normal(size), exponents).clip(-3e38, 3e38)
    values[random.random(size) < 0.1] = 0
    return values.astype(np.float32)


@given(st.lists(FLOAT32, min_size=1, max_size=40))
@example([1e30, 1e-30, -1e30])
@example([3.4028234663852886e38, 1.401298464324817e-45, -3.4028234663852886e38])
@example([0.0, -0.0])
def test_mean_is_that_of_fsum_and_stdev_loses_nothing(values):
    values = np.array(values, np.float32).tolist()
    mean, stdev = exact(values)
    assert found(values) == {"mean": mean, "stdev": stdev, "minimum": min(values), "maximum": max(values)}


@pytest.mark.parametrize("spread", [1, 20, 22, 23, 60, 280])
@pytest.mark.parametrize("size", [statistics.BLOCK + 3, statistics.DOT, statistics.DOT - 1])
def test_sums_of_blocks_are_exact(spread, size):
    values = numbers(spread, size, seed=spread)
    of = statistics.moments(values[None])
    fractions = [Fraction(float(value)) for value in values]
    assert of.total[0] == sum(fractions) * 2**statistics.UNIT
    assert of.squares[0] == sum(value**2 for value in fractions) * 4**statistics.UNIT


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("low", [2.0**-20, 2.0**-21, 0.5])
def test_whole_blocks_of_the_largest_numbers_are_exact(sign, low):
    """The most that a block of integers may have to hold, and numbers at the edge of what it holds."""
    largest = np.float32(1 - 2**-24)
    values = np.full(statistics.BLOCK, sign * largest, np.float32)
    values[0] = np.nextafter(np.float32(low), np.float32(0))
    of = statistics.moments(values[None])
    first, many = Fraction(float(values[0])), Fraction(float(largest))
    assert of.total[0] == (first + sign * many * (len(values) - 1)) * 2**statistics.UNIT
    assert of.squares[0] == (first**2 + many**2 * (len(values) - 1)) * 4**statistics.UNIT


@given(st.integers(0, 2**31), st.sampled_from(sorted(GRIDS)), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_every_cut_and_order_gives_the_same_bits(seed, kind, sizes):
    random = np.random.default_rng(seed)
    values = numbers(GRIDS[kind], sum(sizes), seed)
    values[random.random(len(values)) < 0.3] = np.nan
    whole = bits(found(values))
    assert bits(found(*np.split(values, np.cumsum(sizes)[:-1]))) == whole
    assert bits(found(random.permutation(values))) == whole


def test_a_large_mean_does_not_drown_a_small_spread():
    random = np.random.default_rng(0)
    values = (300_000 + random.standard_normal((1, 200_003))).astype(np.float32)
    assert_equal(statistics.finish(statistics.moments(values)), values)


@pytest.mark.parametrize("values", [[0.0, -0.0], [-0.0, 0.0, 1.0], [-1.0, 0.0, -0.0]])
def test_the_sign_of_zero_does_not_depend_on_the_order(values):
    assert bits(found(values)) == bits(found(values[::-1])) == bits(found(*([value] for value in values)))
    assert not any(np.signbit(value) for value in found(values).values() if value == 0)


def test_nan_is_ignored_and_counted():
    values = np.array([[1, np.nan, 3], [np.nan, np.nan, np.nan], [0, 0, 0]], np.float32)
    of = statistics.moments(values)
    assert of.count.tolist() == [2, 0, 3]
    assert_equal(statistics.finish(of), values)


def test_signalling_nan_is_nan_without_a_warning():
    values = np.array([[1, 0, 3]], np.float32)
    values.view(np.uint32)[0, 1] = 0x7F800001
    assert statistics.moments(values).count.tolist() == [2]


@pytest.mark.parametrize(
    ("values", "mean"),
    [([1, np.inf, 2], np.inf), ([1, -np.inf, np.nan], -np.inf), ([np.inf, -np.inf], np.nan), ([np.inf] * 2, np.inf)],
)
def test_infinite_values_make_an_infinite_mean_and_no_stdev(values, mean):
    for parts in ([values], [values[:1], values[1:]], [values[1:], values[:1]]):
        of = found(*parts)
        np.testing.assert_equal(of["mean"], mean)
        assert math.isnan(of["stdev"])
        assert (of["minimum"], of["maximum"]) == (np.nanmin(values), np.nanmax(values))


def test_moments_are_the_same_after_a_round_through_plain_numbers():
    of = statistics.moments(np.array([[1e30, 1e-30], [np.nan, np.nan], [-np.inf, 1]], np.float32))
    again = statistics.Moments.from_json(of.to_json())
    for name in ("count", "total", "squares", "low", "high"):
        assert getattr(again, name).tolist() == getattr(of, name).tolist()


@pytest.fixture(scope="module")
def netcdf(tmp_path_factory):
    """A path, and what it holds [variable, n]: a narrow field, one around 0, one of every magnitude, one with NaN."""
    path = tmp_path_factory.mktemp("netcdf") / "a.nc"
    random = np.random.default_rng(0)
    dates, latitudes, longitudes = 24, np.linspace(80, -80, 9), np.arange(0, 360, 15.0)
    shape = (dates, len(latitudes), len(longitudes))
    values = {
        "t": 280 + 20 * random.standard_normal(shape),
        "u": 10 * random.standard_normal(shape),
        "tp": numbers(120, math.prod(shape)).reshape(shape),
        "sst": np.where(random.random(shape) < 0.4, np.nan, 280 + random.standard_normal(shape)),
    }
    values = {name: field.astype(np.float32) for name, field in values.items()}
    coordinates = {
        "time": np.datetime64("2020-01-01") + 6 * np.arange(dates) * np.timedelta64(1, "h"),
        "latitude": ("latitude", latitudes, {"units": "degrees_north"}),
        "longitude": ("longitude", longitudes, {"units": "degrees_east"}),
    }
    fields = {name: (("time", "latitude", "longitude"), field) for name, field in values.items()}
    chunks = {name: {"chunksizes": (24, 3, len(longitudes))} for name in fields}
    xr.Dataset(fields, coordinates).to_netcdf(path, encoding=chunks)
    return path, np.stack([field.ravel() for field in values.values()])


@pytest.mark.parametrize(
    "cut",
    [
        {"grid_chunks": 1},
        {"grid_chunks": 4},
        {"grid_chunks": 7, "zarr_format": 2},
        {"grid_chunks": 7, "workers": 2},
        {"grid_chunks": 4, "order": "compact"},
        {"grid_chunks": 7, "max_memory": 100_000},
    ],
    ids=str,
)
def test_netcdf_gives_the_same_bits_for_every_cut(cut, netcdf, rechunk, opened, tmp_path):
    path, values = netcdf
    rechunk(path, tmp_path / "b.zarr", **cut)
    arrays = opened(tmp_path / "b.zarr")[0]
    for variable, row in enumerate(values):
        row = row[~np.isnan(row)]
        mean, stdev = exact(row)
        assert [arrays[name][variable] for name in STATISTICS] == [mean, stdev, row.min(), row.max()]


def test_a_small_memory_bound_reads_the_netcdf_in_pieces(netcdf):
    """What the test above takes for granted."""
    from shardio.rechunk import Request, prepare

    plan = prepare(Request(str(netcdf[0]), "b.zarr", 7, max_memory=100_000)).plan
    assert len(plan.pieces) > 1


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_output_of_a_source_without_statistics_holds_those_of_numpy(zarr_format, build, rechunk, opened, tmp_path):
    source = build(
        tmp_path / "a.zarr", shape=(9, 4, 2, 211), chunks=(4, 3, 2, 100), statistics=False, missing=(2,), dtype="f8"
    )
    cuts = ((5, 4 * 2**30, None), (5, 100_000, None), (1, 4 * 2**30, None), (211, 2**30, 2))
    before = {}
    for n, memory, workers in cuts:
        more = {"max_memory": memory, "workers": workers, "zarr_format": zarr_format, "overwrite": True}
        rechunk(source.path, tmp_path / "b.zarr", n, **more)
        arrays, attributes = opened(tmp_path / "b.zarr")
        assert_equal(arrays, source.expected.transpose(1, 0, 2, 3).reshape(4, -1))
        assert attributes["statistics_end_date"] == str(source.dates[-1])
        before = before or arrays
        assert all((arrays[name] == before[name]).all() for name in STATISTICS)


@pytest.mark.parametrize("absent", [("stdev",), ("mean", "minimum")])
def test_all_statistics_are_computed_where_some_are_absent(absent, build, rechunk, opened, cli, tmp_path):
    source = build(tmp_path / "a.zarr", shape=(5, 3, 2, 23), chunks=(1, 3, 2, 23))
    for name in absent:
        shutil.rmtree(source.path / name)
    assert "statistics     none" in cli("info", source.path).stdout
    words = ("rechunk", source.path, tmp_path / "b.zarr", "-n", 4, "--start", str(source.dates[2]))
    assert "statistics are computed in the same pass: the source has none" in cli(*words).stderr
    arrays, attributes = opened(tmp_path / "b.zarr")
    assert_equal(arrays, source.expected[2:].transpose(1, 0, 2, 3).reshape(3, -1))
    assert attributes["statistics_start_date"] == str(source.dates[2]), "not those of the statistics that are gone"
