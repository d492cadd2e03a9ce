"""Autoregressive forecasts: the state stays cut over the ranks from the first date to the last lead time.

forecast = trainer.load("run/checkpoints/last.ckpt", "o32.zarr")
for lead in forecast.run("2020-02-10", "120h"):
    lead.date, lead.cells, lead.fields          # [ensemble, cells/M, variables], in the units of the dataset

Every step starts from what the last one gave in the units of the dataset, in float32, which is what is stored: a
forecast that goes on from stored fields gives the same bits as one that was never interrupted.

A cell that is absent at the initial date (forecaster.py) is NaN at every lead time.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio import Dataset, Partition, Reads, Wanted, balanced, open_dataset, partition
from shardio.errors import DatasetError, PlanError
from trainer.graph.graph import GraphOptions
from trainer.model.assembly import assemble_graph
from trainer.model.forecaster import Forecaster, known_or_mean, put, without_value
from trainer.model.model import ModelOptions
from trainer.model.precision import Precision
from trainer.predict.trained import Trained, as_date, check_variables, find_date, read_trained
from trainer.share import Share


@dataclass(frozen=True)
class Lead:
    """One lead time of a forecast.

    Attributes:
      number: of steps since the initial date, from 1.
      date: datetime64[s], valid time.
      cells: that this rank owns.
      fields: float32 [ensemble, cells/M, prognostic + diagnostic], in the units of the dataset; NaN where a cell had no
        value at the initial date.
    """

    number: int
    date: np.datetime64
    cells: slice
    fields: Tensor


@dataclass(frozen=True, eq=False)
class Forecast:
    """A trained model on this rank's cells.

    Attributes:
      trained: what the checkpoint says.
      forecaster: the model.
      dataset: where initial fields and forcings come from.
      share: what this rank has of the work.
      precision: with which it computes.
    """

    trained: Trained
    forecaster: Forecaster
    dataset: Dataset
    share: Share
    precision: Precision

    @property
    def variables(self) -> tuple[str, ...]:
        """Of the forecast, in the order of `Lead.fields`."""
        return self.trained.roles.outputs

    def run(
        self,
        start: Any,
        lead_time: str,
        members: int | None = None,
        after: int = 0,
        known: Callable[[int], Tensor] | None = None,
    ) -> Iterator[Lead]:
        """Forecast from the date `start` (and the input dates before it) up to `lead_time`, such as 240h.

        Args:
          start: initial date, in the dataset.
          lead_time: a multiple of the step.
          members: how many of the dataset's members. Default: all.
          after: go on after so many lead times.
          known: prognostic fields [ensemble, cells/M, variables] of one of those lead times, by its number.
        """
        initial = as_date(start)
        steps = self.trained.steps(lead_time)
        self.trained.check(self.dataset, initial, steps)
        return self._steps(initial, range(after + 1, steps + 1), members, known)

    def _steps(
        self, initial: np.datetime64, numbers: range, members: int | None, known: Callable[[int], Tensor] | None
    ) -> Iterator[Lead]:
        model, prognostic = self.forecaster, len(self.trained.roles.prognostic)
        reads = Reads(self._wanted(initial, numbers, members, known is not None), self.share.owned)
        seen, absent = self._start(reads, initial, numbers.start, known)
        for number in numbers:
            with torch.no_grad(), self.precision.autocast(torch.device(self.share.device).type):
                state = torch.stack(tuple(seen))[None]  # [1, time, ensemble, cells/M, inputs]
                fields = model.denormalise(model(state)[0]).float()
            date = self._date(initial, number)
            self._check_finite(fields, absent, date, number)
            yield Lead(number, date, self.share.owned, put(torch.nan, fields, model.lacking, absent))
            if number + 1 < numbers.stop:
                seen.append(self._normalise(self._given(reads, initial, number, fields[..., :prognostic])))

    def _start(
        self, reads: Reads, initial: np.datetime64, first: int, known: Callable[[int], Tensor] | None
    ) -> tuple[deque[Tensor], list[Tensor]]:
        """What the model sees before the first step, each [ensemble, cells/M, inputs]; and which cells are absent."""
        inputs = self.trained.input_steps
        seen: deque[Tensor] = deque(maxlen=inputs)
        for number in range(first - inputs, first):
            fields = known(number).to(self.share.device) if known and number > 0 else None
            given = self._given(reads, initial, number, fields)
            seen.append(self._normalise(given))
        return seen, without_value(given, self.forecaster.lacking)

    def _given(self, reads: Reads, initial: np.datetime64, number: int, prognostic: Tensor | None) -> Tensor:
        """[ensemble, cells/M, inputs] of a lead time, in the units of the dataset: what is not forecast yet is read."""
        roles = self.trained.roles
        if prognostic is None:
            return self._take(reads, self._date(initial, number), roles.inputs)
        forcings = self._take(reads, self._date_of_forcings(initial, number), roles.forcings)
        return torch.cat([prognostic, forcings], dim=-1)

    def _wanted(self, initial: np.datetime64, numbers: range, members: int | None, known: bool) -> list[Wanted]:
        """All that a forecast reads of the dataset, in the order of `_given`; `known`: what was forecast before."""
        roles, wanted = self.trained.roles, []
        for number in range(numbers.start - self.trained.input_steps, numbers.stop - 1):
            whole = number < numbers.start and not (known and number > 0)
            date = self._date(initial, number) if whole else self._date_of_forcings(initial, number)
            names = roles.inputs if whole else roles.forcings
            places = [self.dataset.variables.index(name) for name in names]
            wanted.append(Wanted(self.dataset, find_date(self.dataset, date), places, members))
        return wanted

    def _normalise(self, given: Tensor) -> Tensor:
        """What the model sees of it."""
        model, roles = self.forecaster, self.trained.roles
        places = roles.places(roles.inputs)
        return known_or_mean((given.to(model.mean.dtype) - model.mean[places]) / model.stdev[places])

    def _take(self, reads: Reads, date: np.datetime64, names: tuple[str, ...]) -> Tensor:
        """[ensemble, cells/M, variables] of a date of the dataset, on the device."""
        fields = next(reads)
        self._check_given(fields, names, date)
        return torch.from_numpy(fields).permute(1, 2, 0).to(self.share.device)

    def _date_of_forcings(self, initial: np.datetime64, number: int) -> np.datetime64:
        return self._date(initial, number) if self.trained.changing_forcings(self.dataset) else initial

    def _date(self, initial: np.datetime64, number: int) -> np.datetime64:
        date: np.datetime64 = initial + np.timedelta64(number * self.trained.step, "s")
        return date

    def _check_given(self, fields: NDArray[np.float32], names: tuple[str, ...], date: np.datetime64) -> None:
        """What stops the training stops a forecast: in other variables no cell was ever without a value."""
        for name, field in zip(names, fields, strict=True):
            if name in self.trained.roles.allow_nan or np.isfinite(field.sum(dtype=np.float64)):  # no memory
                continue
            raise DatasetError(
                f"{name} of {date} is not finite in {int((~np.isfinite(field)).sum())} of the {field.shape[-1]} cells "
                "of this rank, and the model was trained on values in all cells. Give a dataset that has them, or "
                "train with the variable in --model.allow_nan."
            )

    def _check_finite(self, fields: Tensor, absent: list[Tensor], date: np.datetime64, number: int) -> None:
        if torch.isfinite(fields.sum()):  # one pass, no memory
            return
        wrong = put(False, ~torch.isfinite(fields), self.forecaster.lacking, absent).sum(dim=(0, 1))
        for name, count in zip(self.variables, wrong.tolist(), strict=True):
            if count:
                raise PlanError(
                    f"the forecast of {name} for {date}, {number} steps ahead, is not finite in {count} of the "
                    f"{fields.shape[1]} cells of this rank: the model diverged. Use a shorter lead time, or train over "
                    "longer rollouts."
                )


# ------------------------------------------------------------------------------------------------------------- loading
def load(
    path: str | Path,
    dataset: Dataset | str | os.PathLike[str],
    share: Share | None = None,
    precision: str | int | None = None,
    **network: Any,
) -> Forecast:
    """A forecast model from a checkpoint, for any number of ranks. All ranks of the group call it together.

    Args:
      path: of a checkpoint that `trainer fit` wrote, on whatever ranks.
      dataset: with the variables that the model was trained on, on the same grid.
      share: what this rank has of the work; default: all of it.
      precision: such as 32-true or bf16-mixed; default: that of the training.
      network: changes of `ModelOptions` that leave the weights as they are: num_chunks, shard_strategy.
    """
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    share = share or Share(forecast_partition(opened, 1))
    return assemble(read_trained(path), opened, share, precision, **network)


def assemble(
    trained: Trained, dataset: Dataset, share: Share, precision: str | int | None = None, **network: Any
) -> Forecast:
    """The model on this rank's cells. All ranks of the group call it together."""
    check_variables(trained, dataset)
    computed = Precision(str(precision or trained.precision))
    options = ModelOptions(**trained.about["network"] | {"checkpointing": False} | network)
    ones = np.ones(len(trained.roles.variables))
    statistics = {"mean": ones, "stdev": ones}  # overwritten by those of the checkpoint
    tendencies = np.ones(len(trained.roles.outputs))
    with _made_of(computed.weights):
        graph = assemble_graph(dataset, share, GraphOptions(**trained.about["graph"]), options)
        model = Forecaster(trained.roles, statistics, tendencies, trained.input_steps, options, graph)
    model.load_state_dict(trained.weights)
    return Forecast(trained, model.to(share.device).eval(), dataset, share, computed)


@contextmanager
def _made_of(kind: torch.dtype) -> Iterator[None]:
    """Make numbers of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def forecast_partition(dataset: Dataset, ranks: int, chunk_cells: int | None = None) -> Partition:
    """Every rank owns whole grid-chunks of what is written.

    Those of `chunk_cells` where a forecast is begun already; else those of the dataset where the ranks can share them
    evenly, else one for each rank.
    """
    cells = dataset.shape[3]
    if chunk_cells is None:
        cut = partition(cells, ranks, dataset.chunk_cells)
        if cut.aligned:
            return cut
        chunk_cells = math.ceil(cells / ranks)
    chunks = math.ceil(cells / chunk_cells)
    if chunks < ranks:
        raise PlanError(
            f"{cells} cells in grid-chunks of {chunk_cells} make {chunks} chunks: too few for {ranks} ranks, each of "
            f"which writes its own. Use {chunks} ranks per model or fewer; an unfinished forecast keeps its chunks, "
            "unless --overwrite discards it."
        )
    return Partition(tuple(min(chunk * chunk_cells, cells) for chunk in balanced(chunks, ranks)), chunk_cells, True)
