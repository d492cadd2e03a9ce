"""How the commands of `trainer` take their flags, show them, and tell what is wrong with them."""

from __future__ import annotations

import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

UNKNOWN = re.compile(r"(?:(Subcommand|Group) '(\S+)' does not accept option '|unrecognized arguments: --)([\w.]+)")
WRONG_TYPE = re.compile(r'Parser key "(\S+)":.*?Subtypes: \[(.*?)\]\n.*Given value: (.*)', re.DOTALL)


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of a description, with its examples."""


class Brief:
    """Of a parser: what is wrong, in a line or two, without the pages of usage that would hide it."""

    prog: str
    _actions: list[Any]

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        """Tell it, and leave with code 2."""
        command = self.prog.replace(" [options]", "")
        if unknown := UNKNOWN.search(message):
            kind, where, name = unknown.groups()
            name = f"{where}.{name}" if kind == "Group" else name
            command = f"{command} {where}" if kind == "Subcommand" else command
            message += f"{_in_file(sys.argv[1:], name)}.{meant(name, known(self, where if kind else ''))}"
        elif wrong := WRONG_TYPE.search(message):
            name, types, value = wrong.groups()
            remedy = f"Write [{value}]." if "list[" in types else f"Give one of: {types}."
            message = f"{name} is {value}. {remedy}"
        print(f"Error: {message}\nAll options: {command} --help", file=sys.stderr)
        sys.exit(2)


class Parser(Brief, ArgumentParser):
    """Of the commands that are not Lightning's."""


def parser_of(command: str, description: str, wanted: str) -> Parser:
    """The parser of a command, with the options that are `wanted` in its usage."""
    usage = f"trainer {command} {wanted} [--OPTION VALUE ...]"
    return Parser(prog=f"trainer {command}", description=description, usage=usage, formatter_class=Formatter)


def known(parser: Any, command: str = "") -> set[str]:
    """Names of the options that a parser takes, or its subcommand, such as model.network.channels."""
    for action in parser._actions:
        if isinstance(action.choices, dict) and command in action.choices:
            return known(action.choices[command])
    return {action.dest for action in parser._actions}


def unknown(about: dict[str, Any], names: Collection[str], inside: str = "") -> Iterator[str]:
    """What a configuration sets that is no option."""
    for key, value in about.items():
        name = f"{inside}{key}"
        group = any(one.startswith(f"{name}.") for one in names)
        if group and isinstance(value, dict):
            yield from unknown(value, names, f"{name}.")
        elif not group and name not in names:
            yield name


def meant(name: str, names: Collection[str]) -> str:
    """The name that comes nearest, as a question; nothing where none is near."""
    near = get_close_matches(name, names, 1, 0.8)
    return f" Did you mean {near[0]}?" if near else ""


def _in_file(arguments: list[str], name: str) -> str:
    """Which of the configurations that are given sets it."""
    import yaml

    options = ("--config", "-c")
    paths = [after for option, after in pairwise(arguments) if option in options]
    paths += [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    for path in paths:
        with suppress(OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):  # it is no tree of options
            about = yaml.safe_load(Path(path).read_text())
            *groups, last = name.split(".")
            for group in groups:
                about = about.get(group, {})
            if last in about:
                return f" (in {path})"
    return ""


def underscored(arguments: list[str]) -> list[str]:
    """--lead-time=240h as --lead_time=240h; values stay as they are."""
    return [_underscored(argument) for argument in arguments]


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
