"""Counters against those of baseline.json: whatever grew by more than 1 % must be explained, by whoever accepts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.01
# A buffer more or less, as threads happen to finish.
TOLERANCES = {("load", "peak_bytes"): 0.1, ("rechunk", "peak_bytes"): 0.1}
ACCEPT = "make perf-accept"
OF_TORCH = ("peak_bytes", "allocations")  # another torch, or another attention kernel, makes other tensors
Cases = Mapping[str, Mapping[str, int]]  # case: counter: number


@dataclass(frozen=True)
class Change:
    """A counter that is no longer what it was; None where there was, or is, none."""

    case: str
    counter: str
    was: int | None
    now: int | None

    @property
    def is_better(self) -> bool:
        """Fewer, though not nothing at all: what counts nothing any more no longer counts."""
        return bool(self.now and self.was and self.now < self.was)

    def __str__(self) -> str:
        if self.was is None:
            return f"{self.case}: {self.counter} is {self.now:,}, and has no baseline"
        if self.now is None:
            return f"{self.case}: {self.counter} was {self.was:,}, and is not counted any more"
        growth = f"{100 * (self.now / self.was - 1):+.1f} %" if self.was else "from nothing"
        return f"{self.case}: {self.counter} was {self.was:,}, is {self.now:,} ({growth})"


def compare(baseline: Mapping[str, Any], now: Cases, now_with: Mapping[str, str]) -> list[Change]:
    """All that changed by more than the tolerance, in the cases that were measured."""
    left_out = OF_TORCH if differences(baseline, now_with) else ()
    changes = []
    for case, counters in now.items():
        before = baseline["counters"].get(case, {})
        for counter in dict.fromkeys([*before, *counters]):
            change = Change(case, counter, before.get(counter), counters.get(counter))
            if counter not in left_out and _differs(change):
                changes.append(change)
    return changes


def _differs(change: Change) -> bool:
    if change.was is None or change.now is None:
        return True
    tolerance = TOLERANCES.get((change.case.rsplit("/", 1)[1], change.counter), TOLERANCE)
    return abs(change.now - change.was) > tolerance * change.was or (change.now == 0) != (change.was == 0)


def differences(baseline: Mapping[str, Any], now_with: Mapping[str, str]) -> list[str]:
    """In what the tensors that are made depend on, beside this repository."""
    was = baseline["made with"]
    return [f"{name} {was[name]}, not {now}" for name, now in now_with.items() if was.get(name, now) != now]


def verdict(changes: list[Change]) -> tuple[bool, str]:
    """(whether nothing got worse, what there is to say)."""
    better = [str(change) for change in changes if change.is_better]
    worse = [str(change) for change in changes if not change.is_better]
    lines = []
    for name, found in (("better", better), ("worse", worse)):
        if found:
            lines += [f"{len(found)} counters got {name}:", *(f"  {line}" for line in found)]
    if changes:
        lines.append(f"If that is meant, run {ACCEPT}, and say in the commit why.")
    return not worse, "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """`made with`: versions; `counters`: by case. Empty where there is no baseline yet."""
    return json.loads(path.read_text()) if path.exists() else {"made with": {}, "counters": {}}


def accept(counters: Cases, path: Path) -> None:
    """Make this the baseline of these cases; others stay."""
    kept = read(path)["counters"] | {case: dict(sorted(found.items())) for case, found in counters.items()}
    path.write_text(json.dumps({"made with": made_with(), "counters": dict(sorted(kept.items()))}, indent=1) + "\n")


def made_with() -> dict[str, str]:
    """What OF_TORCH depends on."""
    import torch

    from trainer.model.kernels import cpp as attention_kernel

    kernel = "torch" if attention_kernel.load()[0] is None else "compiled"
    return {"torch": torch.__version__.split("+")[0], "attention kernel": kernel}
