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

import torch

from tools.perf.counters import Messages, UncountedError, ring
from tools.trainer_step import Sizes, Step, on_ranks
from trainer.comm import Comm, Counting
from trainer.graph.halo import Halo

PARTS = ("encoder", "processor", "decoder")
Sent = Counter[str]


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


def measure(comm: Comm, sizes: Sizes) -> dict[str, dict[str, int]]:
    """What one rank sends in one step, counted and predicted; UncountedError if others left past comm."""
    counting = Counting(comm)
    step = Step(counting, sizes)
    batch, before, known = step.fields(), counting.sent.copy(), counting.messages.total()
    with Messages(comm.rank, comm.ranks) as every:
        step.run(batch)
    sent = counting.sent - before
    if every.number != counting.messages.total() - known or every.sent != sent.total():
        raise UncountedError(f"{every.number} messages left, {every.sent} bytes, of which {sent.total()} are known.")
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
    parts = [f"{part} {way}" for part in PARTS for way in ("forward", "backward")] + ["gradients", "loss"]
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
