"""How fast a rank gets its shard: shardio against its limit, tensorstore, anemoi-datasets and a stock DataLoader.

python -m tools.bench_loader                     o1280, 8 dates, 16 grid-chunks, M = 4: a few minutes
python -m tools.bench_loader --grid o320 --json

Everything runs in this one command, in alternating rounds, page cache warm, peers in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.peers import PeerError, add_options, environments

CONTENDERS = Path(__file__).with_name("loader_contenders.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="o1280")
    parser.add_argument("--dates", type=int, default=8)
    parser.add_argument("--grid-chunks", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the datasets go. Default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options, Path(folder))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians over the repeats of every contender, in ms per date of one rank's shard."""
    chunked, whole, tiny = (str(folder / f"{name}.zarr") for name in ("chunked", "whole", "tiny"))
    common = ["--dates", str(options.dates), "--zarr-format", "2", "--no-fsync"]
    shardio("synth", whole, "--grid", options.grid, *common)
    shardio("rechunk", whole, chunked, "--grid-chunks", str(options.grid_chunks), "--no-fsync")
    shardio("synth", tiny, "--grid", "o8", "--dates", "100", "--zarr-format", "2", "--grid-chunks", "1", "--no-fsync")
    about = json.loads(shardio("info", chunked, "--ranks", str(options.ranks), "--json"))
    cells = about["ranks"]["each"][0]["cells"]
    anemoi = python_of_anemoi(options)
    rows: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        here = json.loads(shardio("bench", chunked, "--ranks", str(options.ranks), "--json"))
        for name, row in here["contenders"].items():
            rows.setdefault(name, []).append(row["ms_per_date"])
        others = {"DataLoader, 2 workers": (sys.executable, "dataloader", chunked)}
        if anemoi:
            others["anemoi-datasets, one chunk per date"] = (anemoi, "anemoi", whole)
            others[f"anemoi-datasets, {options.grid_chunks} grid-chunks"] = (anemoi, "anemoi", chunked)
        for name, (python, contender, path) in others.items():
            rows.setdefault(name, []).append(run(python, contender, path, cells)["ms_per_date"])
    medians = {name: statistics.median(values) for name, values in rows.items()}
    return {
        "grid": options.grid,
        "ranks": options.ranks,
        "grid_chunks": options.grid_chunks,
        "ms_per_date": medians,
        "loader_of_limit": medians["limit"] / medians["loader"],
        "wait": run(sys.executable, "wait", chunked, cells),
        "memory": run(sys.executable, "memory", chunked, cells),
        "overhead": run(sys.executable, "overhead", tiny, cells),
    }


def shardio(*arguments: str) -> str:
    """Standard output of a shardio command."""
    command = [sys.executable, "-m", "shardio.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(python: str, contender: str, path: str, cells: list[int]) -> dict[str, float]:
    """What a contender prints in its own process."""
    command = [python, "-W", "ignore", str(CONTENDERS), contender, path, *map(str, cells)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def python_of_anemoi(options: argparse.Namespace) -> str | None:
    """The interpreter of the peer; None, with the reason, where it does not install."""
    try:
        return str(environments(options).python("anemoi"))
    except PeerError as reason:
        print(f"anemoi-datasets did not run: {reason}", file=sys.stderr)
        return None


def show(found: dict[str, Any]) -> None:
    """The table on stdout."""
    from rich.console import Console
    from rich.table import Table

    loader = found["ms_per_date"]["loader"]
    console = Console()
    console.print(f"one of {found['ranks']} ranks, {found['grid']}, {found['grid_chunks']} grid-chunks")
    table = Table("", "ms per date", "x loader", box=None)
    for name, value in sorted(found["ms_per_date"].items(), key=lambda row: row[1]):
        table.add_row(name, f"{value:.2f}", f"{value / loader:.2f}")
    console.print(table)
    wait, memory = found["wait"], found["memory"]
    console.print(f"loader at {found['loader_of_limit']:.2f} of the limit")
    console.print(
        f"waiting {wait['wait_on_device']:.1%} of the time when the consumer works elsewhere "
        f"for {wait['ms_per_read']:.1f} ms a batch, {wait['wait_on_this_cpu']:.1%} when it works on one of these cores"
    )
    console.print(f"peak memory {memory['batches']:.2f} batches, bound {memory['bound']}")
    console.print(f"{found['overhead']['us_per_batch']:.0f} us per tiny batch")


if __name__ == "__main__":
    sys.exit(main())
