"""Whether numbers that go into a step, and come out of it, are finite; if not, which, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardio.errors import DatasetError, PlanError
from trainer.model.forecaster import Roles
from trainer.model.losses.measured import Measured

Dates = NDArray[np.datetime64]


def check_input(fields: Tensor, dates: Dates, input_steps: int, roles: Roles, step: int) -> None:
    """DatasetError, with variable and date, if a value that is used is not finite and may not be so.

    Args:
      fields: [batch, time, ensemble, cells/M, variables].
      dates: [batch, time].
      input_steps: the first times.
      roles: of the variables.
      step: for the message.
    """
    suspect = ~torch.isfinite(fields.sum(dim=(2, 3)))  # [batch, time, variables]; one pass, no memory
    suspect[..., roles.places(roles.allow_nan)] = False
    suspect[:, :input_steps, roles.places(roles.diagnostics)] = False
    for sample, time, variable in suspect.nonzero().tolist():
        wrong = int((~torch.isfinite(fields[sample, time, ..., variable])).sum())
        if wrong:  # else the sum was too large
            raise DatasetError(
                f"{roles.variables[variable]} of {dates[sample, time]} is not finite in "
                f"{wrong} of the {fields.shape[3]} cells of this rank, which would spoil "
                f"the training (step {step}). Leave the date or the variable out, or name the variable in "
                "--model.allow_nan if NaN means 'no value here'."
            )


def explain_divergence(leads: Sequence[Measured], dates: Dates, names: Sequence[str], step: int) -> NoReturn:
    """PlanError that names the first forecast that is not finite. All ranks of the model group come here.

    Args:
      leads: errors of each lead time.
      dates: [batch, lead times] of their targets.
      names: of the variables that are forecast.
      step: for the message.
    """
    sums = torch.stack([one.sums for one in leads])
    lead, sample, _, output = (~torch.isfinite(sums)).nonzero()[0].tolist()
    raise PlanError(
        f"the forecast of {names[output]} for {dates[sample, lead]} is not finite in step "
        f"{step}, though its input is: the training diverged. Lower --model.optimizer.learning_rate, "
        "or resume from an earlier checkpoint with --trainer.gradient_clip_val 1."
    )
