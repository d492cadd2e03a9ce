"""A dataset in compact order holds the bits of its source in other places, and gives them back in theirs."""

import json
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import xarray
import zarr

from shardio import open_dataset
from shardio.check.info import describe
from shardio.check.verify import check, compare, repair
from shardio.errors import DatasetError, OutputError
from shardio.load.partition import partition
from shardio.rechunk import Request, prepare
from shardio.rechunk.plan import make_plan
from shardio.source.open import open_source
from shardio.source.order import LEAF, border_cells, compact_order, ordered
from shardio.source.source import Selection
from shardio.source.synthetic import octahedral
from shardio.write.job import partial_of

CELLS = 1009
SHAPE = (5, 3, 2, CELLS)
CASES = {  # format of the source, of the compact dataset
    "v2": (2, 2, {"chunks": (1, 3, 2, CELLS)}),
    "v2, every axis cut unevenly": (2, 3, {"chunks": (2, 2, 1, 77)}),
    "v2, float64": (2, 3, {"chunks": (2, 2, 1, 500), "dtype": "f8"}),
    "v3": (3, 3, {"chunks": (1, 3, 2, CELLS)}),
    "v3, Zarr-sharded": (3, 2, {"chunks": (1, 3, 1, 100), "shards": (2, 3, 2, 1100)}),
}


def bits(values):
    return np.ascontiguousarray(values).view(np.uint32)


def scatter(path, cells=CELLS, zarr_format=2, per_cell=True):
    """Put the cells of a source all over the globe, and give it arrays that have a value for each."""
    random = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="r+", zarr_format=zarr_format)
        group["latitudes"][...] = np.degrees(np.arcsin(random.uniform(-1, 1, cells)))
        group["longitudes"][...] = random.uniform(-180, 360, cells)
        group.attrs["field_shape"] = [1, cells]
        more = {
            "area": (("cell",), random.random(cells)),
            "mask": (("time", "cell"), random.random((SHAPE[0], cells)) < 0.5),
        }
        for name, (dimensions, values) in more.items() if per_cell else ():
            named = {"dimension_names": dimensions} if zarr_format == 3 else {}
            array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=values.shape, **named)
            array[...] = values
            array.attrs["about"] = name
            if zarr_format == 2:
                array.attrs["_ARRAY_DIMENSIONS"] = list(dimensions)
        zarr.consolidate_metadata(path, zarr_format=zarr_format)
    return path


@pytest.fixture
def source(build, tmp_path):
    made = build(tmp_path / "a.zarr", shape=SHAPE, chunks=(2, 3, 2, 400), missing=(3,))
    scatter(made.path)
    return made


# ----------------------------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("cells", [1, 2, LEAF, LEAF + 1, 2 * LEAF + 1, 5_000])
def test_order_names_every_cell_once_and_halves_are_even(cells):
    random = np.random.default_rng(cells)
    order = compact_order(random.uniform(-90, 90, cells), random.uniform(0, 360, cells))
    assert np.array_equal(np.sort(order), np.arange(cells))


def test_order_is_the_same_to_the_last_place_everywhere():
    """Workers on other machines have to find it; this one was found on x86-64 with AVX2."""
    latitudes, longitudes, _ = octahedral("o32")
    order = compact_order(latitudes, longitudes)
    assert int(order @ np.arange(order.size)) == 33_821_357_916


def test_cells_at_one_place_keep_their_order():
    order = compact_order(np.full(300, 12.0), np.full(300, 34.0))
    assert np.array_equal(order, np.arange(300))


@pytest.mark.parametrize("turn", [-720.0, -360.0, 360.0])
def test_order_does_not_depend_on_how_longitudes_are_counted(turn):
    latitudes, longitudes, _ = octahedral("o16")
    assert np.array_equal(compact_order(latitudes, longitudes), compact_order(latitudes, longitudes + turn))


