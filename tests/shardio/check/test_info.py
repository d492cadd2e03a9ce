import itertools
import json
import shutil

import numpy as np
import pytest
import xarray

from shardio.check.info import describe


@pytest.fixture(scope="module")
def made(build, rechunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("info")
    source = build(folder / "a.zarr", shape=(6, 3, 2, 100), chunks=(1, 3, 2, 100), missing=(2,))
    rechunk(source.path, folder / "2.zarr", 7, zarr_format=2)
    rechunk(source.path, folder / "3.zarr", 7, zarr_format=3)
    return source, folder


@pytest.mark.parametrize(("zarr_format", "per_date"), [(2, 7), (3, 1)])
def test_numbers_are_those_of_the_dataset(zarr_format, per_date, made):
    source, folder = made
    about = describe(str(folder / f"{zarr_format}.zarr"))
    assert about["shape"] == {"dates": 6, "variables": 3, "ensemble": 2, "cells": 100}
    assert (about["grid_chunks"], about["chunk_cells"], about["files_per_date"]) == (7, 15, per_date)
    assert about["zarr_format"] == zarr_format
    assert about["missing_dates"] == [str(source.dates[2])]
    assert about["frequency"] == "6h"
    assert about["complete"]
    assert about["bytes"] == source.expected.nbytes
    files = [
        f
        for f in (folder / f"{zarr_format}.zarr" / "data").iterdir()
        if f.name not in (".zarray", ".zattrs", "zarr.json")
    ]
    assert about["stored_bytes"] == sum(file.stat().st_size for file in files)
    assert about["statistics"]["v_1"]["mean"] == source.statistics["mean"][1]


def test_a_source_of_others_is_described_too(made):
    source, _ = made
    about = describe(str(source.path))
    assert not about["made_by_shardio"]
    assert about["grid_chunks"] == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 100])
def test_what_ranks_read_is_what_their_cells_need(ranks, made):
    read = describe(str(made[1] / "3.zarr"), ranks)["ranks"]
    assert [each["rank"] for each in read["each"]] == list(range(ranks))
    edges = [each["cells"] for each in read["each"]]
    assert edges[0][0] == 0
    assert edges[-1][1] == 100
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
    total = sum(each["bytes_per_date"] for each in read["each"])
    assert read["read_amplification"] == pytest.approx(total / (3 * 2 * 100 * 4))
    if ranks in (1, 7):
        assert read["aligned"]
        assert read["read_amplification"] == 1


def test_tables_show_what_json_holds(made, cli):
    _, folder = made
    shown = cli("info", folder / "3.zarr", "--ranks", 3)
    assert shown.exit_code == 0
    for word in ("blosc-lz4-shuffle", "7 of 15 cells", "2020-01-01T12:00:00", "read amplification", "v_2"):
        assert word in shown.stdout
    about = json.loads(cli("info", folder / "3.zarr", "--ranks", 3, "--json").stdout)
    assert about["ranks"]["ranks"] == 3


def test_statistics_of_nan_are_valid_json(build, rechunk, cli, tmp_path):
    source = build(tmp_path / "a.zarr", shape=(2, 1, 1, 5), chunks=(1, 1, 1, 5), missing=(0, 1), statistics=False)
    rechunk(source.path, tmp_path / "b.zarr", 5)
    text = cli("info", tmp_path / "b.zarr", "--json").stdout

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["statistics"]["v_0"]["mean"] is None
    assert np.isnan(source.values).all()


def test_no_line_is_broken_where_stdout_is_no_terminal(made, process, tmp_path):
    long = tmp_path / ("a" * 100) / "[b]old.zarr"
    long.parent.mkdir()
    shutil.copytree(made[1] / "3.zarr", long)
    shown = process("info", long, "--ranks", 7).stdout.splitlines()
    assert str(long) in shown
    assert sum(line.startswith("cells of other ranks beside those of a rank") for line in shown) == 1
    assert max(map(len, shown)) < 300, "nor filled up with blanks"


def test_variables_of_a_file_are_shown_with_their_units(cli, tmp_path):
    coordinates = {
        "time": np.datetime64("2020-01-01", "ns") + np.arange(2) * np.timedelta64(6, "h"),
        "level": ("level", [850, 500], {"units": "hPa"}),
        "latitude": ("latitude", np.linspace(90, -90, 7), {"units": "degrees_north"}),
        "longitude": ("longitude", np.arange(0, 360, 30.0), {"units": "degrees_east"}),
    }
    fields = {
        "t": (("time", "level", "latitude", "longitude"), np.zeros((2, 2, 7, 12), "f4"), {"units": "K"}),
        "q": (("time", "latitude", "longitude"), np.zeros((2, 7, 12), "f4")),
    }
    xarray.Dataset(fields, coordinates).to_netcdf(tmp_path / "a.nc")
    shown = [line.split() for line in cli("info", tmp_path / "a.nc").stdout.splitlines()]
    assert ["t_850", "K"] in shown
    assert ["t_500", "K"] in shown
    assert ["q"] in shown
    assert ["resolution", "30", "degrees"] in shown
    assert ["statistics", "none;", "rechunk", "computes", "them"] in shown
    about = json.loads(cli("info", tmp_path / "a.nc", "--json").stdout)
    assert about["units"] == {"t_850": "K", "t_500": "K"}
    assert about["resolution"] == "30"


@pytest.mark.parametrize("resolution", ["o96", "100 cells", "o96, compact order", None])
def test_a_resolution_in_words_is_shown_as_it_is(resolution, made, cli, tmp_path):
    shutil.copytree(made[0].path, tmp_path / "a.zarr")
    attributes = json.loads((tmp_path / "a.zarr/.zattrs").read_text()) | {"resolution": resolution}
    (tmp_path / "a.zarr/.zattrs").write_text(json.dumps(attributes))
    assert f"resolution     {resolution or 'unknown'} " in cli("info", tmp_path / "a.zarr").stdout
