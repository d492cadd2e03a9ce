"""Times of all runs on this machine, one line of JSON each, and which of the last are slower than noise explains.

What is kept is the ratio to the calibration kernel (calibration.py), several times in every run: how far these are
apart is the noise of the run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Run = dict[str, Any]
RECENT = 10  # runs that a new one is compared with


@dataclass(frozen=True)
class SlowDown:
    """A case that took longer than before, in calibration kernels."""

    case: str
    before: float
    now: float
    noise: float

    def __str__(self) -> str:
        return (
            f"{self.case}: {self.now / self.before:.2f} x the {self.before:.1f} kernels of the runs before "
            f"(noise of this run: {self.noise:.0%})"
        )


def entry(found: dict[str, dict[str, Any]], calibration: dict[str, float]) -> Run:
    """A run as history keeps it."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "load": os.getloadavg()[0],
        "calibration": calibration,
        "cases": found,
    }


def machine() -> str:
    """Times of different machines are not compared, ratios or not."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def read(path: Path) -> list[Run]:
    """All runs, the oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")


def slow_downs(runs: list[Run]) -> list[SlowDown]:
    """Of the last run: medians above the median of those before by more than the last run's own noise."""
    *before, last = runs
    found = []
    for case, result in last["cases"].items():
        known = [ratio(run["cases"][case]) for run in before if is_comparable(run, last) and _is_timed(run, case)]
        if known and _is_timed(last, case):
            usual, now, spread = median(known[-RECENT:]), ratio(result), noise(result)
            if now > usual * (1 + spread):
                found.append(SlowDown(case, usual, now, spread))
    return found


def is_comparable(one: Run, other: Run) -> bool:
    """The same machine."""
    return bool(one["machine"] == other["machine"])


def ratio(result: dict[str, Any]) -> float:
    """Median of the repeats."""
    return median(result["ratios"])


def noise(result: dict[str, Any]) -> float:
    """Between the fastest and the slowest repeat, of the median."""
    return (max(result["ratios"]) - min(result["ratios"])) / ratio(result)


def _is_timed(run: Run, case: str) -> bool:
    return "ratios" in run["cases"].get(case, {})


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()
