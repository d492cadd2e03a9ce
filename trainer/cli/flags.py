"""How the commands of `trainer` take their options, from flags and from the YAML, and tell what is wrong with them."""

from __future__ import annotations

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from shardio.errors import SelectionError

NONE = type(None)


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of a description, with its examples."""


class Brief:
    """Of a parser: what is wrong, in a line or two, without the pages of usage that would hide it."""

    prog: str
    _actions: list[Any]

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        """Tell it, and leave with code 2."""
        print(f"Error: {message}\nAll options: {self.prog.replace(' [options]', '')} --help", file=sys.stderr)
        sys.exit(2)


class Parser(Brief, ArgumentParser):
    """Of the commands that are not Lightning's."""


def parser_of(command: str, description: str, wanted: str) -> Parser:
    """The parser of a command, with the options that are `wanted` in its usage."""
    usage = f"trainer {command} {wanted} [--OPTION VALUE ...]"
    return Parser(prog=f"trainer {command}", description=description, usage=usage, formatter_class=Formatter)


def parse(parser: Parser, arguments: list[str], training: Iterable[str] = ()) -> Namespace:
    """Options from flags, written with hyphens or underscores; they win over those of the training's configuration."""
    words = underscored(arguments)
    refuse_typos(parser, words)
    return parser.parse_args([*training, *words])


def refuse_typos(parser: Any, arguments: list[str]) -> None:
    """Leave with code 2 where a flag is no option of the parser, or a list without brackets."""
    takes = _options(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for word, after in pairwise([*arguments, ""]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag not in flags:
            _refuse_unknown(parser, takes, flag[2:].removesuffix("+"))
        _refuse_bare_list(parser, takes, flag.removeprefix("--"), value if equals else after)


def refuse_typos_of(parser: Any, path: str, about: dict[str, Any]) -> None:
    """Leave with code 2 where what a configuration sets is no option of the parser: nothing is ignored in silence."""
    takes = _options(parser)
    for name, value in settings(about, takes):
        _refuse_unknown(parser, takes, name, f" (in {path})")
        _refuse_bare_list(parser, takes, name, value)


def _options(parser: Any) -> dict[str, Any]:
    return {action.dest: action for action in parser._actions}


def _refuse_unknown(parser: Any, takes: Collection[str], name: str, where: str = "") -> None:
    """Keys inside of an option, such as model.loss.variable_weights.t, are its own; inside of a group they are not."""
    inside = max((one for one in takes if name.startswith(f"{one}.")), default="")
    parts = (one for one in takes if one.startswith(f"{inside}.") and not one.endswith(".help"))
    if name not in takes and (not inside or any(parts)):
        parser.error(f"{parser.prog.replace(' [options]', '')} has no option {name}{where}.{meant(name, takes)}")


def _refuse_bare_list(parser: Any, takes: dict[str, Any], name: str, value: Any) -> None:
    kinds = [get_origin(kind) for kind in get_args(getattr(takes.get(name), "_typehint", None)) if kind is not NONE]
    if kinds == [list] and isinstance(value, str) and value[:1] not in ("[", "-") and value not in ("null", "None", ""):
        parser.error(f"{name} is {value}. Write [{value}].")


def configurations(arguments: list[str]) -> list[str]:
    """Paths of the YAML files that are given."""
    after = [path for flag, path in pairwise(arguments) if flag in ("--config", "-c")]
    return after + [word.partition("=")[2] for word in arguments if word.startswith("--config=")]


def read_configuration(path: str) -> dict[str, Any]:
    """What a YAML says, its dates as texts; SelectionError where it cannot be read or is no tree of options."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SelectionError(f"the configuration {path} cannot be read: {error}") from error
    if not isinstance(found or {}, dict):
        raise SelectionError(f"{path} is no configuration of `trainer fit`: it holds {type(found).__name__}.")
    plain: dict[str, Any] = json.loads(json.dumps(found or {}, default=str))
    return plain


def settings(about: dict[str, Any], names: Collection[str], inside: str = "") -> Iterator[tuple[str, Any]]:
    """What a configuration sets, by the names of flags."""
    for key, value in about.items():
        name = f"{inside}{key}"
        if isinstance(value, dict) and any(one.startswith(f"{name}.") for one in names):
            yield from settings(value, names, f"{name}.")
        else:
            yield name, value


def meant(name: str, names: Collection[str]) -> str:
    """The name that comes nearest, as a question; nothing where none is near."""
    near = get_close_matches(name, names, 1, 0.8)
    return f" Did you mean {near[0]}?" if near else ""


def underscored(arguments: list[str]) -> list[str]:
    """--lead-time=240h as --lead_time=240h; values stay as they are."""
    return [_underscored(argument) for argument in arguments]


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
