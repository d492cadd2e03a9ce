"""Ranks started by the first of them on a machine, each an eye on the others: none outlives the rest."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from trainer.ranks.failure import is_first, remedy, say, tell

GLANCE = 0.2  # seconds between two looks
SECONDS_TO_END = 6.0  # for the first rank to notice by itself that another has ended


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, whose watch kills the first process before it can say why, and looks every 5 s only.

    Args:
      environment: says which rank this process is.
      num_processes, num_nodes: ranks of each machine, and machines.
      command: that the ranks run, for messages; default: what the trainer does, fit or validate.
    """

    def __init__(
        self, environment: ClusterEnvironment, num_processes: int, num_nodes: int, command: str | None = None
    ) -> None:
        super().__init__(environment, num_processes, num_nodes)
        self._command = command
        self._is_launched = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this machine, unless torchrun or SLURM did, the first time; run `function`."""
        if self._command is None and trainer is not None and trainer.state.fn is not None:
            self._command = trainer.state.fn.value
        if self._is_launched:  # by the command, before Lightning comes to it
            return function(*args, **kwargs)
        self._is_launched = True
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ["LOCAL_WORLD_SIZE"] = str(self.num_processes)  # loaders share the cores by it
            self._call_children_scripts()
            self._ending = False
            threading.Thread(target=self._watch_children, name="watch-ranks", daemon=True).start()
        elif "TRAINER_PARENT" in os.environ:
            threading.Thread(target=_watch_parent, name="watch-parent", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """End the other ranks of this machine."""
        self._ending = True
        for child in self.procs:
            child.send_signal(signum)

    def _call_children_scripts(self) -> None:
        say(f"starting {self.num_processes * self.num_nodes} ranks")
        os.environ["TRAINER_PARENT"] = str(os.getpid())
        # Ctrl-C reaches all of them. They ignore it from their first moment on; the first rank ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            super()._call_children_scripts()
        finally:
            signal.signal(signal.SIGINT, handler)
            del os.environ["TRAINER_PARENT"]

    def _watch_children(self) -> None:
        while not self._ending:
            codes = [child.poll() for child in self.procs]
            if any(codes):
                self._end({rank: code for rank, code in enumerate(codes, 1) if code})
            if all(code == 0 for code in codes):
                return
            time.sleep(GLANCE)

    def _end(self, codes: dict[int, int]) -> None:
        killed = {rank: -code for rank, code in codes.items() if code < 0}
        if not killed:
            # It has told why, or its own message says so. This process notices by itself, unless it waits for ever.
            time.sleep(SECONDS_TO_END)
        if not self._ending and is_first():
            rank, number = next(iter((killed or codes).items()))
            how = f"was killed by {signal.Signals(number).name}" if killed else f"ended with exit code {number}"
            cause = ", often for lack of memory" if number == signal.SIGKILL and killed else ""
            rank += self.cluster_environment.node_rank() * self.num_processes
            tell(f"rank {rank} {how}{cause}. All ranks stop. {remedy(self._command or '')}")
        self.kill(signal.SIGKILL)
        os._exit(1)


def _watch_parent() -> None:
    """End with the first rank: a rank that waits for it would wait until its time-out."""
    parent = int(os.environ["TRAINER_PARENT"])
    while os.getppid() == parent:
        time.sleep(GLANCE)
    os._exit(1)


def started_by_others() -> dict[str, int]:
    """Processes per node and nodes, as torchrun or SLURM say; empty where neither started this process."""
    # Of an earlier run of this process the first is left, the second taken away by Lightning.
    if {"LOCAL_WORLD_SIZE", "WORLD_SIZE"} <= os.environ.keys() and "TRAINER_PARENT" not in os.environ:
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect() and "SLURM_NTASKS" in os.environ:
        everywhere = int(os.environ["SLURM_NTASKS"])
        here = everywhere // int(os.environ.get("SLURM_NNODES", "1"))
    else:
        return {}
    return {"devices": here, "num_nodes": everywhere // here}
