"""Rows cut by nodes become rows cut by heads and back, exactly; gradients go the same way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shardio.errors import TopologyError
from shardio.load.partition import balanced, partition
from shardio.source.synthetic import octahedral
from trainer.comm import Alone
from trainer.graph.graph import GraphOptions, build_graph
from trainer.graph.heads import HeadExchange, gather_edges, to_heads, to_nodes

BATCH, DEPTH = 2, 3
CUTS = [((0, 4, 7), 2), ((0, 1, 2, 7), 4), ((0, 3, 4, 5, 7), 5)]  # bounds of the nodes, heads


def values(nodes: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, nodes, heads, DEPTH, generator=generator, dtype=torch.float64)


def there_and_back(rank: int, comm: Any, bounds: tuple[int, ...], heads: int) -> dict[str, Any]:
    plan = HeadExchange(comm, bounds)
    rows = values(bounds[-1], heads, 0)[:, bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
    cut = to_heads(rows, plan)
    mine = slice(*plan.heads(heads)[rank : rank + 2])
    (back,) = torch.autograd.grad(cut, rows, values(bounds[-1], heads, 1)[:, :, mine])
    given = cut.detach().requires_grad_()
    whole = to_nodes(given, plan, heads)
    (forth,) = torch.autograd.grad(whole, given, values(bounds[-1], heads, 2)[:, bounds[rank] : bounds[rank + 1]])
    found = {"cut": cut, "rows": rows, "back": back, "whole": whole, "forth": forth}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def all_edges(rank: int, comm: Any, options: GraphOptions) -> dict[str, Any]:
    latitudes, longitudes, _ = octahedral("o4")
    cells = partition(latitudes.size, comm.ranks, 1)
    graph = build_graph(latitudes, longitudes, cells, rank, options)
    edges = graph.processor if comm.ranks == 1 else gather_edges(graph, comm, "cpu")
    return {"source": edges.source, "destination": edges.destination, "features": edges.features}


@pytest.mark.parametrize(("bounds", "heads"), CUTS)
def test_a_rank_gets_its_heads_of_all_nodes_and_gives_all_heads_of_its_nodes_back(
    run: Callable[..., list[Any]], bounds: tuple[int, ...], heads: int
) -> None:
    ranks = len(bounds) - 1
    width = balanced(heads, ranks)
    full = [values(bounds[-1], heads, seed).numpy() for seed in range(3)]
    for rank, found in enumerate(run(there_and_back, [{"bounds": bounds, "heads": heads}] * ranks)):
        nodes, mine = slice(*bounds[rank : rank + 2]), slice(*width[rank : rank + 2])
        assert np.array_equal(found["cut"], full[0][:, :, mine])
        assert np.array_equal(found["back"], full[1][:, nodes])
        assert np.array_equal(found["whole"], found["rows"])
        assert np.array_equal(found["forth"], full[2][:, :, mine])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_edges_of_all_ranks_together_are_those_of_one(run: Callable[..., list[Any]], ranks: int) -> None:
    more = {"options": GraphOptions("ico1", processor="multiscale")}
    (alone,) = run(all_edges, [more])
    for found in run(all_edges, [more] * ranks):
        for name, array in alone.items():
            assert np.array_equal(found[name], array), name


def test_fewer_heads_than_ranks_are_refused_with_a_remedy() -> None:
    plan = HeadExchange(Alone(), (0, 1, 2, 3))
    assert plan.heads(4) == (0, 2, 3, 4)
    with pytest.raises(TopologyError, match=r"2 attention heads cannot be cut over 3 ranks. Use shard_strategy edges"):
        plan.heads(2)
