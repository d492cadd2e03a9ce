"""Dates as users write them: 2020, 2020-03, 2020-03-01, 2020-03-01T06:00; and the frequency of a series."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.errors import DatasetError, SelectionError

_WRITTEN = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d)?)?)?)?)?Z?")
Dates = NDArray[np.datetime64]
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}  # seconds


def parse_start(text: str) -> np.datetime64:
    """The first second of a year, month, day or instant."""
    return np.datetime64(_parse(text), "s")


def parse_end(text: str) -> np.datetime64:
    """The last second of a year, month or day; the instant itself where a time is given."""
    value: Any = _parse(text)
    unit: Any = np.datetime_data(value.dtype)[0]
    if unit in ("Y", "M", "D"):
        last: np.datetime64 = (value + np.timedelta64(1, unit)).astype("datetime64[s]") - np.timedelta64(1, "s")
        return last
    return np.datetime64(value, "s")


def _parse(text: str) -> Any:
    try:
        if not _WRITTEN.fullmatch(str(text).strip()):
            raise ValueError("not a calendar date")
        value: Any = np.datetime64(str(text).strip().removesuffix("Z"))
    except ValueError as error:
        raise SelectionError(
            f"{text!r} is not a date ({error}). Write 2020, 2020-03, 2020-03-01 or 2020-03-01T06:00."
        ) from error
    return value


def between(dates: Dates, start: str | None, end: str | None, where: str) -> range:
    """Indices of the dates from `start` to `end`, both included; SelectionError where there are none."""
    first = 0 if start is None else int(np.searchsorted(dates, parse_start(start), "left"))
    stop = len(dates) if end is None else int(np.searchsorted(dates, parse_end(end), "right"))
    if first >= stop:
        raise SelectionError(
            f"no date of {where} lies between {start or 'its start'} and {end or 'its end'}: "
            f"it holds {dates[0]} to {dates[-1]}. Choose --start and --end within."
        )
    return range(first, stop)


def check_increasing(dates: Dates, where: str) -> None:
    """DatasetError unless every date is later than the one before."""
    wrong = np.flatnonzero(np.diff(dates) <= np.timedelta64(0, "s"))
    if wrong.size:
        at = int(wrong[0])
        raise DatasetError(
            f"the dates of {where} do not increase: {dates[at]} is followed by {dates[at + 1]}. Sort the source "
            "and drop repeated dates first."
        )


def frequency(dates: Dates) -> str | None:
    """The commonest step between dates as anemoi writes it ("6h", "1d", "30m"); None for a single date."""
    seconds = frequency_seconds(dates)
    return None if seconds is None else format_step(seconds)


def frequency_seconds(dates: Dates) -> int | None:
    """The commonest step between dates in seconds; None for a single date."""
    if len(dates) < 2:
        return None
    steps, counts = np.unique(np.diff(dates).astype("timedelta64[s]").astype(np.int64), return_counts=True)
    return int(steps[np.argmax(counts)])


def parse_step(text: str) -> int:
    """`6h` -> 21600; also d, m, s.

    Raises: SelectionError where it is no step.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([dhms])\s*", str(text))
    if not match or int(match[1]) == 0:
        raise SelectionError(f"{text!r} is not a step in time. Write 6h, 1d, 30m or 45s.")
    return int(match[1]) * UNITS[match[2]]


def format_step(seconds: int) -> str:
    """86400 -> "1d", 21600 -> "6h", 1800 -> "30m"."""
    return spellings(seconds)[0]


def spellings(seconds: int) -> list[str]:
    """86400 -> ["1d", "24h", "1440m", "86400s"]: versions of anemoi-datasets differ in which of them they write."""
    return [f"{seconds // size}{unit}" for unit, size in UNITS.items() if seconds % size == 0]
