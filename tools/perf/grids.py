"""Four kinds of grid, some 7,700 cells each, and what is trained on them: between them they use every way to cut."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardio.rechunk import Request, prepare, run
from shardio.source.synthetic import RossbyWaves, octahedral, variable_units
from trainer.graph.graph import GraphOptions
from trainer.model.model import ModelOptions

DATES = 48
TASK_MEMORY = 24 * 2**20  # too little for a block of dates: a date is a task, as it is where dates are large
HOURS = 6
FORCINGS = ("lsm", "latitude")
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Attributes: the cells; grid-chunks of the dataset; its Zarr format; hidden mesh and network trained on it."""

    latitudes: Float64
    longitudes: Float64
    grid_chunks: int
    zarr_format: int
    graph: GraphOptions
    network: ModelOptions


NAMES = ("octahedral", "regular", "limited-area", "irregular")


def grid(name: str) -> Grid:
    """By its name."""
    size = {"channels": 64, "num_layers": 3, "num_heads": 4}
    if name == "octahedral":
        latitudes, longitudes, _ = octahedral("o40")
        graph = GraphOptions("ico3", processor="multiscale")
        return Grid(latitudes, longitudes, 8, 3, graph, ModelOptions(**size))
    if name == "regular":
        lean = ModelOptions(**size, num_chunks=4, checkpointing=True)
        return Grid(
            *_mesh(np.linspace(88.5, -88.5, 60), np.arange(0.0, 360.0, 2.8125)), 8, 2, GraphOptions("o10"), lean
        )
    if name == "limited-area":
        heads = ModelOptions(**size, shard_strategy="heads")
        axes = np.linspace(56.0, 38.0, 88), np.linspace(-5.0, 15.0, 88)
        return Grid(*_mesh(*axes), 8, 3, GraphOptions("ico6", processor="mesh"), heads)
    assert name == "irregular", name
    random = np.random.default_rng(5)
    latitudes = np.degrees(np.arcsin(random.uniform(-1.0, 1.0, 7600)))
    # Five grid-chunks on two ranks: one of them lies across the cut, and its cells travel.
    return Grid(
        latitudes, random.uniform(0.0, 360.0, 7600), 5, 3, GraphOptions("ico3", processor="mesh"), ModelOptions(**size)
    )


def _mesh(latitudes: Float64, longitudes: Float64) -> tuple[Float64, Float64]:
    first, second = np.meshgrid(latitudes, longitudes, indexing="ij")
    return first.ravel(), second.ravel()


@dataclass(frozen=True)
class Site:
    """A grid with its datasets in a folder; every process opens them by itself."""

    name: str
    folder: Path

    @property
    def grid(self) -> Grid:
        return grid(self.name)

    @property
    def source(self) -> Path:
        """One chunk per date, as anemoi-datasets makes them."""
        return self.folder / f"{self.name}-source.zarr"

    @property
    def dataset(self) -> Path:
        """In grid-chunks."""
        return self.folder / f"{self.name}.zarr"

    def request(self, destination: Path, scheduler: str | None = None) -> Request:
        """Its rechunking. Nothing is made durable: the disk's time is not ours."""
        cut = self.grid
        return Request(
            str(self.source),
            str(destination),
            cut.grid_chunks,
            zarr_format=cut.zarr_format,
            scheduler=scheduler,
            overwrite=True,
            sync=False,
            max_memory=TASK_MEMORY,
        )

    def make(self) -> None:
        """Write both datasets."""
        self._write_source()
        run(prepare(self.request(self.dataset)))

    def _write_source(self) -> None:
        import zarr

        cut = self.grid
        waves = RossbyWaves(cut.latitudes, cut.longitudes)
        cells = len(cut.latitudes)
        values = np.empty((DATES, len(waves.variables), 1, cells), np.float32)
        for date in range(DATES):
            waves.fields(3600.0 * HOURS * date, slice(0, cells), values[date, :, 0])
        wide = values.astype(np.float64).transpose(1, 0, 2, 3).reshape(len(waves.variables), -1)
        arrays = {
            "data": values,
            "dates": np.datetime64("2020-01-01", "s") + np.arange(DATES) * np.timedelta64(3600 * HOURS, "s"),
            "latitudes": cut.latitudes,
            "longitudes": cut.longitudes,
            **{"mean": wide.mean(1), "stdev": wide.std(1), "minimum": wide.min(1), "maximum": wide.max(1)},
        }
        constant = {name: {"constant_in_time": about["constant"]} for name, about in variable_units.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zarr, that v2 has no such dtype as dates
            group = zarr.open_group(self.source, mode="w", zarr_format=2)
            about = {"variables": list(waves.variables), "missing_dates": [], "frequency": f"{HOURS}h"}
            group.attrs.update(
                {**about, "field_shape": [cells], "variables_metadata": constant, "resolution": self.name}
            )
            for name, array in arrays.items():
                chunks = (1, *array.shape[1:]) if name == "data" else array.shape
                created = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks, fill_value=0)
                created[...] = array
