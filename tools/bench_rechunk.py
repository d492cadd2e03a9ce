"""How fast `shardio rechunk` is, beside its peers and the limit of the codec, in one run on the same dates.

python -m tools.bench_rechunk                              6 o1280 dates, 3 alternating runs of everybody
python -m tools.bench_rechunk --grid o320 --repeats 5 --skip anemoi --json result.json

Every copy runs in a process of its own (so that its peak memory is its own), on a source in the page cache, into a
folder that was emptied before the clock started. Imports are not timed. Its values are compared with the source after.
The limit always keeps freed memory, as does shardio by itself; the others run with malloc as it comes, which costs some
of them half of their time, or with --allocator tuned at their best.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.peers import PeerError, add_options, environments, run
from tools.rechunk_contenders import CONTENDERS, Copy

Json = dict[str, Any]
HERE = Path(__file__).resolve().parent
# Without them glibc returns large blocks to the kernel at every free.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
PEER_OF = {"anemoi": "anemoi", "anemoi-tuned": "anemoi", "rechunker": "rechunker"}
PACKAGES = ("shardio", "anemoi-datasets", "rechunker", "dask", "zarr", "numcodecs", "numpy")


@dataclass(frozen=True)
class Bench:
    """One source, the folder for outputs, and how to copy."""

    source: Path
    folder: Path
    chunks: int
    fsync: bool
    allocator: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        date, variable, ensemble, cell = json.loads((self.source / "data" / ".zarray").read_text())["shape"]
        return date, variable, ensemble, cell

    @property
    def bytes_of_date(self) -> int:
        return 4 * math.prod(self.shape[1:])

    def copy_of(self, name: str) -> Copy:
        cells = math.ceil(self.shape[3] / self.chunks)
        output = self.folder / f"{name}.zarr"
        return Copy(str(self.source), str(output), cells, self.chunks, os.cpu_count() or 1, self.fsync)

    def time(self, name: str, python: Path) -> Json:
        """One run: seconds, processor seconds, peak memory; PeerError where it fails."""
        self.clear()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        if self.allocator == "tuned" or name == "limit":
            environment |= KEEP_FREED_MEMORY
        arguments = [name, json.dumps(asdict(self.copy_of(name)))]
        command = [str(python), "-W", "ignore", str(HERE / "rechunk_contenders.py"), *arguments]
        measured: Json = json.loads(run(command, "it failed", environment).splitlines()[-1])
        return measured

    def clear(self) -> None:
        """Remove the outputs of earlier runs, and let the disk come to rest."""
        for output in self.folder.glob("*.zarr*"):
            shutil.rmtree(output)
        os.sync()

    def check(self, name: str) -> str:
        """Compare the output with the source, value by value, in another process; empty where they are equal."""
        if name == "limit":
            return ""
        code = "import sys; from tools.bench_rechunk import difference; print(difference(*sys.argv[1:]), end='')"
        command = [sys.executable, "-W", "ignore", "-c", code, str(self.source), self.copy_of(name).destination]
        return run(command, "the comparison failed", dict(os.environ), HERE.parent)


def difference(source: str, output: str) -> str:
    """Empty where `data` of both is equal to the bit and every chunk of the output is stored."""
    import numpy as np
    import zarr

    ours, theirs = (zarr.open_array(path, path="data", mode="r") for path in (output, source))
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.shape} {ours.dtype} instead of {theirs.shape} {theirs.dtype}"
    if ours.nchunks_initialized != ours.nchunks:
        return f"{ours.nchunks - ours.nchunks_initialized} of {ours.nchunks} chunks are missing"
    for date in range(ours.shape[0]):
        if not np.array_equal(ours[date].view(np.uint32), theirs[date].view(np.uint32)):
            return f"date {date} differs"
    return ""


def make_source(folder: Path, grid: str, dates: int) -> Path:
    """Rossby waves, one chunk per date, Zarr v2 in blosc lz4 with shuffle: made once."""
    source = folder / f"source-{grid}-{dates}.zarr"
    if not source.exists():
        layout = ["--grid", grid, "--dates", str(dates), "--zarr-format", "2", "--grid-chunks", "1", "--no-fsync"]
        subprocess.run([sys.executable, "-m", "shardio.cli", "synth", str(source), *layout], check=True)
    return source


def read_once(source: Path) -> None:
    """Bring the source into the page cache."""
    buffer = bytearray(2**20)
    for file in (source / "data").iterdir():
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def measure(bench: Bench, pythons: dict[str, Path], repeats: int) -> tuple[dict[str, list[Json]], dict[str, str]]:
    """Alternating runs of everybody: (results by name, why others did not run)."""
    results: dict[str, list[Json]] = {name: [] for name in pythons}
    failed: dict[str, str] = {}
    read_once(bench.source)
    for repeat, name in _turns(repeats, list(pythons)):
        if name in failed:
            continue
        try:
            result = bench.time(name, pythons[name])
            wrong = bench.check(name) if repeat == 0 else ""
        except PeerError as reason:
            failed[name] = str(reason)
            continue
        if wrong:
            failed[name] = f"its output is not equal to the source: {wrong}"
            continue
        results[name].append(result)
        print(f"run {repeat + 1}: {name} {result['seconds']:.2f} s", file=sys.stderr)
    bench.clear()
    return {name: runs for name, runs in results.items() if name not in failed}, failed


def _turns(repeats: int, names: list[str]) -> Iterator[tuple[int, str]]:
    for repeat in range(repeats):
        for name in names:
            yield repeat, name


def medians(bench: Bench, results: dict[str, list[Json]]) -> dict[str, Json]:
    """What the table shows."""
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results.items()}
    nbytes = bench.shape[0] * bench.bytes_of_date
    return {
        name: {
            "seconds": seconds[name],
            "fastest": min(run["seconds"] for run in runs),
            "slowest": max(run["seconds"] for run in runs),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            "gb_per_second": nbytes / seconds[name] / 1e9,
            "of_limit": seconds["limit"] / seconds[name] if "limit" in seconds else None,
            "peak_mb": max(run["peak_bytes"] for run in runs) / 1e6,
        }
        for name, runs in results.items()
    }


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages that matter, as far as this interpreter has them."""
    code = (
        "import json, sys; from importlib.metadata import version, PackageNotFoundError\n"
        "found = {'python': sys.version.split()[0]}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(run([str(python), "-c", code, *PACKAGES], "it has no versions"))
    return found


def machine() -> Json:
    """Processor, cores, kernel."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {"processor": model, "cores": os.cpu_count(), "kernel": platform.release()}


def print_table(bench: Bench, table: dict[str, Json], failed: dict[str, str], repeats: int) -> None:
    """Medians, and how often faster shardio is."""
    from rich.console import Console
    from rich.table import Table

    date, variables, ensemble, cells = bench.shape
    bound = 3 * bench.bytes_of_date / 1e6 + 300
    title = (
        f"{date} dates x {variables} variables x {ensemble} members x {cells} cells, {bench.chunks} grid-chunks, "
        f"{'with' if bench.fsync else 'without'} fsync, {bench.allocator} allocator, median of {repeats}"
    )
    shown = Table(title=title, caption=f"peak memory should be below 3 dates + 300 MB = {bound:.0f} MB")
    ours = [name for name in table if name.startswith("shardio")]
    ratios = [f"{name} is x faster" for name in ours]
    for heading in ("", "s", "fastest - slowest", "cpu s", "GB/s", "of limit", "peak MB", *ratios):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, row in table.items():
        shown.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['fastest']:.2f} - {row['slowest']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['gb_per_second']:.2f}",
            f"{row['of_limit']:.2f}" if row["of_limit"] else "-",
            f"{row['peak_mb']:.0f}",
            *("-" if name in (*ours, "limit") else f"{row['seconds'] / table[our]['seconds']:.2f}" for our in ours),
        )
    console = Console(width=max(Console().width, 150))
    console.print(shown)
    for name, reason in failed.items():
        console.print(f"{name} did not run: {reason}", highlight=False)


def main() -> int:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = make_source(options.folder, options.grid, options.dates)
    bench = Bench(source, options.folder / "outputs", options.grid_chunks, options.fsync, options.allocator)
    bench.folder.mkdir(exist_ok=True)
    pythons, failed = _interpreters(options)
    results, failed_later = measure(bench, pythons, options.repeats)
    failed |= failed_later
    table = medians(bench, results)
    print_table(bench, table, failed, options.repeats)
    if options.json:
        about = {
            "command": sys.argv[1:],
            "machine": machine(),
            "versions": {name: versions(python) for name, python in pythons.items() if name not in failed},
            "shape": bench.shape,
            "chunks": bench.chunks,
            "medians": table,
            "runs": results,
            "did not run": failed,
        }
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    return 1 if any(name.startswith(("shardio", "limit")) for name in failed) else 0


def _interpreters(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """(Python of every contender, why others have none)."""
    available = environments(options)
    pythons: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for name in CONTENDERS:
        if name in options.skip:
            continue
        try:
            pythons[name] = available.python(PEER_OF[name]) if name in PEER_OF else Path(sys.executable)
        except PeerError as reason:
            failed[name] = str(reason)
    return pythons, failed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure shardio rechunk beside its peers.")
    parser.add_argument("--grid", default="o1280", help="octahedral grid of the source (default: o1280)")
    parser.add_argument("--dates", type=int, default=6, help="dates of the source (default: 6)")
    parser.add_argument("--grid-chunks", type=int, default=16, help="grid-chunks per date (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs (default: 3)")
    parser.add_argument("--skip", action="append", default=[], choices=list(CONTENDERS), help="may be given again")
    parser.add_argument("--fsync", action="store_true", help="everybody makes the output durable")
    parser.add_argument(
        "--allocator", choices=("plain", "tuned"), default="plain", help="malloc of all but the limit (default: plain)"
    )
    parser.add_argument("--folder", type=Path, default=Path(".peers/rechunk"), help="for the source and the outputs")
    parser.add_argument("--json", type=Path, help="write every run, versions and machine to this file")
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
