"""Datasets to load, small and uneven, and what the operating system counts while they are read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from shardio.rechunk import Request, prepare, run

START = np.datetime64("2020-01-01T00:00:00", "s")


@dataclass(frozen=True)
class Stored:
    """A dataset and what it holds: `values` [date, variable, ensemble, cell]."""

    path: Path
    values: np.ndarray
    dates: np.ndarray
    names: list[str]
    statistics: dict[str, np.ndarray]
    missing: tuple[int, ...] = ()

    def fields(self, indices: Any, cells: slice = slice(None)) -> np.ndarray:
        """[batch, time, ensemble, cell, variable] of dates [batch, time]."""
        return self.values[np.asarray(indices)][..., cells].transpose(0, 1, 3, 4, 2)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers that no codec can make small, some of them NaN."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape, np.float32)
    values[random.random(shape) < 0.01] = np.nan
    return values


def every(hours: int, count: int, start: np.datetime64 = START) -> np.ndarray:
    """`count` dates, `hours` apart."""
    return start + np.arange(count) * np.timedelta64(3600 * hours, "s")


def write_source(
    path: Path,
    values: np.ndarray,
    dates: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    missing: tuple[int, ...] = (),
    zarr_format: int = 2,
    chunks: tuple[int, ...] | None = None,
    tendencies: Iterable[str] = (),
    latitudes: np.ndarray | None = None,
    seed: int = 0,
    **storage: Any,
) -> Stored:
    """An anemoi dataset as zarr-python writes it; one chunk per date where `chunks` does not say otherwise."""
    count, variables, _, cells = values.shape
    dates = every(6, count) if dates is None else dates
    names = [f"v_{i}" for i in range(variables)] if names is None else list(names)
    random = np.random.default_rng(100 + seed)
    kinds = ("mean", "stdev", "minimum", "maximum")
    of_values = {kind: random.standard_normal(variables) for kind in kinds}
    of_changes = {
        f"statistics_tendencies_{delta}_{kind}": random.standard_normal(variables)
        for delta in tendencies
        for kind in kinds
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
        group.attrs.update(
            {
                "variables": names,
                "missing_dates": [str(dates[i]) for i in missing],
                "frequency": "6h",
                "resolution": "tiny",
                "field_shape": [cells],
            }
        )
        config = {"write_empty_chunks": True}
        chunks = (1, *values.shape[1:]) if chunks is None else chunks
        fill = np.nan if values.dtype.kind == "f" else 0
        more = {"dimension_names": ["time", "variable", "ensemble", "cell"]} if zarr_format == 3 else {}
        data = group.create_array(
            "data",
            shape=values.shape,
            dtype=values.dtype,
            chunks=chunks,
            fill_value=fill,
            config=config,
            **{**more, **storage},
        )
        data[...] = values
        small = {
            "dates": dates,
            "latitudes": np.linspace(90, -90, cells) if latitudes is None else latitudes,
            "longitudes": np.linspace(0, 359, cells),
            **of_values,
            **of_changes,
        }
        for name, array in small.items():
            group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=array.shape, config=config)[...] = (
                array
            )
    return Stored(path, values.astype(np.float32), dates, names, {**of_values, **of_changes}, missing)


def cut(source: Stored, path: Path, grid_chunks: int, zarr_format: int = 2, codec: str = "lz4") -> Stored:
    """The same dataset, cut into grid-chunks by shardio."""
    request = Request(
        str(source.path), str(path), grid_chunks, zarr_format=zarr_format, codec=codec, sync=False, command="shardio"
    )
    run(prepare(request))
    return Stored(path, source.values, source.dates, source.names, source.statistics, source.missing)


def bits(values: Any) -> np.ndarray:
    """float32 as the numbers of its bits, so that NaN equals NaN."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def bytes_read() -> int:
    """What this process has read so far, as the kernel counts it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def chunk_files(path: Path) -> list[Path]:
    """Every file of `data` that holds chunks."""
    names = (".zarray", ".zattrs", "zarr.json")
    return sorted(file for file in (path / "data").rglob("*") if file.is_file() and file.name not in names)


def stored_bytes(path: Path, date: int, chunks: Iterable[int], grid_chunks: int) -> int:
    """Bytes that chunks of a date take on disk, by file size (v2) or by the index of the Zarr shard (v3)."""
    whole = path / "data" / f"c.{date}.0.0.0"
    if not whole.exists():
        return sum(os.path.getsize(path / "data" / f"{date}.0.0.{chunk}") for chunk in chunks)
    index = np.frombuffer(whole.read_bytes()[-16 * grid_chunks - 4 : -4], "<u8").reshape(-1, 2)
    return sum(int(index[chunk, 1]) for chunk in chunks)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
