"""Do the tools that opened the source open what `shardio rechunk` made of it, and see the same?

python -m tools.check_peers            builds the environment of anemoi-datasets under .peers/ when it is not there

A small dataset as anemoi-datasets makes them (Zarr v2, two members, NaN, a missing date, statistics of tendencies) is
cut into grid-chunks as Zarr v2 and v3. anemoi-datasets opens the source and the v2 output; zarr-python, xarray and
tensorstore open both outputs; and all of them open a forecast that two ranks wrote. `Check`, `make_source`,
`rechunked`, `check_v2` and `check_v3` are for tests too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.peers import PeerError, add_options, environments, run

Json = dict[str, Any]
DATES, MISSING, CELLS, GRID_CHUNKS = 8, 3, 1007, 6
VARIABLES = ("t_850", "z_500", "tp", "lsm")
STATISTICS = ("mean", "stdev", "minimum", "maximum")
# What a peer says of a dataset, in its own environment: JSON to stdout, values to a file.
ASK_ANEMOI = """
import json, os, sys
import numpy as np
from anemoi.datasets import open_dataset

path, values, drop = sys.argv[1], sys.argv[2], sys.argv[3:]
dataset = open_dataset(path, drop=drop) if drop else open_dataset(path)
rows = []
for i in range(len(dataset)):
    try:
        rows.append(np.asarray(dataset[i]))
    except Exception as error:
        rows.append(np.full(dataset.shape[1:], -1e30, np.float32))
        if type(error).__name__ != "MissingDateError":
            raise
has_tendencies = os.path.exists(path + "/statistics_tendencies_6h_mean")  # a forecast has none
tendencies = dataset.statistics_tendencies() if has_tendencies else {}
np.savez(values, data=np.stack(rows), latitudes=dataset.latitudes, longitudes=dataset.longitudes,
         **dataset.statistics, **{"tendencies_" + k: v for k, v in tendencies.items()})
