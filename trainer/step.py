"""The step that is trained, planned, measured and tested: normalise, roll out, take the loss of each lead time.

fields [batch, time, ensemble, cells/M, variables]  ->  prediction and target of each lead time  ->  their mean loss
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.forecaster import Forecaster
from trainer.model.losses.measured import Loss, Measured


@dataclass(frozen=True, eq=False)
class StepLoss:
    """Of one step.

    Attributes:
      value: mean of the lead times' losses; the same on all ranks of the model group, its gradient of own cells.
      leads: of each lead time.
    """

    value: Tensor
    leads: list[Measured]


def forecast_loss(forecaster: Forecaster, loss: Loss, fields: Tensor, steps: int) -> StepLoss:
    """Forecast so many steps from the first dates, and compare with the dates that follow.

    All ranks of the model group call it together.

    Args:
      forecaster: of this rank.
      loss: of one prediction.
      fields: [batch, input_steps + steps or more, ensemble, cells/M, variables], in the units of the dataset.
      steps: lead times.
    """
    normalised = forecaster.normalise(fields[:, : forecaster.input_steps + steps])
    leads = [loss(prediction, target) for prediction, target in forecaster.rollout(normalised, steps)]
    return StepLoss(torch.stack([one.value for one in leads]).mean(), leads)
