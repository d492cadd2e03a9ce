"""How far long work is: a bar on a terminal, a line now and then in a log. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from shardio.units import duration, rate_of

SECONDS_BETWEEN_LINES = 30.0


class Display(Protocol):
    """A context that is told `update(done, nbytes)`."""

    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, done: int, nbytes: int = 0) -> None:
        """`done` dates in all; `nbytes` decoded bytes in this run."""


def display(what: str, of: int, begun: int = 0) -> Display:
    """The display that suits stderr; `begun` dates were done before this run."""
    return Bar(what, of, begun) if sys.stderr.isatty() else Lines(what, of, begun)


class Bar:
    """Dates, bytes, GB/s and time left."""

    def __init__(self, what: str, of: int, begun: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("dates  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(what, total=of, completed=begun, rate="")
        self._start = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, nbytes: int = 0) -> None:
        rate = rate_of(nbytes, time.monotonic() - self._start) if nbytes else ""
        self._progress.update(self._task, completed=done, rate=rate)


class Lines:
    """A line every half minute, for logs."""

    def __init__(self, what: str, of: int, begun: int):
        self._what, self._of, self._begun = what, of, begun
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, done: int, nbytes: int = 0) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        left = (now - self._start) / max(done - self._begun, 1) * (self._of - done)
        rate = f", {rate_of(nbytes, now - self._start)}" if nbytes else ""
        print(f"{self._what}: {done} of {self._of} dates{rate}, {duration(left)} left", file=sys.stderr, flush=True)
