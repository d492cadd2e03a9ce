"""Tiny datasets on every kind of grid, with a variable that has values on some cells only."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from shardio.source.synthetic import octahedral
from trainer.graph.graph import GraphOptions

VARIABLES = ("lsm", "t_850", "sst", "q_500", "tp", "sun")
FORCINGS, DIAGNOSTICS, MASKED = ("lsm", "sun"), ("tp",), "sst"
DATES = 45
LAND = 0.28  # of the cells, the first ones, where MASKED has no value: of 4 ranks the first has none at all


@dataclass(frozen=True)
class Grid:
    """Attributes: latitudes, longitudes; cells of a grid-chunk; the graph that goes with it."""

    latitudes: np.ndarray
    longitudes: np.ndarray
    chunk_cells: int
    graph: GraphOptions


def grid_of(name: str) -> Grid:
    """Those of the parity tests cannot be cut evenly: 208, 162, 143 and 151 cells."""
    if name == "octahedral":
        latitudes, longitudes, _ = octahedral("o4")
        return Grid(latitudes, longitudes, 42, GraphOptions("o2", neighbours=5))
    if name == "regular":
        places = np.meshgrid(np.linspace(80.0, -80.0, 9), np.arange(0.0, 360.0, 20.0), indexing="ij")
        return Grid(*(axis.ravel() for axis in places), 9, GraphOptions("ico1", processor="multiscale"))
    if name == "limited-area":
        places = np.meshgrid(np.linspace(38.0, 56.0, 13), np.linspace(-5.0, 15.0, 11), indexing="ij")
        return Grid(*(axis.ravel() for axis in places), 100, GraphOptions("ico4", cutoff=0.6, neighbours=3))
    if name.startswith("watched"):  # enough cells that a count of them cannot be taken for anything else
        latitudes, longitudes, _ = octahedral("o16")
        return Grid(latitudes, longitudes, {"watched": 100, "watched-astray": 90}[name], GraphOptions("o12"))
    assert name == "irregular"
    random = np.random.default_rng(5)
    latitudes = np.degrees(np.arcsin(random.uniform(-1.0, 1.0, 151)))
    return Grid(latitudes, random.uniform(0.0, 360.0, 151), 13, GraphOptions("ico1", processor="mesh"))


def values_of(cells: int, ensemble: int, dates: int = DATES) -> np.ndarray:
    """[dates, variables, ensemble, cells] that remember half of the date before."""
    random = np.random.default_rng(cells + ensemble)
    values = random.standard_normal((dates, len(VARIABLES), ensemble, cells))
    for date in range(1, dates):
        values[date] += 0.5 * values[date - 1]
    values *= np.array([1.0, 12.0, 3.0, 0.2, 1.0, 100.0])[:, None, None]
    values += np.array([0.5, 280.0, 290.0, 1.0, 2.0, 300.0])[:, None, None]
    values[:, VARIABLES.index("lsm")] = values[:1, VARIABLES.index("lsm"), :1]
    masked = values[:, VARIABLES.index(MASKED)]
    masked[..., : int(LAND * cells)] = np.nan
    masked[random.random(masked.shape) < 0.03] = np.nan
    return values.astype(np.float32)


def write_dataset(path: Path, grid: str, ensemble: int = 1, dates: int = DATES) -> str:
    """As anemoi-datasets lays it out, in grid-chunks."""
    places = grid_of(grid)
    values = values_of(places.latitudes.size, ensemble, dates)
    wide = np.moveaxis(values.astype(np.float64), 1, 0).reshape(len(VARIABLES), -1)
    arrays = {
        "data": values,
        "dates": np.datetime64("2021-03-01T00:00:00", "s") + np.arange(dates) * np.timedelta64(21600, "s"),
        "latitudes": places.latitudes,
        "longitudes": places.longitudes,
        "mean": np.nanmean(wide, axis=1),
        "stdev": np.nanstd(wide, axis=1),
        "minimum": np.nanmin(wide, axis=1),
        "maximum": np.nanmax(wide, axis=1),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="w", zarr_format=2)
        about = {"variables": list(VARIABLES), "missing_dates": [], "frequency": "6h", "resolution": grid}
        group.attrs.update({**about, "field_shape": [places.latitudes.size], "allow_nans": True})
        for name, array in arrays.items():
            chunks = (1, *array.shape[1:3], places.chunk_cells) if name == "data" else array.shape
            fill = np.nan if name == "data" else 0
            created = group.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=chunks,
                fill_value=fill,
                config={"write_empty_chunks": True},
            )
            created[...] = array
    return str(path)
