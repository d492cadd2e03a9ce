"""Peak bytes of live tensors on each rank in a training step, counted storage by storage.

python -m tools.trainer_memory --grid o96 --hidden ico4                  M = 1, 2, 4 and num_chunks 1, 4, 16
python -m tools.trainer_memory --grid o160 --hidden ico5 --ranks 1,4 --chunks 1 --json

peak         most bytes alive at once, on the rank that has most: the batch, the graph, weights, all that is made
replicated   what every rank holds whole, whatever M, at that moment: weights, the optimizer's state, and such gradients
             as there are by then
bound        1.1 x peak of M = 1 / M + replicated
ratio        of what is not replicated: M times that of M, over that of M = 1; what is above 1 is halo
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from tools.trainer_step import Sizes, Step, on_ranks
from trainer.comm import Comm
from trainer.plan.live_bytes import LiveBytes

MARGIN = 1.1


def living_tensors() -> list[Tensor]:
    """All that Python knows of; before a step nothing else is alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measure(comm: Comm, sizes: Sizes) -> dict[str, int]:
    """Of one rank, in the second step, when the optimizer has its state."""
    strangers = living_tensors()
    step = Step(comm, sizes)
    batch = step.fields()
    step.run(batch)
    step.optimizer.zero_grad()
    weights = list(step.forecaster.parameters())
    state = [value for known in step.optimizer.state.values() for value in known.values() if isinstance(value, Tensor)]
    known = {id(tensor) for tensor in strangers}
    alive = [tensor for tensor in living_tensors() if id(tensor) not in known]
    live = LiveBytes()
    live.hold("before", alive)
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda weight: live.hold("gradients", weight.grad))
    before = live.total
    with live:
        step.run(batch)
    found = {"weights": nbytes(weights), "optimizer": nbytes(state), "gradients": live.at_peak["gradients"]}
    found["batch"] = nbytes([batch])
    found["graph"] = before - found["weights"] - found["optimizer"] - found["batch"]
    return found | {"peak": live.peak}


REPLICATED = ("weights", "optimizer", "gradients")


def compare(sizes: Sizes, results: dict[int, list[dict[str, int]]]) -> list[dict[str, Any]]:
    """One row for each M, of the rank with the highest peak; the first M has to be 1."""
    alone = results[1][0]
    divided = alone["peak"] - sum(alone[name] for name in REPLICATED)
    rows = []
    for ranks, found in results.items():
        worst = max(found, key=lambda one: one["peak"])
        replicated = sum(worst[name] for name in REPLICATED)
        bound = MARGIN * alone["peak"] / ranks + replicated
        rest = worst["peak"] - replicated
        rows.append(
            {"grid": sizes.grid, "num_chunks": sizes.num_chunks, "ranks": ranks, **worst}
            | {
                "replicated": replicated,
                "bound": bound,
                "ratio": rest * ranks / divided,
                "held": worst["peak"] <= bound,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Sizes.add_arguments(parser)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--chunks", default="1,4,16")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for chunks in map(int, arguments.chunks.split(",")):
        sizes = replace(Sizes.of(arguments), num_chunks=chunks)
        results = {ranks: on_ranks(measure, ranks, sizes) for ranks in map(int, arguments.ranks.split(","))}
        rows += compare(sizes, results)
    if arguments.json:
        print(json.dumps({"sizes": asdict(Sizes.of(arguments)), "rows": rows}, indent=1))
        return 0
    names = ("peak", "bound", *REPLICATED, "graph", "batch")
    print("MB on the rank with the highest peak")
    print(f"{'grid':<6}{'chunks':>7}{'M':>3}" + "".join(f"{name:>11}" for name in names) + f"{'ratio':>7}")
    for row in rows:
        numbers = "".join(f"{row[name] / 1e6:>11.1f}" for name in names)
        print(f"{row['grid']:<6}{row['num_chunks']:>7}{row['ranks']:>3}{numbers}{row['ratio']:>7.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
