"""One training step against anemoi-models: same graph, width, layers, heads, numbers; in one run, in turns.

python -m tools.bench_trainer                    o96 to ico4, 128 channels, 4 layers, 8 heads: about ten minutes
python -m tools.bench_trainer --grid o48 --hidden ico3 --repeats 1

Rows: one rank with 2 threads, and two ranks with 1 thread each. Both sides run with an allocator that keeps freed
memory: without it every CPU step is about twice as slow. The peer runs in an environment of its own (tools/peers.py).
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

from tools.peers import PeerError, add_options, environments

CONTENDERS = Path(__file__).with_name("trainer_contenders.py")
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
LEAN = ["--checkpointing", "--chunks", "4"]  # what anemoi-models comes with
VARIANTS = {  # name: contender, flags
    "shardio": ("shardio", []),
    "shardio, checkpointing, 4 chunks": ("shardio", LEAN),
    "shardio bf16": ("shardio", ["--bf16"]),
    "anemoi-models as it comes": ("anemoi", LEAN),
    "anemoi-models, no trainable tensors": ("anemoi", [*LEAN, "--trainable", "0"]),
    "anemoi-models, no checkpointing": ("anemoi", []),
    "anemoi-models bf16": ("anemoi", [*LEAN, "--bf16"]),
    "anemoi-models bf16, no checkpointing": ("anemoi", ["--bf16"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="o96")
    parser.add_argument("--hidden", default="ico4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(json.dumps(found, indent=1)) if options.json else show(found)
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians over the repeats, for every variant and both worlds."""
    graph, dataset, size = str(folder / "graph.npz"), str(folder / "o96.zarr"), ["--grid", options.grid]
    size += ["--hidden", options.hidden]
    run([sys.executable], ["graph", graph, *size], 1)
    synth = ["synth", dataset, "--grid", options.grid, "--dates", "12", "--no-fsync"]
    subprocess.run([sys.executable, "-m", "shardio.cli", *synth], check=True, capture_output=True)
    pythons = {"shardio": sys.executable} | python_of_anemoi(options)
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {"1 rank": {}, "2 ranks": {}}
    gemms: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for kind, flags in (("fp32", []), ("bf16", ["--bf16"])):
            found = run([sys.executable], ["gemm", graph, "--threads", "2", *flags], 1)
            gemms.setdefault(kind, []).append(found["gflops"])
        for name, (contender, flags) in VARIANTS.items():
            if contender in pythons:
                for world, ranks in (("1 rank", 1), ("2 ranks", 2)):
                    arguments = [contender, graph, *size, *flags, "--threads", str(3 - ranks)]
                    rows[world].setdefault(name, []).append(run([pythons[contender], "-W", "ignore"], arguments, ranks))
    medians = {
        world: {
            name: {key: statistics.median(one[key] for one in found) for key in NUMBERS}
            for name, found in table.items()
        }
        for world, table in rows.items()
    }
    first = rows["1 rank"]["shardio"][0]
    gflops = {kind: statistics.median(values) for kind, values in gemms.items()}
    loading = run([sys.executable], ["loading", graph, *size, "--dataset", dataset, "--threads", "2"], 1)
    return {"rows": medians, "gemm_gflops": gflops, "step_gflop": first["gflop"], "loading": loading}


NUMBERS = ("step", "forward", "backward", "exchange", "sent_mb", "peak_mb")


def run(python: list[str], arguments: list[str], ranks: int) -> dict[str, Any]:
    """What a contender prints, in processes of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(3 - ranks)}
    command = [*python, *launch, str(CONTENDERS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return result


def python_of_anemoi(options: argparse.Namespace) -> dict[str, str]:
    """The interpreter of the peer; nothing, with the reason, where it does not install."""
    try:
        return {"anemoi": str(environments(options).python("anemoi-models"))}
    except PeerError as reason:
        print(f"anemoi-models did not run: {reason}", file=sys.stderr)
        return {}


def show(found: dict[str, Any]) -> None:
    """The tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    for world, rows in found["rows"].items():
        ours = rows["shardio"]["step"]
        table = Table(world, "step s", "x shardio", "forward", "backward", "exchange", "sent MB", "peak MB", box=None)
        for name, row in rows.items():
            numbers = (row["step"], row["step"] / ours, *(row[key] for key in NUMBERS[1:]))
            table.add_row(name, *(f"{number:.{digits}f}" for number, digits in zip(numbers, DIGITS, strict=True)))
        console.print(table)
    gflop, gemm, loading = found["step_gflop"], found["gemm_gflops"], found["loading"]
    seconds = found["rows"]["1 rank"]["shardio"]["step"]
    console.print(
        f"{gflop:.0f} GFLOP in matrix products per step: {gflop / seconds:.0f} GFLOP/s, where a plain product reaches "
        f"{gemm['fp32']:.0f} ({gemm['bf16']:.0f} in bf16): {gflop / seconds / gemm['fp32']:.2f} of it"
    )
    console.print(f"waiting for the loader: {loading['wait'] / loading['step']:.1%} of a step")


DIGITS = (3, 2, 3, 3, 3, 2, 0)


if __name__ == "__main__":
    sys.exit(main())
