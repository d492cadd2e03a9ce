"""Four gloo processes that do what tests tell them; this file run as a script is such a rank.

`run(function, [arguments of rank 0, of rank 1, ...])` calls function(rank, comm, **arguments) on as many ranks.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from trainer.comm import Alone, Comm, TorchComm

RANKS = 4
GROUPS = ((0, 1), (2, 3), (0, 1, 2), (0, 1, 2, 3))
TIME_TO_START = timedelta(seconds=120)
PATIENCE = timedelta(seconds=60)  # after it gloo gives up a collective that some rank never joins

_comms: dict[tuple[int, ...], Comm] = {}


class Pool:
    """The processes: started when first used, and anew after a failure, which leaves collectives half done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts = folder, 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, function: Callable[..., Any], arguments: Sequence[dict[str, Any]]) -> list[Any]:
        """What the function returns on each rank of a group of that size."""
        if not self.processes:
            self._start()
        used = self.processes[: len(arguments)]
        where = function.__code__.co_filename, function.__name__
        for process, more in zip(used, arguments, strict=True):
            process.stdin.write(pickle.dumps((*where, len(arguments), more)))
            process.stdin.flush()
        replies = [pickle.load(process.stdout) for process in used]
        failures = [reply for good, reply in replies if not good]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [reply for _, reply in replies]

    def stop(self) -> None:
        """They wait for their next task; taking torch down in good order takes seconds."""
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes = []

    def _start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-W", "error", __file__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        meeting = str(self.folder / f"store-{self.starts}")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen([*command, str(rank), meeting], env=environment, **pipes) for rank in range(RANKS)
        ]


def comm_of(ranks: Sequence[int]) -> Comm:
    """In a rank: the communicator of these ranks."""
    return Alone() if len(ranks) == 1 else _comms[tuple(ranks)]


def serve(rank: int, meeting: str) -> None:
    """Answer until killed."""
    torch.set_num_threads(1)
    store = f"file://{meeting}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=TIME_TO_START)
    for ranks in GROUPS:
        group = dist.new_group(list(ranks), timeout=PATIENCE)
        if rank in ranks:
            _comms[ranks] = TorchComm(group)
    replies = sys.stdout.buffer
    with redirect_stdout(sys.stderr):
        while True:
            path, name, ranks, more = pickle.load(sys.stdin.buffer)
            try:
                function = getattr(_module(Path(path)), name)
                reply = (True, function(rank, comm_of(range(ranks)), **more))
            except Exception as error:
                reply = (False, f"rank {rank}: {error!r}")
            pickle.dump(reply, replies)
            replies.flush()


def _module(path: Path) -> ModuleType:
    """By path: under the name that pytest has for it, it could not be imported here."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


if __name__ == "__main__":
    import ranks  # this file under its name, which the functions import too

    ranks.serve(int(sys.argv[1]), sys.argv[2])
