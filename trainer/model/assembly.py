"""From a dataset and options to what one rank trains: its part of the graph, the model on it, and the loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shardio import Dataset
from trainer.graph.graph import GraphOptions, build_graph
from trainer.graph.grid import cell_areas
from trainer.graph.sharded_graph import Placement, ShardedGraph, shard_graph
from trainer.model.forecaster import Forecaster, Roles
from trainer.model.kernel import find_kernel
from trainer.model.loss import LossOptions, build_loss, variable_weights
from trainer.model.losses.measured import Loss, Weighing
from trainer.model.model import ModelOptions
from trainer.model.processor import PROCESSORS
from trainer.model.tendencies import relative_tendencies
from trainer.share import Share


def assemble_graph(
    dataset: Dataset, share: Share, graph: GraphOptions, network: ModelOptions, cache: str | None = None
) -> ShardedGraph:
    """This rank's part of the graph, ready to compute on. All ranks of the group call it together."""
    options = replace(graph, processor_layers=network.num_layers)
    gather = partial(share.comm.gather, tag="survey")
    part = build_graph(dataset.latitudes, dataset.longitudes, share.cells, share.rank, options, cache, gather)
    placement = Placement(share.device, torch.get_default_dtype(), find_kernel(network.kernel, share.device))
    return shard_graph(part, share.comm, placement, network.num_chunks, PROCESSORS[network.shard_strategy].prepare)


def assemble_areas(dataset: Dataset, share: Share) -> Tensor:
    """[cells/M] areas in steradians, on the device."""
    areas = cell_areas(dataset.latitudes, dataset.longitudes)[share.owned]
    return torch.from_numpy(areas).to(share.device, torch.get_default_dtype())


def assemble_forecaster(
    dataset: Dataset, share: Share, roles: Roles, input_steps: int, network: ModelOptions, graph: ShardedGraph
) -> Forecaster:
    """The model, with the statistics of the dataset; its weights are drawn from torch's generator."""
    relative = relative_tendencies(dataset, share.owned, share.comm)
    outputs = roles.places(roles.outputs)
    is_prognostic = np.arange(len(outputs)) < len(roles.prognostic)
    tendencies = np.where(is_prognostic, relative[outputs], 1.0)
    return Forecaster(roles, dataset.statistics, tendencies, input_steps, network, graph).to(share.device)


def assemble_loss(dataset: Dataset, forecaster: Forecaster, areas: Tensor, options: LossOptions, share: Share) -> Loss:
    """The loss of what the forecaster forecasts; the dataset says what is on which level."""
    names = forecaster.roles.outputs
    tendencies = dict(zip(names, forecaster.tendencies.tolist(), strict=True))
    weights = variable_weights(names, options, tendencies, dataset.variables_metadata(names))
    return build_loss(options, Weighing(areas, areas.new_tensor(weights), share.comm))
