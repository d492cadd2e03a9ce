"""What a command prints when it has ended: one fact after training, a table after validation, or either as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trainer.cli.result import defined
from trainer.fit.curves import TRAINING, read
from trainer.fit.metrics import Scores

if TYPE_CHECKING:
    from trainer.cli.fit import TrainerCLI


def show(cli: TrainerCLI, seconds: float) -> None:
    """To stdout."""
    result = _training(cli, seconds) if cli.subcommand == "fit" else _validation(cli)
    if cli.option("json"):
        print(json.dumps(defined(result), allow_nan=False))
    elif cli.subcommand == "fit":
        ratio = (
            ""
            if result["rmse_over_persistence"] is None
            else (f", validation error {result['rmse_over_persistence']:.3f} of persistence")
        )
        print(
            f"trained to step {result['step']} in {_duration(seconds)}: loss {result['loss']:.4g}{ratio}; "
            f"{result['checkpoint']}, {result['picture']}"
        )
    else:
        _print_table(cli.model.scores)


def _training(cli: TrainerCLI, seconds: float) -> dict[str, Any]:
    ratio = cli.trainer.callback_metrics.get("val/rmse_over_persistence")
    step = cli.trainer.global_step
    losses = [loss for at, loss in read(cli.folder, TRAINING).items() if at <= step]  # it may have gone back
    return {
        "step": step,
        "seconds": round(seconds, 3),
        "loss": losses[-1] if losses else float("nan"),
        "rmse_over_persistence": None if ratio is None else float(ratio),
        "checkpoint": str(cli.checkpoints / "last.ckpt"),
        "picture": str(cli.checkpoints.parent / "curves.png"),
    }


def _validation(cli: TrainerCLI) -> dict[str, Any]:
    dataset = cli.datamodule.validation
    return {"from": str(dataset.dates[0]), "to": str(dataset.dates[-1]), "scores": cli.model.scores.nested()}


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
