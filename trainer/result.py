"""The one JSON object that a command prints with --json."""

from __future__ import annotations

import json
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
            print(json.dumps(done), flush=True)
