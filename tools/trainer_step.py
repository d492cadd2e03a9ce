"""A training step on any grid, without a dataset, and ranks to take it on: for trainer_traffic and trainer_memory."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardio.load.partition import partition
from shardio.source.synthetic import octahedral
from trainer.comm import Comm, join_world
from trainer.fit.gradients import broadcast_parameters, reduce_gradients
from trainer.graph.graph import GraphOptions, build_graph
from trainer.graph.grid import cell_areas
from trainer.graph.sharded_graph import Placement, shard_graph
from trainer.model.forecaster import Forecaster, Roles
from trainer.model.kernel import find_kernel
from trainer.model.loss import LossOptions, build_loss
from trainer.model.losses.measured import Weighing
from trainer.model.model import ModelOptions
from trainer.model.processor import PROCESSORS
from trainer.step import forecast_loss

PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Sizes:
    """What is trained; the defaults are those of the project's benchmarks."""

    grid: str = "o96"
    hidden: str = "ico4"
    channels: int = 128
    layers: int = 4
    heads: int = 8
    variables: int = 20
    forcings: int = 2
    lacking: int = 0  # without a value in some cells, the last ones
    input_steps: int = 2
    batch: int = 1
    rollout: int = 1
    num_chunks: int = 1
    checkpointing: bool = True
    shard_strategy: str = "edges"
    loss: str = "mse"
    kernel: str = "auto"
    grid_chunks: int = 16
    dtype: str = "float32"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for field in fields(Sizes):
            kind = {"int": int, "str": str, "bool": _switch}[str(field.type)]
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)

    @staticmethod
    def of(arguments: argparse.Namespace) -> Sizes:
        return Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})


def _switch(word: str) -> bool:
    return {"true": True, "false": False}[word.lower()]


class Step:
    """What one rank has, and what it does in a step."""

    def __init__(self, comm: Comm, sizes: Sizes) -> None:
        dtype = getattr(torch, sizes.dtype)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self._build(comm, sizes)
        finally:
            torch.set_default_dtype(before)

    def _build(self, comm: Comm, sizes: Sizes) -> None:
        latitudes, longitudes, _ = octahedral(sizes.grid)
        self.cells = partition(latitudes.size, comm.ranks, -(-latitudes.size // sizes.grid_chunks))
        self.sizes, self.comm, owned = sizes, comm, self.cells.cells(comm.rank)
        kind = "multiscale" if sizes.hidden.startswith("ico") else "knn"
        edges = GraphOptions(sizes.hidden, processor=kind, processor_layers=sizes.layers)
        self.graph = build_graph(latitudes, longitudes, self.cells, comm.rank, edges)
        dtype, prepare = torch.get_default_dtype(), PROCESSORS[sizes.shard_strategy].prepare
        placement = Placement("cpu", dtype, find_kernel(sizes.kernel, "cpu"))
        sharded = shard_graph(self.graph, comm, placement, sizes.num_chunks, prepare)
        names = tuple(f"v{number}" for number in range(sizes.variables))
        statistics = {"mean": np.zeros(len(names)), "stdev": np.ones(len(names))}
        roles = Roles(names, names[: sizes.forcings], allow_nan=names[len(names) - sizes.lacking :])
        options = ModelOptions(
            *(sizes.channels, sizes.layers, sizes.heads, 4, sizes.num_chunks),
            *(sizes.checkpointing, sizes.shard_strategy, sizes.kernel),
        )
        torch.manual_seed(0)
        changes = np.ones(len(roles.outputs))
        self.forecaster = Forecaster(roles, statistics, changes, sizes.input_steps, options, sharded)
        broadcast_parameters((parameter.data for parameter in self.forecaster.parameters()), comm)
        areas = torch.from_numpy(cell_areas(latitudes, longitudes)[owned]).to(dtype)
        self.loss = build_loss(LossOptions(sizes.loss), Weighing(areas, areas.new_ones(len(roles.outputs)), comm))
        self.optimizer = torch.optim.AdamW(self.forecaster.parameters())
        self.shape = (sizes.batch, sizes.input_steps + sizes.rollout, 1, owned.stop - owned.start, len(names))

    def fields(self) -> Tensor:
        """[batch, time, ensemble, cells/M, variables], of the rank's own cells, at random."""
        return torch.randn(self.shape, dtype=getattr(torch, self.sizes.dtype))

    def run(self, batch: Tensor) -> Tensor:
        """Forward, loss, backward, gradients of the whole, and the optimizer."""
        self.optimizer.zero_grad()
        loss = forecast_loss(self.forecaster, self.loss, batch, self.sizes.rollout).value
        loss.backward()
        reduce_gradients(self.forecaster.parameters(), 1, self.comm)
        self.optimizer.step()
        return loss.detach()


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """function(comm, *arguments) in so many processes; the first error of any ends all."""
    context = multiprocessing.get_context("spawn")
    replies: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        work = (replies, ranks, f"file://{folder}/meeting", function, arguments)
        processes = [context.Process(target=_be_rank, args=(rank, *work)) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            found = dict(_reply(replies) for _ in processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [found[rank] for rank in range(ranks)]


def _reply(replies: Any) -> tuple[int, Any]:
    rank, good, result = replies.get(timeout=PATIENCE.total_seconds())
    if not good:
        raise SystemExit(f"rank {rank}: {result}")
    return rank, result


def _be_rank(
    rank: int, replies: Any, ranks: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        if ranks > 1:
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=PATIENCE)
        replies.put((rank, True, function(join_world(), *arguments)))
    except Exception:
        replies.put((rank, False, traceback.format_exc()))
