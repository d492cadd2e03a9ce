"""`trainer predict`: forecasts from any number of ranks, each writing its own grid-chunks while the next step runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from shardio import Dataset, Description, ShardedWriter
from shardio.dates import parse_end, parse_start, parse_step
from shardio.errors import SelectionError
from shardio.sharded_writer import own_chunks
from shardio.statistics import NAMES
from trainer.forecast import Float32, Forecast


@dataclass(frozen=True)
class Written:
    """What one forecast took.

    Attributes: path; steps; seconds; waited for the disk, seconds; bytes that this rank stored.
    """

    path: Path
    steps: int
    seconds: float
    waited: float
    nbytes: int


def initial_dates(dataset: Dataset, start: str, end: str | None, every: str | None) -> list[np.datetime64]:
    """Dates named one by one, `a,b,c`, or from `start` to `end` every so many hours."""
    if end is None:
        return [parse_start(text.strip()) for text in start.split(",")]
    first, last = parse_start(start), parse_end(end)
    seconds = parse_step(every) if every else dataset.step
    dates = np.arange(first, last + np.timedelta64(1, "s"), np.timedelta64(seconds or 1, "s"))
    if not len(dates):
        raise SelectionError(f"there is no date from {start} to {end}. Give an end after the start.")
    return list(dates)


def write(
    forecast: Forecast,
    start: np.datetime64,
    lead_time: str,
    folder: Path,
    variables: list[str] | None = None,
    members: int | None = None,
    overwrite: bool = False,
    ahead: int = 2,
    sync: bool = True,
    command: str = "the same command",
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Written:
    """One forecast into `folder/<initial date>.zarr`. All ranks of the model group call it together.

    Args:
      forecast: of this rank.
      start: initial date.
      lead_time: such as 240h.
      folder: of all forecasts.
      variables: to write; default: all that are forecast.
      members: of the dataset, to start from; default: all.
      overwrite: replace a forecast that is there.
      ahead: lead times that may wait for the disk.
      sync: make every file durable before it gets its name.
      command: that would finish the job, for messages.
      report: told after every lead time.
    """
    begin = time.perf_counter()
    about = describe(forecast, start, lead_time, variables, members)
    kept = [forecast.variables.index(name) for name in about.variables]
    place, count = forecast.place, about.layout.grid[3]
    path = folder / f"{np.datetime_as_string(start, 'm').replace(':', '')}.zarr"
    identity = {**about.attributes["forecast"], "variables": list(about.variables), "members": members}
    writer = ShardedWriter(
        path,
        about,
        identity,
        own_chunks(count, place.cells.ranks, place.rank),
        place.rank,
        (lambda: dist.barrier(place.group)) if place.group is not None else (lambda: None),
        overwrite,
        ahead,
        command,
        sync,
    )
    steps = len(about.dates)
    with writer:
        for lead in forecast.run(start, lead_time, members, _known(forecast, writer)):
            fields = lead.fields[..., kept].permute(2, 0, 1).cpu().numpy()  # [variables, ensemble, cells/M]
            writer.put(lead.number - 1, np.ascontiguousarray(fields))
            report(lead.number, steps)
    return Written(path, steps, time.perf_counter() - begin, writer.waited, writer.nbytes)


def _known(forecast: Forecast, writer: ShardedWriter) -> list[Float32]:
    """Fields of the lead times that an interrupted run has written: it goes on after them.

    Only if all that the model needs to go on was written; else the forecast is computed anew, and not written again.
    """
    first_missing = next(date for date in range(len(writer.about.dates) + 1) if date not in writer.done)
    if writer.about.variables != forecast.variables:
        return []
    own = forecast.place.owned
    return [writer.read(date, own).transpose(1, 2, 0) for date in range(first_missing)]


def describe(
    forecast: Forecast, start: np.datetime64, lead_time: str, variables: list[str] | None, members: int | None
) -> Description:
    """The dataset that the forecast is to be."""
    dataset, names = forecast.dataset, tuple(variables or forecast.variables)
    unknown = [name for name in names if name not in forecast.variables]
    if unknown:
        raise SelectionError(
            f"the model does not forecast {', '.join(unknown)}. It forecasts: {', '.join(forecast.variables)}."
        )
    if members is not None and not 1 <= members <= dataset.shape[2]:
        raise SelectionError(f"{members} members: the dataset has {dataset.shape[2]}. Use 1 to {dataset.shape[2]}.")
    places = [dataset.variables.index(name) for name in names]
    initial = dataset.dates[forecast.find(start)]
    leads = np.arange(1, forecast.steps(lead_time) + 1) * np.timedelta64(forecast.step, "s")
    attributes: dict[str, Any] = {
        "description": f"forecast from {initial}",
        "forecast": {
            "initial_date": str(initial),
            "lead_time": lead_time,
            "checkpoint": forecast.digest,
            "step_seconds": forecast.step,
        },
        "field_shape": list(dataset.field_shape),
        "variables_metadata": dataset.variables_metadata(names),
    }
    if dataset.resolution:
        attributes["resolution"] = dataset.resolution
    return Description(
        (initial + leads).astype("datetime64[s]"),
        names,
        dataset.latitudes,
        dataset.longitudes,
        members or dataset.shape[2],
        forecast.place.cells.chunk_cells,
        {name: dataset.statistics[name][places] for name in NAMES},
        attributes,
    )
