"""The four kinds of work, as one rank does them: each is an object whose `once()` does it once, all ranks together.

Training and forecasting take the trainer's own parts, without Lightning around them: what is measured is ours.
"""

from __future__ import annotations

import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shardio import Dataset, ShardedDataLoader, Topology, keep_freed_memory, open_dataset
from shardio.load.partition import Partition, partition
from shardio.rechunk import prepare, run
from shardio.rechunk.blocks import execute_here
from shardio.write.output import begin_data
from tools.perf.counters import Counters, stored
from tools.perf.grids import FORCINGS, HOURS, Site
from trainer import predict
from trainer.comm import Comm, Counting
from trainer.fit.gradients import reduce_gradients
from trainer.graph.sharded_graph import Links
from trainer.model.assembly import assemble_areas, assemble_forecaster, assemble_graph, assemble_loss
from trainer.model.forecaster import Forecaster, Roles
from trainer.model.loss import LossOptions
from trainer.predict.forecast import Forecast, Trained, forecast_partition
from trainer.share import Share
from trainer.step import forecast_loss

INPUT_STEPS = 2
STEPS = 3  # of training, in one `once()`
LEADS = 3  # lead times likewise
Split = dict[str, float]


class Work(Protocol):
    """Attributes: of what `once()` does so many: dates, samples, lead times."""

    units: int

    def once(self) -> Split:
        """Do it, and say how many seconds went where."""

    def outcome(self) -> Counters:
        """What is there after it: files, rows."""


class Clock:
    """Seconds between calls, by the name of what was just done."""

    def __init__(self) -> None:
        self.split: Split = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.split[name] = self.split.get(name, 0.0) + now - self._last
        self._last = now


class Clocked(Counting):
    """A communicator that adds up the seconds of its messages; they are part of whatever else was going on."""

    seconds = 0.0

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], tag: str) -> Tensor:
        return self._timed(super().all_to_all, rows, send, receive, tag)

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        return self._timed(super().sum, tensor, tag)

    def _timed(self, send: Callable[..., Tensor], *words: Any) -> Tensor:
        began = time.perf_counter()
        try:
            return send(*words)
        finally:
            self.seconds += time.perf_counter() - began


class Rechunk:
    """One chunk per date into grid-chunks; with a scheduler on its workers."""

    def __init__(self, site: Site, scheduler: str | None = None):
        self._site, self._scheduler = site, scheduler
        self._output = site.folder / f"{site.name}-{'here' if scheduler is None else 'cluster'}.zarr"
        self._tasks = self.units = 0

    def once(self) -> Split:
        clock = Clock()
        shutil.rmtree(self._output, ignore_errors=True)
        clock.lap("empty the folder")
        keep_freed_memory()  # as the command does
        prepared = prepare(self._site.request(self._output, self._scheduler))
        clock.lap("plan")
        self.units, self._tasks = run(prepared).dates, len(prepared.plan.tasks)
        clock.lap("copy")
        del clock.split["empty the folder"]
        return clock.split

    def outcome(self) -> Counters:
        # What is imported or collected meanwhile only adds to it.
        peak = {"peak_bytes": min(self._peak_bytes() for _ in range(3))} if self._scheduler is None else {}
        return stored(self._output) | {"tasks": self._tasks} | peak

    def _peak_bytes(self) -> int:
        """Of arrays and of chunks while fields are copied, one after the other: else threads decide how many."""
        prepared, folder = prepare(self._site.request(self._output)), self._output.with_suffix(".peak")
        begin_data(folder, prepared.layout, {})
        plan = replace(prepared.plan, threads=1, in_flight=1)
        tracemalloc.start()
        try:
            for _ in execute_here(
                prepared.source, prepared.layout, plan, folder / "data", list(plan.tasks), sync=False
            ):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


