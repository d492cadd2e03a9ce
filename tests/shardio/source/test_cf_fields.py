"""What does not fit is named with a remedy that works; damaged files are one clear error; GRIB."""

import itertools
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import cfgrib
import eccodes
import iris_sample_data
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner, Result

from shardio.cli.main import main
from shardio.errors import SelectionError
from shardio.source.cf import CFSource
from shardio.source.source import Selection

SAMPLES = Path(iris_sample_data.path)
SHARED = Path(__file__).parents[4] / "shared" / "data"
TIMES = np.datetime64("2020-01-01", "ns") + np.arange(4) * np.timedelta64(6, "h")
GRID = {"lat": ("lat", [60.0, 50.0, 40.0]), "lon": ("lon", [0.0, 10.0])}


def field(*dims: str, **sizes: int) -> tuple[tuple[str, ...], np.ndarray]:
    extents = {"time": 4, "level": 2, "lat": 3, "lon": 2, **sizes}
    shape = [extents[dim] for dim in dims]
    return dims, np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def save(path: Path, variables: dict[str, object], **coordinates: object) -> Path:
    xr.Dataset(variables, {"time": TIMES, "level": [500, 850], **GRID, **coordinates}).to_netcdf(path)
    return path


def rechunk(source: Path | str, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["rechunk", str(source), str(out), "-n", "1", *options])


def refusal(source: Path | str, out: Path, *options: str) -> str:
    """The one line on stderr; nothing is left behind."""
    result = rechunk(source, out, *options)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not list(out.parent.glob(f"{out.name}*"))
    return result.stderr


def variables(path: Path) -> list[str]:
    return list(zarr.open_group(path, mode="r").attrs["variables"])  # type: ignore[arg-type, call-overload]


# -- variables that do not fit ----------------------------------------------------------------------------------------

T = {"t": field("time", "level", "lat", "lon")}
MISFITS = {
    "two extra dimensions": (
        {"x": field("time", "level", "band", "lat", "lon", band=2)},
        "dimensions band are neither",
    ),
    "expver is no level": ({"x": field("time", "expver", "lat", "lon", expver=2)}, "dimensions expver are neither"),
    "lead times are no levels": ({"x": field("time", "step", "lat", "lon", step=2)}, "dimensions step are neither"),
    "no grid": ({"x": field("time")}, "no latitude among its coordinates"),
    "text": ({"x": ("time", np.array(["a"] * 4))}, "not numbers"),
    "another grid": (
        {"x": (("time", "y2"), np.zeros((4, 5))), "y": field("time", "lat", "lon")},
        "its grid is 5, that of others 3x2",
    ),
    "fewer dates": ({"x": field("time2", "lat", "lon", time2=3)}, "its dates are 3 from 2020-01-01T00:00:00"),
    "gaps in time": ({"x": field("gappy", "lat", "lon", gappy=2)}, "its gappy has gaps (NaT)"),
}
COORDINATES = {
    "lat2": ("y2", np.arange(5.0), {"standard_name": "latitude"}),
    "lon2": ("y2", np.arange(5.0), {"standard_name": "longitude"}),
    "expver": [1, 5],
    "step": ("step", [0, 6], {"units": "hours"}),
    "time2": ("time2", TIMES[:3], {"standard_name": "time"}),
    "gappy": ("gappy", np.array(["NaT", "2020-01-01"], "datetime64[ns]"), {"standard_name": "time"}),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfit_is_named_and_the_suggested_commands_work(case: str, tmp_path: Path) -> None:
    odd, reason = MISFITS[case]
    used = {
        dim for dims in (values[0] for values in odd.values()) for dim in ((dims,) if isinstance(dims, str) else dims)
    }
    coordinates = {n: c for n, c in COORDINATES.items() if n in used or (n in ("lat2", "lon2") and "y2" in used)}
    source = save(tmp_path / "in.nc", {**T, **odd}, **coordinates)
    message = refusal(source, tmp_path / "out.zarr")
    assert f"x: {reason}" in message or reason in message
    suggestions = re.search(r"Use (--drop \S+), or (--select [^\s.]+)\.", message)
    assert suggestions, message
    for i, suggestion in enumerate(suggestions.groups()):
        out = tmp_path / f"out{i}.zarr"
        result = rechunk(source, out, *shlex.split(suggestion))
        assert result.exit_code == 0, result.stderr
        assert variables(out)[:2] == ["t_500", "t_850"]


def test_suggested_drop_keeps_what_was_dropped_before(tmp_path: Path) -> None:
    source = save(tmp_path / "in.nc", {**T, "u": T["t"], "x": field("time")})
    assert "--drop u,x, or --select t." in refusal(source, tmp_path / "out.zarr", "--drop", "u")


def test_grid_of_most_variables_wins_over_that_of_the_first(tmp_path: Path) -> None:
    odd = {"a": (("time", "y2"), np.zeros((4, 5)))}
    coordinates = {name: COORDINATES[name] for name in ("lat2", "lon2")}
    source = save(tmp_path / "in.nc", {**odd, **T, "u": T["t"]}, **coordinates)
    assert "--drop a, or --select t,u." in refusal(source, tmp_path / "out.zarr")


# -- selection --------------------------------------------------------------------------------------------------------

SELECTIONS = [
    (["--select", "t"], ["t_500", "t_850"]),
    (["--select", "t_850"], ["t_850"]),
    (["--select", "sp,t_850,u,t_500"], ["sp", "t_850", "u_500", "u_850", "t_500"]),
    (["--drop", "t"], ["u_500", "u_850", "sp"]),
    (["--drop", "t_500,sp"], ["t_850", "u_500", "u_850"]),
    (["--select", "t,sp", "--drop", "t_500"], ["t_850", "sp"]),
]


@pytest.mark.parametrize(("options", "expected"), SELECTIONS)
def test_names_mean_a_variable_or_one_level_in_the_order_of_select(
    options: list[str], expected: list[str], tmp_path: Path
) -> None:
    source = save(tmp_path / "in.nc", {**T, "u": T["t"], "sp": field("time", "lat", "lon")})
    assert rechunk(source, tmp_path / "out.zarr", *options).exit_code == 0
    assert variables(tmp_path / "out.zarr") == expected
    ours = np.asarray(zarr.open_array(tmp_path / "out.zarr", path="data", mode="r")[...])
    with xr.open_dataset(source) as ds:
        for i, name in enumerate(expected):
            variable, _, level = name.partition("_")
            theirs = ds[variable].sel(level=int(level)) if level else ds[variable]
            np.testing.assert_array_equal(ours[:, i, 0], theirs.values.reshape(4, 6))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--select", "t_123"], "no variable t_123"),
        (["--drop", "t_123"], "no variable t_123"),
        (["--select", "vo"], "no variable vo. It has: t"),
        (["--drop", "t"], "no variable of"),
        (["--select", "t,t_850"], "names t_850 more than once"),
    ],
)
def test_selection_that_cannot_be_met_is_refused(options: list[str], problem: str, tmp_path: Path) -> None:
    assert problem in refusal(save(tmp_path / "in.nc", T), tmp_path / "out.zarr", *options)


