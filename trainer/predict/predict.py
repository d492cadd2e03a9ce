"""`trainer predict`: forecasts from any number of ranks, each writing its own grid-chunks while the next step runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardio import STATISTICS, Dataset, Description, Partition, ShardedWriter, is_complete
from shardio.dates import format_step, parse_end, parse_start, parse_step
from shardio.errors import OutputError, SelectionError
from trainer.model.precision import Precision
from trainer.predict.forecast import Forecast
from trainer.predict.trained import Trained, precision_of


@dataclass(frozen=True, eq=False)
class Task:
    """One forecast to be written.

    Attributes: path; initial: date; steps; members: of the dataset, None for all; about: the dataset that it is to be;
      identity: what it depends on.
    """

    path: Path
    initial: np.datetime64
    steps: int
    members: int | None
    about: Description
    identity: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether it was written before, by whatever ranks."""
        return is_complete(self.path, self.about, self.identity)


@dataclass(frozen=True)
class Written:
    """What one forecast took.

    Attributes: path; steps that were computed; seconds; waited for the disk, seconds; bytes that this rank stored.
    """

    path: Path
    steps: int
    seconds: float
    waited: float
    nbytes: int


def initial_dates(dataset: Dataset, start: str, end: str | None, every: str | None) -> list[np.datetime64]:
    """Dates named one by one, `a,b,c`, or from `start` to `end` every so many hours."""
    if end is None:
        if every is not None:
            raise SelectionError(f"--every {every} needs --end, the last initial date.")
        return sorted({parse_start(text) for text in start.split(",")})
    first, last = parse_start(start), parse_end(end)
    seconds = parse_step(every) if every else dataset.step
    dates = np.arange(first, last + np.timedelta64(1, "s"), np.timedelta64(seconds or 1, "s"))
    if not len(dates):
        raise SelectionError(f"there is no date from {start} to {end}. Give an end after the start.")
    return list(dates)


def path_of(folder: Path, initial: np.datetime64) -> Path:
    """FOLDER/2020-02-10T0000.zarr."""
    return folder / f"{np.datetime_as_string(initial, 'm').replace(':', '')}.zarr"


def plan(
    trained: Trained,
    dataset: Dataset,
    cells: Partition,
    initial: np.datetime64,
    folder: Path,
    lead_time: str,
    variables: Sequence[str] | None = None,
    members: int | None = None,
    config: dict[str, Any] | None = None,
    precision: str | int | None = None,
) -> Task:
    """What is to be written. That the dataset has the variables is for `check_variables`, once for all dates.

    Args:
      trained: the model.
      dataset: where it starts from.
      cells: who owns which.
      initial: date.
      folder: of all forecasts.
      lead_time: such as 240h.
      variables: to write; default: all that are forecast.
      members: of the dataset, to start from; default: all.
      config: noted in the attributes.
      precision: with which it is computed; default: that of the training.
    Raises: SelectionError where the dataset or the model does not have what that takes.
    """
    steps = trained.steps(lead_time)
    trained.check(dataset, initial, steps)
    names = _names_to_write(trained, variables)
    if members is not None and not 1 <= members <= dataset.shape[2]:
        raise SelectionError(f"{members} members: the dataset has {dataset.shape[2]}. Use 1 to {dataset.shape[2]}.")
    about = {
        "initial_date": str(initial),
        "lead_time": f"{steps * trained.step / 3600:g}h",
        "step": format_step(trained.step),
        "checkpoint": trained.digest,
        **_about_precision(trained, precision),
    }
    attributes = _attributes(trained, dataset, names)
    attributes |= {"description": f"forecast from {initial}"}
    attributes |= {"forecast": {**about, "model": trained.about, "config": config or {}}}
    places = [dataset.variables.index(name) for name in names]
    description = Description(
        (initial + np.arange(1, steps + 1) * np.timedelta64(trained.step, "s")).astype("datetime64[s]"),
        names,
        dataset.latitudes,
        dataset.longitudes,
        members or dataset.shape[2],
        cells.chunk_cells,
        {name: dataset.statistics[name][places] for name in STATISTICS},
        attributes,
        extras=dataset.cell_order,
    )
    identity = {**about, "variables": list(names), "members": description.ensemble, "dataset": _names(dataset)}
    return Task(path_of(folder, initial), initial, steps, members, description, identity)


