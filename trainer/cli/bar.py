"""Progress of forecasts on stderr, by the first rank."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """One line for each forecast."""

    def __init__(self, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(file=sys.stderr)
        self._progress = Progress(*columns, console=console, disable=not shown, redirect_stdout=False)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, name: str) -> Callable[[int, int], None]:
        """What `write` tells after every lead time."""
        task = self._progress.add_task(name, total=None)
        return lambda done, of: self._progress.update(task, completed=done, total=of)
