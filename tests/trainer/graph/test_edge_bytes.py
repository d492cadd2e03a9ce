"""An edge weighs at most 20 bytes with its features: every tensor of the graph that a rank computes on is weighed."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shardio.load.partition import partition
from shardio.source.synthetic import octahedral
from trainer.comm import Alone
from trainer.graph.counts import CutGraph
from trainer.graph.graph import Graph, GraphOptions, build_graph
from trainer.graph.pretend import Pretence, pretend_graph
from trainer.graph.sharded_graph import Placement, ShardedGraph, shard_graph
from trainer.model.kernel import KERNELS
from trainer.model.processor import PROCESSORS

MOST = 20  # bytes
GRAPHS = {
    "knn": GraphOptions("o24"),
    "mesh": GraphOptions("ico4", processor="mesh"),
    "multiscale": GraphOptions("ico4", processor="multiscale"),
    "wide": GraphOptions("o16", cutoff=1.2),
}


@cache
def graph_of(name: str) -> Graph:
    latitudes, longitudes, _ = octahedral("o96")
    return build_graph(latitudes, longitudes, partition(latitudes.size, 1, latitudes.size), 0, GRAPHS[name])


def tensors(thing: Any) -> Iterator[Tensor]:
    """All that it is made of, however deep."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple):
        for part in thing:
            yield from tensors(part)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from tensors(getattr(thing, field.name))


def bytes_of_edges(graph: ShardedGraph) -> int:
    """Storage once, but for the places of the nodes."""
    parts = [graph.encoder, graph.processor, graph.decoder]
    storages = [tensor.untyped_storage() for tensor in tensors(tuple(parts))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize("name", GRAPHS)
def test_an_edge_weighs_at_most_20_bytes(name: str, kernel: str, num_chunks: int) -> None:
    graph = graph_of(name)
    edges = sum(getattr(graph, part).source.size for part in ("encoder", "processor", "decoder"))
    sharded = shard_graph(graph, placement=Placement(kernel=KERNELS[kernel]), num_chunks=num_chunks)
    assert 12 * edges < bytes_of_edges(sharded) <= MOST * edges  # 12 are the features


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_plan_holds_the_same_bytes(name: str, kernel: str, num_chunks: int) -> None:
    graph = graph_of(name)
    counts = CutGraph(graph, graph.cells, GRAPHS[name].processor_layers).rank(0)
    pretence = Pretence(Alone(), torch.float32, KERNELS[kernel])
    planned = pretend_graph(counts, pretence, num_chunks, PROCESSORS["edges"].pretend)
    sharded = shard_graph(graph, placement=Placement(kernel=KERNELS[kernel]), num_chunks=num_chunks)
    ours, theirs = ([(t.shape, t.dtype) for t in tensors(one)] for one in (sharded, planned))
    assert ours == theirs


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_what_is_held_twice_would_be_seen(kernel: str) -> None:
    graph = graph_of("knn")
    sharded = shard_graph(graph, placement=Placement(kernel=KERNELS[kernel]))
    edges = sum(getattr(graph, part).source.size for part in ("encoder", "processor", "decoder"))
    again = sharded.decoder.chunks[0].lists.ends.long().clone()
    assert bytes_of_edges(sharded) + again.nbytes > MOST * edges


def test_ends_in_16_bits_are_those_of_the_edges() -> None:
    graph = graph_of("knn")
    lists = shard_graph(graph, placement=Placement(kernel=KERNELS["torch"])).encoder.chunks[0].lists
    (blocks,) = [[block for table in lists.incoming for block in lists.blocks_in(table, 1000)]]
    ends = torch.cat([block.ends.flatten() for block in blocks])
    edges = torch.cat([block.edges.flatten() for block in blocks])
    assert lists.ends.dtype == torch.int16
    assert int(ends.max()) > 2**15
    assert torch.equal(ends, torch.from_numpy(graph.encoder.source)[edges])
