"""Autoregressive forecasts: the state stays cut over the ranks from the first date to the last lead time.

forecast = trainer.load("run/checkpoints/last.ckpt", dataset)
for lead in forecast.run("2020-02-10", "120h"):
    lead.date, lead.fields          # [ensemble, cells/M, variables], in the units of the dataset

Every step starts from what the last one gave in the units of the dataset, in float32, which is what is stored: a
forecast that goes on from stored fields gives the same bits as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio import Dataset
from shardio.dates import format_step, parse_start, parse_step
from shardio.errors import DatasetError, SelectionError
from shardio.partition import Partition, partition
from shardio.sharded_writer import chunk_cells_for
from trainer.assembly import Place, assemble_graph
from trainer.checkpoint import load as load_checkpoint
from trainer.forecaster import Forecaster, Roles
from trainer.graph import GraphOptions
from trainer.model import ModelOptions

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Lead:
    """One lead time of a forecast.

    Attributes:
      number: of steps since the initial date, from 1.
      date: datetime64[s], valid time.
      cells: that this rank owns.
      fields: float32 [ensemble, cells/M, prognostic + diagnostic], in the units of the dataset.
    """

    number: int
    date: np.datetime64
    cells: slice
    fields: Tensor


@dataclass(frozen=True, eq=False)
class Forecast:
    """A trained model on this rank's cells.

    Attributes:
      forecaster: the model.
      dataset: where initial fields and forcings come from.
      place: where this rank stands.
      step: seconds between lead times.
      digest: of the checkpoint.
    """

    forecaster: Forecaster
    dataset: Dataset
    place: Place
    step: int
    digest: str

    @property
    def variables(self) -> tuple[str, ...]:
        """Of the forecast, in the order of `Lead.fields`."""
        return self.forecaster.roles.outputs

    def run(
        self, start: Any, lead_time: str, members: int | None = None, done: Sequence[Float32] = ()
    ) -> Iterator[Lead]:
        """Forecast from the date `start` (and the input dates before it) up to `lead_time`, such as 240h.

        Args:
          start: initial date, in the dataset.
          lead_time: a multiple of the step.
          members: how many of the dataset's members. Default: all.
          done: fields [ensemble, cells/M, variables] of the first lead times, where those are known already.
        """
        model, steps = self.forecaster, self.steps(lead_time)
        first = self.find(start)
        inputs = [self.read(first - back, members) for back in range(model.input_steps - 1, -1, -1)]
        state = model.first_state(model.normalise(torch.stack(inputs)[None]))  # [1, time, ensemble, cells/M, inputs]
        for number in range(1, steps + 1):
            date = self.dataset.dates[first] + np.timedelta64(number * self.step, "s")
            if number <= len(done):
                fields = torch.from_numpy(done[number - 1]).to(self.place.device)
            else:
                with torch.no_grad():
                    fields = model.denormalise(model(state)[0]).float()
                yield Lead(number, date, self.place.owned, fields)
            if number < steps:
                state = model.next_state(state, *self._continue(fields, date, first, members))

    def steps(self, lead_time: str) -> int:
        """Lead times up to this one."""
        seconds = parse_step(lead_time)
        if seconds < self.step or seconds % self.step:
            raise SelectionError(
                f"a lead time of {lead_time} is no multiple of the model's step, {format_step(self.step)}."
            )
        return seconds // self.step

    def find(self, start: Any) -> int:
        """Place of the initial date in the dataset; SelectionError where it or the input dates before are not there."""
        date = start if isinstance(start, np.datetime64) else parse_start(str(start))
        dates = self.dataset.dates
        wanted = date.astype("datetime64[s]") - np.arange(self.forecaster.input_steps)[::-1] * np.timedelta64(
            self.step, "s"
        )
        places = np.searchsorted(dates, wanted)
        for one, place in zip(wanted, places, strict=True):
            if place == len(dates) or dates[place] != one or self.dataset.is_missing[place]:
                raise SelectionError(
                    f"a forecast from {date} needs {one}, which the dataset lacks: it has {dates[0]} to {dates[-1]} "
                    f"every {self.dataset.frequency}. Choose another initial date."
                )
        if np.any(np.diff(places) != 1):
            raise SelectionError(
                f"the dataset has dates between those that the model takes, {format_step(self.step)} apart. Open it "
                f"with frequency={format_step(self.step)!r}."
            )
        return int(places[-1])

    def read(self, date: int, members: int | None = None) -> Tensor:
        """[ensemble, cells/M, variables] of a date of the dataset, on the device."""
        fields = self.dataset[date, :, slice(0, members), self.place.owned]  # [variables, ensemble, cells/M]
        return torch.from_numpy(fields).permute(1, 2, 0).to(self.place.device)

    def _continue(self, fields: Tensor, date: Any, first: int, members: int | None) -> tuple[Tensor, Tensor]:
        """Normalised prediction [1, ensemble, cells/M, outputs], and all variables at its date for their forcings."""
        model = self.forecaster
        outputs = model.roles.places(model.roles.outputs)
        prediction = (fields.to(model.mean.dtype) - model.mean[outputs]) / model.stdev[outputs]
        return prediction[None], model.normalise(self._forced(date, first, members))[None]

    def _forced(self, date: Any, first: int, members: int | None) -> Tensor:
        changing = [name for name in self.forecaster.roles.forcings if name not in self.dataset.constants]
        place = int(np.searchsorted(self.dataset.dates, date))
        known = place < len(self.dataset) and self.dataset.dates[place] == date and not self.dataset.is_missing[place]
        if changing and not known:
            raise SelectionError(
                f"the forcings {', '.join(changing)} are needed for {date}, which the dataset lacks. Give a dataset "
                "that reaches as far as the forecast, or a shorter lead time."
            )
        return self.read(place if changing else first, members)


def forecast_partition(dataset: Dataset, ranks: int) -> Partition:
    """Every rank owns whole grid-chunks of what is written: those of the dataset where they fit, else one each."""
    cells = dataset.shape[3]
    return partition(cells, ranks, chunk_cells_for(cells, ranks, dataset.chunk_cells))


def load(path: str | Path, dataset: Dataset, place: Place | None = None, **network: Any) -> Forecast:
    """A forecast model from a checkpoint, for any number of ranks. All ranks of the group call it together.

    Args:
      path: of a checkpoint that `trainer fit` wrote, on whatever ranks.
      dataset: with the variables that the model was trained on, on the same grid.
      place: where this rank stands; default: alone.
      network: changes of `ModelOptions` that leave the weights as they are: num_chunks, shard_strategy.
    """
    checkpoint = load_checkpoint(path)
    about = checkpoint.get("shardio")
    if about is None:
        raise DatasetError(f"{path} is no checkpoint of `trainer fit`. Give one from the folder checkpoints of a run.")
    if list(dataset.variables) != about["variables"]:
        raise DatasetError(
            f"{path} was trained on {', '.join(about['variables'])}, the dataset gives {', '.join(dataset.variables)}. "
            "Open it with select=[...] of those."
        )
    place = place or Place(forecast_partition(dataset, 1))
    options = ModelOptions(**about["network"] | {"checkpointing": False} | network)
    roles = Roles(tuple(about["variables"]), tuple(about["forcings"]), tuple(about["diagnostics"]))
    graph = assemble_graph(dataset, place, GraphOptions(**about["graph"]), options)
    ones = np.ones(len(roles.variables))
    statistics = {"mean": ones, "stdev": ones}  # overwritten by those of the checkpoint
    model = Forecaster(roles, statistics, np.ones(len(roles.outputs)), about["input_steps"], options, graph)
    prefix = "forecaster."
    weights = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()}
    model.load_state_dict(weights)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return Forecast(model.to(place.device).eval(), dataset, place, about["step_seconds"], digest)
