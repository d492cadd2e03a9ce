"""What a worker of a cluster does: run one task, with tools that outlive it.

All threads of a worker share one source, one pool and one set of buffers: the plan counts the memory of one, and HDF5
serves one thread of a process.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardio.format.layout import ArrayLayout
from shardio.rechunk.allocator import keep_freed_memory
from shardio.rechunk.blocks import Buffers, write_block
from shardio.rechunk.plan import Plan, Task
from shardio.rechunk.request import Request
from shardio.source.source import Source
from shardio.write.writer import ChunkWriter
from shardio.write.written import WrittenDate


@dataclass(frozen=True)
class Work:
    """One job as its workers see it; `plan` without its tasks, which come one by one, `client` as `here` says it."""

    request: Request
    layout: ArrayLayout
    plan: Plan
    folder: str
    client: str


class Tools:
    """What the tasks of one job share in a worker process."""

    def __init__(self, work: Work) -> None:
        if work.client != name_process():  # a process of the cluster, not one that a user's library call runs in
            keep_freed_memory()
        self.source: Source = work.request.open_source()
        with_moments = self.source.statistics is None
        self.writer = ChunkWriter(Path(work.folder), work.layout, work.plan.threads, work.request.sync, with_moments)
        self.pool = ThreadPoolExecutor(work.plan.threads, "chunk")
        self.buffers = Buffers(work.plan.in_flight)

    def close(self) -> None:
        """Let files and threads go."""
        self.pool.shutdown()
        self.source.close()


class Workshop:
    """The tools of one job at a time. Those of the last one are put away as soon as none of its tasks uses them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: Work | None = None
        self._tools: Tools | None = None
        self._users: dict[Tools, int] = {}

    @contextmanager
    def borrow(self, work: Work) -> Iterator[Tools]:
        """The tools for a job, made by the first of its tasks while the others wait."""
        with self._lock:
            if self._tools is None or self._work != work:
                self._put_away()
                self._tools = Tools(work)
                self._work, self._users[self._tools] = work, 0
            tools = self._tools
            self._users[tools] += 1
        try:
            yield tools
        finally:
            with self._lock:
                self._users[tools] -= 1
                self._close_unused(tools)

    def end(self, folder: str) -> None:
        """Put the tools of the job away that writes to `folder`."""
        with self._lock:
            if self._work is not None and self._work.folder == folder:
                self._put_away()

    def _put_away(self) -> None:
        tools, self._tools, self._work = self._tools, None, None
        if tools is not None:
            self._close_unused(tools)

    def _close_unused(self, tools: Tools) -> None:
        if tools is not self._tools and not self._users[tools]:
            del self._users[tools]
            tools.close()


WORKSHOP = Workshop()  # of this process: a task finds there what the one before it has left


def run_task(task: Task, work: Work) -> list[WrittenDate]:
    """One task, in a worker process."""
    with WORKSHOP.borrow(work) as tools:
        return write_block(tools.source, tools.writer, task, work.plan.pieces, tools.pool, tools.buffers)


def end_job(folder: str) -> None:
    """Close what a worker has open for a job that is done."""
    WORKSHOP.end(folder)


def name_process() -> str:
    """This process, among those of all machines."""
    return f"{socket.gethostname()}:{os.getpid()}"