print(json.dumps({
    "shape": dataset.shape, "dates": [str(d) for d in dataset.dates], "missing": sorted(map(int, dataset.missing)),
    "variables": dataset.variables, "frequency": str(dataset.frequency), "resolution": str(dataset.resolution),
    "field_shape": list(dataset.field_shape), "name_to_index": dataset.name_to_index, "dtype": str(dataset.dtype),
    "start_date": str(dataset.start_date), "end_date": str(dataset.end_date),
    "variables_metadata": dataset.variables_metadata,
}, default=str))
"""


@dataclass(frozen=True)
class Check:
    """One comparison; `problem` is empty where it holds."""

    reader: str
    output: str
    what: str
    problem: str = ""


def make_source(path: Path) -> NDArray[np.float32]:
    """A small dataset as anemoi-datasets makes them; returns its values [date, variable, ensemble, cell]."""
    import zarr

    random = np.random.default_rng(0)
    values = random.normal(280, 10, (DATES, len(VARIABLES), 2, CELLS)).astype(np.float32)
    values[:, 2, :, ::7] = np.nan  # a variable that is not defined everywhere
    values[MISSING] = np.nan
    dates = np.datetime64("2020-01-01", "s") + np.arange(DATES) * np.timedelta64(6, "h")
    group = zarr.open_group(path, mode="w", zarr_format=2)
    arrays = {
        "data": values,
        "dates": dates.astype("datetime64[s]"),
        "latitudes": np.linspace(90, -90, CELLS),
        "longitudes": np.linspace(0, 360, CELLS, endpoint=False),
        **_statistics(values, ""),
        **_statistics(np.diff(values, axis=0), "statistics_tendencies_6h_"),
    }
    for name, array in arrays.items():
        chunks = (1, *array.shape[1:]) if name == "data" else array.shape
        created = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)
        created[...] = array
    group["data"].attrs["_ARRAY_DIMENSIONS"] = ["time", "variable", "ensemble", "cell"]
    group.attrs.put(_attributes([str(date) for date in dates]))
    zarr.consolidate_metadata(path, zarr_format=2)
    return values


def _statistics(values: NDArray[np.float32], prefix: str) -> dict[str, NDArray[np.float64]]:
    axes, wide = (0, 2, 3), values.astype(np.float64)
    functions: tuple[Callable[..., Any], ...] = (np.nanmean, np.nanstd, np.nanmin, np.nanmax)
    return {prefix + name: function(wide, axis=axes) for name, function in zip(STATISTICS, functions, strict=True)}


def _attributes(dates: list[str]) -> Json:
    return {
        "uuid": "5c4a3c0e-0000-4000-8000-000000000000",
        "version": "0.30",
        "variables": list(VARIABLES),
        "variables_metadata": {name: {"mars": {"param": name.split("_")[0]}} for name in VARIABLES},
        "resolution": "o16",
        "field_shape": [CELLS],
        "frequency": "6h",
        "start_date": dates[0],
        "end_date": dates[-1],
        "statistics_start_date": dates[0],
        "statistics_end_date": dates[-1],
        "missing_dates": [dates[MISSING]],
        "allow_nans": True,
        "ensemble_dimension": 2,
        "flatten_grid": True,
        "data_request": {"grid": "o16", "area": [90, 0, -90, 360], "param_level": {}, "param_step": {}},
    }


def rechunked(source: Path, zarr_format: int) -> Path:
    """What `shardio rechunk` makes of a source, beside it."""
    from shardio.rechunk import Request, prepare, run

    output = source.with_name(f"v{zarr_format}.zarr")
    run(prepare(Request(str(source), str(output), GRID_CHUNKS, zarr_format)))
    return output


def written_by_ranks(path: Path) -> NDArray[np.float32]:
    """A dataset such as `trainer predict` writes, of two ranks; returns its values."""
    from shardio import Description, ShardedWriter

    values = np.random.default_rng(1).normal(280, 10, (DATES, 2, 2, CELLS)).astype(np.float32)
    initial, chunk_cells = np.datetime64("2020-01-01", "s"), -(-CELLS // 4)
    about = Description(
        initial + np.arange(DATES) * np.timedelta64(21600, "s"),
        VARIABLES[:2],
        np.linspace(90, -90, CELLS),
        np.linspace(0, 360, CELLS, endpoint=False),
        2,
        chunk_cells,
        {name: np.array([280.0, 10.0]) for name in STATISTICS},
        {"forecast": {"initial_date": str(initial)}, "uuid": "", "resolution": "o16"},
    )

    meeting = threading.Barrier(2)

    def tell(said: str) -> list[str]:
        meeting.wait()
        return [said, said]

    def write(rank: int) -> None:
        chunks = range(2 * rank, 2 * rank + 2)
        with ShardedWriter(path, about, {"run": 1}, chunks, rank, tell) as writer:
            for date in range(DATES):
                writer.put(date, values[date][..., chunks.start * chunk_cells : chunks.stop * chunk_cells])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    return values


def check_forecast(python: Path | None, path: Path, values: NDArray[np.float32]) -> list[Check]:
    """What ranks wrote is read as it was, by every reader."""
    import zarr

    found = np.asarray(zarr.open_group(path, mode="r")["data"][...])
    checks = [Check("zarr-python", path.name, "data", _unequal(found, values)), *_check_xarray(path, values)]
    checks += _check_tensorstore(path, values, "zarr")
    if python is not None:
        theirs = _ask_anemoi(python, path, [])
        checks += [Check("anemoi-datasets", path.name, "data", _unequal(theirs["data"], values))]
        expected = {"variables": list(VARIABLES[:2]), "shape": list(values.shape), "missing": []}
        checks += [Check("anemoi-datasets", path.name, key, _unequal(theirs[key], v)) for key, v in expected.items()]
    return checks


def check_anemoi(python: Path, source: Path, output: Path) -> list[Check]:
    """anemoi-datasets sees the same in the output as in the source, whole and with a variable dropped."""
    checks = []
    for drop in ([], ["z_500"]):
        label = f"{output.name}{' without z_500' if drop else ''}"
        theirs, ours = (_ask_anemoi(python, path, drop) for path in (source, output))
        for name, value in theirs.items():
            checks.append(Check("anemoi-datasets", label, name, _unequal(ours.get(name), value)))
        if not drop:
            expected = "" if theirs["missing"] == [MISSING] else f"{theirs['missing']} instead of {[MISSING]}"
            checks.append(Check("anemoi-datasets", source.name, "missing date is seen", expected))
    return checks


def _ask_anemoi(python: Path, path: Path, drop: list[str]) -> Json:
    values = path.with_suffix(".npz")
    said = run([str(python), "-W", "ignore", "-c", ASK_ANEMOI, str(path), str(values), *drop], f"it reads {path.name}")
    found: Json = json.loads(said.splitlines()[-1])
    with np.load(values) as arrays:
        return found | {name: arrays[name] for name in arrays.files}


def check_v2(source: Path, output: Path, values: NDArray[np.float32]) -> list[Check]:
    """One file per grid-chunk, equal values for every reader."""
    files = len([file for file in (output / "data").iterdir() if not file.name.startswith(".z")])
    count = "" if files == DATES * GRID_CHUNKS else f"{files} instead of {DATES * GRID_CHUNKS}"
    return [Check("files", output.name, "one per grid-chunk", count), *_check_readers(source, output, values, "zarr")]


def check_v3(source: Path, output: Path, values: NDArray[np.float32]) -> list[Check]:
    """One file per date, equal values for every reader, named dimensions."""
    import zarr

    files = sorted(file.name for file in (output / "data").iterdir() if file.name != "zarr.json")
    expected = [f"c.{date}.0.0.0" for date in range(DATES)]
    names = zarr.open_array(output, path="data", mode="r").metadata.to_dict().get("dimension_names")
    return [
        Check("files", output.name, "one per date", _unequal(files, expected)),
        Check("zarr-python", output.name, "dimensions", _unequal(list(names or ()), list(DIMENSIONS))),
        *_check_readers(source, output, values, "zarr3"),
    ]


DIMENSIONS = ("time", "variable", "ensemble", "cell")


def _check_readers(source: Path, output: Path, values: NDArray[np.float32], driver: str) -> list[Check]:
    return [
        *_check_zarr(source, output),
        *_check_xarray(output, values),
        *_check_tensorstore(output, values, driver),
    ]


def _check_zarr(source: Path, output: Path) -> list[Check]:
    """Every array of the source is there, equal, and so is every attribute that does not describe the cut."""
    import zarr

    theirs, ours = zarr.open_group(source, mode="r"), zarr.open_group(output, mode="r")
    checks = []
    for name, array in sorted(theirs.arrays()):
        found = np.asarray(ours[name][...]) if name in ours else None
        checks.append(Check("zarr-python", output.name, name, _unequal(found, np.asarray(array[...]))))
    kept = {name: value for name, value in theirs.attrs.items() if name != "uuid"}
    changed = [name for name, value in kept.items() if ours.attrs.get(name) != value]
    checks.append(Check("zarr-python", output.name, "attributes", f"changed: {changed}" if changed else ""))
    return checks


def _check_xarray(output: Path, values: NDArray[np.float32]) -> list[Check]:
    import xarray

    with xarray.open_zarr(output, chunks=None, consolidated=None) as dataset:
        found = dataset["data"]
        dimensions = _unequal(list(found.dims), list(DIMENSIONS))
        dates = dataset["dates"].values.astype("datetime64[s]").astype(np.int64)
        start = np.datetime64("2020-01-01", "s").astype(np.int64)
        return [
            Check("xarray", output.name, "dimensions", dimensions),
            Check("xarray", output.name, "data", _unequal(found.values, values)),
            Check("xarray", output.name, "dates", _unequal(dates, start + np.arange(DATES) * 6 * 3600)),
        ]


def _check_tensorstore(output: Path, values: NDArray[np.float32], driver: str) -> list[Check]:
    import tensorstore

    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(output / "data")}}
    opened = tensorstore.open(spec, open=True, read=True).result()
    part = slice(CELLS // 3, CELLS - 5)
    return [
        Check("tensorstore", output.name, "data", _unequal(opened.read().result(), values)),
        Check(
            "tensorstore", output.name, "part", _unequal(opened[2, :, 1, part].read().result(), values[2, :, 1, part])
        ),
    ]


def _unequal(ours: Any, theirs: Any) -> str:
    """Empty where both are equal, NaN in the same places included."""
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{ours.dtype} {list(ours.shape)} instead of {theirs.dtype} {list(theirs.shape)}"
        same = np.array_equal(ours, theirs, equal_nan=theirs.dtype.kind == "f")
        either = ~((ours != ours) & (theirs != theirs))  # not NaN in both
        return "" if same else f"{int(((ours != theirs) & either).sum())} values differ"
    return "" if ours is not None and ours == theirs else f"{ours!r} instead of {theirs!r}"


def check_all(folder: Path, anemoi: Path | None) -> list[Check]:
    """Every check there is; `anemoi` is the interpreter that has anemoi-datasets."""
    source = folder / "source.zarr"
    values = make_source(source)
    v2, v3 = rechunked(source, 2), rechunked(source, 3)
    forecast = folder / "forecast.zarr"
    checks = [*check_v2(source, v2, values), *check_v3(source, v3, values)]
    checks += check_forecast(anemoi, forecast, written_by_ranks(forecast))
    return [*check_anemoi(anemoi, source, v2), *checks] if anemoi else checks


def print_table(checks: list[Check]) -> None:
    """One row per reader and output: what is equal, and every difference."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("reader", "output", "equal", "differs"):
        table.add_column(heading)
    for reader, output in dict.fromkeys((check.reader, check.output) for check in checks):
        mine = [check for check in checks if (check.reader, check.output) == (reader, output)]
        equal = ", ".join(check.what for check in mine if not check.problem)
        differs = "\n".join(f"{check.what}: {check.problem}" for check in mine if check.problem)
        table.add_row(reader, output, equal, differs or "-")
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Open shardio's output with the tools of others.")
    parser.add_argument("--skip-anemoi", action="store_true", help="check with zarr, xarray and tensorstore only")
    add_options(parser)
    options = parser.parse_args()
    try:
        anemoi = None if options.skip_anemoi else environments(options).python("anemoi")
        with tempfile.TemporaryDirectory() as folder:
            checks = check_all(Path(folder), anemoi)
    except PeerError as reason:
        print(f"anemoi-datasets did not run: {reason}", file=sys.stderr)
        return 1
    print_table(checks)
    failed = sum(bool(check.problem) for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
