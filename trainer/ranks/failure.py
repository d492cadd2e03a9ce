"""When a rank fails, all stop within seconds, and one message says why: that of the first error.

rank 1 throws        it writes its name into the ranks' common store, tells its message, ends
rank 0 notices       that the connection is gone, finds the name in the store, and ends without a word
rank 1 is killed     no name is in the store: rank 0 tells who is missing
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed as dist

from shardio.errors import ShardioError

FIRST = "trainer/first_to_fail"
SIGNS_OF_LOSS = (
    *("Connection closed by", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/"),
    *("ncclRemoteError", "NCCL communicator was aborted", "caught collective operation timeout"),
)
REASON_OF_NCCL = "Last error:"  # after pages on where it was noticed
REMEDIES = {  # by command
    "fit": "Resume with --ckpt_path last.",
    "validate": "Run the same command again.",
    "predict": "Run the same command again: it goes on where it stopped.",
}
# Rank 0 waits less than the others: it knows most about who is missing, and keeps the store.
SECONDS_FOR_THE_FIRST = {"rank 0": 2.0, "others": 4.0}


class Stderr:
    """Where messages go, also while a thread keeps away from it what torch's C++ writes, pages of it."""

    def __init__(self) -> None:
        self._lock, self._silences, self._real = threading.Lock(), 0, 2

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing gets there but by `write`; several threads may want it so at once."""
        with self._lock:
            if not self._silences:
                self._real = os.dup(2)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 2)
                os.close(nowhere)
            self._silences += 1
        try:
            yield
        finally:
            with self._lock:
                self._silences -= 1
                if not self._silences:
                    os.dup2(self._real, 2)
                    os.close(self._real)
                    self._real = 2

    def write(self, text: str) -> None:
        """In one piece, so that lines of several ranks do not mix."""
        with self._lock:
            os.write(self._real, text.encode())


STDERR = Stderr()


def rank() -> int | None:
    """Of this process; None where it is alone or not yet placed."""
    if dist.is_initialized():
        return dist.get_rank() if dist.get_world_size() > 1 else None
    name = next((name for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), None)
    return None if name is None else int(os.environ[name])


def lost_a_rank(error: BaseException) -> bool:
    """Whether this is only the echo of what happened to another rank.

    An error of NCCL alone is none: two ranks on one GPU are told to all ranks alike, and no other rank tells of it.
    """
    if isinstance(error, ShardioError) or not isinstance(error, RuntimeError):
        return False
    is_network = isinstance(error, dist.DistError) and not isinstance(error, dist.DistBackendError)
    return is_network or any(sign in str(error) for sign in SIGNS_OF_LOSS)


def is_first() -> bool:
    """Claim to be the first rank that fails; False where another was, or where the ranks' store is gone with it."""
    if not dist.is_initialized():
        return _speaks_for_its_node()
    me = str(dist.get_rank())
    try:
        with STDERR.silent():
            answer: bytes = _store().compare_set(FIRST, "", me)
    except RuntimeError:
        return True  # rank 0 is gone with the store, perhaps killed: better one message too many
    return answer.decode() == me


def remedy(command: str) -> str:
    """What to do when the ranks of a command were stopped."""
    return REMEDIES.get(command, "")


def tell(message: str, debug: bool = False) -> None:
    """One message on stderr; the traceback only if asked for."""
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    STDERR.write(f"Error: {message}\n")


def stop(
    error: BaseException, command: str, debug: bool = False, end_others: Callable[[], None] = lambda: None
) -> NoReturn:
    """Tell the error if it is the first of all ranks, and leave at once, without waiting for ranks that hang.

    Args:
      error: what this rank failed with.
      command: that failed: fit, validate, predict.
      debug: with its traceback.
      end_others: ends the ranks that this one started.
    """
    where = "" if rank() is None else f"rank {rank()}: "
    if not lost_a_rank(error):
        if is_first():
            tell(where + _words(error, debug), debug)
    else:
        told = _another_told()
        if told is None:
            tell(
                f"{where}stopped with rank 0, which was killed, often for lack of memory, if it left no message. "
                f"{remedy(command)}",
                debug,
            )
        elif not told and is_first():
            tell(
                f"{where}stopped, because the connection to another rank was lost. Without a message of that rank it "
                f"was killed, often for lack of memory, or hangs. {remedy(command)} ({_first_line(error)})",
                debug,
            )
    sys.stderr.flush()
    end_others()
    os._exit(1)


def _words(error: BaseException, debug: bool) -> str:
    if isinstance(error, ShardioError):
        return str(error)
    advice = "" if debug else " (--debug shows where)"
    if isinstance(error, dist.DistBackendError) and REASON_OF_NCCL in str(error):
        reason = str(error).partition(REASON_OF_NCCL)[2].strip().partition("\n")[0]
        return f"NCCL cannot connect the ranks: {reason}. NCCL_DEBUG=WARN tells more{advice}"
    return f"{type(error).__name__}: {error}{advice}"


def _another_told() -> bool | None:
    """Wait a little for the rank whose error came first: it may still be at its message. None if rank 0 is gone."""
    if not dist.is_initialized():
        return False
    end = time.monotonic() + SECONDS_FOR_THE_FIRST["others" if dist.get_rank() else "rank 0"]
    try:
        while time.monotonic() < end:
            with STDERR.silent():
                if _store().check([FIRST]):
                    return True
            time.sleep(0.05)
    except RuntimeError:
        return None  # and its store with it
    return False


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _speaks_for_its_node() -> bool:
    """Before the ranks know one another, those that torchrun or SLURM started would all tell the same."""
    started_by_others = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return not started_by_others or local == "0"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def say(what: str) -> None:
    """What takes seconds and is no step yet."""
    if sys.stderr.isatty() and rank() in (0, None):
        print(f"{what} ...", file=sys.stderr, flush=True)
