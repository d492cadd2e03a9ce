"""What `trainer plan` predicts, beside what real ranks hold and send: peak bytes of live tensors, and bytes sent.

python -m tools.check_plan                       grids o32 to o160, M = 1, 2, 4: minutes
python -m tools.check_plan --json

Each rank takes two real steps; in the second one LiveBytes counts all storages, those too that Python knew of before,
and every message is counted where it leaves (Counting). The prediction knows none of it: it is made in this
process, from a graph cut by arithmetic, on tensors without numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from shardio.load.partition import partition
from shardio.source.synthetic import octahedral
from tools.trainer_memory import living_tensors
from tools.trainer_step import Sizes, Step, on_ranks
from trainer.comm import Comm, Counting
from trainer.fit.gradients import reduce_gradients
from trainer.graph.counts import CutGraph
from trainer.graph.graph import GraphOptions, build_graph
from trainer.model.forecaster import Roles
from trainer.model.loss import LossOptions
from trainer.model.model import ModelOptions
from trainer.model.precision import Precision
from trainer.plan.footprint import Footprint, Job, footprint
from trainer.plan.live_bytes import LiveBytes
from trainer.step import forecast_loss

MARGIN = 0.1
LARGE = Sizes("o96", "ico4", channels=64, layers=3, variables=12, checkpointing=False)
CASES: list[tuple[int, Sizes, str]] = [
    *((ranks, replace(LARGE, checkpointing=again), "32-true") for ranks in (1, 2, 4) for again in (False, True)),
    *((ranks, replace(LARGE, checkpointing=True, num_chunks=4), "32-true") for ranks in (1, 2, 4)),
    (2, replace(LARGE, batch=2, rollout=2), "32-true"),
    (4, replace(LARGE, rollout=3, checkpointing=True), "32-true"),
    (2, replace(LARGE, shard_strategy="heads"), "32-true"),
    (1, LARGE, "bf16-mixed"),
    (4, replace(LARGE, checkpointing=True, num_chunks=8), "bf16-mixed"),
    (1, replace(LARGE, grid="o160", hidden="o48"), "32-true"),
    (4, replace(LARGE, grid="o160", hidden="o48", checkpointing=True, num_chunks=4), "32-true"),
]


def measure(comm: Comm, sizes: Sizes, precision: str, averages: bool = False) -> dict[str, Any]:
    """Of one real rank, in its second step, in Lightning's order."""
    strangers = {id(tensor) for tensor in living_tensors()}
    counting = Counting(comm)
    step = Step(counting, sizes)
    average = AveragedModel(step.forecaster, avg_fn=get_ema_avg_fn(0.999)) if averages else None
    batch, dates, members, cells, variables = step.shape
    fields = torch.randn(batch, dates, variables, members, cells).permute(0, 1, 3, 4, 2)

    def take() -> None:
        with Precision(precision).autocast("cpu"):
            loss = forecast_loss(step.forecaster, step.loss, fields, sizes.rollout).value
        step.optimizer.zero_grad()
        loss.backward()
        reduce_gradients(step.forecaster.parameters(), 1, counting)
        step.optimizer.step()
        if average is not None:
            average.update_parameters(step.forecaster)

    take()
    live = LiveBytes()
    live.hold("before", [tensor for tensor in living_tensors() if id(tensor) not in strangers])
    before = counting.sent.copy()
    with live:
        take()
    return {"peak": live.peak, "sent": dict(counting.sent - before)}


def predict(
    sizes: Sizes, precision: str, ranks: int, every: bool = False, averages: bool = False
) -> dict[int, Footprint]:
    """Of the rank that `trainer plan` takes for the largest; of every one after it."""
    latitudes, longitudes, _ = octahedral(sizes.grid)
    kind = "multiscale" if sizes.hidden.startswith("ico") else "knn"
    options = GraphOptions(sizes.hidden, processor=kind)
    graph = build_graph(latitudes, longitudes, partition(latitudes.size, 1, latitudes.size), 0, options)
    cells = partition(latitudes.size, ranks, -(-latitudes.size // sizes.grid_chunks))
    cut = CutGraph(graph, cells, sizes.layers)
    names = tuple(f"v{number}" for number in range(sizes.variables))
    network = ModelOptions(
        *(sizes.channels, sizes.layers, sizes.heads, 4, sizes.num_chunks),
        *(sizes.checkpointing, sizes.shard_strategy, sizes.kernel),
    )
    roles = Roles(names, names[: sizes.forcings], allow_nan=names[len(names) - sizes.lacking :])
    loss = LossOptions(sizes.loss)
    settings = {"network": network, "loss": loss, "precision": Precision(precision), "averages": averages}
    job = Job(roles, sizes.input_steps, sizes.rollout, sizes.batch, **settings)
    others = [rank for rank in range(ranks) if every and rank != cut.largest]
    return {rank: footprint(job, cut.rank(rank)) for rank in (cut.largest, *others)}


def compare(predicted: dict[int, Footprint], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Peak of the largest rank beside that of all real ones; whether ranks sent what was predicted of them."""
    peak, most = next(iter(predicted.values())).peak, max(one["peak"] for one in measured)
    sent = {rank: {part: count for part, count in one.sent.items() if count} for rank, one in predicted.items()}
    return {
        "predicted": peak,
        "measured": most,
        "error": peak / most - 1.0,
        "sent": sum(next(iter(sent.values())).values()),
        "sent_equal": all(of_one == measured[rank]["sent"] for rank, of_one in sent.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    rows = []
    if not as_json:
        print(f"{'case':<64}{'predicted':>11}{'measured':>11}{'error':>8}  MB; bytes sent equal")
    for ranks, sizes, precision in CASES:
        row = compare(predict(sizes, precision, ranks), on_ranks(measure, ranks, sizes, precision))
        name = f"{sizes.grid} M{ranks} batch {sizes.batch} rollout {sizes.rollout} chunks {sizes.num_chunks} "
        name += f"{'checkpointing ' if sizes.checkpointing else ''}{sizes.shard_strategy} {precision}"
        rows.append({"case": name, **row})
        if not as_json:
            numbers = f"{row['predicted'] / 1e6:>11.1f}{row['measured'] / 1e6:>11.1f}{row['error']:>8.2%}"
            print(f"{name:<64}{numbers}  {'yes' if row['sent_equal'] else 'NO'}", flush=True)
    if as_json:
        print(json.dumps(rows, indent=1))
    return 0 if all(abs(row["error"]) <= MARGIN and row["sent_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
