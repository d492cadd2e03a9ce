"""The model against its equations: dense, with no lists of edges, no chunks and no halo."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import grid_of
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from shardio.errors import PlanError
from shardio.load.partition import partition
from trainer.graph.graph import Edges, Graph, build_graph
from trainer.graph.sharded_graph import Placement, ShardedGraph, shard_graph
from trainer.model.kernel import find_kernel
from trainer.model.layers import take
from trainer.model.model import EncodeProcessDecode, ModelOptions
from trainer.model.processor import PROCESSORS

INPUTS, OUTPUTS, BATCH = 7, 3, 2
OPTIONS = ModelOptions(channels=12, num_layers=2, num_heads=3, mlp_ratio=2, checkpointing=False)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Rows are few: two threads on a busy machine only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def graph() -> Graph:
    grid = grid_of("irregular")
    cells = partition(grid.latitudes.size, 1, grid.chunk_cells)
    return build_graph(grid.latitudes, grid.longitudes, cells, 0, grid.graph)


def sharded(graph: Graph, num_chunks: int = 1, shard_strategy: str = "edges") -> ShardedGraph:
    prepare = PROCESSORS[shard_strategy].prepare
    placement = Placement(dtype=torch.float64, kernel=find_kernel("auto", "cpu"))
    return shard_graph(graph, placement=placement, num_chunks=num_chunks, prepare=prepare)


def model_of(graph: Graph, options: ModelOptions = OPTIONS) -> EncodeProcessDecode:
    """With biases and scales that are not 0 and 1; the same numbers for all options."""
    torch.manual_seed(0)
    part = sharded(graph, options.num_chunks, options.shard_strategy)
    model = EncodeProcessDecode(options, INPUTS, OUTPUTS, part).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def some_fields(graph: Graph) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, len(graph.cell_coordinates), INPUTS, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ the equations
def places(coordinates: np.ndarray) -> Tensor:
    latitude, longitude = np.radians(coordinates[:, 0]), np.radians(coordinates[:, 1])
    columns = [np.sin(latitude), np.cos(latitude), np.sin(longitude), np.cos(longitude)]
    return torch.from_numpy(np.stack(columns, axis=1))


def normed(rows: Tensor, weights: Weights, name: str) -> Tensor:
    return layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def affine(rows: Tensor, weights: Weights, name: str) -> Tensor:
    return linear(rows, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def block(source: Tensor, destination: Tensor, edges: Edges, weights: Weights, name: str) -> Tensor:
    """Key and value of an edge: those of its source plus a projection of its features. [nodes, channels] each."""
    heads, depth, _ = weights[f"{name}.edge"].shape
    # Where sources and destinations are the same nodes they share a normalisation.
    towards = normed(destination, weights, f"{name}.norm_{'source' if source is destination else 'destination'}")
    query, own = affine(towards, weights, f"{name}.query_self").chunk(2, dim=-1)
    key, value = affine(normed(source, weights, f"{name}.norm_source"), weights, f"{name}.key_value").chunk(2, dim=-1)
    connected = torch.zeros(len(destination), len(source), dtype=torch.bool)
    connected[edges.destination, edges.source] = True
    assert int(connected.sum()) == edges.source.size
    features = torch.zeros(len(destination), len(source), 3, dtype=torch.float64)
    features[edges.destination, edges.source] = torch.from_numpy(edges.features).double()
    parts = []
    for head in range(heads):
        channels = slice(head * depth, (head + 1) * depth)
        carried = features @ weights[f"{name}.edge"][head].T  # [destinations, sources, depth]
        logits = ((key[:, channels] + carried) * query[:, None, channels]).sum(-1) / math.sqrt(depth)
        attention = torch.softmax(logits.masked_fill(~connected, -torch.inf), dim=1)
        parts.append((attention[..., None] * (value[:, channels] + carried)).sum(1))
    attended = torch.cat(parts, dim=-1)
    rows = destination + affine(attended + own, weights, f"{name}.project")
    inner = gelu(affine(normed(rows, weights, f"{name}.norm_mlp"), weights, f"{name}.mlp.0"))
    return rows + affine(inner, weights, f"{name}.mlp.2")


def forecast(fields: Tensor, graph: Graph, weights: Weights, layers: int) -> Tensor:
    """[cells, inputs] -> [cells, outputs]."""
    cells, mesh = places(graph.cell_coordinates), places(graph.hidden_coordinates)
    inputs = torch.cat([fields, cells], dim=-1)
    embedded = affine(inputs, weights, "embed_cells")
    hidden = block(embedded, affine(mesh, weights, "embed_hidden"), graph.encoder, weights, "encoder")
    processed = hidden
    for layer in range(layers):
        processed = block(processed, processed, graph.processor, weights, f"processor.{layer}")
    targets = affine(inputs, weights, "embed_targets")
    decoded = block(hidden + processed, targets, graph.decoder, weights, "decoder")
    return affine(normed(decoded, weights, "output.0"), weights, "output.1")


# ---------------------------------------------------------------------------------------------------------- the tests
VARIANTS = {
    "plain": OPTIONS,
    "in 4 chunks": replace(OPTIONS, num_chunks=4),
    "in more chunks than hidden nodes": replace(OPTIONS, num_chunks=45),
    "checkpointed": replace(OPTIONS, num_chunks=3, checkpointing=True),
    "by heads on one rank": replace(OPTIONS, shard_strategy="heads"),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients_are_those_of_the_equations(graph: Graph, options: ModelOptions) -> None:
    model = model_of(graph, options)
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    fields = some_fields(graph)
    found, tracked = fields.clone().requires_grad_(), fields.clone().requires_grad_()
    outputs = model(found)
    expected = torch.stack([forecast(one, graph, weights, OPTIONS.num_layers) for one in tracked])
    torch.testing.assert_close(outputs, expected, rtol=1e-11, atol=1e-11)
    outputs.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(found.grad, tracked.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        scale = weights[name].grad.abs().max()
        assert scale > 0.0, f"{name} does nothing"
        assert (parameter.grad - weights[name].grad).abs().max() <= 1e-10 * scale, name


def test_more_inputs_than_channels_change_nothing_but_what_is_pulled(graph: Graph) -> None:
    narrow = replace(OPTIONS, channels=6)
    assert narrow.channels < INPUTS < OPTIONS.channels
    model = model_of(graph, narrow)
    weights = dict(model.named_parameters())
    fields = some_fields(graph)
    expected = torch.stack([forecast(one, graph, weights, narrow.num_layers) for one in fields])
    torch.testing.assert_close(model(fields), expected, rtol=1e-11, atol=1e-11)


def test_samples_of_a_batch_do_not_see_one_another(graph: Graph) -> None:
    model, fields = model_of(graph), some_fields(graph)
    both = model(fields)
    alone = torch.cat([model(one[None]) for one in fields])
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)


def test_rows_taken_once_get_their_gradient_and_others_zero() -> None:
    rows, index = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda rows: take(rows, index), rows)
    assert torch.equal(take(rows, index), rows[:, index])
    assert take(rows, None) is rows


def test_sizes_that_cannot_be_are_refused_with_a_remedy() -> None:
    with pytest.raises(
        PlanError, match=r"12 channels cannot be cut into 5 heads\. Use num_heads of: 1, 2, 3, 4, 6, 12"
    ):
        ModelOptions(channels=12, num_heads=5)
    with pytest.raises(PlanError, match="num_chunks is 0"):
        ModelOptions(num_chunks=0)


def test_unknown_ways_to_cut_the_processor_are_refused(graph: Graph) -> None:
    with pytest.raises(PlanError, match="shard_strategy 'nodes' is unknown"):
        ModelOptions(shard_strategy="nodes")
    with pytest.raises(PlanError, match="num_chunks is 0"):
        shard_graph(graph, num_chunks=0)