def _names_to_write(trained: Trained, variables: Sequence[str] | None) -> tuple[str, ...]:
    roles = trained.roles
    names = tuple(dict.fromkeys(variables or roles.outputs))
    unknown = [name for name in names if name not in roles.outputs]
    if unknown:
        raise SelectionError(
            f"the model does not forecast {', '.join(unknown)}. It forecasts: {', '.join(roles.outputs)}."
        )
    return names


def _attributes(trained: Trained, dataset: Dataset, names: tuple[str, ...]) -> dict[str, Any]:
    """Of a dataset of forecasts, whatever their date."""
    return {
        "field_shape": list(dataset.field_shape),
        "frequency": format_step(trained.step),
        "variables_metadata": dataset.variables_metadata(names),
        "uuid": "",  # of what it depends on
        "allow_nans": not set(names).isdisjoint(trained.roles.lacking),
        **_about_statistics(dataset),
        **({"resolution": dataset.resolution} if dataset.resolution else {}),
    }


def _about_statistics(dataset: Dataset) -> dict[str, Any]:
    """They are those of the dataset, not of the forecast."""
    about = dataset.attributes
    return {name: about[name] for name in ("statistics_start_date", "statistics_end_date") if name in about}


def _about_precision(trained: Trained, precision: str | int | None) -> dict[str, str]:
    """Other bits are another forecast; nothing where they are those of the weights, as before there was a choice."""
    name = Precision(str(precision or trained.precision)).name
    return {} if name == precision_of(trained.weights) else {"precision": name}


def _names(dataset: Dataset) -> list[str]:
    """Of what the forecast starts from; a folder may be called otherwise on another machine."""
    return sorted({Path(path).name for path in dataset.paths})


def write(
    forecast: Forecast,
    task: Task,
    overwrite: bool = False,
    ahead: int = 2,
    sync: bool = True,
    command: str = "the same command",
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Written:
    """Write one forecast, or go on with it. All ranks of the model group call it together.

    Args:
      forecast: of this rank.
      task: from `plan`, with the same partition.
      overwrite: replace a forecast that is there.
      ahead: lead times that may be on their way to the disk.
      sync: make every file durable before it gets its name.
      command: that would finish the job, for messages.
      report: told after every lead time.
    """
    begin, share = time.perf_counter(), forecast.share
    if not share.cells.aligned:
        raise OutputError("the ranks do not own whole grid-chunks. Cut the cells with forecast_partition.")
    kept = [forecast.variables.index(name) for name in task.about.variables]
    writer = ShardedWriter(
        task.path,
        task.about,
        task.identity,
        share.cells.chunks(share.rank),
        share.rank,
        lambda said: share.comm.gather(said, "writer"),
        overwrite,
        ahead,
        command,
        sync,
    )
    with writer:
        after = _go_on_after(forecast, writer)
        lead_time = f"{task.steps * forecast.trained.step}s"
        for lead in forecast.run(task.initial, lead_time, task.members, after, _known(forecast, writer)):
            fields = lead.fields[..., kept].permute(2, 0, 1).contiguous()  # [variables, ensemble, cells/M]
            writer.put(lead.number - 1, fields.cpu().numpy())
            report(lead.number, task.steps)
    return Written(task.path, task.steps - after, time.perf_counter() - begin, writer.waited, writer.nbytes)


def _go_on_after(forecast: Forecast, writer: ShardedWriter) -> int:
    """Lead times that an interrupted run has written, all of them and all that the model needs to go on.

    Without that the forecast is computed anew, and what is there already is not written again.
    """
    if not set(forecast.trained.roles.prognostic) <= set(writer.about.variables):
        return 0
    return next(date for date in range(len(writer.about.dates) + 1) if date not in writer.done)


def _known(forecast: Forecast, writer: ShardedWriter) -> Callable[[int], Tensor]:
    prognostic = [
        writer.about.variables.index(name)
        for name in forecast.trained.roles.prognostic
        if name in writer.about.variables
    ]

    def known(number: int) -> Tensor:
        fields = writer.read(number - 1, forecast.share.owned)  # [variables, ensemble, cells/M]
        return torch.from_numpy(fields[prognostic]).permute(1, 2, 0)

    return known
