"""Datasets to cut, small and uneven; shardio as a function, as a command, and on one dask cluster."""

import os
import signal
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from shardio.cli.main import main
from shardio.rechunk import Request, prepare, run

DIMENSIONS = ["time", "variable", "ensemble", "cell"]
PAYLOAD = np.uint32(0x7FC12345)  # a quiet NaN that carries a message


@dataclass(frozen=True)
class Built:
    """A source and what it holds."""

    path: Path
    values: np.ndarray
    dates: np.ndarray
    missing: tuple[int, ...]
    variables: list[str]
    statistics: dict[str, np.ndarray]
    extras: dict[str, np.ndarray]

    @property
    def expected(self) -> np.ndarray:
        with np.errstate(over="ignore"):
            return self.values.astype(np.float32)


def some_values(shape: tuple[int, ...], dtype: str, missing: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of every size; where the type has NaN, some NaN with a payload, and NaN on missing dates."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        return random.integers(np.iinfo(kind).min // 2, np.iinfo(kind).max // 2, shape).astype(kind)
    values = (random.standard_normal(shape) * 10.0 ** random.integers(-3, 6, shape)).astype(kind)
    values[random.random(shape) < 0.05] = np.nan
    values[tuple(n // 2 for n in shape)] = np.nan
    if kind == np.float32:
        values.view(np.uint32)[tuple(n - 1 for n in shape)] = PAYLOAD
    values[list(missing)] = np.nan
    return values


def build_source(
    path: Path,
    zarr_format: int = 2,
    shape: tuple[int, int, int, int] = (5, 3, 1, 23),
    chunks: tuple[int, int, int, int] = (1, 3, 1, 23),
    shards: tuple[int, int, int, int] | None = None,
    dtype: str = "f4",
    missing: tuple[int, ...] = (),
    absent: bool = False,
    statistics: bool = True,
    extras: bool = False,
    seed: int = 0,
    **storage: Any,
) -> Built:
    """Write an anemoi dataset with zarr-python. `absent`: missing dates have no chunks at all."""
    values = some_values(shape, dtype, missing, seed)
    start = np.datetime64("2020-01-01T00:00:00", "s")
    dates = start + np.arange(shape[0]) * np.timedelta64(21600, "s")
    names = [f"v_{i}" for i in range(shape[1])]
    random = np.random.default_rng(seed + 1)
    stats = {name: random.standard_normal(shape[1]) for name in ("mean", "stdev", "minimum", "maximum")}
    more: dict[str, np.ndarray] = {}
    if extras:
        more = {
            "statistics_tendencies_6h_mean": random.standard_normal(shape[1]),
            "count": np.arange(shape[1], dtype=np.int64),
            "table": random.standard_normal((4, 3)).astype(np.float32),
            "names": np.array([f"station {'x' * i}" for i in range(4)], dtype="<U24"),
            "_build/flags": np.arange(shape[0]) % 2 == 0,
            "_build/lengths": np.arange(shape[0]),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
        group.attrs.update(
            {
                "variables": names,
                "variables_metadata": {name: {"mars": {"param": name}} for name in names},
                "resolution": "tiny",
                "field_shape": [shape[3]],
                "frequency": "6h",
                "start_date": str(dates[0]),
                "end_date": str(dates[-1]),
                "missing_dates": [str(dates[i]) for i in missing],
                "statistics_start_date": str(dates[0]),
                "statistics_end_date": str(dates[-1]),
                "allow_nans": True,
                "uuid": "11111111-2222-3333-4444-555555555555",
                "chunks": list(chunks),
                "shape": list(shape),
                "dtype": str(np.dtype(dtype)),
                "recipe": {"anything": ["at", "all"], "deep": {"er": 1.5}},
            }
        )
        fill = np.nan if np.dtype(dtype).kind == "f" else 0
        data = _array(group, "data", DIMENSIONS, shape, dtype, chunks, shards=shards, fill_value=fill, **storage)
        data[...] = values
        small = {
            "dates": (["time"], dates),
            "latitudes": (["cell"], np.linspace(90, -90, shape[3])),
            "longitudes": (["cell"], np.linspace(0, 359, shape[3])),
            **{name: (["variable"], stat) for name, stat in stats.items() if statistics},
            **{name: (_dimensions(name, array.ndim), array) for name, array in more.items()},
        }
        for name, (dimensions, array) in small.items():
            _array(group, name, dimensions, array.shape, array.dtype, tuple(min(n, 7) for n in array.shape))[...] = (
                array
            )
        if extras:
            group["_build"].attrs["history"] = "made by hand"
            group["table"].attrs["units"] = "K"
        zarr.consolidate_metadata(path, zarr_format=zarr_format)
    if absent:
        assert chunks[0] == 1
        for i in missing:
            for file in (path / "data").glob(f"{i}.*" if zarr_format == 2 else f"c/{i}/*/*/*"):
                file.unlink()
    return Built(path, values, dates, missing, names, stats if statistics else {}, more)


def _dimensions(name: str, ndim: int) -> list[str]:
    if ndim == 1 and (name.startswith("statistics") or name == "count"):
        return ["variable"]
    if name.startswith("_build"):
        return ["time"]
    return [f"{name.replace('/', '_')}_{axis}" for axis in range(ndim)]


def _array(
    group: zarr.Group, name: str, dimensions: list[str], shape: Any, dtype: Any, chunks: Any, **storage: Any
) -> zarr.Array:
    if group.metadata.zarr_format == 3:
        named: dict[str, Any] = {"dimension_names": dimensions}
    else:
        named = {"attributes": {"_ARRAY_DIMENSIONS": dimensions}}
    config = {"write_empty_chunks": True}
    return group.create_array(name, shape=shape, dtype=dtype, chunks=chunks, config=config, **named, **storage)


@pytest.fixture(scope="session")
def build():
    """`build(path, **what)` writes an anemoi dataset."""
    return build_source


@pytest.fixture(scope="session")
def rechunk():
    """`rechunk(source, destination, n, **request)` runs in this process."""

    def rechunk(source: Any, destination: Any, grid_chunks: int, **more: Any) -> Any:
        more = {"sync": False, "command": "shardio rechunk SRC DST", **more}
        return run(prepare(Request(os.fspath(source), os.fspath(destination), grid_chunks, **more)))

    return rechunk


@pytest.fixture(scope="session")
def opened():
    """`opened(path)`: everything in a dataset as zarr-python reads it, by name, and its attributes."""

    def opened(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = zarr.open_group(path, mode="r")
            members = dict(group.members(max_depth=None))
            arrays = {name: np.asarray(m[...]) for name, m in members.items() if isinstance(m, zarr.Array)}
            return arrays, dict(group.attrs)

    return opened


@pytest.fixture(scope="session")
def tree():
    """`tree(folder)`: the bytes of every file below it."""

    def tree(folder: Path) -> dict[str, bytes]:
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return tree


@pytest.fixture(scope="session")
def cli():
    """`cli(*words)`: the command in this process; anything but a clean exit fails the test."""

    def cli(*words: Any) -> Any:
        result = CliRunner().invoke(main, [os.fspath(word) if isinstance(word, Path) else str(word) for word in words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return cli


SHARDIO = Path(sysconfig.get_path("scripts")) / "shardio"


@pytest.fixture(scope="session")
def process():
    """`process(*words)`: the installed command, in a process of its own."""

    def process(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SHARDIO, *map(str, words)], capture_output=True, text=True, check=False, **more)

    return process


@pytest.fixture(scope="session")
def begin():
    """`begin(*words)`: the installed command, left running."""

    def begin(*words: Any, **more: Any) -> subprocess.Popen[str]:
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        # A shell that runs the tests in its background has them, and all they start, ignore interrupts.
        silent["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([SHARDIO, *map(str, words)], **(silent | more))

    return begin


@pytest.fixture(scope="session")
def cluster():
    """One dask cluster of two worker processes for all tests."""
    import distributed

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as started:
        yield started


@pytest.fixture(scope="session")
def python():
    """`python(code, *words)`: in a fresh interpreter."""

    def python(code: str, *words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **more)

    return python
