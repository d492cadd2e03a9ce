"""The YAML of a training, for the commands that need some of it: `predict` and `plan`."""

from __future__ import annotations

from typing import Any

from trainer.cli.flags import parser_of, read_configuration, refuse_typos_of
from trainer.fit.data import ForecastDataModule
from trainer.fit.module import ForecastModule
from trainer.fit.strategy import DDPGroupStrategy

GROUPS = {"model": ForecastModule, "data": ForecastDataModule, "strategy": DDPGroupStrategy}


def read_training(path: str) -> dict[str, Any]:
    """What it says; what it sets of Lightning's trainer is not looked at. Leaves with code 2 where it has typos.

    Raises: SelectionError if it cannot be read.
    """
    about, parser = read_configuration(path), parser_of("fit", "", "")
    for name, of in GROUPS.items():
        parser.add_class_arguments(of, name)
    refuse_typos_of(parser, path, {name: about[name] for name in GROUPS if about.get(name)})
    return about
