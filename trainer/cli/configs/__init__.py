"""Ready configurations, which the commands know by name: `trainer fit --config demo`."""

from __future__ import annotations

from pathlib import Path


def by_name(arguments: list[str]) -> list[str]:
    """The arguments with the path of a configuration of this folder, where one is given by its name."""
    options = ("--config", "-c")
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if equals and option in options:
            found.append(f"{option}={_path(value)}")
        else:
            found.append(_path(argument) if before in options else argument)
    return found


def _path(name: str) -> str:
    own = Path(__file__).parent / f"{name}.yaml"
    return str(own) if "/" not in name and own.exists() and not Path(name).exists() else name
