"""Values on the command line that click does not know: sizes and lists of names."""

from __future__ import annotations

import re
from typing import Any

import click


class ByteSize(click.ParamType[int]):
    """4GiB, 500MB, 1073741824."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size. Write 4GiB, 500MB or a number of bytes.", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** ["", "K", "M", "G", "T"].index(match[2].upper()))


def join_names(ctx: click.Context, param: click.Parameter, several: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """An option of names given more than once: all of them, in order."""
    return tuple(name for names in several for name in names)


class Names(click.ParamType[tuple[str, ...]]):
    """a,b,c."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if not names:
            self.fail("it names nothing. Write a,b,c, or leave the option out.", param, ctx)
        return names
