"""The loss curve as a picture, from the log that is always written."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

TRAINING, SKILL = "train/loss", "val/rmse_over_persistence"


class LossCurve(Callback):
    """Draws `curves.png` in the run's folder when training ends; a resumed run is drawn with what came before.

    Args: folder: of the run; its logs are in logs/version_0, version_1, ...
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

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
        axes.grid(alpha=0.3, which="both")
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path
