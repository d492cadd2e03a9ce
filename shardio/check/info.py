"""What a dataset is, for a person and for a script."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardio.dates import frequency
from shardio.format.layout import ArrayLayout
from shardio.load.partition import partition
from shardio.source.open import open_source
from shardio.source.order import border_cells, order_of
from shardio.source.source import STATISTICS, Source, units_of
from shardio.units import size
from shardio.write.job import refuse_unfinished

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = dict[str, Any]
WIDEST = 2**14  # characters of a line


def describe(path: str, ranks: int | None = None) -> Json:
    """Layout, dates, variables, statistics, stored bytes; with `ranks`, what each of so many ranks would read."""
    if "://" not in path:
        refuse_unfinished(Path(path))
    with closing(open_source(path)) as source:
        return _describe(path, source, ranks)


def _describe(path: str, source: Source, ranks: int | None) -> Json:
    about: Json = {
        "path": path,
        "shape": dict(zip(("dates", "variables", "ensemble", "cells"), _shape(source), strict=True)),
        "start": str(source.dates[0]),
        "end": str(source.dates[-1]),
        "frequency": frequency(source.dates),
        "missing_dates": [str(date) for date in source.missing],
        "resolution": source.attributes.get("resolution"),
        "variables": list(source.variables),
        "units": {name: units for name in source.variables if (units := units_of(source.attributes, name))},
        "statistics": {
            name: {key: _finite(values[i]) for key, values in (source.statistics or {}).items()}
            for i, name in enumerate(source.variables)
            if source.statistics
        },
    }
    if source.layout is not None:
        about |= {"order": order_of(source), **_stored(source, source.layout)}
        if ranks is not None:
            about["ranks"] = _read_by(source, source.layout, ranks)
    return about


def _finite(value: Any) -> float | None:
    """NaN is no JSON."""
    return float(value) if np.isfinite(value) else None


def _shape(source: Source) -> tuple[int, ...]:
    return (len(source.dates), len(source.variables), *source.extent.shape[2:])


def _stored(source: Source, layout: ArrayLayout) -> Json:
    files = source.stored_files()
    decoded = int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize
    stored = sum(files.values())
    shardio: Json = source.attributes.get("shardio", {})
    return {
        "zarr_format": layout.zarr_format,
        "dtype": np.dtype(layout.dtype).name,
        "chunks": list(layout.chunks),
        "zarr_shards": list(layout.zarr_shards) if layout.zarr_shards else None,
        "grid_chunks": layout.grid[3],
        "chunk_cells": layout.chunks[3],
        "codec": str(layout.codec) if layout.codec else "other",
        "files": len(files),
        "files_per_date": len(files) / layout.shape[0],
        "bytes": decoded,
        "stored_bytes": stored,
        "ratio": decoded / stored if stored else None,
        "made_by_shardio": bool(shardio),
        "complete": bool(shardio.get("complete", True)),
        "source": shardio.get("source"),
    }


def _read_by(source: Source, layout: ArrayLayout, ranks: int) -> Json:
    cut = partition(layout.shape[3], ranks, layout.chunks[3])
    bytes_per_cell = layout.shape[1] * layout.shape[2] * np.dtype(layout.dtype).itemsize
    return {
        "ranks": ranks,
        "aligned": cut.aligned,
        "imbalance": cut.imbalance,
        "read_amplification": cut.read_amplification,
        "border_cells": border_cells(source, cut.bounds),
        "each": [
            {
                "rank": rank,
                "cells": [cut.cells(rank).start, cut.cells(rank).stop],
                "grid_chunks": [cut.chunks(rank).start, cut.chunks(rank).stop],
                "bytes_per_date": cut.cells_read(rank) * bytes_per_cell,
            }
            for rank in range(ranks)
        ],
    }


def screen() -> Console:
    """Stdout for tables: as wide as the terminal; in a file or a pipe no line is broken, for who searches in it."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDEST, markup=False)


def print_description(about: Json) -> None:
    """The description as tables on stdout."""
    from rich.table import Table

    console = screen()
    shape = about["shape"]
    rows = [
        ("shape", "  ".join(f"{n} {name}" for name, n in shape.items())),
        (
            "dates",
            f"{about['start']} to {about['end']}" + (f" every {about['frequency']}" if about["frequency"] else ""),
        ),
        (
            "missing dates",
            ", ".join(about["missing_dates"][:8]) + (" ..." if len(about["missing_dates"]) > 8 else "") or "none",
        ),
        ("resolution", _resolution(about["resolution"])),
    ]
    if "chunks" in about:
        per_date = about["files_per_date"]
        rows += [
            ("format", f"Zarr v{about['zarr_format']}, {about['dtype']}, {about['codec']}"),
            ("grid-chunks", f"{about['grid_chunks']} of {about['chunk_cells']} cells; chunks {about['chunks']}"),
            ("order", about["order"]),
            ("files", f"{about['files']}, {per_date:g} per date"),
            (
                "bytes",
                f"{size(about['bytes'])} in {size(about['stored_bytes'])}"
                + (f", ratio {about['ratio']:.2f}" if about["ratio"] else ""),
            ),
            ("complete", "yes" if about["complete"] else "no"),
        ]
    if not about["statistics"]:
        rows.append(("statistics", "none; rechunk computes them"))
    console.print(about["path"])
    overview = Table(show_header=False, box=None)
    overview.add_column(style="bold")
    for name, value in rows:
        overview.add_row(name, value)
    console.print(overview)
    console.print(_variables(about))
    if "ranks" in about:
        _print_ranks(about["ranks"], about["order"], console)


def _resolution(stored: Any) -> str:
    """With its unit, where it is a number: the convention is degrees."""
    try:
        return f"{float(stored):g} degrees"
    except (TypeError, ValueError):
        return "unknown" if stored is None else str(stored)


def _variables(about: Json) -> Table:
    """The names, and what is known of each."""
    from rich.table import Table

    units, statistics = about["units"], about["statistics"]
    table = Table("variable", *["units"] * bool(units), *STATISTICS * bool(statistics), box=None)
    for name in about["variables"]:
        values = [statistics[name][key] for key in STATISTICS] if statistics else []
        shown = ["-" if value is None else f"{value:.6g}" for value in values]
        table.add_row(name, *[units.get(name, "")] * bool(units), *shown)
    return table


def _print_ranks(read: Json, order: str, console: Any) -> None:
    from rich.table import Table

    cut = "along the chunk grid" if read["aligned"] else "balanced across chunks"
    console.print(
        f"{read['ranks']} ranks, cut {cut}: imbalance {read['imbalance']:.1%}, "
        f"read amplification {read['read_amplification']:.3f}"
    )
    border = read["border_cells"]
    other = "compact" if order == "native" else "native"
    # What is less by less than the estimate may be wrong by is not worth a rewrite.
    remedy = f" (rechunk --order {other})" if border[other] < 0.8 * border[order] else ""
    console.print(
        f"cells of other ranks beside those of a rank: about {border[order]} for the rank with most; in {other} order "
        f"about {border[other]}{remedy}"
    )
    table = Table("rank", "cells", "grid-chunks", "bytes per date", box=None)
    for each in read["each"]:
        first, stop = each["grid_chunks"]
        cells = f"{each['cells'][0]}-{each['cells'][1] - 1}"
        table.add_row(str(each["rank"]), cells, f"{first}-{stop - 1}", size(each["bytes_per_date"]))
    console.print(table)