def test_quarters_of_the_globe_are_regions_not_bands():
    latitudes, longitudes, _ = octahedral("o32")
    order = compact_order(latitudes, longitudes)
    radians = np.radians([latitudes, longitudes])[:, order]
    position = np.stack([np.cos(radians[0]) * np.cos(radians[1]), np.cos(radians[0]) * np.sin(radians[1])])
    for part in np.array_split(position, 4, axis=1):
        assert np.abs(part.mean(axis=1)).min() > 0.3, "a band goes around the axis"


# -------------------------------------------------------------------------------------------------------- what is there
@pytest.mark.parametrize("case", CASES)
def test_output_equals_source_under_the_permutation_and_comes_back(case, build, rechunk, opened, tmp_path):
    zarr_format, target, more = CASES[case]
    extras = case in ("v2", "v3")
    made = build(tmp_path / "a.zarr", zarr_format, shape=SHAPE, missing=(3,), extras=extras, **more)
    scatter(made.path, zarr_format=zarr_format)
    before, attributes = opened(made.path)
    rechunk(made.path, tmp_path / "native.zarr", 7)
    compact, back = tmp_path / "compact.zarr", tmp_path / "back.zarr"
    rechunk(made.path, compact, 7, order="compact", zarr_format=target)
    arrays, about = opened(compact)
    order = arrays.pop("cell_order")
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(CELLS))
    assert not np.array_equal(order, np.arange(CELLS))
    assert (bits(arrays["data"]) == bits(made.expected[..., order])).all()
    for name in ("latitudes", "longitudes", "area", "mask"):
        assert np.array_equal(arrays[name], before[name][..., order]), name
    for name in ("dates", "mean", "stdev", "minimum", "maximum", *made.extras):
        assert np.array_equal(arrays[name], before[name]), name
    assert about["field_shape"] == [CELLS]
    assert about["resolution"] == "tiny, compact order"
    rechunk(compact, back, 7, order="native", zarr_format=zarr_format)
    arrays, about = opened(back)
    expected, native = opened(tmp_path / "native.zarr")
    assert arrays.keys() == expected.keys()
    for name, values in arrays.items():
        assert values.dtype == expected[name].dtype
        assert values.tobytes() == expected[name].tobytes(), name
    refreshed = {"shardio", "uuid"}
    assert {key: about[key] for key in about.keys() - refreshed} == {
        key: native[key] for key in native.keys() - refreshed
    }
    assert about["field_shape"] == attributes["field_shape"] == [1, CELLS]
    assert check(str(compact)) == check(str(back)) == []


def test_a_compact_source_stays_compact_unless_told_otherwise(source, rechunk, opened, tmp_path):
    rechunk(source.path, tmp_path / "b.zarr", 7, order="compact")
    rechunk(tmp_path / "b.zarr", tmp_path / "c.zarr", 3)
    rechunk(tmp_path / "b.zarr", tmp_path / "d.zarr", 3, order="compact")
    rechunk(tmp_path / "c.zarr", tmp_path / "e.zarr", 7, order="native")
    (b, about), (c, kept), (d, _), (e, native) = (opened(tmp_path / f"{name}.zarr") for name in "bcde")
    for name in ("data", "cell_order", "latitudes", "area"):
        assert b[name].tobytes() == c[name].tobytes() == d[name].tobytes()
    assert about["field_shape"] == kept["field_shape"] == [CELLS]
    assert (bits(e["data"]) == bits(source.expected)).all()
    assert native["field_shape"] == [1, CELLS]
    assert native["resolution"] == "tiny"


def test_a_native_source_stays_as_it_is(source, rechunk, tree, tmp_path):
    for name, order in (("b", None), ("c", "native")):
        (tmp_path / name).mkdir()
        rechunk(source.path, tmp_path / name / "x.zarr", 7, order=order)
    assert tree(tmp_path / "b" / "x.zarr") == tree(tmp_path / "c" / "x.zarr")


def test_compact_and_native_are_different_datasets(source, rechunk, opened, tmp_path):
    rechunk(source.path, tmp_path / "b.zarr", 7, order="compact")
    rechunk(source.path, tmp_path / "c.zarr", 7)
    assert opened(tmp_path / "b.zarr")[1]["uuid"] != opened(tmp_path / "c.zarr")[1]["uuid"]


