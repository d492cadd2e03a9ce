"""Rossby waves as a source of `rechunk`: `shardio synth` writes, resumes and checks exactly as rechunk does."""

from __future__ import annotations

from concurrent.futures import Executor
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates, parse_start
from shardio.errors import SelectionError
from shardio.source.extent import SourceExtent
from shardio.source.source import Json, Source
from shardio.source.synthetic import RossbyWaves, octahedral, variable_units

CELLS_AT_ONCE = 2**16


class SyntheticSource(Source):
    """`dates` dates from `start`, every `hours`; time zero of the waves is 2000-01-01, whatever the start."""

    def __init__(self, grid: str, dates: int, start: str = "2020-01-01", hours: int = 6, seed: int = 0):
        if dates < 1 or hours < 1:
            raise SelectionError(f"{dates} dates every {hours} hours make no dataset. Use 1 or more of both.")
        self.path = f"synthetic://{grid.lower()}?seed={seed}"
        self.latitudes, self.longitudes, _ = octahedral(grid)
        self.waves = RossbyWaves(self.latitudes, self.longitudes, seed)
        self.variables: tuple[str, ...] = self.waves.variables
        first = parse_start(start)
        self.dates: Dates = first + np.arange(dates) * np.timedelta64(hours, "h").astype("timedelta64[s]")
        cells = len(self.latitudes)
        shape = (dates, len(self.variables), 1, cells)
        # Any cut costs the same: a "chunk" is one cell of one date.
        self.extent = SourceExtent(shape, (1, len(self.variables), 1, 1), 4, range(dates), tuple(range(shape[1])))
        self.attributes: Json = {
            "description": "linear Rossby waves, exact at every time",
            "resolution": grid.lower(),
            "field_shape": [cells],
            "variables_metadata": {
                name: {
                    "mars": {"param": name},
                    "units": str(about["units"]),
                    "long_name": str(about["long_name"]),
                    **({"constant_in_time": True} if about["constant"] else {}),
                }
                for name, about in variable_units.items()
            },
            "synthetic": {"grid": grid.lower(), "seed": seed, "epoch": "2000-01-01T00:00:00"},
        }

    def fingerprint(self) -> str:
        return sha256(f"{self.path}:{self.dates[0]}:{self.dates[-1]}:{len(self.dates)}".encode()).hexdigest()

    def read(self, dates: slice, cells: slice, out: NDArray[np.float32], pool: Executor | None = None) -> None:
        jobs = [
            (float(date.astype(np.int64) - EPOCH.astype(np.int64)), place, start)
            for place, date in enumerate(self.dates[dates])
            for start in range(cells.start, cells.stop, CELLS_AT_ONCE)
        ]

        def fill(job: tuple[float, int, int]) -> None:
            seconds, place, start = job
            part = slice(start, min(start + CELLS_AT_ONCE, cells.stop))
            self.waves.fields(seconds, part, out[place, :, 0, start - cells.start : part.stop - cells.start])

        for _ in (pool.map if pool else map)(fill, jobs):
            pass


EPOCH = np.datetime64("2000-01-01T00:00:00", "s")
