"""From a source to grid-chunks: a request is checked, planned, executed here or on dask, and published.

A `Request` comes in; a dataset and a `Result` go out.
"""

from typing import TYPE_CHECKING

from shardio.lazy import fetch_from

if TYPE_CHECKING:  # what __getattr__ gives at run time, for type checkers and editors
    from shardio.rechunk.execute import Progress, Result, run
    from shardio.rechunk.request import Prepared, Request, prepare

__all__ = ["Prepared", "Progress", "Request", "Result", "prepare", "run"]

_HOMES = {
    "Prepared": "request",
    "Progress": "execute",
    "Request": "request",
    "Result": "execute",
    "prepare": "request",
    "run": "execute",
}

__getattr__ = fetch_from(__name__, _HOMES)