# -- dates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 2, 1, 0], [0, 1, 1, 2]])
def test_dates_that_do_not_increase_are_refused(order: list[int], tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "in.nc", T, time=TIMES[order]), tmp_path / "out.zarr")
    assert "do not increase" in message and "Sort the source" in message


def test_files_that_overlap_in_time_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "in1.nc", T)
    save(tmp_path / "in2.nc", T)
    message = refusal(tmp_path / "in*.nc", tmp_path / "out.zarr")
    assert "in1.nc" in message and "in2.nc" in message and "do not overlap" in message


def test_constants_that_differ_between_files_are_refused(tmp_path: Path) -> None:
    for i in range(2):
        times = TIMES + i * np.timedelta64(1, "D")
        save(tmp_path / f"in{i}.nc", {**T, "lsm": (("lat", "lon"), np.full((3, 2), i))}, time=times)
    message = refusal(tmp_path / "in*.nc", tmp_path / "out.zarr")
    assert "lsm: it has no time, and differs" in message and "--drop lsm" in message


def test_dates_stored_as_fractions_of_days_fall_on_the_second(tmp_path: Path) -> None:
    days = np.arange(4) / 24 * 7
    ds = xr.Dataset(
        {"t": field("time", "lat", "lon")}, {**GRID, "time": ("time", days, {"units": "days since 1900-01-01"})}
    )
    ds.to_netcdf(tmp_path / "in.nc")
    dates = CFSource(str(tmp_path / "in.nc"), Selection()).dates
    np.testing.assert_array_equal(
        dates, np.datetime64("1900-01-01", "s") + np.arange(4) * np.timedelta64(7 * 3600, "s")
    )


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 5_000, 250_000, 500_000])
def test_truncated_netcdf_is_one_clear_error(keep: int, tmp_path: Path) -> None:
    whole = (SAMPLES / "toa_brightness_stereographic.nc").read_bytes()
    (tmp_path / "cut.nc").write_bytes(whole[:keep])
    result = rechunk(tmp_path / "cut.nc", tmp_path / "out.zarr")
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: ")
    assert "cut.nc" in result.stderr and "copy it again" in result.stderr
    assert not (tmp_path / "out.zarr").exists()


