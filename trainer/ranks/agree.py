"""What is on the file system is found out by the first rank and told to the others: two that look may see two things.

On a shared file system a rank of another machine may see what was there seconds ago. If one rank goes on with a run
and another begins it, they wait for each other for ever, or train two models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shardio.errors import ShardioError
from trainer.comm import Comm
from trainer.ranks.failure import rank
from trainer.ranks.launcher import started_by_others

Found = TypeVar("Found")


@dataclass(frozen=True)
class Finding(Generic[Found]):
    """What the first rank has found, or why it cannot go on; neither on the other ranks, until they are told."""

    found: Found | None = None
    refusal: ShardioError | None = None


def look(find: Callable[[], Found]) -> Finding[Found]:
    """What `find` finds, on the first rank, before the ranks know one another.

    Raises: the ShardioError of `find`, where no rank waits for the answer: this process has yet to start them.
    """
    if not _is_first():
        return Finding()
    try:
        return Finding(find())
    except ShardioError as error:
        if not started_by_others() and "NODE_RANK" not in os.environ:
            raise
        return Finding(refusal=error)


def hear(finding: Finding[Found], world: Comm) -> Found:
    """What the first rank has found, on all ranks, which call this together once they know one another.

    Raises: its ShardioError on the first rank, which tells it; SystemExit on the others.
    """
    told = world.tell(finding, "what the first rank has found")
    if told.refusal is not None:
        raise told.refusal if world.rank == 0 else SystemExit(1)
    assert told.found is not None
    return told.found


def _is_first() -> bool:
    """Of all machines, also before the ranks know one another."""
    return rank() in (0, None) and int(os.environ.get("NODE_RANK", "0")) == 0
