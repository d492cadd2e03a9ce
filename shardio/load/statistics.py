"""Statistics of variables, out of the datasets that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardio.dates import format_step, spellings
from shardio.errors import DatasetError, SelectionError
from shardio.source.anemoi import AnemoiSource
from shardio.source.source import STATISTICS


def statistics_of(origins: Sequence[AnemoiSource], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """float64 [variable] by name of statistic; DatasetError where no origin has a variable."""
    return _by_variable(origins, [origin.statistics or {} for origin in origins], names)


def tendencies_of(
    origins: Sequence[AnemoiSource], names: Sequence[str], seconds: int
) -> dict[str, NDArray[np.float64]]:
    """Of the change over so many seconds; SelectionError where an origin has none of exactly that time."""
    needed, lacking = [], set(names)
    for origin in origins:  # not those whose variables an earlier one has
        if lacking & set(origin.variables):
            needed.append(origin)
            lacking -= set(origin.variables)
    return _by_variable(needed, [_tendencies(origin, seconds) for origin in needed], names)


def _by_variable(
    origins: Sequence[AnemoiSource], tables: Sequence[Mapping[str, NDArray[Any]]], names: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Of several datasets in time the first has the statistics, as for the field's other tools."""
    found: dict[str, dict[str, float]] = {name: {} for name in STATISTICS}
    for origin, table in reversed(list(zip(origins, tables, strict=True))):
        for key, values in table.items():
            found[key].update(zip(origin.variables, values.tolist(), strict=True))
    lacking = [name for name in names if name not in found["mean"]]
    if lacking:
        raise DatasetError(
            f"{origins[0].path} has no statistics of {', '.join(lacking)}. Name another dataset with statistics=."
        )
    return {key: np.array([values[name] for name in names]) for key, values in found.items()}


def _tendencies(source: AnemoiSource, seconds: int) -> dict[str, NDArray[Any]]:
    have = sorted(name for name in source.extra_names() if "tendencies" in name)
    for delta in spellings(seconds):
        names = {name: f"statistics_tendencies_{delta}_{name}" for name in STATISTICS}
        if set(names.values()) <= set(have):
            return {name: source.required(stored, len(source.variables)) for name, stored in names.items()}
    wanted = f"statistics_tendencies_{format_step(seconds)}_{STATISTICS[0]}"
    raise SelectionError(f"{source.path} has no {wanted}. It has: {', '.join(have) or 'none'}.")
