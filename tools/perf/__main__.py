"""Performance CI: counters are gates, times are trends.

python -m tools.perf                        all cases: some minutes on 2 cores; exit code 1 if a counter got worse
python -m tools.perf --grid octahedral      one grid only
python -m tools.perf --accept               make the counters of the last run the baseline

A case is grid/ranks/work, as in octahedral/2/train. Bytes, files, messages, tensors and FLOPs are compared with
tools/perf/baseline.json. Times go to perf/history.jsonl, and with those of earlier runs to perf/report.html: a case
that is slower than the noise of the run explains is flagged, and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tools.perf import gate, history, report
from tools.perf.calibration import Calibration
from tools.perf.grids import NAMES, Site
from tools.perf.matrix import measure

FOLDER = Path("perf")
LAST = "last.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="append", choices=NAMES, help="may be given again; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of everything that is timed; 0 counts only")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of history and report (default: perf)")
    parser.add_argument("--accept", action="store_true", help="take the last run's counters as the baseline")
    parser.add_argument("--baseline", type=Path, default=gate.BASELINE, help="(default: tools/perf/baseline.json)")
    options = parser.parse_args()
    return accept(options.folder, options.baseline) if options.accept else run(options)


def accept(folder: Path, baseline: Path) -> int:
    """Without running anything again."""
    last = folder / LAST
    if not last.exists():
        print(f"{last} is not there: run make perf first.", file=sys.stderr)
        return 1
    counters = json.loads(last.read_text())
    changes = gate.compare(gate.read(baseline), counters, {})
    gate.accept(counters, baseline)
    print("\n".join([*map(str, changes), f"{baseline} has {len(changes)} new numbers. Commit it."]))
    return 0


def run(options: argparse.Namespace) -> int:
    """Measure, compare, keep, draw."""
    began = time.perf_counter()
    # Ranks are killed when they have answered; Python would tell of the locks that they leave.
    sys.warnoptions.append("ignore:resource_tracker")
    with tempfile.TemporaryDirectory() as folder:
        sites = [Site(name, Path(folder)) for name in options.grid or NAMES]
        for site in sites:
            site.make()
        found = measure(sites, options.repeats, lambda what: print(f"measuring: {what}", file=sys.stderr))
    counters = {case: result["counters"] for case, result in found.items()}
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / LAST).write_text(json.dumps(counters, indent=1))
    baseline, made_with = gate.read(options.baseline), gate.made_with()
    changes = gate.compare(baseline, counters, made_with)
    good, words = gate.verdict(changes)
    if other := gate.differences(baseline, made_with):
        print(f"{' and '.join(gate.OF_TORCH)} were not compared: the baseline has {'; '.join(other)}.")
    slow = []
    if options.repeats:
        path = options.folder / "history.jsonl"
        history.append(path, history.entry(found, Calibration().parts()))
        runs = history.read(path)
        slow = history.slow_downs(runs)
        print(f"report: {report.write(options.folder, runs, changes, slow)}")
    if slow:
        print("\n".join([f"{len(slow)} cases are slower than noise explains:", *(f"  {one}" for one in slow)]))
        if (load := os.getloadavg()[0]) > (cores := os.cpu_count() or 1) + 1:
            print(f"  but the machine is busy (load {load:.1f} on {cores} cores): repeat it when it is not")
    if words:
        print(words)
    print(f"{len(found)} cases in {time.perf_counter() - began:.0f} s: {'good' if good else 'a counter got worse'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
