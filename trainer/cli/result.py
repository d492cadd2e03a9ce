"""The one JSON object that a command prints with --json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_object(shown: bool) -> Iterator[dict[str, Any]]:
    """A dictionary to fill with what was done; printed at the end, also where an error ends it.

    Args: shown: by this rank, and asked for.
    """
    done: dict[str, Any] = {}
    try:
        yield done
    finally:
        if shown:
            print(json.dumps(defined(done), allow_nan=False), flush=True)


def defined(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: defined(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
