"""What the user asks for, checked before the first byte is written, and the plan that follows from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from shardio.errors import DatasetError, OutputError
from shardio.format.codec import named
from shardio.format.layout import ArrayLayout, grid_chunked, parse
from shardio.format.metadata import array_metadata, group_attributes
from shardio.format.store import LocalStore
from shardio.rechunk.plan import Plan, make_plan
from shardio.source.open import open_source
from shardio.source.order import order_of, ordered
from shardio.source.source import Selection, Source
from shardio.write.job import list_differences, partial_of, sweep_published
from shardio.write.output import FORMAT_VERSION

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
        source = self.opener() if self.opener else open_source(self.source, self.selection, self.fill_absent)
        return ordered(source, self.order)


@dataclass(frozen=True)
class Prepared:
    """A checked request: nothing is written yet.

    Attributes:
      fingerprint, changed: of the source, before anything of it is read.
      is_complete: the destination is that very dataset already, and nothing is left to do.
    """

    request: Request
    source: Source
    fingerprint: str
    changed: str
    layout: ArrayLayout
    plan: Plan
    is_complete: bool = False

    @property
    def identity(self) -> Json:
        """What must be equal for a run to continue another."""
        r, chosen = self.request, self.request.selection
        return {
            "source": r.source if "://" in r.source else str(Path(r.source).absolute()),
            "source fingerprint": self.fingerprint,
            "source changed": self.changed,
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

    @property
    def about(self) -> Json:
        """What the attribute `shardio` of the dataset says of how it was made."""
        about: Json = {
            "format_version": FORMAT_VERSION,
            "grid_chunks": self.layout.grid[3],
            "chunk_cells": self.layout.chunks[3],
            "codec": str(self.layout.codec),
            "source": self.request.source,
            "source_fingerprint": self.fingerprint,
            "source_changed": self.changed,
            "selection": asdict(self.request.selection),
        }
        return about | ({"missing_chunks_filled": True} if self.request.fill_absent else {})


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked before the first byte is written, and make the plan.

    Raises: PlanError, SelectionError, DatasetError: what is asked for cannot be, or the source cannot be read;
      OutputError where the destination exists and is another dataset, or cannot be written.
    """
    _check_destination(request)
    destination = Path(request.destination)
    exists = os.path.lexists(destination) and not request.overwrite
    if exists:
        sweep_published(destination)
        _read_published(destination)  # what cannot be this dataset is refused before the source is opened
    codec = named(request.codec)
    source = request.open_source()
    try:
        shape = (len(source.dates), len(source.variables), source.extent.shape[2], source.extent.shape[3])
        layout = grid_chunked(shape, request.grid_chunks, request.zarr_format or source.zarr_format, codec)
        plan = make_plan(source.extent, layout, request.max_memory, request.workers or 1)
        found = (source.fingerprint(), source.changed())
        prepared = Prepared(request, source, *found, layout, plan, is_complete=exists)
        if exists:
            _check_same(prepared)
    except BaseException:
        source.close()
        raise
    return prepared


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


def _check_apart(source: Path, destination: Path) -> None:
    """OutputError where writing one would touch the other: the same path, also through a link, or one inside."""
    here, there = source.resolve(), destination.resolve()
    if here == there or (source.exists() and destination.exists() and source.samefile(destination)):
        raise OutputError(f"source and destination are the same: {there}. Choose another destination.")
    if here in there.parents:
        raise OutputError(f"{destination} lies inside its source {source}. Choose a destination outside.")
    if {there, partial_of(there)} & {here, *here.parents}:
        raise OutputError(f"the source {source} lies inside the destination {destination}. Choose another destination.")


def _read_published(destination: Path) -> tuple[ArrayLayout, Json]:
    """Layout of `data` and the attribute `shardio` of a complete dataset; OutputError where it is none."""
    store = LocalStore(destination)
    try:
        layout = parse(array_metadata(store, "data") or {}, f"{destination}/data")
        about = group_attributes(store).get("shardio")
    except (DatasetError, OSError):
        about = None
    if not isinstance(about, dict) or not about.pop("complete", False):
        raise _exists(destination)
    about.pop("arrays", None)
    return layout, about


def _check_same(prepared: Prepared) -> None:
    """OutputError where what is there is not what the request would make."""
    destination = Path(prepared.request.destination)
    layout, about = _read_published(destination)
    before = {**about, "zarr_format": layout.zarr_format}
    now = {**json.loads(json.dumps(prepared.about)), "zarr_format": prepared.layout.zarr_format}
    if before != now or layout != prepared.layout:
        raise _exists(destination, f" It is not what is asked for: {list_differences(before, now) or layout}.")


def _exists(destination: Path, why: str = "") -> OutputError:
    return OutputError(f"{destination} exists. Use --overwrite to replace it, or choose another destination.{why}")
