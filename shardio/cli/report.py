"""What rechunk will do and what verify found, in words and for scripts."""

from __future__ import annotations

from typing import Any

from shardio.rechunk.execute import Result
from shardio.rechunk.request import Prepared
from shardio.source.order import order_of
from shardio.units import duration, size

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
        "already_complete": prepared.is_complete,
    }


def plan_as_text(prepared: Prepared) -> str:
    """The plan, for a person."""
    if prepared.is_complete:
        return f"plan: nothing to do, {prepared.request.destination} is complete"
    plan, layout = prepared.plan, prepared.layout
    dates, variables, ensemble, cells = layout.shape
    memory = f"memory at most {size(plan.peak_memory)}"
    if prepared.request.scheduler:
        who, memory = f"every worker of the cluster: {count(plan.threads, 'thread')}", f"{memory} in each worker"
    else:
        processes = f"{plan.workers} processes x " if plan.workers > 1 else ""
        who = f"{processes}{count(plan.threads, 'thread')}"
    pieces = count(len(plan.pieces), "piece") + " each" * (len(plan.tasks) > 1)
    lines = [
        f"plan: {count(dates, 'date')}, {count(variables, 'variable')}, {count(ensemble, 'member')}, "
        f"{cells} cells -> {layout.grid[3]} grid-chunks of {layout.chunks[3]} cells, Zarr v{layout.zarr_format}, "
        f"{layout.codec}",
        f"  {count(len(plan.tasks), 'task')} in {pieces}; {who}, {count(plan.in_flight, 'task')} in flight",
        f"  read {size(plan.bytes_read)} (amplification {plan.amplification:.2f}), "
        f"write {size(plan.bytes_written)} before compression, {memory}",
    ]
    if prepared.source.statistics is None:
        lines.append("  statistics are computed in the same pass: the source has none")
    if prepared.source.extent.whole_dates:
        lines.append(f"  cells are put in {order_of(prepared.source)} order: every date is read whole")
    if plan.reason:
        lines.append(f"  amplified because {plan.reason}")
    return "\n".join(lines)


def tell_result(result: Result, seconds: float) -> str:
    """What a run ends with."""
    if result.already_complete:
        return (
            f"{result.destination} is already complete: {count(result.resumed_dates, 'date')} x "
            f"{count(result.grid_chunks, 'chunk')}; nothing was written"
        )
    resumed = f" ({result.resumed_dates} dates were there already)" if result.resumed_dates else ""
    rate = result.nbytes / max(seconds, 1e-9) / 2**30
    return (
        f"wrote {result.dates} dates x {result.grid_chunks} chunks, {size(result.nbytes)} "
        f"in {duration(seconds)} ({rate:.2f} GiB/s){resumed}"
    )


def count(number: int, what: str) -> str:
    """1 task, 2 tasks."""
    return f"{number} {what}{'s' * (number != 1)}"


def tell_faults(path: str, source: str | None, faults: int, repaired: int) -> str:
    """What verify says last."""
    fixed = f"{count(repaired, 'date')} repaired; " if repaired else ""
    if faults:
        remedy = f"Repair chunks with: shardio verify {path} --source SOURCE --repair"
        return f"{fixed}{path}: {count(faults, 'fault')}. {remedy}"
    equal = f" and every value equals {source}" if source else ""
    return f"{fixed}{path}: all checksums match{equal}"