def test_a_per_cell_array_of_another_length_is_refused(source, rechunk, tmp_path):
    group = zarr.open_group(source.path, mode="r+")
    array = group.create_array("odd", shape=(4,), dtype="f8")
    array.attrs["_ARRAY_DIMENSIONS"] = ["cell"]
    with pytest.raises(DatasetError, match="odd has 4 cells, the dataset has 1009"):
        rechunk(source.path, tmp_path / "b.zarr", 7, order="compact")


def test_a_per_cell_array_without_names_of_dimensions_is_known_by_its_length(source, rechunk, opened, tmp_path):
    values = np.tile(np.arange(CELLS), (2, 1))
    zarr.open_group(source.path, mode="r+").create_array("bare", data=values)
    rechunk(source.path, tmp_path / "b.zarr", 7, order="compact")
    arrays, _ = opened(tmp_path / "b.zarr")
    assert np.array_equal(arrays["bare"][1], arrays["cell_order"])


def test_a_damaged_permutation_is_refused(source, rechunk, tmp_path):
    rechunk(source.path, tmp_path / "b.zarr", 7, order="compact")
    zarr.open_array(tmp_path / "b.zarr", path="cell_order", mode="r+")[3] = 4
    assert [fault.file for fault in check(str(tmp_path / "b.zarr"))] == [f"{tmp_path}/b.zarr/cell_order"]
    with pytest.raises(DatasetError, match="does not name each of the 1009 cells once"):
        rechunk(tmp_path / "b.zarr", tmp_path / "c.zarr", 7, order="native")


def test_selection_goes_with_order(source, rechunk, opened, tmp_path):
    chosen = Selection(start="2020-01-01T06", select=("v_2", "v_0"))
    rechunk(source.path, tmp_path / "b.zarr", 7, order="compact", selection=chosen)
    arrays, _ = opened(tmp_path / "b.zarr")
    assert (bits(arrays["data"]) == bits(source.expected[1:, [2, 0]][..., arrays["cell_order"]])).all()
    assert compare(str(tmp_path / "b.zarr"), str(source.path)) == []


def test_netcdf_becomes_compact_and_comes_back_as_a_raster(rechunk, opened, tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 19, 36)).astype("f4")
    coordinates = {
        "time": np.datetime64("2020-01-01", "ns") + np.arange(4) * np.timedelta64(6, "h"),
        "latitude": ("latitude", np.linspace(90, -90, 19), {"units": "degrees_north"}),
        "longitude": ("longitude", np.arange(0, 360, 10.0), {"units": "degrees_east"}),
    }
    xarray.Dataset({"t": (("time", "latitude", "longitude"), values)}, coordinates).to_netcdf(tmp_path / "a.nc")
    rechunk(tmp_path / "a.nc", tmp_path / "b.zarr", 4, order="compact")
    rechunk(tmp_path / "b.zarr", tmp_path / "c.zarr", 4, order="native")
    (b, compact), (c, native) = opened(tmp_path / "b.zarr"), opened(tmp_path / "c.zarr")
    assert np.array_equal(b["data"][:, 0, 0], values.reshape(4, -1)[:, b["cell_order"]])
    assert np.array_equal(c["data"][:, 0, 0], values.reshape(4, -1))
    assert compact["field_shape"] == [684]
    assert native["field_shape"] == [19, 36]
    assert np.allclose(b["stdev"], values.std(), rtol=1e-6), "of the same values, added up in another order"
    assert compare(str(tmp_path / "b.zarr"), str(tmp_path / "a.nc")) == []


# ---------------------------------------------------------------------------------------------------------- how it runs
def test_bytes_do_not_depend_on_memory_bound_or_workers(source, rechunk, tree, cluster, tmp_path):
    trees = []
    ways = ({}, {"max_memory": 400_000}, {"scheduler": cluster.scheduler_address})
    for number, more in enumerate(ways):
        (tmp_path / str(number)).mkdir()
        rechunk(source.path, tmp_path / str(number) / "b.zarr", 7, order="compact", **more)
        trees.append(tree(tmp_path / str(number) / "b.zarr"))
    assert trees[0] == trees[1] == trees[2]


