"""What exact statistics cost a rechunk: the same source with and without them, in one run, alternating.

python -m tools.bench_statistics --folder /dev/shm/shardio

Sources of the same Rossby waves with noise on a quarter-degree grid: NetCDF deflated as archives have it, NetCDF as it
comes, and an anemoi dataset of one blosc chunk per date. `alone` is what one thread takes for a value.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics as medians
import time
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardio.rechunk import Request, prepare, run
from shardio.source.source import STATISTICS
from shardio.source.synthetic import RossbyWaves
from shardio.write.statistics import moments

ROWS, COLUMNS = 721, 1440
CHUNKS = 16
NETCDF = {"deflated": {"zlib": True, "complevel": 1, "shuffle": True}, "plain": {}}


def fields(dates: int) -> dict[str, NDArray[np.float32]]:
    """[date, row, column] by variable: waves, with noise that no codec can do away with."""
    latitudes = np.repeat(np.linspace(90, -90, ROWS), COLUMNS)
    waves = RossbyWaves(latitudes, np.tile(np.arange(COLUMNS) * 360 / COLUMNS, ROWS), 0)
    values = np.empty((dates, len(waves.variables), ROWS * COLUMNS), np.float32)
    random = np.random.default_rng(0)
    for date, out in enumerate(values):
        waves.fields(date * 21600.0, slice(0, ROWS * COLUMNS), out)
        out *= 1 + 1e-3 * random.standard_normal(out.shape, np.float32)
    return {f"f_{name}": values[:, i].reshape(dates, ROWS, COLUMNS) for i, name in enumerate(waves.variables)}


def make_sources(folder: Path, dates: int) -> dict[str, Path]:
    """Every source, made once."""
    import xarray as xr

    sources = {f"NetCDF, {kind}": folder / f"{kind}-{dates}.nc" for kind in NETCDF}
    streamed = folder / f"streamed-{dates}.zarr"
    if not streamed.exists():
        coordinates = {
            "time": np.datetime64("2020-01-01") + 6 * np.arange(dates) * np.timedelta64(1, "h"),
            "latitude": ("latitude", np.linspace(90, -90, ROWS), {"units": "degrees_north"}),
            "longitude": ("longitude", np.arange(COLUMNS) * 360 / COLUMNS, {"units": "degrees_east"}),
        }
        arrays = {name: (("time", "latitude", "longitude"), values) for name, values in fields(dates).items()}
        for (_, path), encoding in zip(sources.items(), NETCDF.values(), strict=True):
            settings = {name: {**encoding, "chunksizes": (1, ROWS, COLUMNS)} for name in arrays}
            xr.Dataset(arrays, coordinates).to_netcdf(path, encoding=settings)
        run(prepare(Request(str(path), str(streamed), 1, zarr_format=2, sync=False)))
    return {**sources, "anemoi, streamed": streamed}


def time_once(source: Path, output: Path, computed: bool) -> tuple[float, float, int]:
    """Seconds, processor seconds and values of one rechunk."""
    shutil.rmtree(output, ignore_errors=True)
    prepared = prepare(Request(str(source), str(output), CHUNKS, sync=False))
    zeros = {name: np.zeros(len(prepared.source.variables)) for name in STATISTICS}
    prepared.source.statistics = None if computed else zeros
    began, cpu = time.perf_counter(), time.process_time()
    run(prepared)
    return time.perf_counter() - began, time.process_time() - cpu, int(np.prod(prepared.layout.shape))


def time_alone() -> float:
    """Nanoseconds of one thread for a value, of a field around 0."""
    values = np.random.default_rng(0).standard_normal((4, ROWS * COLUMNS // CHUNKS), np.float32)
    best = np.inf
    for _ in range(50):
        began = time.thread_time()
        moments(values)
        best = min(best, time.thread_time() - began)
    return float(best * 1e9 / values.size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what statistics cost a rechunk.")
    parser.add_argument("--dates", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(".peers/statistics"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; alone {time_alone():.2f} ns a value")
    for name, source in make_sources(options.folder, options.dates).items():
        runs: dict[bool, list[tuple[float, float, int]]] = {False: [], True: []}
        for _ in range(options.repeats):
            for computed, found in runs.items():
                found.append(time_once(source, options.folder / "output.zarr", computed))
        shutil.rmtree(options.folder / "output.zarr")
        for measure, at in (("seconds", 0), ("processor seconds", 1)):
            without, computed = (medians.median(run[at] for run in runs[kind]) for kind in (False, True))
            least = [min(run[at] for run in runs[kind]) for kind in (False, True)]
            print(f"{name}: {measure} {without:.2f} without, {computed:.2f} with ({computed / without - 1:+.0%});")
            print(f"    fastest {least[0]:.2f} and {least[1]:.2f} ({least[1] / least[0] - 1:+.0%})")


if __name__ == "__main__":
    main()
