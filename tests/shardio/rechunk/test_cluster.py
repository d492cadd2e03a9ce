"""Other processes write the same bytes, and losing one of them loses nothing."""

import json
import os
import signal
import subprocess
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path

import distributed
import pytest

from shardio.errors import PlanError
from shardio.write.job import partial_of


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "a.zarr"
    return build(
        path, 2, shape=(60, 3, 1, 4001), chunks=(2, 3, 1, 1500), missing=(7,), statistics=False, dtype="f8"
    ).path


@pytest.fixture(scope="module")
def alone(source, rechunk, tree, tmp_path_factory):
    """By Zarr format, every file that one process writes."""
    found = {}
    for zarr_format in (2, 3):
        destination = tmp_path_factory.mktemp("alone") / "b.zarr"
        rechunk(source, destination, 13, zarr_format=zarr_format)
        found[zarr_format] = tree(destination)
    return found


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_local_workers_write_the_same_bytes(zarr_format, source, alone, process, tree, tmp_path):
    words = ("rechunk", source, tmp_path / "b.zarr", "-n", 13, "--zarr-format", zarr_format, "--max-memory", "2MB")
    done = process(*words, "--workers", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dates"] == 60
    assert tree(tmp_path / "b.zarr") == alone[zarr_format]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_scheduler_writes_the_same_bytes(zarr_format, source, alone, rechunk, cluster, tree, tmp_path):
    address = cluster.scheduler_address
    rechunk(source, tmp_path / "b.zarr", 13, zarr_format=zarr_format, max_memory=900_000, scheduler=address)
    assert tree(tmp_path / "b.zarr") == alone[zarr_format]


def test_resume_after_killed_workers_is_bit_identical(source, alone, begin, cluster, tree, tmp_path):
    destination = tmp_path / "b.zarr"
    words = ("rechunk", source, destination, "-n", 13, "--zarr-format", 2, "--max-memory", "900kB")
    with begin(*words, "--scheduler", cluster.scheduler_address) as running:
        for killed in range(2):
            while running.poll() is None and len(list(partial_of(destination).glob("dataset-*/data/*.*"))) < 40:
                time.sleep(0.001)
            assert running.poll() is None, "the run was over before a worker could be killed"
            workers = [worker.pid for worker in cluster.workers.values() if worker.pid]
            os.kill(workers[killed % len(workers)], signal.SIGKILL)
        _, said = running.communicate()
    assert running.returncode == 0, said
    assert tree(destination) == alone[2]


def test_a_killed_client_resumes_on_the_cluster_bit_identical(source, alone, begin, process, cluster, tree, tmp_path):
    destination = tmp_path / "b.zarr"
    words = ("rechunk", source, destination, "-n", 13, "--zarr-format", 2, "--max-memory", "900kB")
    on_cluster = ("--scheduler", cluster.scheduler_address)
    with begin(*words, *on_cluster) as running:
        while running.poll() is None and len(list(partial_of(destination).glob("dataset-*/data/*.*"))) < 100:
            time.sleep(0.001)
        running.kill()
        running.communicate()
    assert not destination.exists()
    done = process(*words, *on_cluster)
    assert done.returncode == 0, done.stderr
    assert tree(destination) == alone[2]


def test_error_in_a_worker_is_one_clear_message(build, cluster, cli, tmp_path):
    source = build(tmp_path / "a.zarr").path
    (source / "data" / "3.0.0.0").unlink()
    done = cli("rechunk", source, tmp_path / "b.zarr", "-n", 4, "--scheduler", cluster.scheduler_address)
    assert done.exit_code == 1
    assert "3.0.0.0" in done.stderr
    assert "is missing" in done.stderr
    assert not (tmp_path / "b.zarr").exists()


def test_workers_that_join_late_are_waited_for_and_all_get_work(source, alone, begin, tree, tmp_path):
    """As those of a batch system do: how many there are is not known when the run begins."""
    options = {"n_workers": 0, "threads_per_worker": 1, "processes": False, "protocol": "tcp"}
    with distributed.LocalCluster(**options, dashboard_address="127.0.0.1:0") as late:
        address, tasks = late.scheduler_address, late.scheduler.tasks
        words = ("rechunk", source, tmp_path / "b.zarr", "-n", 13, "--zarr-format", 2, "--max-memory", "900kB")
        with begin(*words, "--scheduler", address) as running:
            begun, before = len(tasks), -1
            while not begun or begun != before:
                assert running.poll() is None, running.stderr.read()
                time.sleep(0.2)
                begun, before = len(tasks), begun
            late.scale(6)
            most = 0
            while running.poll() is None:
                most = max(most, len(tasks))
                time.sleep(0.001)
            _, said = running.communicate()
    assert running.returncode == 0, said
    assert f"no worker has joined {address} yet: waiting for the first\n" in said
    assert most > 2 * begun
    assert tree(tmp_path / "b.zarr") == alone[2]


@pytest.fixture
def killable(tmp_path):
    """(scheduler's process, its address), with one worker."""
    file, dask = tmp_path / "scheduler.json", Path(sysconfig.get_path("scripts")) / "dask"
    words = {"scheduler": ("--port", "0", "--no-dashboard"), "worker": ("--nthreads", "1", "--no-nanny")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as stack:
        started = []
        for name, more in words.items():
            process = stack.enter_context(subprocess.Popen([dask, name, "--scheduler-file", file, *more], **quiet))
            stack.callback(process.kill)
            started.append(process)
            while not file.exists():
                assert process.poll() is None
                time.sleep(0.05)
        yield started[0], json.loads(file.read_text())["address"]


def test_a_lost_scheduler_is_told_and_the_run_goes_on_without(source, alone, begin, rechunk, killable, tree, tmp_path):
    (scheduler, address), destination = killable, tmp_path / "b.zarr"
    words = ("rechunk", source, destination, "-n", 13, "--zarr-format", 2, "--max-memory", "900kB", "--no-fsync")
    with begin(*words, "--scheduler", address) as running:
        while len(list(partial_of(destination).glob("dataset-*/data/*.*"))) < 40:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.001)
        scheduler.kill()
        _, said = running.communicate()
    assert running.returncode == 1
    assert f"Error: the dask scheduler at {address} was lost" in said
    assert "run the same command again to continue" in said
    assert "Traceback" not in said
    rechunk(source, destination, 13, zarr_format=2, max_memory=900_000)
    assert tree(destination) == alone[2]


def test_no_scheduler_is_a_clear_error(source, rechunk, tmp_path):
    with pytest.raises(PlanError, match="Start one with `dask scheduler`"):
        rechunk(source, tmp_path / "b.zarr", 13, scheduler="nonsense://here")
    assert not (tmp_path / "b.zarr").exists()
