"""How many threads, and threads that read: daemons, as a read that hangs must never keep Python from ending."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from shardio.errors import ShardioError

P = ParamSpec("P")
T = TypeVar("T")
SECONDS_TO_END = 1.0

Work = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


def cores() -> int:
    """That this process may use: a batch system often gives a job a few of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each(function: Callable[[T], object], items: Iterable[T], pool: Executor | None) -> None:
    """Call `function` of every item, on the threads of `pool` where there is one.

    When it returns or raises, no call is still running: none writes into a buffer that its owner uses again.
    Raises: what the first item that failed raised, or CancelledError where the pool ended before all were begun;
    calls that had not begun then are left out.
    """
    if pool is None:
        for item in items:
            function(item)
        return
    futures: list[Future[object]] = []
    try:
        for item in items:
            futures.append(pool.submit(function, item))
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        for future in futures:  # not `wait`: it never ends for work that a pool's own shutdown cancelled
            if not future.cancelled():
                future.exception()


class Threads(Executor):
    """An executor whose threads begin with the first work and end with the executor."""

    def __init__(self, count: int, name: str):
        self._count, self._name, self._closed = count, name, False
        self._work: Work = SimpleQueue()
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._work, count).atexit = False
        _alive.add(self)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._closed:
            raise ShardioError("the loader was closed. Make a new one.")
        if not self._threads:
            names = (f"{self._name}-{i}" for i in range(self._count))
            self._threads = [threading.Thread(target=_run, args=(self._work,), name=n, daemon=True) for n in names]
            for thread in self._threads:
                thread.start()
        future: Future[T] = Future()
        self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads; work that has not begun is cancelled, whatever `cancel_futures` says."""
        self._closed = True
        _end(self._work, self._count)
        for thread in self._threads if wait else ():
            thread.join()

    def join(self, seconds: float) -> None:
        """Wait for the threads, not longer than `seconds`."""
        for thread in self._threads:
            thread.join(seconds / self._count)


def _run(work: Work) -> None:
    while (item := work.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del item, future, call  # what was read may be given up while this thread waits


def _end(work: Work, count: int) -> None:
    with suppress(Empty):
        while True:
            if (item := work.get_nowait()) is not None:
                item[0].cancel()
    for _ in range(count):
        work.put(None)


_alive: weakref.WeakSet[Threads] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    # Threads between two reads end here and now, in good order; only one that hangs is left behind.
    for threads in list(_alive):
        threads.shutdown(wait=False)
        threads.join(SECONDS_TO_END)
