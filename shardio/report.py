"""What rechunk will do and what verify found, in words and for scripts."""

from __future__ import annotations

from typing import Any

from shardio.order import order_of
from shardio.progress import size
from shardio.rechunk import Prepared

Json = dict[str, Any]


def plan_as_json(prepared: Prepared) -> Json:
    """The plan, for a script."""
    plan, layout = prepared.plan, prepared.layout
    return {
        "source": prepared.request.source,
        "destination": prepared.request.destination,
        "shape": list(layout.shape),
        "chunks": list(layout.chunks),
        "zarr_format": layout.zarr_format,
        "codec": str(layout.codec),
        "order": order_of(prepared.source),
        "tasks": len(plan.tasks),
        "pieces_per_task": len(plan.pieces),
        "bytes_needed": plan.bytes_needed,
        "bytes_read": plan.bytes_read,
        "read_amplification": plan.amplification,
        "bytes_written": plan.bytes_written,
        "peak_memory": plan.peak_memory,
        "workers": plan.workers,
        "threads": plan.threads,
        "tasks_in_flight": plan.in_flight,
        "reason": plan.reason,
    }


def plan_as_text(prepared: Prepared) -> str:
    """The plan, for a person."""
    plan, layout = prepared.plan, prepared.layout
    dates, variables, ensemble, cells = layout.shape
    lines = [
        f"plan: {dates} dates, {variables} variables, {ensemble} members, {cells} cells "
        f"-> {layout.grid[3]} grid-chunks of {layout.chunks[3]} cells, Zarr v{layout.zarr_format}, {layout.codec}",
        f"  {len(plan.tasks)} tasks in {len(plan.pieces)} pieces each; {plan.workers} process(es) "
        f"x {plan.threads} threads, {plan.in_flight} tasks in flight",
        f"  read {size(plan.bytes_read)} (amplification {plan.amplification:.2f}), "
        f"write {size(plan.bytes_written)} before compression, memory at most {size(plan.peak_memory)}",
    ]
    if prepared.source.statistics is None:
        lines.append("  statistics are computed in the same pass: the source has none")
    if prepared.source.extent.whole_dates:
        lines.append(f"  cells are put in {order_of(prepared.source)} order: every date is read whole")
    if plan.reason:
        lines.append(f"  amplified because {plan.reason}")
    return "\n".join(lines)


def verdict(path: str, source: str | None, faults: int, repaired: int) -> str:
    """What verify says last."""
    fixed = f"{repaired} date(s) repaired; " if repaired else ""
    if faults:
        return f"{fixed}{path}: {faults} fault(s). Repair chunks with: shardio verify {path} --source SOURCE --repair"
    equal = f" and every value equals {source}" if source else ""
    return f"{fixed}{path}: all checksums match{equal}"
