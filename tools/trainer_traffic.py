"""Bytes that each rank sends in a training step, by part of the model, counted where they leave.

python -m tools.trainer_traffic --grid o96 --hidden ico4 --ranks 2,4          real gloo ranks, under a minute
python -m tools.trainer_traffic --ranks 2 --rollout 2 --json

counted      bytes that collectives send to other ranks; an all-reduce counts as the ring that it is at best
predicted    from Halo.traffic and the number of weights, before anything is sent
lower bound  different sources, owned by others, of the edges that cross a cut; what a rank has to receive in forward
             and to send in backward, and so, over all ranks, what has to be sent in either
all-gather   what it would be if every rank gave its rows to all others, and their gradients back
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tools.trainer_step import Sizes, Step, on_ranks
from trainer.graph.halo import Halo
from trainer.graph.sharded_graph import ShardedGraph
from trainer.model.loss import AreaLoss

PARTS = ("encoder", "processor", "decoder")
# Every way of torch.distributed to move numbers: whatever is not counted below must not be used.
UNCOUNTED = (
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_gather_coalesced"),
    *("all_reduce_coalesced", "all_to_all", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "scatter", "scatter_object_list"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "send_object_list", "recv_object_list"),
)
Sent = Counter[str]


class UncountedError(RuntimeError):
    """A collective that the count does not know."""


@contextmanager
def count_sent(graph: ShardedGraph) -> Iterator[Sent]:
    """Bytes sent to other ranks within, by part and direction, such as `decoder backward`."""
    sent: Sent = Counter()
    kept = {
        name: getattr(dist, name) for name in ("all_to_all_single", "all_reduce", *UNCOUNTED) if hasattr(dist, name)
    }

    def all_to_all_single(
        received: Tensor, given: Tensor, receive: list[int] | None = None, send: list[int] | None = None, **more: Any
    ) -> Any:
        group = more.get("group")
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        counts = [len(given) // ranks] * ranks if send is None else send
        row = given.element_size() * given[0].numel() if len(given) else 0
        sent[_whence(graph)] += (sum(counts) - counts[rank]) * row
        return kept["all_to_all_single"](received, given, receive, send, **more)

    def all_reduce(tensor: Tensor, *words: Any, **more: Any) -> Any:
        sent[_whence(graph)] += ring(tensor.numel() * tensor.element_size(), dist.get_world_size(more.get("group")))
        return kept["all_reduce"](tensor, *words, **more)

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*words: Any, **more: Any) -> Any:
            raise UncountedError(f"{name} is used in a step, and its bytes are not counted.")

        return refused

    for name in kept:
        setattr(
            dist, name, {"all_to_all_single": all_to_all_single, "all_reduce": all_reduce}.get(name) or refuse(name)
        )
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def ring(nbytes: int, ranks: int) -> int:
    """What a rank sends in an all-reduce that wastes nothing."""
    return 2 * (ranks - 1) * nbytes // ranks


def _whence(graph: ShardedGraph) -> str:
    """Which part of the step sends: read from the frames that led here."""
    frame = sys._getframe(2)
    while frame is not None:
        name, known = frame.f_code.co_name, frame.f_locals
        if name in ("forward", "backward"):
            plan = known.get("halo", known.get("plan")) or getattr(known.get("ctx"), "plan", None)
            for part in PARTS:
                if plan is not None and plan is getattr(graph, part).halo:
                    return f"{part} {name}"
            if plan is not None and plan is graph.heads:
                return f"processor {name}"
        if name == "reduce_gradients":
            return "gradients"
        if isinstance(known.get("self"), AreaLoss):
            return "loss"
        frame = frame.f_back
    return "elsewhere"


def predict_sent(step: Step) -> dict[str, Sent]:
    """Counted, lower bound, and all-gather, as they follow from the halos alone; shard_strategy edges."""
    sizes, graph = step.sizes, step.forecaster.network.graph
    itemsize = getattr(torch, sizes.dtype).itemsize
    inputs = sizes.input_steps * sizes.variables
    raw = inputs <= sizes.channels
    uses = {"encoder": sizes.rollout, "processor": sizes.rollout * sizes.layers, "decoder": sizes.rollout}
    widths = {"encoder": inputs if raw else sizes.channels, "processor": sizes.channels, "decoder": sizes.channels}
    results: dict[str, Sent] = {name: Counter() for name in ("predicted", "lower bound", "all-gather")}
    for part in PARTS:
        halo: Halo = getattr(graph, part).halo
        times = uses[part]
        # Raw inputs of the first step want no gradient: they are data.
        back = times - 1 if part == "encoder" and raw else times
        row = sizes.batch * widths[part] * itemsize
        traffic, nodes, borrowed = halo.traffic(row), _bounds(step, part)[-1], _borrowed(step, part)
        everyone = row * (nodes - halo.owned)
        for direction, count, halo_bytes, all_bytes in (
            ("forward", times, traffic.sent, traffic.all_gather),
            ("backward", back, traffic.received, everyone),
        ):
            key = f"{part} {direction}"
            results["predicted"][key] = count * halo_bytes
            results["all-gather"][key] = count * all_bytes
            results["lower bound"][key] = count * borrowed * row
    ranks = halo.ranks
    weights = sum(parameter.numel() for parameter in step.forecaster.parameters())
    reduced = ring(weights * itemsize, ranks)
    totals = sizes.rollout * ring(2 * sizes.batch * (sizes.variables - sizes.forcings) * itemsize, ranks)
    for result in results.values():
        result["gradients"], result["loss"] = reduced, totals
    return results


def _bounds(step: Step, part: str) -> tuple[int, ...]:
    return step.graph.cells.bounds if part == "encoder" else step.graph.hidden_bounds


def _borrowed(step: Step, part: str) -> int:
    """Different sources, owned by others, of this rank's edges: from the graph, not from the halo."""
    first, last = _bounds(step, part)[step.graph.rank : step.graph.rank + 2]
    return sum(not first <= source < last for source in set(getattr(step.graph, part).source.tolist()))