def test_plan_reads_whole_dates_and_counts_their_memory(source):
    native, compact = (ordered(open_source(source.path), order) for order in (None, "compact"))
    layout = prepare(Request(str(source.path), str(source.path.parent / "b.zarr"), 7)).layout
    plan, other = (make_plan(one.extent, layout, 2**30, threads=2) for one in (compact, native))
    assert plan.pieces == (slice(0, CELLS),)
    assert plan.peak_memory - other.peak_memory == CELLS * (2 * 4 + 16)
    tight = make_plan(compact.extent, layout, 100_000, threads=1)
    assert tight.pieces == (slice(0, CELLS),)
    assert tight.amplification == pytest.approx(9 / 5), "both dates of a chunk are decoded for each of them"
    assert "--max-memory" in tight.reason


def test_dry_run_and_help_say_what_happens_to_the_order(source, cli, tmp_path):
    words = ("rechunk", source.path, tmp_path / "b.zarr", "-n", 7, "--order", "compact", "--dry-run")
    assert "cells are put in compact order: every date is read whole" in cli(*words).stdout
    assert json.loads(cli(*words, "--json").stdout)["order"] == "compact"
    assert "the order of the source" in " ".join(cli("rechunk", "--help").stdout.split())
    assert cli("rechunk", source.path, tmp_path / "b.zarr", "-n", 7, "--order", "hilbert").exit_code == 2


@pytest.mark.parametrize("order", ["compact", "native"])
def test_a_run_goes_on_after_a_kill_with_the_same_bits(order, build, rechunk, begin, tree, tmp_path):
    made = build(tmp_path / "a.zarr", 3, shape=(40, 3, 1, 9_001), chunks=(1, 3, 1, 9_001), compressors=None)
    scatter(made.path, 9_001, 3, per_cell=False)
    source = made.path
    if order == "native":
        rechunk(made.path, tmp_path / "compact.zarr", 4, order="compact")
        source = tmp_path / "compact.zarr"
    killed, whole = tmp_path / "killed" / "b.zarr", tmp_path / "whole" / "b.zarr"
    for path in (killed, whole):
        path.parent.mkdir()
    words = (
        "rechunk",
        source,
        killed,
        "-n",
        "4",
        "--order",
        order,
        "--no-fsync",
        "--max-memory",
        "8MiB",
    )  # tasks of one date
    ledger = partial_of(killed) / "ledger.jsonl"
    process = begin(*words)
    end = time.monotonic() + 60
    while not (ledger.exists() and ledger.stat().st_size) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    rechunk(source, whole, 4, order=order)
    if not killed.exists():
        with pytest.raises(OutputError, match="order was"):
            rechunk(source, killed, 4, order="compact" if order == "native" else "native")
        assert rechunk(source, killed, 4, order=order).resumed_dates > 0
    assert tree(killed) == tree(whole)


def test_rows_are_moved_on_any_thread(source, tmp_path):
    compact = ordered(open_source(source.path), "compact")
    whole, part = (np.empty((5, 3, 2, n), np.float32) for n in (CELLS, 90))
    with ThreadPoolExecutor(4) as pool:
        compact.read(slice(0, 5), slice(0, CELLS), whole, pool)
        compact.read(slice(0, 5), slice(10, 100), part, pool)
    assert (bits(whole) == bits(source.expected[..., compact.order])).all()
    assert (bits(part) == bits(whole[..., 10:100])).all()


