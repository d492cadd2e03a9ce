"""Sources that xarray opens become datasets whose every value is the one that xarray reads."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import iris_sample_data
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

from shardio.cli.main import main
from shardio.errors import ShardioError
from shardio.rechunk import Request, prepare, run
from shardio.source.cf import CFSource
from shardio.source.source import Selection

SAMPLES = Path(iris_sample_data.path)
SHARED = Path(__file__).parents[4] / "shared" / "data"


def rechunk(source: Path | str, tmp_path: Path, grid_chunks: int = 2, **options: Any) -> zarr.Group:
    """Rechunk through the Python entry points and open the result with zarr-python."""
    destination = tmp_path / "out.zarr"
    selection = Selection(**{key: options.pop(key) for key in ("start", "end", "select", "drop") if key in options})
    run(prepare(Request(str(source), str(destination), grid_chunks, selection=selection, sync=False, **options)))
    return zarr.open_group(destination, mode="r")


def data_of(group: zarr.Group) -> NDArray[np.float32]:
    return np.asarray(group["data"][...])


def same_bits(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    theirs = np.ascontiguousarray(theirs, np.float32)
    return ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def assert_holds(group: zarr.Group, expected: dict[str, NDArray[Any]]) -> None:
    """Every variable equals [date, ensemble, cell] to the bit, and its statistics equal NumPy's in float64."""
    assert group.attrs["variables"] == list(expected)
    data = data_of(group)
    for i, (name, values) in enumerate(expected.items()):
        assert same_bits(data[:, i], values), name
        wide = np.asarray(values, np.float32).astype(np.float64)
        for statistic, of in (
            ("mean", np.nanmean),
            ("stdev", np.nanstd),
            ("minimum", np.nanmin),
            ("maximum", np.nanmax),
        ):
            np.testing.assert_allclose(group[statistic][i], of(wide), rtol=1e-12, atol=1e-12 * np.nanmax(abs(wide)))


# -- real files: one row for every NetCDF file of iris-sample-data ----------------------------------------------------

CALENDAR = ("360_day", "convert_calendar('standard', dim='time', align_on='year', use_cftime=False)")
NEMO_CALENDAR = ("time_centered has the calendar 360_day", "assign_coords(time_centered=(('time_counter',), dates))")
NO_GRID = ("no latitude among its coordinates", "assign_coords")
FILES: dict[str, list[str] | tuple[str, ...]] = {  # variables that it becomes, or the problem and its remedy
    "A1B_north_america.nc": CALENDAR,
    "E1_north_america.nc": CALENDAR,
    "NEMO/nemo_1m_20150101-20150201_grid-T.nc": NEMO_CALENDAR,
    "NEMO/nemo_1m_20150201-20150301_grid-T.nc": NEMO_CALENDAR,
    "NEMO/nemo_1m_20150301-20150401_grid-T.nc": NEMO_CALENDAR,
    "SOI_Darwin.nc": NO_GRID,
    "atlantic_profiles.nc": ["salinity", "theta"],
    "hybrid_height.nc": NO_GRID,
    "mesh_C4_synthetic_float.nc": NO_GRID,
    "orca2_votemper.nc": ("time_counter has the calendar 360_day", "assign_coords(time_counter=((), dates))"),
    "ostia_monthly.nc": ["surface_temperature"],
    "rotated_pole.nc": NO_GRID,
    "space_weather.nc": ("no time coordinate", "expand_dims(time="),
    "toa_brightness_stereographic.nc": ["data"],
    "vlstr_type.nc": ["wind"],
}


def test_table_has_every_netcdf_file_of_the_samples() -> None:
    assert sorted(FILES) == sorted(str(path.relative_to(SAMPLES)) for path in SAMPLES.rglob("*.nc"))