def measure(rank: int, group: dist.ProcessGroup | None, sizes: Sizes) -> dict[str, dict[str, int]]:
    """What one rank sends in one step, counted and predicted."""
    step = Step(rank, group, sizes)
    batch = step.fields()
    with count_sent(step.forecaster.network.graph) as sent:
        step.run(batch)
    predicted = predict_sent(step) if sizes.shard_strategy == "edges" else {}
    return {"counted": dict(sent), **{name: dict(result) for name, result in predicted.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Sizes.add_arguments(parser)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sizes = Sizes.of(arguments)
    found = {ranks: on_ranks(measure, ranks, sizes) for ranks in map(int, arguments.ranks.split(","))}
    if arguments.json:
        print(json.dumps({"sizes": vars(sizes), "ranks": found}, indent=1))
        return 0
    for ranks, results in found.items():
        print(_table(ranks, results))
    return 0


def _table(ranks: int, results: list[dict[str, dict[str, int]]]) -> str:
    kinds = list(results[0])
    rows = [f"{ranks} ranks, MB sent per rank and step: mean of the ranks (counted also: the most)"]
    rows.append(f"{'':<22}{'counted':>10}{'most':>10}" + "".join(f"{kind:>13}" for kind in kinds[1:]))
    parts = [f"{part} {way}" for part in PARTS for way in ("forward", "backward")] + ["gradients", "loss", "elsewhere"]
    for part in [*(part for part in parts if any(part in result["counted"] for result in results)), "all"]:
        cells = []
        for kind in kinds:
            numbers = [sum(result[kind].values()) if part == "all" else result[kind].get(part, 0) for result in results]
            cells.append(f"{sum(numbers) / ranks / 1e6:>{10 if kind == 'counted' else 13}.3f}")
            if kind == "counted":
                cells.append(f"{max(numbers) / 1e6:>10.3f}")
        rows.append(f"{part:<22}" + "".join(cells))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
