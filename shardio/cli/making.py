"""Make a dataset, as `shardio rechunk` and `shardio synth` do: show the plan, run with progress, end with one fact."""

from __future__ import annotations

import json
import time

import click

from shardio.cli.progress import display
from shardio.cli.report import plan_as_json, plan_as_text, tell_result
from shardio.rechunk import cluster
from shardio.rechunk.allocator import keep_freed_memory
from shardio.rechunk.execute import Progress, run
from shardio.rechunk.request import Request, prepare


def make(request: Request, dry_run: bool, as_json: bool) -> None:
    """Plan and progress go to stderr, the result to stdout; of a dry run the plan is the result."""
    keep_freed_memory()  # from here on: coordinates are read and hashed, and every chunk is encoded into new bytes
    prepared = prepare(request)
    if dry_run and as_json:
        click.echo(json.dumps(plan_as_json(prepared), indent=1))
        return
    click.echo(plan_as_text(prepared), err=not dry_run)
    if dry_run:
        return
    began = time.monotonic()
    if request.scheduler and not prepared.is_complete:
        click.echo(
            f"waiting for the dask scheduler at {request.scheduler}, {cluster.SECONDS_TO_CONNECT} s at most", err=True
        )
    with display("rechunk", len(prepared.source.dates)) as bar:

        def report(progress: Progress) -> None:
            bar.update(progress.dates, progress.nbytes)

        result = run(prepared, report)
    seconds = time.monotonic() - began
    click.echo(json.dumps({**vars(result), "seconds": seconds}) if as_json else tell_result(result, seconds))