@pytest.mark.parametrize("file", [file for file, outcome in FILES.items() if isinstance(outcome, list)])
def test_sample_becomes_what_xarray_reads(file: str, tmp_path: Path) -> None:
    group = rechunk(SAMPLES / file, tmp_path, 1)
    with xr.open_dataset(SAMPLES / file) as ds:
        expected = {}
        for name in FILES[file]:
            array = ds[name] if "time" in ds[name].dims else ds[name].expand_dims("time")
            levels = [dim for dim in array.dims if dim == "depth"]
            array = array.transpose("time", *levels, ...)
            if levels:
                for i, depth in enumerate(ds["depth"].values.tolist()):
                    expected[f"{name}_{depth:.6g}"] = array.values[:, i].reshape(len(array), 1, -1)
            else:
                expected[name] = array.values.reshape(len(array), 1, -1)
        assert_holds(group, expected)
        np.testing.assert_array_equal(group["dates"][...], np.atleast_1d(ds["time"].values.astype("datetime64[s]")))
        lat, lon = (ds[next(n for n in (long, long[:3]) if n in ds.coords)] for long in ("latitude", "longitude"))
        lats, lons = xr.broadcast(lat, lon) if lat.dims != lon.dims else (lat, lon)
        np.testing.assert_array_equal(group["latitudes"][...], lats.values.reshape(-1).astype(np.float64))
        np.testing.assert_array_equal(group["longitudes"][...], lons.values.reshape(-1).astype(np.float64))


