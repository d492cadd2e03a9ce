"""A worker of a dask cluster opens a source once, however many of its threads ask, and lets it go in the end."""

import os
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import distributed
import numpy as np
import pytest
import xarray as xr

from shardio.check.info import describe
from shardio.check.picture import draw
from shardio.check.verify import check, compare, repair
from shardio.rechunk import Request, prepare, run

FILES = 24  # to open them takes long enough for two threads to meet


@pytest.fixture
def source(tmp_path):
    """Files of a date each."""
    for i in range(FILES):
        coordinates = {
            "time": [np.datetime64("2020-01-01", "ns") + np.timedelta64(6 * i, "h")],
            "latitude": ("latitude", np.linspace(90, -90, 7), {"units": "degrees_north"}),
            "longitude": ("longitude", np.linspace(0, 330, 12), {"units": "degrees_east"}),
        }
        fields = {"t": (("time", "latitude", "longitude"), np.full((1, 7, 12), i, np.float32))}
        xr.Dataset(fields, coordinates).to_netcdf(tmp_path / f"{i:02}.nc")
    return tmp_path / "*.nc"


@pytest.fixture
def two_threads():
    """A cluster of one worker process, in which two tasks begin at once."""
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": True, "memory_limit": 0}
    with distributed.LocalCluster(**options, dashboard_address="127.0.0.1:0") as started:
        yield started


def held(process):
    """How many NetCDF files a process has open."""
    found = 0
    for descriptor in os.listdir(f"/proc/{process}/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/{process}/fd/{descriptor}").endswith(".nc")
    return found


@contextmanager
def watched(process):
    """Gives the most NetCDF files that a process has had open at a time."""
    counts, is_over = [0], threading.Event()

    def watch():
        while not is_over.wait(0.002):
            counts.append(held(process))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield lambda: max(counts)
    finally:
        is_over.set()
        watching.join()


def test_two_threads_of_a_worker_share_one_source_and_drop_it(source, two_threads, tmp_path):
    worker = two_threads.workers[0].pid
    request = Request(str(source), str(tmp_path / "b.zarr"), 4, scheduler=two_threads.scheduler_address, sync=False)
    prepared = prepare(replace(request, max_memory=4000))
    assert len(prepared.plan.tasks) > 4
    with watched(worker) as most:
        run(prepared)
    assert most() == FILES
    assert held(worker) == 0


def test_the_next_job_of_a_worker_closes_the_source_of_the_last(source, two_threads, tmp_path):
    """Of a job that did not end well nobody tells the worker."""
    worker = two_threads.workers[0].pid
    request = Request(str(source), str(tmp_path / "b.zarr"), 4, scheduler=two_threads.scheduler_address, sync=False)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepare(request), stop)
    assert held(worker) == FILES
    during = []
    run(prepare(replace(request, destination=str(tmp_path / "c.zarr"))), lambda _: during.append(held(worker)))
    assert during[-1] == FILES


def test_a_finished_run_has_closed_its_files(source, tmp_path):
    prepared = prepare(Request(str(source), str(tmp_path / "b.zarr"), 4, sync=False))
    assert held(os.getpid()) == FILES
    run(prepared)
    assert held(os.getpid()) == 0


def test_info_plot_and_verify_close_what_they_open(source, rechunk, tmp_path):
    rechunk(source, tmp_path / "b.zarr", 4)
    describe(str(source))
    draw(str(source), "t", None, str(tmp_path / "t.png"))
    assert compare(str(tmp_path / "b.zarr"), str(source)) == []
    (tmp_path / "b.zarr" / "data" / "c.0.0.0.0").write_bytes(b"damaged")
    assert repair(str(tmp_path / "b.zarr"), str(source), check(str(tmp_path / "b.zarr"))) == 1
    assert held(os.getpid()) == 0


def test_what_cannot_be_planned_is_closed(source, tmp_path):
    with pytest.raises(Exception, match="memory bound"):
        prepare(Request(str(source), str(tmp_path / "b.zarr"), 4, max_memory=10))
    assert held(os.getpid()) == 0
