"""Which variables are on pressure levels: what the dataset says of their level types, else what their names allow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

STANDARD = {  # hPa
    *(1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 125, 150, 175, 200, 225, 250, 300, 350, 400, 450, 500),
    *(550, 600, 650, 700, 750, 775, 800, 825, 850, 875, 900, 925, 950, 975, 1000),
}
LOWEST = 10  # hPa: of soils and lakes there are layers 1, 2 and 3


def pressure_levels(variables: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, float]:
    """variable: level in hPa, of those on pressure levels.

    Where `mars.levtype` is known it decides: pl, and no other. Where it is not, a name such as t_850 is on a pressure
    level if all levels of its parameter, t, are standard ones, and one of them is 10 hPa or more: t_137 and t_500 are
    model levels, swvl_1 and swvl_2 layers of the soil.

    Args: variables: names; metadata: what the dataset says of each, `Dataset.variables_metadata`.
    """
    found, guessed = {}, dict[str, dict[str, int]]()
    for name in variables:
        mars, numbered = metadata.get(name, {}).get("mars", {}), re.fullmatch(r"(.+)_(\d+)", name)
        level = mars.get("levelist", numbered[2] if numbered else None)
        if "levtype" in mars:
            if mars["levtype"] == "pl" and level is not None:
                found[name] = float(level)
        elif numbered:
            guessed.setdefault(numbered[1], {})[name] = int(numbered[2])
    for levels in guessed.values():
        if STANDARD.issuperset(levels.values()) and max(levels.values()) >= LOWEST:
            found |= levels
    return found
