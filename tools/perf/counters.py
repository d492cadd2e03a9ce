"""What is counted while a piece of work is done once: the same numbers on every machine, hence good for a gate.

bytes_read     by the kernel's own count of what this process asked it to read: no way to read escapes it but mmap
opens          of files with fields, for reading and for writing
messages       collectives that this rank took part in, and bytes_sent by them to other ranks
flops          of matrix products, forward and backward
peak_bytes     of living tensors (trainer/plan/live_bytes.py); of rechunking, of arrays and chunks (tracemalloc)
allocations    of tensors
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tools.trainer_memory import living_tensors
from trainer.plan.live_bytes import LiveBytes

Counters = dict[str, int]


def count(work: Callable[[], Any], folder: Path, strangers: set[int]) -> Counters:
    """Of doing it. It should have been done before: what is made once does not count.

    It is done twice: to count FLOPs, torch keeps tensors alive that would be gone.

    Args: work; folder: of all its files; strangers: ids of tensors that have nothing to do with it.
    """
    messages, live, opens = Messages(), LiveBytes(), opens_below(folder)
    mine = [tensor for tensor in living_tensors() if id(tensor) not in strangers]
    live.hold("before", mine)
    del mine
    made, opened, before = live.made, len(opens), bytes_read()
    with live, messages:
        work()
    counters = {"bytes_read": bytes_read() - before, "opens": len(opens) - opened}
    counters |= {"messages": messages.number, "bytes_sent": messages.sent}
    counters |= {"peak_bytes": live.peak, "allocations": live.made - made}
    with FlopCounterMode(display=False) as flops:
        work()
    return counters | {"flops": int(flops.get_total_flops())}


def bytes_read() -> int:
    """By this process since it began, as the kernel counts them."""
    return _from_kernel("/proc/self/io", "rchar:")


def peak_resident(reset: bool = False) -> int:
    """Bytes of memory that this process had at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * _from_kernel("/proc/self/status", "VmHWM:")


def _from_kernel(path: str, name: str) -> int:
    with open(path) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


_opens: dict[str, list[str]] = {}
FIELDS = f"{os.sep}data{os.sep}"  # how often a ledger is opened depends on which thread is done first


def opens_below(folder: Path) -> list[str]:
    """A list that grows with every file with fields below the folder that this process opens, from now on."""
    if not _opens:
        sys.addaudithook(_hear)  # for ever: Python cannot take it back
    return _opens.setdefault(f"{folder}{os.sep}", [])


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        for folder, opened in _opens.items():
            if path.startswith(folder) and FIELDS in path:
                opened.append(path)


class UncountedError(RuntimeError):
    """A collective that the count does not know."""


def ring(nbytes: int, ranks: int) -> int:
    """What a rank sends in an all-reduce that wastes nothing."""
    return 2 * (ranks - 1) * nbytes // ranks


class Messages(TorchDispatchMode):
    """Sees every collective of this thread, however it is called.

    Args: rank, ranks: of the group; default: of the world.

    Attributes:
      number: of collectives.
      sent: bytes to other ranks; an all-reduce counts as the ring that it is at best.
    """

    def __init__(self, rank: int | None = None, ranks: int | None = None) -> None:
        super().__init__()
        self.number, self.sent, self._group = 0, 0, (rank, ranks)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.number += 1
            self.sent += self._bytes(function._opname, args)
        return function(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> int:
        rank, ranks = self._group
        if rank is None or ranks is None:
            rank, ranks = dist.get_rank(), dist.get_world_size()
        if name == "barrier":
            return 0
        if name == "allreduce_":
            return sum(ring(_size(tensor), ranks) for tensor in args[0])
        if name == "alltoall_base_":
            given, counts = args[1], args[4] or [len(args[1]) // ranks] * ranks
            return _size(given) * (sum(counts) - counts[rank]) // max(1, sum(counts))
        if name == "allgather_":
            return sum(map(_size, args[1])) * (ranks - 1)
        raise UncountedError(f"c10d.{name} is used, and its bytes are not counted. Add it to {__file__}.")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def stored(folder: Path) -> Counters:
    """What lies on disk below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"bytes_written": sum(path.stat().st_size for path in files), "files": len(files)}
