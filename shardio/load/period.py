"""Which dates of a dataset are kept."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
from numpy.typing import NDArray

from shardio.dates import Dates, between, format_step, frequency_seconds, parse_step
from shardio.errors import SelectionError

When = str | int | date | np.datetime64 | None  # datetime is a date


def keep_between(dates: Dates, start: When, end: When, where: str) -> range:
    """Indices of the dates from `start` to `end`, both included; SelectionError, naming `where`, if there is none."""
    return between(dates, _as_text(start), _as_text(end), where)


def _as_text(when: When) -> str | None:
    if isinstance(when, datetime) and when.tzinfo is not None:
        when = when.astimezone(UTC).replace(tzinfo=None)
    if isinstance(when, np.datetime64) and np.datetime_data(when.dtype)[0] in ("ms", "us", "ns"):
        when = when.astype("datetime64[s]")
    return None if when is None else str(when)


def keep_every(step: str | None, dates: Dates, kept: range) -> NDArray[np.int64]:
    """Indices of those kept that lie a multiple of `step` after the first; SelectionError if it is no multiple."""
    indices = np.arange(kept.start, kept.stop)
    base = frequency_seconds(dates)
    if step is None or base is None:
        return indices
    seconds = parse_step(step)
    if seconds % base:
        raise SelectionError(
            f"frequency {step} is not a multiple of {format_step(base)}, the step of the dataset. "
            f"Use {format_step(base)}, {format_step(2 * base)}, {format_step(4 * base)}, ..."
        )
    since = (dates[indices] - dates[indices[0]]).astype(np.int64)
    kept_indices: NDArray[np.int64] = indices[since % seconds == 0]
    return kept_indices
