"""What can be known to fail before any rank is started, fails here, in one process, with the remedy."""

from __future__ import annotations

from lightning import Trainer

from shardio import partition
from shardio.errors import SelectionError
from trainer.fit.data import ForecastDataModule
from trainer.fit.module import ForecastModule
from trainer.fit.strategy import DDPGroupStrategy
from trainer.graph.graph import build_graph
from trainer.graph.grid import mesh_nodes
from trainer.model.forecaster import Roles
from trainer.model.loss import variable_weights
from trainer.model.precision import Precision
from trainer.model.processor import PROCESSORS


def check(trainer: Trainer, module: ForecastModule, data: ForecastDataModule) -> None:
    """ShardioError if topology, variables, hidden mesh or heads do not fit one another or the dataset."""
    assert isinstance(trainer.strategy, DDPGroupStrategy)
    topology, dataset = trainer.strategy.topology, data.dataset
    partition(dataset.shape[3], topology.model_size, dataset.chunk_cells)
    roles = Roles(dataset.variables, module.forcings, module.diagnostics, module.allow_nan)
    variable_weights(roles.outputs, module.loss_options, dict.fromkeys(roles.outputs, 1.0))
    if dataset.step is None:
        raise SelectionError(f"the dataset has one date, {dataset.dates[0]}. Training needs two or more.")
    Precision(trainer.precision)
    data.check_windows(topology, module)
    network = module.network_options
    PROCESSORS[network.shard_strategy].check(network.num_heads, topology.model_size)
    _check_mesh(module, data, topology.model_size)


def _check_mesh(module: ForecastModule, data: ForecastDataModule, ranks: int) -> None:
    """A mesh with fewer nodes than cells fits; of others only those near the cells are kept: build it and see."""
    name, dataset = module.graph_options.hidden, data.dataset
    family = name.rstrip("0123456789")
    size = name[len(family) :]
    known = family in ("o", "ico") and size.isdigit()
    if not known or not ranks < mesh_nodes(family, int(size)) <= dataset.shape[3]:
        cells = partition(dataset.shape[3], ranks, dataset.chunk_cells)
        build_graph(dataset.latitudes, dataset.longitudes, cells, 0, module.graph_options, module.graph_cache)