def test_damaged_chunk_of_a_netcdf_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "in.nc"
    noise = np.random.default_rng(0).normal(size=(4, 30, 20)).astype(np.float32)
    ds = xr.Dataset(
        {"t": (("time", "lat", "lon"), noise)}, {"time": TIMES, "lat": np.arange(30.0), "lon": np.arange(20.0)}
    )
    ds.to_netcdf(path, encoding={"t": {"zlib": True, "fletcher32": True, "chunksizes": (1, 30, 20)}})
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 3, len(content), 1000):
        content[at] ^= 0xFF
    path.write_bytes(content)
    result = rechunk(path, tmp_path / "out.zarr")
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: ")
    assert "copy it again" in result.stderr
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("name", ["air_temp.pp", "NAME_output.txt", "UM"])
def test_what_xarray_cannot_open_is_one_clear_error(name: str, tmp_path: Path) -> None:
    assert "cannot be opened" in refusal(SAMPLES / name, tmp_path / "out.zarr")


def test_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    assert "no file matches" in refusal(tmp_path / "none*.nc", tmp_path / "out.zarr")


# -- GRIB -------------------------------------------------------------------------------------------------------------

LEVELS, DATES, STEPS, MEMBERS = (850, 500), (20200101, 20200102), (0, 6), (0, 1, 2)


def messages() -> list[tuple[dict[str, int | str], bytes]]:
    """One GRIB message for each variable, level, date, step and member, with the keys that make it."""
    random = np.random.default_rng(3)
    found = []
    for keys in itertools.product(("z", "t"), LEVELS, DATES, STEPS, MEMBERS):
        handle = eccodes.codes_grib_new_from_samples("regular_ll_pl_grib2")
        named = dict(zip(("shortName", "level", "dataDate", "step", "number"), keys, strict=True))
        template = {"productDefinitionTemplateNumber": 1, "Ni": 8, "Nj": 5, "jDirectionIncrementInDegrees": 45}
        ends = {"latitudeOfLastGridPointInDegrees": -90, "latitudeOfFirstGridPointInDegrees": 90}
        wide = {"iDirectionIncrementInDegrees": 45, "longitudeOfLastGridPointInDegrees": 315}
        for key, value in (template | ends | wide | named).items():
            eccodes.codes_set(handle, key, value)
        eccodes.codes_set_values(handle, random.normal(250, 20, 40))
        found.append((named, eccodes.codes_get_message(handle)))
        eccodes.codes_release(handle)
    return found


@pytest.fixture
def grib(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "in.grib", keep: Callable[[dict[str, int | str]], bool] = lambda keys: True) -> Path:
        (tmp_path / name).write_bytes(b"".join(content for keys, content in messages() if keep(keys)))
        return tmp_path / name

    return write


def assert_equals_cfgrib(source: Path, out: Path) -> None:
    """Every value is the one cfgrib gives; dates are the valid times in order."""
    with warnings.catch_warnings(action="ignore"):  # cfgrib calls xarray the old way
        (ds,) = cfgrib.open_datasets(str(source), backend_kwargs={"indexpath": ""})
    dates = ds["valid_time"].values.reshape(-1)
    expected = {}
    for name, array in ds.data_vars.items():
        array = array.expand_dims([dim for dim in ("number", "time", "step") if dim not in array.dims])
        levels = array["isobaricInhPa"].values.tolist()
        values = array.transpose("time", "step", "number", "isobaricInhPa", "latitude", "longitude").values
        values = values.reshape(len(dates), values.shape[2], len(levels), -1)[np.argsort(dates)]
        expected |= {f"{name}_{level:g}": values[:, :, i] for i, level in enumerate(levels)}
    group = zarr.open_group(out, mode="r")
    assert variables(out) == list(expected)
    np.testing.assert_array_equal(group["dates"][...], np.sort(dates).astype("datetime64[s]"))
    data = np.asarray(group["data"][...])
    for i, (name, values) in enumerate(expected.items()):
        assert np.ascontiguousarray(data[:, i]).tobytes() == np.ascontiguousarray(values).tobytes(), name
        wide = values.astype(np.float64)
        for statistic, value in (("mean", wide.mean()), ("stdev", wide.std()), ("minimum", wide.min())):
            np.testing.assert_allclose(group[statistic][i], value, rtol=1e-12)


def test_grib_becomes_what_cfgrib_reads(grib: Callable[..., Path], tmp_path: Path) -> None:
    source = grib()
    assert rechunk(source, tmp_path / "out.zarr").exit_code == 0
    assert_equals_cfgrib(source, tmp_path / "out.zarr")
    assert list(tmp_path.glob("*.idx")) == []


