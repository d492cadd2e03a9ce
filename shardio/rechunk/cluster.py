"""The same tasks on a dask cluster: K local processes, or the workers of a scheduler (SLURM, Kubernetes, ssh).

Workers write chunks and return their checksums; the client alone writes the ledger. Losing a worker loses its tasks,
which dask gives to another.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardio.errors import OutputError, PlanError
from shardio.format.layout import ArrayLayout
from shardio.rechunk.plan import Plan, Task
from shardio.rechunk.worker import Work, end_job, name_process, run_task
from shardio.write.written import WrittenDate

if TYPE_CHECKING:
    from shardio.rechunk.request import Request

RETRIES = 2
AHEAD = 3  # tasks submitted for one that a worker runs
SECONDS_TO_CONNECT = 20
LOGGER = logging.getLogger("distributed.client")
SECONDS_BETWEEN_COUNTS = 0.2  # of the workers


def execute(
    request: Request, layout: ArrayLayout, plan: Plan, folder: Path, todo: list[Task]
) -> Iterator[list[WrittenDate]]:
    """Run tasks on the cluster, a bounded number submitted at a time, and give back what each wrote.

    Raises: OutputError where the scheduler, or all workers that tried a task, were lost; PlanError where none answers.
    """
    from distributed import as_completed
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    with ExitStack() as stack:
        stack.callback(LOGGER.setLevel, LOGGER.level)
        LOGGER.setLevel(logging.CRITICAL)  # it logs pages where the scheduler is lost, which we tell in a line
        client = _client(request, plan, stack)
        workers, counted = len(client.nthreads()), time.monotonic()
        if request.scheduler and not workers:
            print(f"no worker has joined {request.scheduler} yet: waiting for the first", file=sys.stderr, flush=True)
        queue = iter(todo)
        running: Any = as_completed()  # type: ignore[no-untyped-call]
        # Without its tasks: the plan goes along with each of them.
        work = Work(request, layout, replace(plan, tasks=()), str(folder.absolute()), name_process())

        def submit() -> None:
            """As many as keep the workers busy that are there by now: those of a batch system join late."""
            nonlocal workers, counted
            if time.monotonic() - counted > SECONDS_BETWEEN_COUNTS:
                with suppress(OSError):  # of a scheduler that is lost, as the next result tells
                    workers, counted = len(client.nthreads()), time.monotonic()
            most = AHEAD * max(1, workers) * plan.in_flight
            for task in islice(queue, max(0, most - running.count())):
                running.add(client.submit(run_task, task, work, pure=False, retries=RETRIES))

        submit()
        for future in running:
            try:
                yield future.result()
            except KilledWorker as error:
                raise OutputError(
                    f"dask lost every worker that tried a task ({error}). Give workers more memory, or lower "
                    "--max-memory, then run the same command again to continue."
                ) from error
            except (FutureCancelledError, CommClosedError) as error:
                raise OutputError(
                    f"the dask scheduler{f' at {request.scheduler}' if request.scheduler else ''} was lost ({error}). "
                    "Start it again with workers, then run the same command again to continue."
                ) from error
            submit()
        # Workers that live on would keep files open, and buffers. Where this fails, their next job closes them.
        client.run(end_job, work.folder, on_error="ignore")


def _client(request: Request, plan: Plan, stack: ExitStack) -> Any:
    import distributed

    open_client: Any = distributed.Client
    open_cluster: Any = distributed.LocalCluster

    if request.scheduler:
        try:
            return stack.enter_context(open_client(request.scheduler, timeout=f"{SECONDS_TO_CONNECT}s"))
        except (OSError, ValueError) as error:
            raise PlanError(
                f"no dask scheduler answers at {request.scheduler} ({error}). Start one with `dask scheduler`."
            ) from error
    # The plan keeps the memory bound; dask's own limit would kill workers over the page cache.
    cluster = stack.enter_context(
        open_cluster(
            n_workers=plan.workers,
            threads_per_worker=plan.in_flight,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",  # any free port: a taken one costs a warning and a socket
        )
    )
    return stack.enter_context(open_client(cluster))
