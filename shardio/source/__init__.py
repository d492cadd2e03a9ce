"""What gives fields on cells: anemoi datasets, NetCDF, GRIB and CF Zarr, synthetic waves; in any order of cells.

A path and a selection come in; a `Source` goes out, which fills an array with dates and cells.
"""

from typing import TYPE_CHECKING

from shardio.lazy import fetch_from

if TYPE_CHECKING:  # what __getattr__ gives at run time, for type checkers and editors
    from shardio.source.open import open_source
    from shardio.source.source import Selection, Source

__all__ = ["Selection", "Source", "open_source"]

_HOMES = {"Selection": "source", "Source": "source", "open_source": "open"}

__getattr__ = fetch_from(__name__, _HOMES)
