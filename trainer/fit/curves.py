"""The loss of every step in the log that is always written, and its picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

TRAINING, RATE, SKILL = "train/loss", "train/learning_rate", "val/rmse_over_persistence"


class LossCurve(Callback):
    """Logs the loss of each optimizer step, and draws `curves.png` when training ends.

    The loss is the mean over all batches of the step, on all ranks: it depends neither on the topology nor on how
    gradients are accumulated. It is in the log before the checkpoint of the step is written, so that a run killed
    at any time and resumed has logged every step. A resumed run is drawn with what came before.

    Args: folder: of the run; its logs are in logs/version_0, version_1, ...
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._losses: list[Tensor] = []
        self._rate = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._losses.append(outputs["loss"].detach())
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        # Lightning hands out losses divided by the batches of a step, whether there were so many or fewer.
        loss = torch.stack(self._losses).mean() * trainer.accumulate_grad_batches
        self._losses.clear()
        if self._step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        world = trainer.strategy.world  # type: ignore[attr-defined]
        loss = world.sum(loss, "curves") / world.ranks
        for logger in trainer.loggers:
            logger.log_metrics({TRAINING: float(loss), RATE: self._rate}, step=self._step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            draw(self.folder)


def read(folder: Path, name: str) -> dict[int, float]:
    """Value of a metric at each step; where runs overlap the later one counts."""
    logs = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    values: dict[int, float] = {}
    for path in logs:
        with path.open(newline="") as file:
            values |= {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
    return dict(sorted(values.items()))


def draw(folder: Path) -> Path | None:
    """curves.png: training loss and, where there is validation, error over that of persistence."""
    from matplotlib.figure import Figure

    curves = {name: values for name in (TRAINING, SKILL) if (values := read(folder, name))}
    if not curves:
        return None
    figure = Figure(figsize=(5.0 * len(curves), 3.5), layout="constrained")
    titles = {TRAINING: "training loss", SKILL: "validation error / that of persistence"}
    for i, (name, values) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), i)
        axes.plot(list(values), list(values.values()), marker="o" if len(values) < 40 else None, markersize=3)
        axes.set(title=titles[name], xlabel="step", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # there is no step 2.5
        axes.grid(alpha=0.3, which="both")
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path