def test_pattern_of_grib_files_becomes_one_series(grib: Callable[..., Path], tmp_path: Path) -> None:
    for i, (date, level) in enumerate(itertools.product(DATES, LEVELS)):
        grib(f"part{i}.grib", lambda keys, d=date, v=level: keys["dataDate"] == d and keys["level"] == v)
    result = rechunk(tmp_path / "part*.grib", tmp_path / "out.zarr", "--select", "z,t")
    assert result.exit_code == 0, result.stderr
    whole = grib("whole.grib")
    assert (
        rechunk(whole, tmp_path / "whole.zarr", "--select", ",".join(variables(tmp_path / "out.zarr"))).exit_code == 0
    )
    data = [np.asarray(zarr.open_array(tmp_path / n, path="data", mode="r")[...]) for n in ("out.zarr", "whole.zarr")]
    assert data[0].tobytes() == data[1].tobytes()


def test_forecasts_that_reach_a_date_twice_are_refused(grib: Callable[..., Path], tmp_path: Path) -> None:
    source = grib(keep=lambda keys: keys["dataDate"] == DATES[0])
    content = source.read_bytes()
    handle_time = [c for k, c in messages() if k["dataDate"] == DATES[0]]
    later = []
    for message in handle_time:
        handle = eccodes.codes_new_from_message(message)
        eccodes.codes_set(handle, "dataTime", 600)
        later.append(eccodes.codes_get_message(handle))
        eccodes.codes_release(handle)
    source.write_bytes(content + b"".join(later))
    assert "time x step reaches 2020-01-01T12:00:00 more than once" in refusal(source, tmp_path / "out.zarr")


def test_grib_on_a_curvilinear_grid_becomes_what_cfgrib_reads(tmp_path: Path) -> None:
    source = SAMPLES / "polar_stereo.grib2"
    assert rechunk(source, tmp_path / "out.zarr").exit_code == 0
    (ds,) = cfgrib.open_datasets(str(source), backend_kwargs={"indexpath": ""})
    data = np.asarray(zarr.open_array(tmp_path / "out.zarr", path="data", mode="r")[...])
    assert data.tobytes() == ds["t"].values.tobytes()
    assert variables(tmp_path / "out.zarr") == [f"t_{float(ds['isobaricInhPa']):g}"]


@pytest.mark.parametrize("keep", [0.3, 0.77, 0.999])
def test_truncated_grib_is_one_clear_error(keep: float, tmp_path: Path) -> None:
    whole = b"".join(content for _, content in messages())
    (tmp_path / "cut.grib").write_bytes(whole[: int(keep * len(whole))])
    message = refusal(tmp_path / "cut.grib", tmp_path / "out.zarr")
    assert "cut.grib" in message and "copy it again" in message


def test_grib_with_a_message_absent_is_refused(grib: Callable[..., Path], tmp_path: Path) -> None:
    absent = {"shortName": "t", "level": 500, "dataDate": DATES[1], "step": 6, "number": 1}
    source = grib(keep=lambda keys: keys != absent)
    message = refusal(source, tmp_path / "out.zarr")
    assert (
        "t: 1 of 24 GRIB messages (levels x dates x members) are absent" in message
        and "--drop t, or --select z." in message
    )


def test_grib_without_cfgrib_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cfgrib'] = None\n"
        f"from shardio.cli.main import main; main(['rechunk', {str(SAMPLES / 'polar_stereo.grib2')!r}, "
        f"{str(tmp_path / 'out.zarr')!r}, '-n', '1'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "shardio[grib]"' in result.stderr and result.stderr.count("\n") == 1


def test_selection_error_names_every_variable_of_all_files(tmp_path: Path) -> None:
    save(tmp_path / "a.nc", T)
    save(tmp_path / "b.nc", {"u": T["t"]})
    with pytest.raises(SelectionError, match=r"It has: t, u\."):
        CFSource(str(tmp_path / "?.nc"), Selection(select=("w",)))


if SHARED.is_dir():  # ECMWF's files are not ours to give away

    @pytest.mark.parametrize("name", ["era5-levels-members.grib", "era-pl-10deg.grib"])
    def test_era5_grib_becomes_what_cfgrib_reads(name: str, tmp_path: Path) -> None:
        result = rechunk(SHARED / name, tmp_path / "out.zarr", "--workers", "2")
        assert result.exit_code == 0, result.stderr
        assert_equals_cfgrib(SHARED / name, tmp_path / "out.zarr")
        assert {"z_850", "t_500"} <= set(variables(tmp_path / "out.zarr"))