# ------------------------------------------------------------------------------------------------------- verify, repair
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("way", ["compact", "native"])
def test_damage_is_found_and_repaired_through_the_permutation(way, zarr_format, source, rechunk, tree, tmp_path):
    origin = source.path
    if way == "native":
        rechunk(origin, tmp_path / "compact.zarr", 3, order="compact")
        origin = tmp_path / "compact.zarr"
    made = tmp_path / "b.zarr"
    rechunk(origin, made, 7, order=way, zarr_format=zarr_format)
    whole = tree(made)
    assert compare(str(made), str(origin)) == []
    file = sorted(file for file in (made / "data").iterdir() if "." in file.name[1:] and file.name != "zarr.json")[1]
    file.write_bytes(b"damage")
    found = check(str(made))
    assert {fault.file for fault in found} == {str(file)}
    assert repair(str(made), str(origin), found) == 1
    assert tree(made) == whole


def test_compact_datasets_are_compared_with_native_ones_and_with_one_another(source, rechunk, tmp_path):
    for name, order in (("b", "compact"), ("c", "compact"), ("d", "native")):
        rechunk(source.path, tmp_path / f"{name}.zarr", 7 if name == "b" else 3, order=order)
    for ours, theirs in (("b", "c"), ("b", "d"), ("d", "b")):
        assert compare(str(tmp_path / f"{ours}.zarr"), str(tmp_path / f"{theirs}.zarr")) == []
    data = zarr.open_array(source.path, path="data", mode="r+")
    data[1, 0, 0, 17] = 99.0
    (fault,) = compare(str(tmp_path / "b.zarr"), str(source.path))
    order = zarr.open_array(tmp_path / "b.zarr", path="cell_order", mode="r")[...]
    assert fault.grid_chunk == np.flatnonzero(order == 17)[0] // 145
    assert fault.problem == "1 values differ from the source"


