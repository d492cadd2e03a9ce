"""Edge attention on o96 and ico4: trainer.model.attention against gather and scatter as in PyTorch Geometric.

python -m tools.bench_attention                  both kernels, float32 and bfloat16: half a minute
python -m tools.bench_attention --threads 1 --json

All that lies between a block's linears on nodes is timed, forward and backward, edge weights included. The contenders
take turns; times are the best of all turns, peaks are of live tensors, without inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardio.load.partition import partition
from shardio.source.synthetic import octahedral
from trainer.graph.edge_lists import EdgeLists
from trainer.graph.graph import Edges, GraphOptions, build_graph
from trainer.model.attention import attend
from trainer.model.kernel import find_kernel

ALLOCATOR = {  # or glibc faults the pages of large tensors in at each use
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="o96")
    parser.add_argument("--hidden", default="ico4")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = list(measure(options))
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'edges':<22}{'type':<10}{'contender':<12}{'forward ms':>11}{'both ms':>9}{'peak MB':>9}{'error':>10}")
    for row in rows:
        print(
            f"{row['part']:<10} {row['edges']:<11}{row['type']:<10}{row['contender']:<12}{row['forward']:>11.2f}"
            f"{row['both']:>9.2f}{row['peak']:>9.1f}{row['error']:>10.1e}"
        )
    return 0


def measure(options: argparse.Namespace) -> Any:
    latitudes, longitudes, _ = octahedral(options.grid)
    multiscale = GraphOptions(options.hidden, processor="multiscale" if options.hidden.startswith("ico") else "knn")
    graph = build_graph(latitudes, longitudes, partition(latitudes.size, 1, 1), 0, multiscale)
    cells, hidden = len(graph.cell_coordinates), len(graph.hidden_coordinates)
    for part, edges, sources in (
        ("encoder", graph.encoder, cells),
        ("processor", graph.processor, hidden),
        ("decoder", graph.decoder, hidden),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = inputs(edges, sources, dtype, options)
            contenders = candidates(edges, sources)
            exact = run(candidates(edges, sources)["torch"], [tensor.double() for tensor in tensors])
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            errors = {}
            for turn in range(options.repeats + 1):
                for name, contender in contenders.items():
                    *spent, results = clock(contender, tensors)
                    if turn:
                        times[name].append((spent[0], spent[1]))
                    pairs = zip(results, exact, strict=True)
                    errors[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            for name, contender in contenders.items():
                forward, both = (1e3 * min(column) for column in zip(*times[name], strict=True))
                yield {
                    "part": part,
                    "edges": edges.source.size,
                    "type": str(dtype).removeprefix("torch."),
                    "contender": name,
                    "forward": forward,
                    "both": both,
                    "peak": peak(contender, tensors) / 1e6,
                    "error": errors[name],
                }


def inputs(edges: Edges, sources: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Tensor]:
    """Query, key, value, edge features and the edge weight [heads, depth, features]."""
    torch.manual_seed(0)
    per_head = options.heads, options.channels // options.heads
    query = torch.randn(options.batch, edges.destinations, *per_head)
    key, value = torch.randn(2, options.batch, sources, *per_head)
    weight = torch.randn(*per_head, edges.features.shape[1]) / 3
    return [tensor.to(dtype) for tensor in (query, key, value, torch.from_numpy(edges.features), weight)]


Contender = Callable[[list[Tensor]], Tensor]


def candidates(edges: Edges, sources: int) -> dict[str, Contender]:
    source, destination = torch.from_numpy(edges.source), torch.from_numpy(edges.destination)

    def scatter(tensors: list[Tensor]) -> Tensor:
        """anemoi-models' GraphTransformerConv: one message per edge."""
        query, key, value, features, weight = tensors
        carried = torch.einsum("ef,hdf->ehd", features, weight)
        ends = destination.view(1, -1, 1).expand(query.shape[0], -1, query.shape[2])
        logit = (query.index_select(1, destination) * (key.index_select(1, source) + carried)).sum(-1)
        logit = logit / query.shape[3] ** 0.5
        nothing = logit.new_zeros(query.shape[:3])
        top = nothing.scatter_reduce(1, ends, logit.detach(), "amax", include_self=False)
        p = (logit - top.index_select(1, destination)).exp()
        total = nothing.scatter_add(1, ends, p) + 1e-16
        p = p / total.index_select(1, destination)
        message = (value.index_select(1, source) + carried) * p.unsqueeze(-1)
        return torch.zeros_like(query).scatter_add(1, ends.unsqueeze(-1).expand_as(message), message)

    def gather(kernel: str) -> Contender:
        lists = EdgeLists.build(source, destination, sources, edges.destinations, kernel=find_kernel(kernel, "cpu"))

        def contender(tensors: list[Tensor]) -> Tensor:
            query, key, value, features, weight = tensors
            dense = torch.block_diag(*weight)  # one large product instead of one per head
            tilt = (query.flatten(2) @ dense).unflatten(2, (len(weight), -1))
            out, carried = attend(query, key, value, tilt, features, lists)
            return out + (carried.flatten(2) @ dense.T).view_as(out)

        return contender

    return {"scatter": scatter} | {kernel: gather(kernel) for kernel in ("torch", "cpp")}


def clock(contender: Contender, tensors: list[Tensor]) -> tuple[float, float, list[Tensor]]:
    """Seconds of forward, of forward and backward, and the output with its gradients."""
    query, key, value, features, weight = tensors
    wanted = [tensor.detach().requires_grad_() for tensor in (query, key, value, weight)]
    start = time.perf_counter()
    out = contender([*wanted[:3], features, wanted[3]])
    forward = time.perf_counter() - start
    gradients = torch.autograd.grad(out, wanted, torch.ones_like(out))
    return forward, time.perf_counter() - start, [out.detach(), *gradients]


def run(contender: Contender, tensors: list[Tensor]) -> list[Tensor]:
    return clock(contender, tensors)[2]


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.live -= nbytes


def peak(contender: Contender, tensors: list[Tensor]) -> int:
    known = Peak()
    for tensor in tensors:
        known.seen.add(tensor.untyped_storage()._cdata)
    with known:
        run(contender, tensors)
    return known.most


if __name__ == "__main__":
    if any(name not in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, [*sys.orig_argv], os.environ | ALLOCATOR)
    sys.exit(main())
