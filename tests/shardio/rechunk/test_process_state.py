"""What a library does to the process it runs in: nothing."""

import threading
import warnings

import pytest

from shardio.rechunk import Request, prepare, run

COUNT_MALLOPT = """
import ctypes, sys
class Watched(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "mallopt":
            print("mallopt")
        return super().__getattr__(name)
ctypes.CDLL = Watched
"""
LIBRARY = """
from shardio.rechunk import Request, prepare, run
print(run(prepare(Request(sys.argv[1], sys.argv[2], 4, sync=False))).dates)
"""
IN_PROCESS = """
import distributed
from shardio.rechunk import Request, prepare, run
options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
with distributed.LocalCluster(**options) as cluster:
    address = cluster.scheduler_address
    print(run(prepare(Request(sys.argv[1], sys.argv[2], 4, sync=False, scheduler=address))).dates)
"""
COMMAND = """
from shardio.cli.main import main
main(["rechunk", sys.argv[1], sys.argv[2], "-n", "4", "--no-fsync"])
"""


@pytest.mark.parametrize("program", [LIBRARY, IN_PROCESS], ids=["here", "on a cluster in this process"])
def test_no_library_call_sets_malloc_of_the_process(program, build, python, tmp_path):
    source = build(tmp_path / "a.zarr").path
    done = python(COUNT_MALLOPT + program, source, tmp_path / "b.zarr")
    assert done.stdout == "5\n", done.stderr


def test_the_command_does(build, python, tmp_path):
    done = python(COUNT_MALLOPT + COMMAND, build(tmp_path / "a.zarr").path, tmp_path / "b.zarr")
    assert "mallopt" in done.stdout.split(), done.stderr


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_filters_of_warnings_are_left_alone_by_threads(zarr_format, build, tmp_path, monkeypatch):
    """They belong to the process: a thread that puts its own back would undo what another set meanwhile."""
    entered = []
    enter = warnings.catch_warnings.__enter__

    def note(self):
        entered.append(threading.current_thread())
        return enter(self)

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", note)
    source = build(tmp_path / "a.zarr", zarr_format, extras=True, statistics=False)
    run(prepare(Request(str(source.path), str(tmp_path / "b.zarr"), 4, sync=False)))
    assert entered
    assert {thread.name for thread in entered} == {threading.main_thread().name}