@pytest.mark.parametrize("file", [file for file, outcome in FILES.items() if isinstance(outcome, tuple)])
def test_sample_is_refused_with_the_reason_and_the_remedy(file: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["rechunk", str(SAMPLES / file), str(tmp_path / "out.zarr"), "-n", "1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert all(words in result.stderr for words in (file, *FILES[file]))
    assert not list(tmp_path.iterdir())


def test_remedy_for_a_calendar_works(tmp_path: Path) -> None:
    with xr.open_dataset(SAMPLES / "A1B_north_america.nc", decode_timedelta=False) as ds:
        converted = ds.convert_calendar("standard", dim="time", align_on="year", use_cftime=False)
        converted[["air_temperature"]].to_netcdf(tmp_path / "new.nc")
        values = ds["air_temperature"].values
    group = rechunk(tmp_path / "new.nc", tmp_path)
    assert_holds(group, {"air_temperature": values.reshape(240, 1, -1)})


def test_remedy_for_a_calendar_of_a_curvilinear_file_works(tmp_path: Path) -> None:
    with xr.open_dataset(SAMPLES / "orca2_votemper.nc") as ds:
        new = ds.assign_coords(time_counter=((), np.datetime64("2000-01-01", "ns")))
        new[["votemper"]].to_netcdf(tmp_path / "new.nc")
        group = rechunk(tmp_path / "new.nc", tmp_path, 4)
        assert np.isnan(ds["votemper"].values).any()
        assert_holds(group, {"votemper": ds["votemper"].values.reshape(1, 1, -1)})
        np.testing.assert_array_equal(group["latitudes"][...], ds["nav_lat"].values.reshape(-1).astype(np.float64))
    assert group.attrs["field_shape"] == [148, 180]


def test_remedy_for_absent_dates_works(tmp_path: Path) -> None:
    with xr.open_dataset(SAMPLES / "space_weather.nc") as ds:
        ds.expand_dims(time=[np.datetime64("2020-01-01", "ns")]).to_netcdf(tmp_path / "new.nc")
        group = rechunk(tmp_path / "new.nc", tmp_path, select=("TEC", "Ne"))
        levels = {f"Ne_{h:.6g}": v.reshape(1, 1, -1) for h, v in zip(ds["height"].values, ds["Ne"].values, strict=True)}
        assert_holds(group, {"TEC": ds["TEC"].values.reshape(1, 1, -1), **levels})


# -- CF Zarr as WeatherBench2 and ARCO-ERA5 lay it out ----------------------------------------------------------------

LATITUDE_FIRST, LONGITUDE_FIRST = ("latitude", "longitude"), ("longitude", "latitude")


def weather(grid: Sequence[str] = LATITUDE_FIRST, ascending: bool = False, dates: int = 10) -> xr.Dataset:
    """t and q on levels, a surface field, and a constant one: 7 x 11 cells, NaN among them."""
    sizes = {"time": dates, "level": 3, "latitude": 7, "longitude": 11}
    random = np.random.default_rng(7)

    def field(*dims: str) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        return dims, random.normal(250, 20, [sizes[dim] for dim in dims]).astype(np.float32)

    latitudes = np.linspace(-90, 90, 7) if ascending else np.linspace(90, -90, 7)
    ds = xr.Dataset(
        {
            "t": field("time", "level", *grid),
            "q": field("time", "level", *grid),
            "t2m": field("time", *grid),
            "lsm": field(*grid),
        },
        {
            "time": np.datetime64("2020-01-01", "ns") + np.arange(dates) * np.timedelta64(6, "h"),
            "level": [500, 850, 1000],
            "latitude": ("latitude", latitudes, {"units": "degrees_north"}),
            "longitude": ("longitude", np.linspace(0, 360, 11, endpoint=False), {"units": "degrees_east"}),
        },
    )
    ds["t2m"].values[-1, 2, 4] = np.nan
    return ds


def fields_of(ds: xr.Dataset, cells: Sequence[str] = LATITUDE_FIRST) -> dict[str, NDArray[Any]]:
    """[date, ensemble, cell] of every variable and level, flattened by xarray and NumPy alone."""
    found = {}
    for name, array in ds.data_vars.items():
        array = array if "time" in array.dims else array.expand_dims(time=ds["time"])
        array = array if "number" in array.dims else array.expand_dims("number")
        for level in array["level"].values.tolist() if "level" in array.dims else [None]:
            part = array if level is None else array.sel(level=level)
            values = part.transpose("time", "number", *cells).values
            found[str(name) if level is None else f"{name}_{level}"] = values.reshape(*values.shape[:2], -1)
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset as Zarr with several dates in a chunk."""

    def to_zarr(ds: xr.Dataset, zarr_format: Any = 3, time: int = 4, **chunks: int) -> Path:
        path = tmp_path / "source.zarr"
        sizes = {**dict(ds.sizes), "time": time, **chunks}
        encoding = {name: {"chunks": [sizes[str(d)] for d in v.dims], **v.encoding} for name, v in ds.data_vars.items()}
        ds.to_zarr(path, zarr_format=zarr_format, encoding=encoding, consolidated=False)
        return path

    return to_zarr


@pytest.mark.parametrize(
    ("grid", "zarr_format", "ascending"),
    list(itertools.product((LATITUDE_FIRST, LONGITUDE_FIRST), (2, 3), (False, True))),
)
def test_cf_zarr_becomes_what_xarray_reads(
    grid: Sequence[str], zarr_format: int, ascending: bool, tmp_path: Path, write: Callable[..., Path]
) -> None:
    path = write(weather(grid, ascending), zarr_format)
    group = rechunk(path, tmp_path, 7)
    with xr.open_zarr(path, chunks=None, consolidated=False) as ds:
        assert_holds(group, fields_of(ds[["lsm", "q", "t", "t2m"]]))
        assert group.attrs["field_shape"] == [7, 11]
        assert group["latitudes"][:11].tolist() == [float(ds["latitude"][0])] * 11
        assert group["longitudes"][:11].tolist() == ds["longitude"].values.tolist()
    assert group.attrs["variables_metadata"]["lsm"]["constant_in_time"] is True
    assert group.attrs["variables_metadata"]["t_850"]["mars"] == {"param": "t", "levelist": 850}
    assert group.attrs["frequency"] == "6h"


def test_longitude_first_storage_gives_the_same_dataset_as_latitude_first(tmp_path: Path) -> None:
    ds = weather()
    ds.to_netcdf(tmp_path / "a.nc")
    ds.transpose("longitude", "level", "time", "latitude").to_netcdf(tmp_path / "b.nc")
    first, second = (data_of(rechunk(tmp_path / f"{n}.nc", tmp_path, overwrite=True)) for n in "ab")
    assert first.tobytes() == second.tobytes()


def test_packed_integers_are_unpacked_as_xarray_does(tmp_path: Path, write: Callable[..., Path]) -> None:
    ds = weather()[["t", "t2m"]]
    for array in ds.data_vars.values():
        array.encoding = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 200.0, "_FillValue": -32768}
    path = write(ds)
    with xr.open_zarr(path, chunks=None, consolidated=False) as packed:
        assert int(np.isnan(packed["t2m"]).sum()) == 1
        assert_holds(rechunk(path, tmp_path), fields_of(packed[["t", "t2m"]]))


@pytest.mark.parametrize("grid", [LATITUDE_FIRST, LONGITUDE_FIRST])
@pytest.mark.parametrize("chunks", [{"latitude": 7}, {"latitude": 2, "longitude": 3, "level": 1}])
def test_pieces_smaller_than_the_grid_give_the_same_bytes(
    grid: Sequence[str], chunks: dict[str, int], tmp_path: Path, write: Callable[..., Path]
) -> None:
    path = write(weather(grid), time=10, **chunks)
    source = CFSource(str(path), Selection())
    whole = np.empty((10, 8, 1, 77), np.float32)
    source.read(slice(0, 10), slice(0, 77), whole)
    for dates, cells in ((1, 30), (3, 11), (10, 5)):
        for date, cell in itertools.product(range(0, 10, dates), range(0, 77, cells)):
            some = slice(date, min(date + dates, 10)), slice(cell, min(cell + cells, 77))
            out = np.full((some[0].stop - date, 8, 1, some[1].stop - cell), -1, np.float32)
            source.read(*some, out)
            assert same_bits(out, whole[some[0], :, :, some[1]])


def test_tiny_memory_bound_gives_the_same_bytes(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(weather(), time=10, latitude=1)
    plenty = data_of(rechunk(path, tmp_path, 7))
    request = Request(str(path), str(tmp_path / "out.zarr"), 7, max_memory=20_000, overwrite=True, sync=False)
    prepared = prepare(request)
    assert len(prepared.plan.pieces) > 1
    run(prepared)
    assert data_of(zarr.open_group(tmp_path / "out.zarr", mode="r")).tobytes() == plenty.tobytes()


def test_a_stored_chunk_is_loaded_once_for_all_its_dates(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(weather()[["t"]], time=5)
    source = CFSource(str(path), Selection())
    boxes = list(source._boxes(slice(0, 10), slice(0, 77)))
    assert source.extent.chunks == (5, 3, 1, 77)
    assert sum((box.dates.stop - box.dates.start) * len(box.levels) for box in boxes) == 10 * 3
    assert all(box.dates.start % 5 == 0 and len(box.levels) == 3 for box in boxes)


def test_unstructured_cells_keep_their_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 23)).astype(np.float32)
    lat, lon = np.deg2rad(random.uniform(-90, 90, 23)), np.deg2rad(random.uniform(0, 360, 23))
    coords = {
        "time": np.arange(3).astype("datetime64[D]").astype("datetime64[ns]"),
        "clat": ("cell", lat, {"units": "radian", "standard_name": "latitude"}),
        "clon": ("cell", lon, {"units": "radian", "standard_name": "longitude"}),
    }
    xr.Dataset({"t": (("time", "cell"), values)}, coords).to_netcdf(tmp_path / "icon.nc")
    group = rechunk(tmp_path / "icon.nc", tmp_path, 23)
    assert_holds(group, {"t": values.reshape(3, 1, 23)})
    np.testing.assert_allclose(group["latitudes"][...], np.rad2deg(lat), rtol=1e-15)


def test_realizations_become_ensemble_members_and_constants_are_repeated_for_each(tmp_path: Path) -> None:
    ds = weather(dates=2)[["t2m", "lsm"]]
    members = xr.concat([ds["t2m"] + i for i in range(3)], "number").rename(number="realization")
    ds.assign(t2m=members).to_netcdf(tmp_path / "eps.nc")
    data = data_of(rechunk(tmp_path / "eps.nc", tmp_path))
    assert same_bits(data[:, 0], members.transpose("time", "realization", ...).values.reshape(2, 3, 77))
    assert same_bits(data[:, 1], np.broadcast_to(ds["lsm"].values.reshape(77), (2, 3, 77)))


def test_pressure_in_pascal_is_named_in_hectopascal(tmp_path: Path) -> None:
    ds = weather(dates=2)[["t"]]
    ds = ds.assign_coords(level=("level", [50000.0, 85000.0, 100000.0], {"units": "Pa"}))
    ds.to_netcdf(tmp_path / "pa.nc")
    assert rechunk(tmp_path / "pa.nc", tmp_path).attrs["variables"] == ["t_500", "t_850", "t_1000"]


# -- several files ----------------------------------------------------------------------------------------------------


def test_files_that_follow_one_another_become_one_series(tmp_path: Path) -> None:
    ds = weather()
    for name, dates in {"c": slice(0, 3), "a": slice(3, 4), "b": slice(4, 10)}.items():
        ds.isel(time=dates).to_netcdf(tmp_path / f"era5-{name}.nc")
    group = rechunk(tmp_path / "era5-*.nc", tmp_path)
    assert_holds(group, fields_of(ds))
    np.testing.assert_array_equal(group["dates"][...], ds["time"].values.astype("datetime64[s]"))


def test_files_of_one_variable_one_level_or_one_date_each_become_one_dataset(tmp_path: Path) -> None:
    ds = weather(dates=3)
    for date, name in itertools.product(range(3), ("t", "t2m")):
        ds[[name]].isel(time=date).to_netcdf(tmp_path / f"era5-{name}-{date}.nc")
    q = ds[["q"]].assign_coords(level=ds["level"].assign_attrs(units="hPa"))
    for level in range(3):
        q.isel(level=level).to_netcdf(tmp_path / f"era5-q-{level}.nc")
    ds[["lsm"]].to_netcdf(tmp_path / "era5-lsm.nc")
    fields = fields_of(ds)
    select = ("t2m", "lsm", "t", "q")
    group = rechunk(tmp_path / "era5-*.nc", tmp_path, select=select)
    levels = {name: [each for each in fields if each == name or each.startswith(f"{name}_")] for name in select}
    assert_holds(group, {each: fields[each] for name in select for each in levels[name]})


def test_pattern_of_zarr_stores_becomes_one_series(tmp_path: Path) -> None:
    ds = weather()[["t2m"]]
    for i in range(2):
        ds.isel(time=slice(5 * i, 5 * i + 5)).to_zarr(tmp_path / f"year{i}.zarr", consolidated=False)
    assert_holds(rechunk(tmp_path / "year?.zarr", tmp_path), fields_of(ds))


# -- other ways to run ------------------------------------------------------------------------------------------------


def test_two_local_workers_write_the_same_bytes(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(weather(), time=2)
    here = data_of(rechunk(path, tmp_path))
    assert data_of(rechunk(path, tmp_path, workers=2, overwrite=True)).tobytes() == here.tobytes()


def test_two_local_workers_write_the_same_bytes_from_many_netcdf_files(tmp_path: Path) -> None:
    ds = weather()
    for i in range(5):
        ds.isel(time=slice(2 * i, 2 * i + 2)).to_netcdf(tmp_path / f"part{i}.nc")
    assert_holds(rechunk(tmp_path / "part*.nc", tmp_path, workers=2), fields_of(ds))


def test_dates_are_chosen_within_chunks(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(weather(), time=4)
    group = rechunk(path, tmp_path, start="2020-01-01T12:00", end="2020-01-02")
    assert_holds(group, fields_of(weather()[["lsm", "q", "t", "t2m"]].isel(time=slice(2, 8))))


def test_command_line_reads_netcdf_and_verifies_against_it(tmp_path: Path) -> None:
    weather().to_netcdf(tmp_path / "in.nc")
    runner, source, out = CliRunner(), str(tmp_path / "in.nc"), str(tmp_path / "out.zarr")
    assert runner.invoke(main, ["rechunk", source, out, "-n", "7", "--select", "t2m,t"]).exit_code == 0
    assert_holds(zarr.open_group(out, mode="r"), fields_of(weather()[["t2m", "t"]]))
    verified = runner.invoke(main, ["verify", out, "--source", source])
    assert verified.exit_code == 0, verified.output


def test_variables_of_a_zarr_store_come_in_the_order_of_their_names(write: Callable[..., Path]) -> None:
    path = write(weather())
    assert {CFSource(str(path), Selection()).variables for _ in range(8)} == {
        ("lsm", "q_500", "q_850", "q_1000", "t_500", "t_850", "t_1000", "t2m")
    }


def test_resumed_run_refuses_a_file_that_changed(tmp_path: Path) -> None:
    weather().to_netcdf(tmp_path / "in.nc")
    request = Request(str(tmp_path / "in.nc"), str(tmp_path / "out.zarr"), 7, sync=False)
    prepared = prepare(request)
    os.utime(tmp_path / "in.nc", (0, 0))
    with pytest.raises(ShardioError, match="changed"):
        run(prepared)
