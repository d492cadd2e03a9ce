"""What the user asks for, checked before the first byte is written, and the plan that follows from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from shardio.errors import OutputError
from shardio.format.codec import named
from shardio.format.layout import ArrayLayout, grid_chunked
from shardio.rechunk.allocator import keep_freed_memory
from shardio.rechunk.plan import Plan, make_plan
from shardio.source.open import open_source
from shardio.source.order import order_of, ordered
from shardio.source.source import Selection, Source
from shardio.write.job import partial_of, sweep_published

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
      order: of the cells, compact or native; None is that of the source.
      opener: where given, makes the source instead of `source`, in any process.
    """

    source: str
    destination: str
    grid_chunks: int
    zarr_format: int | None = None
    codec: str = "lz4"
    selection: Selection = field(default_factory=Selection)
    max_memory: int = 4 * 2**30
    workers: int | None = None
    scheduler: str | None = None
    overwrite: bool = False
    sync: bool = True
    fill_absent: bool = False
    order: str | None = None
    command: str = ""
    opener: Callable[[], Source] | None = field(default=None, compare=False)

    def open_source(self) -> Source:
        """The source, in whatever process this runs."""
        keep_freed_memory()  # from here on: coordinates are read and hashed, and every chunk is encoded into new bytes
        source = self.opener() if self.opener else open_source(self.source, self.selection, self.fill_absent)
        return ordered(source, self.order)


@dataclass(frozen=True)
class Prepared:
    """A checked request: nothing is written yet."""

    request: Request
    source: Source
    fingerprint: str
    layout: ArrayLayout
    plan: Plan

    @property
    def identity(self) -> Json:
        """What must be equal for a run to continue another."""
        r, chosen = self.request, self.request.selection
        return {
            "source": r.source if "://" in r.source else str(Path(r.source).absolute()),
            "source fingerprint": self.fingerprint,
            "grid-chunks": r.grid_chunks,
            "zarr-format": self.layout.zarr_format,
            "codec": r.codec,
            "order": order_of(self.source),
            "start": chosen.start,
            "end": chosen.end,
            "select": list(chosen.select),
            "drop": list(chosen.drop),
            "dates": len(self.source.dates),
            "variables": list(self.source.variables),
        }


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked before the first byte is written, and make the plan."""
    _check_destination(request)
    codec = named(request.codec)
    source = request.open_source()
    shape = (len(source.dates), len(source.variables), source.extent.shape[2], source.extent.shape[3])
    layout = grid_chunked(shape, request.grid_chunks, request.zarr_format or source.zarr_format, codec)
    plan = make_plan(source.extent, layout, request.max_memory, request.workers or 1)
    return Prepared(request, source, source.fingerprint(), layout, plan)


def _check_destination(request: Request) -> None:
    destination = Path(request.destination)
    if "://" in request.destination:
        raise OutputError(f"{request.destination} is remote. Write to a local or shared file system, then copy.")
    if destination.suffix != ".zarr":
        raise OutputError(f"{destination} does not end in .zarr. Name the output {destination}.zarr.")
    if not destination.parent.is_dir():
        raise OutputError(f"the folder {destination.parent} does not exist. Create it first.")
    if not os.access(destination.parent, os.W_OK):
        raise OutputError(f"the folder {destination.parent} is not writable. Choose another destination.")
    if request.source and not request.opener and "://" not in request.source:
        for path in glob(request.source) or [request.source]:
            _check_apart(Path(path), destination)
    if os.path.lexists(destination) and not request.overwrite:
        sweep_published(destination)
        raise OutputError(f"{destination} exists. Use --overwrite to replace it, or choose another destination.")


def _check_apart(source: Path, destination: Path) -> None:
    """OutputError where writing one would touch the other: the same path, also through a link, or one inside."""
    here, there = source.resolve(), destination.resolve()
    if here == there or (source.exists() and destination.exists() and source.samefile(destination)):
        raise OutputError(f"source and destination are the same: {there}. Choose another destination.")
    if here in there.parents:
        raise OutputError(f"{destination} lies inside its source {source}. Choose a destination outside.")
    if {there, partial_of(there)} & {here, *here.parents}:
        raise OutputError(f"the source {source} lies inside the destination {destination}. Choose another destination.")
