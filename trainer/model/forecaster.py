"""From fields to forecasts: normalise, step, put the forecast in the place of the oldest input, step again.

fields      [batch, time, ensemble, cells/M, variables]   of the dataset, in its units
state       [batch, input time, ensemble, cells/M, prognostic + forcing]    normalised
prediction  [batch, ensemble, cells/M, prognostic + diagnostic]             normalised

A cell that has no value of a prognostic variable at the last input time (sea surface temperature over land) is absent:
it gets none from the network, and is the mean in every later state. Otherwise the network, which no target corrects
there, would feed itself on what it makes up. Where the target or an earlier input time has no value changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardio.errors import SelectionError
from trainer.graph.sharded_graph import ShardedGraph
from trainer.model.model import EncodeProcessDecode, ModelOptions


@dataclass(frozen=True)
class Roles:
    """What the model does with each variable of the dataset.

    Attributes:
      variables: of the dataset, in its order.
      forcings: known at all times, given to the model, not forecast.
      diagnostics: forecast, not given to the model.
      allow_nan: without a value in some cells.
      All but forcings and diagnostics are prognostic: given and forecast.
    """

    variables: tuple[str, ...]
    forcings: tuple[str, ...] = ()
    diagnostics: tuple[str, ...] = ()
    allow_nan: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for role in ("forcings", "diagnostics", "allow_nan"):
            unknown = [name for name in getattr(self, role) if name not in self.variables]
            if unknown:
                raise SelectionError(
                    f"{role} {', '.join(unknown)} are not in the dataset. It has: {', '.join(self.variables)}."
                )
        both = sorted(set(self.forcings) & set(self.diagnostics))
        if both:
            raise SelectionError(f"{', '.join(both)} cannot be forcing and diagnostic at once. Choose one.")
        if not self.prognostic:
            raise SelectionError("no variable is prognostic, so nothing can be stepped forward. Leave some free.")

    @property
    def prognostic(self) -> tuple[str, ...]:
        """Given and forecast."""
        return tuple(name for name in self.variables if name not in (*self.forcings, *self.diagnostics))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Given to the model, in the order of `state`."""
        return self.prognostic + self.forcings

    @property
    def outputs(self) -> tuple[str, ...]:
        """Forecast, in the order of `prediction`."""
        return self.prognostic + self.diagnostics

    @property
    def lacking(self) -> tuple[str, ...]:
        """Prognostic, and without a value in some cells."""
        return tuple(name for name in self.prognostic if name in self.allow_nan)

    def places(self, names: Sequence[str]) -> list[int]:
        """Where those variables are in the dataset."""
        return [self.variables.index(name) for name in names]


class Forecaster(nn.Module):
    """The model with its normalisation: all that a forecast needs, and all that a checkpoint holds.

    Args:
      roles: of the variables.
      statistics: mean and stdev, each [variables].
      tendencies: [prognostic + diagnostic], standard deviation of the change over one step (for diagnostics: 1), in
        standard deviations of the variable: the unit in which the network answers.
      input_steps: dates that the model is given.
      options: of the network.
      graph: this rank's part.

    Attributes:
      lacking: places of the variables that some cells have no value of, in state and prediction.
    """

    mean: Tensor
    stdev: Tensor
    tendencies: Tensor

    def __init__(
        self,
        roles: Roles,
        statistics: Mapping[str, NDArray[np.float64]],
        tendencies: NDArray[np.float64],
        input_steps: int,
        options: ModelOptions,
        graph: ShardedGraph,
    ):
        super().__init__()
        self.roles, self.input_steps = roles, input_steps
        dtype = torch.get_default_dtype()
        stdev = np.where(statistics["stdev"] > 0.0, statistics["stdev"], 1.0)
        for name, array in (("mean", statistics["mean"]), ("stdev", stdev), ("tendencies", tendencies)):
            self.register_buffer(name, torch.from_numpy(np.array(array, np.float64)).to(dtype))
        self.network = EncodeProcessDecode(options, input_steps * len(roles.inputs), len(roles.outputs), graph)
        self._inputs, self._forcings = roles.places(roles.inputs), roles.places(roles.forcings)
        self._outputs = roles.places(roles.outputs)
        self.lacking = [roles.prognostic.index(name) for name in roles.lacking]

    def normalise(self, fields: Tensor) -> Tensor:
        """Fields of all variables, in standard deviations from the mean."""
        return (fields.to(self.mean.dtype) - self.mean) / self.stdev

    def denormalise(self, prediction: Tensor) -> Tensor:
        """A prediction in the units of the dataset."""
        return prediction * self.stdev[self._outputs] + self.mean[self._outputs]

    def first_state(self, fields: Tensor) -> Tensor:
        """From normalised fields whose first times are the input; what is NaN there becomes the mean."""
        return known_or_mean(fields[:, : self.input_steps, ..., self._inputs])

    def forward(self, state: Tensor) -> Tensor:
        """One step: [batch, input time, ensemble, cells/M, inputs] -> [batch, ensemble, cells/M, outputs]."""
        batch, _, ensemble, cells, _ = state.shape
        rows = state.permute(0, 2, 3, 1, 4).reshape(batch * ensemble, cells, -1)
        answer = self.network(rows).to(state.dtype).view(batch, ensemble, cells, -1) * self.tendencies
        prognostic = len(self.roles.prognostic)
        now = state[:, -1, ..., :prognostic]
        return torch.cat([now + answer[..., :prognostic], answer[..., prognostic:]], dim=-1)

    def next_state(self, state: Tensor, prediction: Tensor, fields: Tensor) -> Tensor:
        """The oldest input time makes place for the prediction and the forcings of its time.

        Args: state; prediction; fields: [batch, ensemble, cells/M, variables], normalised, of the time predicted.
        """
        forcings = known_or_mean(fields[..., self._forcings])
        newest = torch.cat([prediction[..., : len(self.roles.prognostic)], forcings], dim=-1)
        return torch.cat([state[:, 1:], newest[:, None]], dim=1)

    def rollout(self, fields: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Forecast step after step, each from the last.

        Args: fields: [batch, input_steps + steps, ensemble, cells/M, variables], normalised.
        Yields: prediction and target, [batch, ensemble, cells/M, outputs], normalised; in cells that are absent the
          mean, and NaN.
        """
        state = self.first_state(fields)
        absent = without_value(fields[:, self.input_steps - 1], self.roles.places(self.roles.lacking))
        for step in range(steps):
            prediction = put(0.0, self(state), self.lacking, absent)
            then = fields[:, self.input_steps + step]
            yield prediction, put(torch.nan, then[..., self._outputs], self.lacking, absent)
            if step + 1 < steps:
                state = self.next_state(state, prediction, then)


def without_value(fields: Tensor, places: Sequence[int]) -> list[Tensor]:
    """Where those variables have no finite value: of each, bool [..., cells/M]."""
    return [~torch.isfinite(fields[..., place]) for place in places]


def put(value: float, fields: Tensor, places: Sequence[int], where: Sequence[Tensor]) -> Tensor:
    """Put a value into those variables, in place, where each is to have it. No gradient goes back from there."""
    for place, cells in zip(places, where, strict=True):
        fields[..., place].masked_fill_(cells, value)
    return fields


def known_or_mean(normalised: Tensor) -> Tensor:
    """Normalised fields, the mean (0) where they have no finite value."""
    return torch.nan_to_num(normalised, nan=0.0, posinf=0.0, neginf=0.0)
