"""One training step, as this package and as anemoi-models take it; each contender runs in a process of its own.

Called by bench_trainer.py, on one rank or under torchrun, with the interpreter of the contender's environment. The
last line of rank 0 is JSON. Both sides get one graph, one width, one number of layers and heads, the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

PARTS = {"enc": ("data", "hidden"), "proc": ("hidden", "hidden"), "dec": ("hidden", "data")}


@dataclass
class Wire:
    """What this rank sends, in bytes, and how long its collectives take; ring algorithms where there is a choice."""

    world: int
    sent: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def watch(self) -> None:
        others = self.world - 1
        rules: dict[str, Callable[..., float]] = {
            "all_gather": lambda outputs, mine, *a, **k: size(mine) * others,
            "all_gather_into_tensor": lambda output, mine, *a, **k: size(mine) * others,
            "all_reduce": lambda tensor, *a, **k: size(tensor) * 2 * others / self.world,
            "all_to_all": lambda outputs, inputs, *a, **k: sum(map(size, inputs)) - size(inputs[dist.get_rank()]),
            "all_to_all_single": self._uneven,
            "broadcast": lambda tensor, *a, **k: size(tensor) * others / self.world,
            "isend": lambda tensor, *a, **k: size(tensor),
        }
        for name, rule in rules.items():
            setattr(dist, name, self._counted(name, getattr(dist, name), rule))

    def _uneven(self, received: Any, sent: Any, receive: Any = None, send: Any = None, **rest: Any) -> float:
        if send is None:
            return size(sent) * (self.world - 1) / self.world
        rows = size(sent) / max(len(sent), 1)
        return rows * (sum(send) - send[dist.get_rank()])

    def _counted(self, name: str, call: Callable[..., Any], rule: Callable[..., float]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += int(rule(*args, **kwargs))
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return counted


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --------------------------------------------------------------------------------------------------------- this package
def make_graph(path: str, grid: str, hidden: str) -> None:
    """Our one-rank graph as plain arrays, for both sides."""
    from shardio.load.partition import partition
    from shardio.source.synthetic import octahedral
    from trainer.graph.graph import GraphOptions, build_graph

    latitudes, longitudes, _ = octahedral(grid)
    cells = partition(latitudes.size, 1, latitudes.size)
    processor = "multiscale" if hidden.startswith("ico") else "knn"
    graph = build_graph(latitudes, longitudes, cells, 0, GraphOptions(hidden, processor=processor))
    arrays: dict[str, Any] = {"data": graph.cell_coordinates, "hidden": graph.hidden_coordinates}
    for name, edges in (("enc", graph.encoder), ("proc", graph.processor), ("dec", graph.decoder)):
        arrays[f"{name}_index"] = np.stack([edges.source, edges.destination])
        arrays[f"{name}_features"] = edges.features
    np.savez(path, **arrays)


def ours(options: argparse.Namespace, rank: int, world: int) -> tuple[Any, Callable[[Any, Any], Any], Any]:
    from shardio.load.partition import partition
    from shardio.rechunk.allocator import keep_freed_memory
    from shardio.source.synthetic import octahedral
    from trainer.comm import join_world
    from trainer.graph.graph import GraphOptions, build_graph
    from trainer.graph.sharded_graph import Placement, shard_graph
    from trainer.model.forecaster import Forecaster, Roles
    from trainer.model.kernel import find_kernel
    from trainer.model.loss import LossOptions, build_loss
    from trainer.model.losses.measured import Weighing
    from trainer.model.model import ModelOptions

    keep_freed_memory()
    latitudes, longitudes, _ = octahedral(options.grid)
    cells = partition(latitudes.size, world, latitudes.size)
    processor = "multiscale" if options.hidden.startswith("ico") else "knn"
    settings = GraphOptions(options.hidden, processor=processor, processor_layers=options.layers)
    graph = build_graph(latitudes, longitudes, cells, rank, settings)
    comm = join_world()
    placement = Placement(kernel=find_kernel("auto", "cpu"))
    sharded = shard_graph(graph, comm, placement, options.chunks)
    sizes = ModelOptions(
        options.channels, options.layers, options.heads, num_chunks=options.chunks, checkpointing=options.checkpointing
    )
    one = np.ones(options.variables)
    roles = Roles(tuple(f"v{i}" for i in range(options.variables)))
    torch.manual_seed(0)
    model = Forecaster(roles, {"mean": 0.0 * one, "stdev": one}, one, options.input_steps, sizes, sharded)
    loss = build_loss(LossOptions(), Weighing(torch.ones(sharded.owned_cells), torch.ones(len(one)), comm))

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            prediction = model(model.first_state(model.normalise(x)))
        return loss(prediction, y[:, 0]).value

    return model, forward, cells.cells(rank)


def reduce_ours(model: Any, world: int) -> None:
    from trainer.comm import join_world
    from trainer.fit.gradients import reduce_gradients

    reduce_gradients(model.parameters(), 1, join_world())


# -------------------------------------------------------------------------------------------------------- anemoi-models
def theirs(options: argparse.Namespace, rank: int, world: int) -> tuple[Any, Callable[[Any, Any], Any], Any]:
    from anemoi.models.distributed.balanced_partition import get_balanced_partition_sizes, get_partition_range
    from anemoi.models.distributed.graph import reduce_tensor

    model = anemoi_model(options)
    cells = len(np.load(options.graph)["data"])
    sizes = get_balanced_partition_sizes(cells, world)
    first, last = get_partition_range(sizes, rank)
    group = dist.new_group(list(range(world))) if world > 1 else None
    shards = {"data": sizes} if world > 1 else None
    net: Any = model
    if world > 1:
        for name, parameter in model.named_parameters():  # as anemoi-training does: by name
            if "trainable" not in name and "no_gradscaling" not in name:
                parameter.register_hook(lambda gradient: gradient * float(world))
        net = torch.nn.parallel.DistributedDataParallel(model, static_graph=True)
    count = cells * options.variables

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            out = net({"data": x}, model_comm_group=group, grid_shard_sizes=shards)["data"]
        loss = ((out - y) ** 2).sum() / count
        return reduce_tensor(loss, group) if group is not None else loss

    return net, forward, slice(first, last)


def anemoi_model(options: argparse.Namespace) -> Any:
    """AnemoiModelEncProcDec with its published default settings; only sizes and checkpointing are ours."""
    import functools

    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.models.models import AnemoiModelEncProcDec
    from omegaconf import OmegaConf
    from torch_geometric.data import HeteroData

    with np.load(options.graph) as file:
        arrays = {name: file[name] for name in file.files}
    graph = HeteroData()
    for nodes in ("data", "hidden"):
        graph[nodes].x = torch.tensor(np.radians(arrays[nodes]), dtype=torch.float32)
        graph[nodes].num_nodes = len(graph[nodes].x)
    for part, (source, destination) in PARTS.items():
        edges = graph[(source, "to", destination)]
        edges.edge_index = torch.from_numpy(arrays[f"{part}_index"])
        edges.edge_length, edges.edge_dirs = torch.from_numpy(arrays[f"{part}_features"]).split([1, 2], dim=1)
    kernels = {"LayerNorm": "torch.nn.LayerNorm", "Linear": "torch.nn.Linear", "Activation": "torch.nn.GELU"}
    norm = {"_target_": "anemoi.models.layers.normalization.AutocastLayerNorm", "bias": False}
    common = {
        "trainable_size": options.trainable,
        "sub_graph_edge_attributes": ["edge_length", "edge_dirs"],
        "num_channels": options.channels,
        "mlp_hidden_ratio": 4,
        "num_heads": options.heads,
        "qk_norm": False,
        "cpu_offload": False,
        "gradient_checkpointing": options.checkpointing,
        "layer_kernels": {name: {"_target_": target} for name, target in kernels.items()}
        | {"QueryNorm": norm, "KeyNorm": norm},
        "shard_strategy": "edges",
        "graph_attention_backend": "pyg",
        "edge_pre_mlp": False,
    }
    layers = "anemoi.models.layers"
    mapper = {**common, "num_chunks": options.chunks}
    config = {
        "model": {
            "model": {"hidden_nodes_name": "hidden", "latent_skip": True},
            "node_trainable_parameters": dict.fromkeys(("data", "hidden"), options.trainable),
            "latent_aggregator": {"_target_": f"{layers}.aggregator.SumAggregator"},
            "processor": {
                "_target_": f"{layers}.processor.GraphTransformerProcessor",
                "num_layers": options.layers,
                "num_chunks": 1,
                **common,
            },
            "encoders": {
                "all": {
                    "source_datasets": ["data"],
                    "dataset_fusing_strategy": "not_supported",
                    "mapper": {"_target_": f"{layers}.mapper.GraphTransformerForwardMapper", **mapper},
                }
            },
            "decoders": {
                "all": {
                    "target_datasets": ["data"],
                    "target_node_features": ["encoded_data"],
                    "mapper": {
                        "_target_": f"{layers}.mapper.GraphTransformerBackwardMapper",
                        "initialise_data_extractor_zero": False,
                        **mapper,
                    },
                }
            },
            "residual": {"_target_": f"{layers}.residual.SkipConnection", "step": -1},
            "bounding": [],
        },
    }
    names = {f"v{i}": i for i in range(options.variables)}
    indices = IndexCollection(OmegaConf.create({"forcing": [], "diagnostic": [], "target": []}), names)
    torch.manual_seed(0)
    model = AnemoiModelEncProcDec(
        model_config=OmegaConf.create(config),
        data_indices={"data": indices},
        statistics={"data": None},
        n_step_input=options.input_steps,
        n_step_output=1,
        graph_data=graph,
    )
    if not options.checkpointing:  # the setting is not passed on everywhere
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
            if type(module).__name__ == "StaticGraphProvider":
                module.get_edges = functools.partial(module.get_edges, act_checkpoint=False)
    return model


# ---------------------------------------------------------------------------------------------------------- measurement
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the steps after the warm-up."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(options.threads)
    wire = Wire(world)
    if world > 1:
        dist.init_process_group("gloo")
    is_ours = options.contender == "shardio"
    model, forward, owned = (ours if is_ours else theirs)(options, rank, world)
    if world > 1:
        wire.watch()
    cells = len(np.load(options.graph)["data"])
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, options.input_steps, 1, cells, options.variables, generator=draw)[..., owned, :].contiguous()
    y = torch.randn(1, 1, 1, cells, options.variables, generator=draw)[..., owned, :].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows: list[dict[str, float]] = []
    losses = []
    for step in range(options.warmup + options.steps):
        wire.sent.clear()
        wire.seconds = 0.0
        if world > 1:
            dist.barrier()
        start = time.perf_counter()
        loss = forward(x, y)
        middle = time.perf_counter()
        loss.backward()
        if is_ours:
            reduce_ours(model, world)
        end = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        done = time.perf_counter()
        losses.append(float(loss.detach()))
        times = {"step": done - start, "forward": middle - start, "backward": end - middle, "exchange": wire.seconds}
        if step >= options.warmup:
            rows.append(times)
    if world > 1 and not is_ours:  # DDP sums gradients by C++, which no name in Python shows
        wire.sent["gradients"] += sum(map(size, model.parameters())) * 2 * (world - 1) // world
    return {
        **{name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "losses": losses,
        "sent": dict(wire.sent),
        "sent_mb": sum(wire.sent.values()) / 1e6,
        "peak_mb": peak_mb(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflop": flops(forward, x, y) if is_ours and world == 1 else None,
        "kernel": kernel() if is_ours else None,
    }


def kernel() -> str:
    """Which attention ran."""
    from trainer.model.kernels import cpp as attention_kernel

    return str(getattr(attention_kernel, "describe", lambda: "?")())


def flops(forward: Callable[[Any, Any], Any], x: Any, y: Any) -> float:
    """Of all matrix products of forward and backward, in 1e9; attention is not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        forward(x, y).backward()
    return counter.get_total_flops() / 1e9


