"""What each knob of training does to the time and the memory of a step: the table of docs/performance.md.

python -m tools.perf.knobs                        o48 to ico3, 128 channels, 4 layers; a few minutes
python -m tools.perf.knobs --grid o96 --hidden ico4 --only "as it comes" --only checkpointing

Each variant runs in processes of its own, one thread per rank. Times are over those of the calibration kernel around
them, and over the first variant's: other programs disturb them less than they disturb seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from shardio.rechunk.allocator import keep_freed_memory
from tools.perf.calibration import Calibration
from tools.trainer_step import Sizes, Step, on_ranks
from trainer.comm import Comm
from trainer.model.kernels import cpp as attention_kernel
from trainer.plan.live_bytes import LiveBytes


@dataclass(frozen=True)
class Variant:
    """Attributes: what differs from the first; ranks; whether freed memory is kept, and attention compiled."""

    changes: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    keep_memory: bool = True
    compiled: bool = True


VARIANTS = {
    "as it comes": Variant(),
    "`checkpointing`": Variant({"checkpointing": True}),
    "`checkpointing`, `num_chunks` 4": Variant({"checkpointing": True, "num_chunks": 4}),
    "`checkpointing`, `num_chunks` 16": Variant({"checkpointing": True, "num_chunks": 16}),
    "`num_chunks` 4 alone": Variant({"num_chunks": 4}),
    "`num_gpus_per_model` 2": Variant(ranks=2),
    "`num_gpus_per_model` 2, `shard_strategy` heads": Variant({"shard_strategy": "heads"}, ranks=2),
    "half the channels": Variant({"channels": 64}),
    "batch 2": Variant({"batch": 2}),
    "rollout 2": Variant({"rollout": 2}),
    "no compiler for the attention kernel": Variant(compiled=False),
    "glibc's malloc as it comes": Variant(keep_memory=False),
}


def measure(comm: Comm, sizes: Sizes, variant: Variant, repeats: int) -> dict[str, float]:
    """Kernels and seconds of a step, and the peak of living tensors, of one rank."""
    if variant.keep_memory:
        keep_freed_memory()
    if not variant.compiled:
        without: Callable[[], Any] = lambda: (None, "it is left out")  # noqa: E731
        attention_kernel.load = without
    calibration, step = Calibration(), Step(comm, sizes)
    batch = step.fields()
    step.run(batch)
    runs = []
    for _ in range(repeats):
        comm.tell(None, "begin together")
        before, began = calibration.seconds(), time.perf_counter()
        step.run(batch)
        seconds = time.perf_counter() - began
        runs.append((2 * seconds / (before + calibration.seconds()), seconds))
    live = LiveBytes()
    live.hold("before", step.forecaster, step.forecaster.network.graph, step.optimizer, batch)
    with live:
        step.run(batch)
    kernels, seconds = (median(column) for column in zip(*runs, strict=True))
    return {"kernels": kernels, "seconds": seconds, "fastest": min(run[0] for run in runs), "peak": live.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="o48")
    parser.add_argument("--hidden", default="ico3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="may be given again; default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    plain = Sizes(options.grid, options.hidden, checkpointing=False)
    found: dict[str, dict[str, float]] = {}
    for name in options.only or VARIANTS:
        variant = VARIANTS[name]
        ranks = on_ranks(measure, variant.ranks, replace(plain, **variant.changes), variant, options.repeats)
        found[name] = {key: max(one[key] for one in ranks) for key in ranks[0]}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    first = next(iter(found.values()))
    print("| | step | fastest step | peak of tensors per rank |\n|---|---|---|---|")
    for name, row in found.items():
        ratios = f"{row['kernels'] / first['kernels']:.2f} | {row['fastest'] / first['fastest']:.2f}"
        print(f"| {name} | {ratios} | {row['peak'] / 1e6:.0f} MB, {row['peak'] / first['peak']:.2f} |")


if __name__ == "__main__":
    main()
