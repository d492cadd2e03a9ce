"""What a command prints when it has ended: one fact after training, a table after validation, or either as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.cli.result import defined
from trainer.fit.curves import TRAINING, read
from trainer.fit.metrics import Scores
from trainer.fit.run_folder import CHECKPOINTS


@dataclass(frozen=True)
class Trained:
    """Outcome of a training.

    Attributes: folder of the run; step it came to; seconds it took; ratio: validation error over that of persistence.
    """

    folder: Path
    step: int
    seconds: float
    ratio: float | None

    def as_json(self) -> dict[str, Any]:
        losses = [loss for at, loss in read(self.folder, TRAINING).items() if at <= self.step]  # it may have gone back
        return {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "loss": losses[-1] if losses else float("nan"),
            "rmse_over_persistence": self.ratio,
            "checkpoint": str(self.folder / CHECKPOINTS / "last.ckpt"),
            "picture": str(self.folder / "curves.png"),
        }

    def print(self) -> None:
        told = self.as_json()
        ratio = "" if self.ratio is None else f", validation error {self.ratio:.3f} of persistence"
        print(
            f"trained to step {self.step} in {_duration(self.seconds)}: loss {told['loss']:.4g}{ratio}; "
            f"{told['checkpoint']}, {told['picture']}"
        )


@dataclass(frozen=True)
class Validated:
    """Outcome of a validation. Attributes: first, last: dates; scores."""

    first: str
    last: str
    scores: Scores

    def as_json(self) -> dict[str, Any]:
        return {"from": self.first, "to": self.last, "scores": self.scores.nested()}

    def print(self) -> None:
        _print_table(self.scores)


def show(outcome: Trained | Validated, as_json: bool) -> None:
    """To stdout."""
    if as_json:
        print(json.dumps(defined(outcome.as_json()), allow_nan=False))
    else:
        outcome.print()


def _print_table(scores: Scores) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="root mean square error (and that of persistence)")
    table.add_column("variable")
    table.add_column("units")
    for lead in scores.leads:
        table.add_column(lead, justify="right")
    for k, variable in enumerate(scores.variables):
        pairs = zip(scores.rmse[:, k], scores.persistence[:, k], strict=True)
        table.add_row(variable, scores.units[k], *(f"{rmse:.4g} ({still:.4g})" for rmse, still in pairs))
    width = None if Console().is_terminal else Console(width=10_000).measure(table).maximum  # in a file: unbroken
    Console(width=width).print(table)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
