"""How the commands of `trainer` take their flags, and show them."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter

from jsonargparse import DefaultHelpFormatter


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of a description, with its examples."""


def underscored(arguments: list[str]) -> list[str]:
    """--lead-time=240h as --lead_time=240h; values stay as they are."""
    return [_underscored(argument) for argument in arguments]


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
