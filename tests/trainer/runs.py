"""Runs of the command `trainer` as real processes, at the price of a fork each.

A server imports the trainer once; every run is a fork of it, for several ranks with the variables that torchrun sets.
This file run as a script is that server.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

TINY = [
    *("--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--model.forcings=[lsm,latitude]"),
    *("--model.graph.hidden=ico1", "--model.network.channels=8", "--model.network.num_layers=1"),
    *("--model.network.num_heads=2", "--save_every=1", "--data.threads=1"),
]
NUMBERS = itertools.count()
PATIENCE = 60.0  # seconds for a run of a few steps; what takes longer hangs


def serve() -> None:
    """Fork for every line of JSON, and say how the forks ended."""
    import trainer.cli.fit
    import trainer.cli.main

    children: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            end = time.monotonic() + order["seconds"]
            while order["wait"] not in children and time.monotonic() < end:
                pid, status = os.waitpid(order["wait"], os.WNOHANG)
                if pid:
                    children[pid] = os.waitstatus_to_exitcode(status)
                else:
                    time.sleep(0.01)
            print(json.dumps(children.get(order["wait"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(order)
            code: Any = 0
            try:
                if order["arguments"][0] == "-c":
                    exec(order["arguments"][1], {})
                else:
                    trainer.cli.main.main()
            except SystemExit as end:
                code = end.code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        children.pop(pid, None)  # of an earlier run: numbers of processes come again
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here too: who is told of it may kill the group before the child has made it
        print(pid, flush=True)


def _become(order: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    started = Path(f"{order['log']}.started")
    started.touch()

    def watch(event: str, what: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and "python" in str(what[0]):
            started.write_text(f"{started.read_text()}{what[1]}\n")

    sys.addaudithook(watch)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{order['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    # Lightning starts further ranks by this name.
    sys.argv = [str(Path(sysconfig.get_path("scripts")) / "trainer"), *order["arguments"]]


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@cache
def waves() -> Path:
    """A week of waves on 544 cells, in 4 grid-chunks; never changed."""
    from click.testing import CliRunner

    from shardio.cli.main import main

    folder = Path(tempfile.mkdtemp(prefix="waves-"))
    atexit.register(shutil.rmtree, folder)
    words = ["synth", str(folder / "o8.zarr"), "--grid", "o8", "--dates", "28", "--grid-chunks", "4", "--no-fsync"]
    assert CliRunner().invoke(main, words).exit_code == 0
    return folder / "o8.zarr"


@cache
def server() -> Server:
    """One for all tests; it ends with them, when its input closes."""
    return Server()


class Run:
    """`trainer *arguments` on so many ranks, under way; or, of `-c program`, a Python program.

    Args: folder: where it runs; it writes to `run` there. launcher: whose variables ranks are given.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        launcher: str = "torchrun",
    ):
        self.folder, self.output = folder, folder / "run"
        number = next(NUMBERS)
        self._logs = [folder / f"log-{number}-{rank}" for rank in range(ranks)]
        rank_variables = [{}] if ranks == 1 else list(_variables(ranks, launcher))
        self.pids = [
            server().ask(
                arguments=arguments, log=str(log), folder=str(folder), environment=(environment or {}) | variables
            )
            for log, variables in zip(self._logs, rank_variables, strict=True)
        ]

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes of all ranks; AssertionError if one does not end."""
        end = time.monotonic() + seconds
        codes = [server().ask(wait=pid, seconds=end - time.monotonic()) for pid in self.pids]
        hanging = [rank for rank, code in enumerate(codes) if code is None]
        if hanging:
            self.kill()
        assert not hanging, f"ranks {hanging} did not end in {seconds} s:\n{self.errors}"
        return codes

    def kill(self, rank: int | None = None) -> None:
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def until(self, happened: Callable[[], Any], seconds: float = PATIENCE) -> None:
        """Wait for something to happen while it runs."""
        end = time.monotonic() + seconds
        while not happened():
            ended = [pid for pid in self.pids if gone(pid)]
            assert not ended or happened(), f"ended before:\n{self.errors}"
            assert time.monotonic() < end, f"did not happen in {seconds} s:\n{self.errors}"
            time.sleep(0.001)

    @property
    def errors(self) -> str:
        """What all ranks wrote to stderr."""
        return "".join(log.with_suffix(".err").read_text() for log in self._logs if log.with_suffix(".err").exists())

    @property
    def started(self) -> str:
        """The processes that the first rank started."""
        return self._logs[0].with_suffix(".started").read_text()

    @property
    def printed(self) -> str:
        """What all ranks wrote to stdout."""
        return "".join(log.with_suffix(".out").read_text() for log in self._logs)

    @property
    def steps(self) -> int:
        """Logged so far by the newest version."""
        logs = sorted(self.output.glob("logs/version_*/metrics.csv"))
        return max(trace(self.output), default=0) if logs else 0


def gone(pid: int) -> bool:
    """Whether a process has ended, or waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def fit(folder: Path, *arguments: str, ranks: int = 1) -> Run:
    """A run of `trainer fit` to its end, that went well."""
    run = Run(folder, "fit", *arguments, ranks=ranks)
    assert run.wait() == [0] * ranks, run.errors
    return run


def trace(output: Path, name: str = "train/loss", version: str = "*") -> dict[int, str]:
    """The logged digits of each step; a step logged twice, by a run and by the resumed one, must have the same."""
    values: dict[int, str] = {}
    for path in sorted(output.glob(f"logs/version_{version}/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get(name):
                    step = int(row["step"])
                    assert values.setdefault(step, row[name]) == row[name], f"step {step} of {path}"
    return values


def checkpoint(output: Path, name: str = "last") -> dict[str, Any]:
    import torch

    loaded: dict[str, Any] = torch.load(output / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return loaded


def _variables(ranks: int, launcher: str) -> Iterator[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in range(ranks):
        if launcher == "slurm":
            yield shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        else:
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
            yield shared | places | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}


def tiny(*more: str, dataset: Path | None = None) -> list[str]:
    """Arguments of a training that takes milliseconds a step."""
    return [*TINY, f"--data.dataset={dataset or waves()}", *more]


if __name__ == "__main__":
    serve()
