"""From a source to grid-chunks: a request is checked, planned, executed here or on dask, and published.

A `Request` comes in; a dataset and a `Result` go out.
"""

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardio.rechunk' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"shardio.rechunk.{_HOMES[name]}"), name)
