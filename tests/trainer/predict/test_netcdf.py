"""The NetCDF file has the values of the dataset, on axes where the grid has them, and decodes as CF says."""

import json
from collections.abc import Callable
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray

from shardio import Description, ShardedWriter, open_dataset
from shardio.errors import OutputError
from trainer.predict.netcdf import OWN, export

NAMES = ("t_850", "tp")
START = "2021-03-02T00:00:00"


@pytest.fixture
def forecast(tmp_path: Path) -> Callable[..., Path]:
    """`forecast(members, table)`: a dataset on a table of 4 x 6 cells, or on the same cells in another order."""

    def forecast(members: int = 1, table: bool = True, name: str = "f.zarr", names: tuple[str, ...] = NAMES) -> Path:
        latitudes, longitudes = (
            axis.ravel() for axis in np.meshgrid([60.0, 20.0, -20.0, -60.0], np.arange(0.0, 360.0, 60.0), indexing="ij")
        )
        order = np.arange(24) if table else np.random.default_rng(0).permutation(24)
        metadata = {"t_850": {"units": "K", "long_name": "temperature", "mars": {"param": "t"}}}
        about = Description(
            np.datetime64(START, "s") + np.arange(1, 4) * np.timedelta64(21600, "s"),
            names,
            latitudes[order],
            longitudes[order],
            members,
            10,
            {name: np.ones(2) for name in ("mean", "stdev", "minimum", "maximum")},
            {"field_shape": [4, 6], "variables_metadata": metadata, "forecast": {"initial_date": START}},
        )
        values = np.random.default_rng(1).standard_normal((3, 2, members, 24)).astype(np.float32)
        values[1, 1, :, 5] = np.nan
        with ShardedWriter(tmp_path / name, about, {"members": members}, range(3)) as writer:
            for date in range(3):
                writer.put(date, values[date])
        return tmp_path / name

    return forecast


def test_a_table_of_cells_has_latitude_and_longitude_axes(forecast: Callable[..., Path], tmp_path: Path) -> None:
    path = forecast()
    assert export(path, tmp_path / "f.nc")
    with xarray.open_dataset(tmp_path / "f.nc") as found:
        assert found["t_850"].dims == ("time", "latitude", "longitude")
        assert found["latitude"].values.tolist() == [60.0, 20.0, -20.0, -60.0]
        assert found["longitude"].values.tolist() == [0.0, 60.0, 120.0, 180.0, 240.0, 300.0]
        assert found["time"].values.astype("datetime64[s]").tolist() == open_dataset(path).dates.tolist()
        assert found["forecast_reference_time"].values == np.datetime64(START)
        assert found["forecast_period"].values.tolist() == [6.0, 12.0, 18.0]
        assert set(found["tp"].coords) >= {"forecast_reference_time", "forecast_period"}
        assert set(found.data_vars) == set(NAMES)
        assert found["t_850"].attrs == {"units": "K", "long_name": "temperature"}
        assert found.attrs["Conventions"] == "CF-1.8"
        assert max(len(str(value)) for value in found.attrs.values()) <= 64  # one line each
        for v, name in enumerate(NAMES):
            ours, theirs = found[name].values.reshape(3, 24), open_dataset(path)[:, v, 0]
            assert ours.dtype == np.float32
            assert np.array_equal(ours, theirs, equal_nan=True)


def test_other_cells_stay_in_one_row_and_members_have_their_axis(forecast: Callable[..., Path], tmp_path: Path) -> None:
    path = forecast(members=2, table=False)
    export(path, tmp_path / "f.nc")
    with xarray.open_dataset(tmp_path / "f.nc") as found:
        assert found["tp"].dims == ("time", "realization", "cell")
        assert set(found["tp"].coords) >= {"latitude", "longitude", "time", "realization"}
        assert np.array_equal(found["latitude"].values, open_dataset(path).latitudes)
        assert np.array_equal(found["tp"].values, open_dataset(path)[:, 1], equal_nan=True)


def test_shardio_reads_the_file_back(forecast: Callable[..., Path], tmp_path: Path) -> None:
    from shardio.rechunk import Request, prepare, run

    path = forecast()
    export(path, tmp_path / "f.nc")
    run(prepare(Request(str(tmp_path / "f.nc"), str(tmp_path / "again.zarr"), 4)))
    again, first = open_dataset(tmp_path / "again.zarr"), open_dataset(path)
    assert again.variables == first.variables
    assert again.dates.tolist() == first.dates.tolist()
    assert np.array_equal(again[:], first[:], equal_nan=True)


def test_the_same_file_is_kept_and_another_refused(forecast: Callable[..., Path], tmp_path: Path) -> None:
    path, target = forecast(), tmp_path / "f.nc"
    assert export(path, target)
    before = target.stat().st_mtime_ns
    assert not export(path, target)
    assert target.stat().st_mtime_ns == before
    other = forecast(members=2, name="other.zarr")
    with pytest.raises(OutputError, match=r"f.nc exists and is something else. Use --overwrite"):
        export(other, target)
    assert export(other, target, overwrite=True)
    assert [file.name for file in tmp_path.glob("*f.nc*")] == ["f.nc"]


def test_a_file_that_names_its_source_in_full_is_kept(forecast: Callable[..., Path], tmp_path: Path) -> None:
    """As files did before they had a digest."""
    path, target = forecast(), tmp_path / "f.nc"
    export(path, target)
    with netCDF4.Dataset(target, "a") as file:
        file.delncattr("source_digest")
        identity = open_dataset(path).attributes["shardio"]
        file.shardio_origin = json.dumps(identity, sort_keys=True)
    assert not export(path, target)
    with pytest.raises(OutputError, match=r"f.nc exists and is something else"):
        export(forecast(members=2, name="other.zarr"), target)


@pytest.mark.parametrize("name", OWN)
def test_a_variable_called_as_a_coordinate_is_refused(forecast: Callable[..., Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=f"^{name} cannot be written as NetCDF, .*Leave it out with --variables"):
        export(forecast(names=("t_850", name)), tmp_path / "f.nc")
    assert not list(tmp_path.glob("*f.nc*"))


def test_every_name_of_the_file_that_is_no_variable_is_refused(forecast: Callable[..., Path], tmp_path: Path) -> None:
    names: set[str] = set()
    for table in (True, False):
        export(forecast(2, table, f"{table}.zarr"), tmp_path / f"{table}.nc")
        with netCDF4.Dataset(tmp_path / f"{table}.nc") as found:
            names |= {*found.variables, *found.dimensions}
    assert names - set(NAMES) == set(OWN)


def test_a_folder_that_is_not_there_is_an_error_with_a_remedy(forecast: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"f.nc cannot be written: .*See that its folder is there, may be"):
        export(forecast(), tmp_path / "none" / "f.nc")
