"""What a checkpoint says of a model, and what a dataset must have for a forecast with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardio import Dataset
from shardio.dates import format_step, parse_start, parse_step
from shardio.errors import DatasetError, SelectionError
from trainer.model.forecaster import Roles
from trainer.model.saved import load


@dataclass(frozen=True, eq=False)
class Trained:
    """What a checkpoint holds of a model; the same for any number of ranks.

    Attributes:
      roles: of the variables.
      input_steps: dates that the model is given.
      step: seconds between lead times.
      about: what the training noted: graph, network, version.
      weights: by name.
      digest: of the file.
      precision: of the training.
    """

    roles: Roles
    input_steps: int
    step: int
    about: dict[str, Any]
    weights: dict[str, Tensor]
    digest: str
    precision: str

    def steps(self, lead_time: str) -> int:
        """Lead times up to this one, such as 240h."""
        seconds = parse_step(lead_time)
        if seconds % self.step:
            raise SelectionError(
                f"a lead time of {lead_time} is no multiple of the model's step, {format_step(self.step)}."
            )
        return seconds // self.step

    def check(self, dataset: Dataset, initial: np.datetime64, steps: int) -> None:
        """SelectionError unless the dataset has the input dates, and forcings up to the last step but one."""
        for back in range(self.input_steps):
            find_date(dataset, initial - np.timedelta64(back * self.step, "s"), f"a forecast from {initial} needs it")
        changing = self.changing_forcings(dataset)
        for number in range(1, steps) if changing else ():
            why = f"a forecast from {initial} needs its {', '.join(changing)}; give a dataset that reaches further, or "
            find_date(dataset, initial + np.timedelta64(number * self.step, "s"), f"{why}a shorter lead time")

    def changing_forcings(self, dataset: Dataset) -> list[str]:
        """Those that the dataset does not call constant."""
        return [name for name in self.roles.forcings if name not in dataset.constants]


def read_trained(path: str | Path) -> Trained:
    """What the checkpoint at `path` holds of a model."""
    checkpoint = load(path)
    about = checkpoint.get("shardio")
    if about is None:
        raise DatasetError(f"{path} is no checkpoint of `trainer fit`. Give one from the folder checkpoints of a run.")
    may_lack = about.get("allow_nan", about["variables"])  # before it was noted, all that are given may lack values
    roles = Roles(*map(tuple, (about["variables"], about["forcings"], about["diagnostics"], may_lack)))
    prefix, state = "forecaster.", checkpoint["state_dict"]
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    precision = about.get("precision", precision_of(weights))  # before it was noted, that of the weights
    return Trained(roles, about["input_steps"], about["step_seconds"], about, weights, digest, precision)


def precision_of(weights: dict[str, Tensor]) -> str:
    """In which nothing is rounded that the weights are not."""
    return "64-true" if weights["mean"].dtype == torch.float64 else "32-true"


def check_variables(trained: Trained, dataset: Dataset) -> None:
    """DatasetError unless the dataset has all variables of the model."""
    lacking = [name for name in trained.roles.variables if name not in dataset.variables]
    if lacking:
        raise DatasetError(
            f"the model was trained on {', '.join(lacking)} too, which the dataset lacks: it has "
            f"{', '.join(dataset.variables)}. Give a dataset with all variables of the training."
        )
    if trained.about.get("grid", dataset.grid_digest) != dataset.grid_digest:
        raise DatasetError(
            f"the model was trained on another grid than that of this dataset, {dataset.shape[3]} cells. Give a "
            "dataset on the grid of the training; the order of its cells does not matter."
        )


def as_date(when: Any) -> np.datetime64:
    """A date as users write it, or any that numpy knows."""
    return when.astype("datetime64[s]") if isinstance(when, np.datetime64) else parse_start(str(when))


def find_date(dataset: Dataset, date: np.datetime64, why: str = "") -> int:
    """Place of a date; SelectionError where it is not there."""
    place = int(np.searchsorted(dataset.dates, date))
    if place == len(dataset) or dataset.dates[place] != date or dataset.is_missing[place]:
        what = "is missing in" if date in dataset.dates else "is not in"
        raise SelectionError(
            f"{date} {what} the dataset, which has {dataset.dates[0]} to {dataset.dates[-1]} every "
            f"{dataset.frequency}: {why or 'choose another'}."
        )
    return place