# ------------------------------------------------------------------------------------------------------ who looks at it
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_peers_open_it(zarr_format, source, rechunk, tmp_path):
    rechunk(source.path, tmp_path / "b.zarr", 7, order="compact", zarr_format=zarr_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = xarray.open_zarr(tmp_path / "b.zarr", decode_times=False, mask_and_scale=False)
        assert ds.data.dims == ("time", "variable", "ensemble", "cell")
        assert ds.cell_order.dims == ds.area.dims == ds.latitudes.dims == ("cell",)
        back = ds.isel(cell=np.argsort(ds.cell_order.values)).data.values
    assert (bits(back) == bits(source.expected)).all()
    dataset = open_dataset(tmp_path / "b.zarr")
    assert dataset.field_shape == (CELLS,)
    assert np.array_equal(dataset[0, 0, 0], source.expected[0, 0, 0][dataset.cell_order[0].values], equal_nan=True)


def test_info_shows_the_order_and_what_it_saves(cli, tmp_path):
    cli("synth", tmp_path / "a.zarr", "--grid", "o32", "--dates", 1, "--no-fsync")
    cli("rechunk", tmp_path / "a.zarr", tmp_path / "b.zarr", "-n", 16, "--order", "compact", "--no-fsync")
    cli("rechunk", tmp_path / "a.zarr", tmp_path / "c.zarr", "-n", 16, "--no-fsync")
    compact, native = (describe(str(tmp_path / name), 16) for name in ("b.zarr", "c.zarr"))
    assert (compact["order"], native["order"]) == ("compact", "native")
    assert compact["ranks"]["border_cells"] == native["ranks"]["border_cells"]
    assert compact["resolution"] == "o32, compact order"
    assert 1.5 * native["ranks"]["border_cells"]["compact"] < native["ranks"]["border_cells"]["native"]
    assert "(rechunk --order compact)" in " ".join(cli("info", tmp_path / "c.zarr", "--ranks", 16).stdout.split())


def raster(latitudes, longitudes):
    return [values.ravel() for values in np.meshgrid(latitudes, longitudes, indexing="ij")]


def irregular(cells=9_000):
    """Ten times as many cells in an eighth of the globe as elsewhere, row after row."""
    random = np.random.default_rng(0)
    latitudes, longitudes = np.degrees(np.arcsin(random.uniform(-1, 1, 3 * cells))), random.uniform(0, 360, 3 * cells)
    kept = random.random(3 * cells) < np.where((latitudes > 20) & (longitudes < 120), 1, 0.1)
    order = np.argsort(-latitudes[kept])
    return latitudes[kept][order], longitudes[kept][order]


GRIDS = {
    "octahedral": octahedral("o48")[:2],
    "regular, with poles": raster(np.linspace(90, -90, 61), np.arange(0, 360, 3)),
    "regular, without": raster(np.linspace(89, -89, 90), np.arange(0, 360, 2)),
    "limited area": raster(np.linspace(40, 60, 41), np.linspace(-10, 20, 61)),
    "small limited area": raster(np.linspace(45, 45.5, 50), np.linspace(5, 5.5, 40)),
    "irregular": irregular(),
}


def on(latitudes, longitudes):
    return SimpleNamespace(
        latitudes=np.asarray(latitudes),
        longitudes=np.asarray(longitudes),
        extent=SimpleNamespace(shape=(1, 1, 1, len(latitudes))),
        array=lambda _: None,
    )


def counted_beside(latitudes, longitudes, bounds):
    """Cells of others that are as near to a cell as the sixth nearest, by a tree; of the rank with most."""
    from scipy.spatial import cKDTree

    lat, lon = np.radians(latitudes), np.radians(longitudes)
    position = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    tree = cKDTree(position)
    reach = tree.query(position, 7)[0][:, -1]
    most = 0
    for first, stop in pairwise(bounds):
        near = tree.query_ball_point(position[first:stop], 1.001 * reach[first:stop] + 1e-9)
        beside = np.unique(np.concatenate(near).astype(int))
        most = max(most, int(((beside < first) | (beside >= stop)).sum()))
    return most


@pytest.mark.parametrize("ranks", [2, 3, 16])
@pytest.mark.parametrize("name", GRIDS)
def test_estimate_of_borders_is_near_what_a_tree_counts(name, ranks):
    latitudes, longitudes = (np.asarray(values) for values in GRIDS[name])
    bounds = partition(latitudes.size, ranks, -(-latitudes.size // 16)).bounds
    estimate = border_cells(on(latitudes, longitudes), bounds)
    for order in ("native", "compact"):
        placed = np.arange(latitudes.size) if order == "native" else compact_order(latitudes, longitudes)
        counted = counted_beside(latitudes[placed], longitudes[placed], bounds)
        assert 0.9 < estimate[order] / counted < 1.25, order


@pytest.mark.parametrize("name", ["octahedral", "regular, without", "irregular"])
def test_estimate_of_borders_holds_where_not_all_cells_are_looked_at(name, monkeypatch):
    whole = on(*GRIDS[name])
    bounds = partition(len(whole.latitudes), 4, -(-len(whole.latitudes) // 16)).bounds
    all_cells = border_cells(whole, bounds)
    monkeypatch.setattr("shardio.source.order.MOST_SURVEYED", 3_000)
    for order, estimate in border_cells(whole, bounds).items():
        assert 0.6 < estimate / all_cells[order] < 1.5, order


@pytest.mark.parametrize("cells", [1, 2, 7])
def test_few_cells_have_borders_too(cells):
    few = on(np.linspace(50, 40, cells), np.linspace(0, 9, cells))
    assert border_cells(few, (0, cells))["native"] == 0
    assert border_cells(few, tuple(range(cells + 1)))["native"] == cells - 1


def test_info_names_the_command_only_where_it_saves(build, rechunk, cli, tmp_path):
    made = build(tmp_path / "a.zarr", shape=(1, 1, 1, 2501), chunks=(1, 1, 1, 2501))
    group = zarr.open_group(made.path, mode="r+", use_consolidated=False)
    group["latitudes"][...], group["longitudes"][...] = GRIDS["limited area"]
    rechunk(made.path, tmp_path / "b.zarr", 4, order="compact")
    two, many = (cli("info", made.path, "--ranks", ranks).stdout for ranks in (2, 16))
    assert "beside those of a rank: about 62 for the rank with most; in compact order about" in two
    assert "rechunk --order" not in two
    assert "rechunk --order" not in cli("info", tmp_path / "b.zarr", "--ranks", 16).stdout
    assert "(rechunk --order compact)" in many
