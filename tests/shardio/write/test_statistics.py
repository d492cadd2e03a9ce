import itertools
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardio import STATISTICS
from shardio.write import statistics


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


@given(st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_cut_gives_the_statistics_of_the_whole(seed, sizes):
    random = np.random.default_rng(seed)
    values = (random.standard_normal((3, sum(sizes))) + 2).astype(np.float32)
    values[0, random.random(sum(sizes)) < 0.7] = np.nan
    values[1] = np.nan
    bounds = [0, *itertools.accumulate(sizes)]
    parts = [statistics.moments(values[:, a:b]) for a, b in itertools.pairwise(bounds)]
    found = statistics.finish(statistics.merge(parts))
    for name, wanted in expected(values).items():
        scale = np.nanmax(np.abs(values[[0, 2]]))  # the mean of few values may cancel
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12, atol=1e-13 * scale, err_msg=name)


def test_a_large_mean_does_not_drown_a_small_spread():
    random = np.random.default_rng(0)
    values = (300_000 + random.standard_normal((1, 200_003))).astype(np.float32)
    parts = [statistics.moments(part) for part in np.array_split(values, 7, axis=1)]
    assert_equal(statistics.finish(statistics.merge(parts)), values)


def test_large_rows_are_taken_in_blocks_without_loss():
    values = np.random.default_rng(0).standard_normal((2, 3 * statistics.BLOCK + 17)).astype(np.float32)
    assert_equal(statistics.finish(statistics.moments(values)), values + 0)


def test_infinite_values_raise_no_warning():
    values = np.array([[1, np.inf, 2]], np.float32)
    found = statistics.finish(statistics.merge([statistics.moments(values), statistics.moments(values)]))
    assert found["maximum"] == np.inf
    assert found["minimum"] == 1
    assert not np.isfinite(found["mean"])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_output_of_a_source_without_statistics_holds_those_of_numpy(zarr_format, build, rechunk, opened, tmp_path):
    source = build(
        tmp_path / "a.zarr", shape=(9, 4, 2, 211), chunks=(4, 3, 2, 100), statistics=False, missing=(2,), dtype="f8"
    )
    before = {}
    for n, memory, workers in ((5, 4 * 2**30, None), (5, 100_000, None), (1, 4 * 2**30, None), (211, 2**30, 2)):
        rechunk(
            source.path,
            tmp_path / "b.zarr",
            n,
            max_memory=memory,
            workers=workers,
            zarr_format=zarr_format,
            overwrite=True,
        )
        arrays, attributes = opened(tmp_path / "b.zarr")
        assert_equal(arrays, source.expected.transpose(1, 0, 2, 3).reshape(4, -1))
        assert attributes["statistics_end_date"] == str(source.dates[-1])
        if n in before:  # the same cut: the same bits, whatever the memory
            assert all((arrays[name] == before[n][name]).all() for name in STATISTICS)
        before[n] = arrays


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