def gemm(options: argparse.Namespace) -> dict[str, Any]:
    """What this machine reaches in the product that the model needs most: cells x channels x 4 channels."""
    torch.set_num_threads(options.threads)
    kind = torch.bfloat16 if options.bf16 else torch.float32
    left = torch.randn(40320, options.channels, dtype=kind)
    right = torch.randn(options.channels, 4 * options.channels, dtype=kind)
    out = left @ right
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - start)
    return {"gflops": 2 * left.numel() * right.shape[1] / statistics.median(seconds) / 1e9}


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """What a step waits for its batch, when both share the cores: seconds per step."""
    from shardio import ShardedDataLoader, Topology, open_dataset

    torch.set_num_threads(options.threads)
    dataset = open_dataset(options.dataset)
    options.variables = len(dataset.variables)
    model, forward, _ = ours(options, 0, 1)
    model.mean.copy_(torch.from_numpy(dataset.statistics["mean"]))
    model.stdev.copy_(torch.from_numpy(dataset.statistics["stdev"]).clamp(min=1e-12))
    loader = ShardedDataLoader(dataset, Topology(), input_steps=options.input_steps, threads=options.threads)
    waits, steps, batches = [], [], iter(loader)
    for step in range(options.warmup + options.steps):
        start = time.perf_counter()
        fields = next(batches).fields
        ready = time.perf_counter()
        forward(fields[:, : options.input_steps], model.normalise(fields[:, options.input_steps :])).backward()
        if step >= options.warmup:
            waits.append(ready - start)
            steps.append(time.perf_counter() - start)
    return {"wait": statistics.median(waits), "step": statistics.median(steps)}


def peak_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=["graph", "shardio", "anemoi", "gemm", "loading"])
    parser.add_argument("graph")
    for name, default in (("channels", 128), ("layers", 4), ("heads", 8), ("variables", 20), ("input-steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("chunks", 1), ("threads", 1), ("steps", 5), ("warmup", 2), ("trainable", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--grid", default="o96")
    parser.add_argument("--hidden", default="ico4")
    parser.add_argument("--dataset", help="for loading")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    if options.contender == "graph":
        make_graph(options.graph, options.grid, options.hidden)
        return 0
    found = {"gemm": gemm, "loading": loading}.get(options.contender, measure)(options)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
