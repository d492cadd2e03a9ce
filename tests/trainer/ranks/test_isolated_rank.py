"""A rank that borrows nothing still takes part in every message: else the others would wait for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shardio.load.partition import Partition
from shardio.source.synthetic import octahedral
from trainer.graph.graph import Edges, Graph, GraphOptions, build_graph
from trainer.graph.sharded_graph import Placement, shard_graph
from trainer.model.model import EncodeProcessDecode, ModelOptions

THREE = (0, 70, 140, 208)  # cells of o4 on three ranks


def isolated(graph: Graph, cut: int) -> Graph:
    """Without the processor's edges between hidden nodes below `cut` and the others."""
    edges = graph.processor
    kept = (edges.source < cut) == (edges.destination + graph.hidden.start < cut)
    alone = Edges(edges.source[kept], edges.destination[kept], edges.features[kept], edges.destinations)
    return replace(graph, processor=alone)


def step(rank: int, comm: Any, bounds: tuple[int, ...], checkpointing: bool) -> dict[str, Any]:
    latitudes, longitudes, _ = octahedral("o4")
    cells, options = Partition(bounds, 1, aligned=True), GraphOptions("ico1", processor="mesh")
    cut = build_graph(latitudes, longitudes, Partition(THREE, 1, aligned=True), 0, options).hidden_bounds[1]
    graph = isolated(build_graph(latitudes, longitudes, cells, rank, options), cut)
    sharded = shard_graph(graph, comm, Placement(dtype=torch.float64))
    torch.manual_seed(0)
    sizes = ModelOptions(8, num_layers=2, num_heads=2, checkpointing=checkpointing)
    model = EncodeProcessDecode(sizes, 3, 2, sharded).double()
    fields = torch.randn(1, 208, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(fields[:, cells.cells(rank)]).square().sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    comm.sum(gradients, "gradients")
    return {"gradients": gradients.numpy(), "borrowed": sharded.processor.halo.rows - sharded.processor.halo.owned}


def test_a_rank_that_borrows_no_hidden_node_joins_backward(run: Callable[..., list[Any]]) -> None:
    for checkpointing in (False, True):
        (alone,) = run(step, [{"bounds": (0, 208), "checkpointing": checkpointing}])
        parts = run(step, [{"bounds": THREE, "checkpointing": checkpointing}] * 3)
        assert min(part["borrowed"] for part in parts) == 0 < max(part["borrowed"] for part in parts)
        for part in parts:
            np.testing.assert_allclose(part["gradients"], alone["gradients"], rtol=1e-10, atol=1e-12)
