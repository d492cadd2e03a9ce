"""AdamW, and how its learning rate follows the batch size and the training: warm-up, then half a cosine.

Weights of matrices decay; scales of LayerNorm and biases, of one dimension, do not. Decay keeps matrices small, which
LayerNorm makes up for, and so acts as a learning rate; a scale or bias it only draws away from what fits the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from shardio.errors import PlanError

RULES = ("none", "linear", "sqrt")


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW or SGD, and the learning rate.

    Attributes:
      name: adamw or sgd.
      learning_rate: at its highest, of an effective batch of 1 if scaling is not none.
      scaling: with the effective batch (samples per optimizer step over all ranks): none, linear or sqrt.
      warmup_steps: steps in which it rises from 0.
      final_fraction: of the learning rate, in the last step; 1 keeps it constant after warm-up.
      weight_decay: of AdamW and SGD.
      beta1, beta2: of AdamW.
      momentum: of SGD.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    scaling: str = "none"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("name", ("adamw", "sgd")), ("scaling", RULES)):
            if getattr(self, name) not in known:
                raise PlanError(f"optimizer {name} {getattr(self, name)!r} is unknown. Use one of: {', '.join(known)}.")
        if not self.learning_rate > 0.0 or self.warmup_steps < 0:
            raise PlanError(
                f"learning_rate {self.learning_rate} and warmup_steps {self.warmup_steps} cannot be. "
                "Use a learning rate above 0, and 0 steps or more."
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            raise PlanError(f"final_fraction is {self.final_fraction}. Use 0 to 1.")

    def peak(self, effective_batch: int) -> float:
        """Highest learning rate."""
        scale = {"none": 1.0, "linear": float(effective_batch), "sqrt": math.sqrt(effective_batch)}
        return self.learning_rate * scale[self.scaling]

    def factor(self, step: int, steps: int) -> float:
        """Of the highest learning rate, in a step of so many."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / max(steps - self.warmup_steps, 1), 1.0)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], options: OptimizerOptions, effective_batch: int, steps: int
) -> dict[str, Any]:
    """Optimizer and schedule, as Lightning takes them; of two groups, of which the second does not decay."""
    rate, weights = options.peak(effective_batch), list(parameters)
    decaying, others = ([weight for weight in weights if _decays(weight) is kind] for kind in (True, False))
    groups = [{"params": decaying, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if options.name == "adamw":
        betas = options.beta1, options.beta2
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas)
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=options.momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.factor(step, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _decays(weight: torch.Tensor) -> bool:
    return weight.dim() > 1


def split_groups(checkpoint: dict[str, Any], parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let a run go on from a checkpoint of when all weights were one group, and all decayed.

    Args: checkpoint: of Lightning; changed in place. parameters: of the run, in the order of the group.
    """
    decays = [_decays(weight) for weight in parameters]
    order = sorted(range(len(decays)), key=lambda place: not decays[place])  # sorted keeps the order otherwise
    for optimizer, schedule in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
        if len(optimizer["param_groups"]) > 1:
            continue
        (whole,) = optimizer["param_groups"]
        optimizer["state"] = {
            new: optimizer["state"][old] for new, old in enumerate(order) if old in optimizer["state"]
        }
        first, every = sum(decays), len(decays)
        optimizer["param_groups"] = [
            {**whole, "params": list(range(first))},
            {**whole, "params": list(range(first, every)), "weight_decay": 0.0},
        ]
        for name in ("base_lrs", "_last_lr", "lr_lambdas"):
            schedule[name] = schedule[name] * 2


def follow_batch(checkpoint: dict[str, Any], options: OptimizerOptions, before: int, now: int) -> None:
    """Let a resumed run with another effective batch go on at the same part of the schedule, at the rate of its batch.

    Args:
      checkpoint: of Lightning; changed in place.
      options: of the run.
      before, now: effective batch of the checkpoint, and of the run.
    """
    if before == now:
        return
    rate = options.peak(now)
    for schedule in checkpoint["lr_schedulers"]:
        schedule["last_epoch"] = round(schedule["last_epoch"] * before / now)
        schedule["base_lrs"] = [rate] * len(schedule["base_lrs"])
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"] = rate
