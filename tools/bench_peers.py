"""All side-by-side numbers of the README in one command, as its tables, in Markdown.

python -m tools.bench_peers                    everything as the README has it: about an hour on 2 cores
python -m tools.bench_peers --quick            small grids, one repeat: minutes; do not quote its numbers
python -m tools.bench_peers --only loader

It runs bench_loader, bench_rechunk and bench_trainer one after the other, and builds the environments of the peers
first (tools/peers.py). Leave the machine alone meanwhile: the load average is printed with each table. A peer that does
not install costs its rows, and its reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench_rechunk import machine
from tools.peers import PeerError, add_options, environments

Json = dict[str, Any]
ABSENT = "did not run"


@dataclass(frozen=True)
class Bench:
    """Attributes: how to run it, in full and quickly; what it needs; the README's table from what it found."""

    full: tuple[str, ...]
    quick: tuple[str, ...]
    peers: tuple[str, ...]
    table: Callable[[Json, str], list[str]]

    def command(self, quick: bool) -> list[str]:
        return ["python", "-m", *(self.quick if quick else self.full)]


def loader_table(found: Json, command: str) -> list[str]:
    chunks = found["grid_chunks"]
    rows = {
        "limit: pread and decode into reused buffers, nothing else": "limit",
        "`ShardedDataLoader`": "loader",
        "the same as one tensor on the CPU (`batch.fields`)": "loader, one tensor",
        "ring of tensorstore reads": "tensorstore ring",
        f"anemoi-datasets, same {chunks} grid-chunks": f"anemoi-datasets, {chunks} grid-chunks",
        "torch DataLoader with 2 workers over zarr-python": "DataLoader, 2 workers",
        "anemoi-datasets, one chunk per date": "anemoi-datasets, one chunk per date",
    }
    times = found["ms_per_date"]
    cells = {label: f"{times[name]:.1f}" if name in times else ABSENT for label, name in rows.items()}
    return markdown(f"one of {found['ranks']} ranks gets its shard of a date", ["ms"], cells, command)


def rechunk_table(found: Json, command: str) -> list[str]:
    rows = {
        "limit: the codec and the files, nothing else": ("limit",),
        "`shardio rechunk`, Zarr v2 / v3": ("shardio-v2", "shardio-v3"),
        "`anemoi-datasets copy`, as it comes": ("anemoi",),
        "`anemoi-datasets copy`, tuned": ("anemoi-tuned",),
        "zarr-python, one date per core, by hand": ("zarr-python-threads",),
        "zarr-python, date after date": ("zarr-python",),
        "dask.array": ("dask",),
        "rechunker": ("rechunker",),
    }
    medians = found["medians"]

    def cell(names: Sequence[str], key: str, digits: int) -> str:
        return " / ".join(f"{medians[name][key]:.{digits}f}" if name in medians else ABSENT for name in names)

    columns = {"s": ("seconds", 2), "processor s": ("cpu_seconds", 2), "peak MB": ("peak_mb", 0)}
    cells = {label: [cell(names, *column) for column in columns.values()] for label, names in rows.items()}
    return markdown(f"{found['shape'][0]} dates from 1 to {found['chunks']} grid-chunks", list(columns), cells, command)


def trainer_table(found: Json, command: str) -> list[str]:
    heads, cells = [], {}
    for world, rows in found["rows"].items():
        heads += [f"{world}: s", "peak MB", *(["MB sent"] if world != "1 rank" else [])]
        for name, row in rows.items():
            numbers = [f"{row['step']:.2f}", f"{row['peak_mb']:.0f}"]
            cells.setdefault(name, []).extend([*numbers, f"{row['sent_mb']:.1f}"] if world != "1 rank" else numbers)
    return markdown("one training step", heads, cells, command)


def markdown(what: str, heads: Sequence[str], cells: Json, command: str) -> list[str]:
    """A table as the README has them: the command stands in the first row."""
    lines = [f"| {what} | {' | '.join(heads)} | command |", "|" + "---|" * (len(heads) + 2)]
    for number, (label, row) in enumerate(cells.items()):
        values = row if isinstance(row, list) else [row]
        lines.append(f"| {label} | {' | '.join(values)} | {f'`{command}` ' if number == 0 else ''}|")
    return lines


RECHUNK = "tools.bench_rechunk"
BENCHES = {
    "loader": Bench(
        ("tools.bench_loader",),
        ("tools.bench_loader", "--grid", "o320", "--repeats", "1"),
        ("anemoi",),
        loader_table,
    ),
    "rechunk": Bench(
        (RECHUNK, "--dates", "24", "--repeats", "5"),
        (RECHUNK, "--grid", "o320", "--repeats", "1"),
        ("anemoi", "rechunker"),
        rechunk_table,
    ),
    "trainer": Bench(
        ("tools.bench_trainer",),
        ("tools.bench_trainer", "--grid", "o32", "--hidden", "ico2", "--repeats", "1"),
        ("anemoi-models",),
        trainer_table,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(BENCHES), help="may be given again; default: all")
    parser.add_argument("--quick", action="store_true", help="small grids, one repeat")
    parser.add_argument("--json", type=Path, help="write all that was found to this file")
    parser.add_argument("--folder", type=Path, help="of the fields; in /dev/shm no disk is measured (needs 8 GB)")
    add_options(parser)
    options = parser.parse_args()
    chosen = options.only or list(BENCHES)
    build(options, chosen)
    results: Json = {"machine": machine(), "quick": options.quick}
    print(f"{results['machine']['processor']}, {results['machine']['cores']} cores")
    for name in chosen:
        began, load = time.perf_counter(), os.getloadavg()[0]
        found = run(name, options)
        command = " ".join(BENCHES[name].command(options.quick))
        results[name] = found | {"command": command, "load before": load}
        print("\n" + "\n".join(BENCHES[name].table(found, command)))
        print(f"\n*{time.perf_counter() - began:.0f} s; load average before it {load:.1f}*", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def build(options: argparse.Namespace, chosen: Sequence[str]) -> None:
    """The peers' environments, before anything is measured."""
    for peer in dict.fromkeys(peer for name in chosen for peer in BENCHES[name].peers):
        try:
            environments(options).python(peer)
        except PeerError as reason:
            print(f"{peer} will be missing: {reason}", file=sys.stderr)


def run(name: str, options: argparse.Namespace) -> Json:
    """What a bench found; its own words go to stderr."""
    words = BENCHES[name].command(options.quick)[1:]
    peers = ["--venvs", str(options.venvs), *(word for pair in options.peer for word in ("--peer", pair))]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        as_file = name == "rechunk"  # it prints a table, and writes JSON to a file
        json_option = ["--json", str(result)] if as_file else ["--json"]
        place = ["--folder", str(options.folder)] if options.folder and name != "trainer" else []
        command = [sys.executable, *words, *json_option, *place, *peers]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"python {' '.join(words)} ended with {done.returncode}: its message is above.")
        found: Json = json.loads(result.read_text() if as_file else done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