class Rank:
    """Where one rank stands in a world that is one model group."""

    def __init__(self, comm: Comm, site: Site):
        self.comm, self.site = comm, site
        self.topology = Topology(comm.ranks, comm.rank, comm.ranks)

    def loader(self, dataset: Dataset, **more: Any) -> ShardedDataLoader:
        return ShardedDataLoader(
            dataset, self.topology, shuffle=False, group=self.comm.group, threads=max(1, 2 // self.comm.ranks), **more
        )


class Load:
    """Every date, as one tensor of the rank's own cells."""

    def __init__(self, rank: Rank):
        dataset = open_dataset(str(rank.site.dataset))
        self._loader = rank.loader(dataset, input_steps=1, target_steps=0)
        self.units = len(dataset)

    def once(self) -> Split:
        clock = Clock()
        self._loader.set_epoch(-1)  # wherever the last one ended, begin at the start
        self._loader.set_epoch(0)
        for batch in self._loader:
            clock.lap("wait")
            _ = batch.fields
            clock.lap("put together")
        return clock.split

    def outcome(self) -> Counters:
        return {}


class Model:
    """What training and forecasting share: the first dates of the dataset, and a model on the cells of `cut`."""

    def __init__(self, rank: Rank, cut: Callable[[Dataset, int], Partition]):
        grid, self.rank = rank.site.grid, rank
        last = np.datetime64("2020-01-01", "s") + (INPUT_STEPS + STEPS - 1) * np.timedelta64(HOURS, "h")
        self.dataset = open_dataset(str(rank.site.dataset), end=str(last))
        self.share = Share(cut(self.dataset, rank.comm.ranks), rank.comm)
        self.graph = assemble_graph(self.dataset, self.share, grid.graph, grid.network)
        self.roles = Roles(self.dataset.variables, FORCINGS)
        torch.manual_seed(0)
        parts = (self.dataset, self.share, self.roles, INPUT_STEPS, grid.network, self.graph)
        self.forecaster: Forecaster = assemble_forecaster(*parts)

    @property
    def rows(self) -> Counters:
        """That this rank borrows for one use of each part."""
        parts = (self.graph.encoder, self.graph.processor, self.graph.decoder)
        return {"rows": sum(sum(links.halo.receive_counts) for links in parts if isinstance(links, Links))}


class Train:
    """A few steps, from the loader to the optimizer."""

    units = STEPS

    def __init__(self, rank: Rank):
        self._rank = rank
        self._model = Model(rank, lambda dataset, ranks: partition(dataset.shape[3], ranks, dataset.chunk_cells))
        areas = assemble_areas(self._model.dataset, self._model.share)
        model = self._model
        self._loss = assemble_loss(model.dataset, model.forecaster, areas, LossOptions(), model.share)
        self._optimizer = torch.optim.AdamW(self._model.forecaster.parameters())

    def once(self) -> Split:
        forecaster, clock = self._model.forecaster, Clock()
        # A loader keeps so few dates in memory; another one reads them again.
        loader = self._rank.loader(self._model.dataset, input_steps=INPUT_STEPS, target_steps=1)
        for batch in loader:
            fields = batch.fields
            clock.lap("load")
            loss = forecast_loss(forecaster, self._loss, fields, 1).value
            clock.lap("forward")
            self._optimizer.zero_grad()
            loss.backward()
            clock.lap("backward")
            reduce_gradients(forecaster.parameters(), 1, self._rank.comm)
            clock.lap("reduce")
            self._optimizer.step()
            clock.lap("optimizer")
        loader.close()
        return clock.split

    def outcome(self) -> Counters:
        return self._model.rows


class Predict:
    """A few lead times, each rank writing its own grid-chunks."""

    units = LEADS

    def __init__(self, rank: Rank):
        self._rank, self._model = rank, Model(rank, forecast_partition)
        trained = Trained(self._model.roles, INPUT_STEPS, 3600 * HOURS, {}, {}, "perf")
        self._forecast = Forecast(trained, self._model.forecaster, self._model.dataset, self._model.share)
        self._folder = rank.site.folder / f"{rank.site.name}-forecast-{rank.comm.ranks}"
        self._folder.mkdir(exist_ok=True)

    def once(self) -> Split:
        model, began = self._model, time.perf_counter()
        initial, lead_time = model.dataset.dates[INPUT_STEPS - 1], f"{LEADS * HOURS}h"
        task = predict.plan(self._forecast.trained, model.dataset, model.share.cells, initial, self._folder, lead_time)
        written = predict.write(self._forecast, task, overwrite=True, sync=False)
        seconds = time.perf_counter() - began
        return {"compute": seconds - written.waited, "wait for the disk": written.waited}

    def outcome(self) -> Counters:
        if self._rank.comm.rank:  # all ranks wrote to one folder
            return self._model.rows | {"files": 0, "bytes_written": 0}
        return self._model.rows | stored(self._folder)


def works(comm: Comm, site: Site) -> Iterator[tuple[str, Callable[[], Work]]]:
    """All that one rank does on a grid: names, and what makes it ready."""
    here = Rank(comm, site)
    if comm.ranks == 1:
        yield "rechunk", lambda: Rechunk(site)
    yield "load", lambda: Load(here)
    yield "train", lambda: Train(here)
    yield "forecast", lambda: Predict(here)
