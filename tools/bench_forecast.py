"""Seconds per forecast step, and the share of time that ranks wait for output: 1 rank and 2, in turns.

python -m tools.bench_forecast                 o96 to ico4, 128 channels, 4 layers, 20 lead times: about five minutes
python -m tools.bench_forecast --grid o32 --hidden ico3 --steps 8 --repeats 1

One rank has 2 threads, two ranks have 1 each. The model is trained for one step: what it forecasts plays no part. The
time of a step is that of `trainer predict` from the first input read to the published dataset, over the lead times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RANKS = (1, 2)
VARIANTS = {"each file made durable": [], "--no-fsync": ["--no-fsync"]}
CORES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="o96")
    parser.add_argument("--hidden", default="ico4")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(json.dumps(found, indent=1)) if options.json else show(found)
    return 0


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per variant and number of ranks, with the medians over the repeats."""
    dataset, run = folder / "data.zarr", folder / "run"
    call("shardio.cli", "synth", dataset, "--grid", options.grid, "--dates", 4, "--grid-chunks", 4)
    call(
        *("trainer.cli", "fit", f"--data.dataset={dataset}", f"--output={run}", "--model.forcings=[lsm,latitude]"),
        *(f"--model.graph.hidden={options.hidden}", f"--model.network.channels={options.channels}"),
        *(f"--model.network.num_layers={options.layers}", "--trainer.max_steps=1", "--data.input_steps=2"),
        "--trainer.enable_progress_bar=false",
    )
    given = (
        *("predict", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--dataset", dataset, "--json"),
        *("--start", "2020-01-01T12:00", "--lead-time", f"{6 * options.steps}h"),
    )
    times: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for ranks in RANKS:
            for name, flags in VARIANTS.items():
                where = folder / f"{name}-{ranks}-{repeat}"
                said = call(
                    "trainer.cli", *given, *flags, "--devices", ranks, "--output", where, threads=CORES // ranks
                )
                times.setdefault((name, ranks), []).append(json.loads(said)["forecasts"][0])
    return [row(name, ranks, runs) for (name, ranks), runs in times.items()]


def row(name: str, ranks: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [run["seconds"] / run["steps"] for run in runs]
    return {
        "output": name,
        "ranks": ranks,
        "seconds_per_step": statistics.median(steps),
        "range": (min(steps), max(steps)),
        "waiting": statistics.median(run["waited"] / run["seconds"] for run in runs),
    }


def call(module: str, *arguments: Any, threads: int = CORES) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def show(found: list[dict[str, Any]]) -> None:
    """As a table for docs/benchmarks.md."""
    print("| ranks | output | s per step, median (least – most) | waiting for output |\n|---|---|---|---|")
    for one in found:
        least, most = one["range"]
        step = f"{one['seconds_per_step']:.3f} ({least:.3f} – {most:.3f})"
        print(f"| {one['ranks']} | {one['output']} | {step} | {one['waiting']:.1%} |")


if __name__ == "__main__":
    sys.exit(main())
