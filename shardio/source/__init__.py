"""What gives fields on cells: anemoi datasets, NetCDF, GRIB and CF Zarr, synthetic waves; in any order of cells.

A path and a selection come in; a `Source` goes out, which fills an array with dates and cells.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ gives at run time, for type checkers and editors
    from shardio.source.open import open_source
    from shardio.source.source import Selection, Source

__all__ = ["Selection", "Source", "open_source"]

_HOMES = {"Selection": "source", "Source": "source", "open_source": "open"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardio.source' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"shardio.source.{_HOMES[name]}"), name)
