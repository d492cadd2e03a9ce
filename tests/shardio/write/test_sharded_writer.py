"""Many ranks write one dataset: on a slow disk, on a full one, killed, and at odds with each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardio import Description, ShardedWriter, open_dataset
from shardio.check import verify
from shardio.errors import DatasetError, OutputError
from shardio.write.job import partial_of
from shardio.write.ledgers import lock_ranks
from shardio.write.sharded_writer import is_complete

CELLS, CHUNK, DATES, VARIABLES = 103, 20, 12, ("t", "q")
OWN = (range(0, 2), range(2, 5), range(5, 6))  # of three ranks; the last chunk has 3 cells
FIELDS = np.random.default_rng(0).standard_normal((DATES, 2, 2, CELLS)).astype(np.float32)


def about(cells: int = CELLS, chunk_cells: int = CHUNK, dates: int = DATES) -> Description:
    return Description(
        np.datetime64("2020-01-01", "s") + np.arange(dates) * np.timedelta64(21600, "s"),
        VARIABLES,
        np.linspace(80.0, -80.0, cells),
        np.linspace(0.0, 350.0, cells),
        2,
        chunk_cells,
        {name: np.array([1.0, 2.0]) for name in ("mean", "stdev", "minimum", "maximum")},
        {"description": "random numbers"},
    )


class Ranks:
    """`tell` of several threads that are ranks of one writer."""

    def __init__(self, count: int):
        self._said, self._meeting = [""] * count, threading.Barrier(count)

    def of(self, rank: int) -> Callable[[str], list[str]]:
        def tell(said: str) -> list[str]:
            self._said[rank] = said
            self._meeting.wait(30)
            answer = list(self._said)
            self._meeting.wait(30)
            return answer

        return tell


def together(act: Callable[[int, Callable[[str], list[str]]], Any], count: int = 3) -> list[Any]:
    """What `act(rank, tell)` returns or raises on each of the ranks."""
    ranks, found = Ranks(count), [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = act(rank, ranks.of(rank))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def cells_of(chunks: range) -> slice:
    return slice(chunks.start * CHUNK, min(chunks.stop * CHUNK, CELLS))


def write_on_three(path: Path, dates: range = range(DATES), **more: Any) -> list[Any]:
    def write(rank: int, tell: Any) -> set[int]:
        with ShardedWriter(path, about(), {"run": 1}, OWN[rank], rank, tell, **more) as writer:
            for date in dates:
                writer.put(date, FIELDS[date][..., cells_of(OWN[rank])])
            return writer.done

    return together(write)


def stop_on_three(path: Path, dates: int, **more: Any) -> None:
    """An error in the loop of every rank ends the run after so many dates."""

    def write(rank: int, tell: Any) -> None:
        with ShardedWriter(path, about(), {"run": 1}, OWN[rank], rank, tell, **more) as writer:
            for date in range(dates):
                writer.put(date, FIELDS[date][..., cells_of(OWN[rank])])
            while writer.nbytes == 0 or not all(future.done() for future in writer._writing):
                time.sleep(0.001)
            raise RuntimeError("stop")

    assert all(isinstance(end, RuntimeError) for end in together(write))


def test_ranks_with_uneven_shares_write_one_dataset(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    assert write_on_three(path) == [set(), set(), set()]
    dataset = open_dataset(path)
    assert np.array_equal(dataset[:], FIELDS)
    assert dataset.chunk_cells == CHUNK
    assert verify.check(str(path)) == []
    assert len(list((path / "data").glob("[0-9]*"))) == DATES * 6
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zarr"]


def test_an_interrupted_run_goes_on_where_its_ledgers_end(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_on_three(path, 5)
    with pytest.raises(DatasetError, match=r"a.zarr is incomplete: 5 of 12 dates are written"):
        open_dataset(path)
    there = {
        file.name: file.stat().st_mtime_ns for file in path.with_name("a.zarr.partial").glob("dataset-*/data/*.*.*")
    }
    assert len(there) == 5 * 6
    assert write_on_three(path) == [set(range(5))] * 3
    assert np.array_equal(open_dataset(path)[:], FIELDS)
    assert all((path / "data" / name).stat().st_mtime_ns == time for name, time in there.items())


def test_a_torn_ledger_and_a_short_file_cost_only_those_chunks(tmp_path: Path) -> None:
    path, partial = tmp_path / "a.zarr", tmp_path / "a.zarr.partial"
    stop_on_three(path, 5)
    torn = partial / "ledger.1.jsonl"
    torn.write_text(torn.read_text().rstrip()[:-3])  # the last of rank 1: a chunk of the fifth date
    short = next(partial.glob("dataset-*/data/1.0.0.0"))
    short.write_bytes(short.read_bytes()[:-1])
    next(partial.glob("dataset-*/data/2.0.0.5")).unlink()
    assert write_on_three(path) == [{0, 3}] * 3
    assert np.array_equal(open_dataset(path)[:], FIELDS)
    assert verify.check(str(path)) == []


def test_what_was_not_made_durable_is_checked_byte_for_byte(tmp_path: Path) -> None:
    path, partial = tmp_path / "a.zarr", tmp_path / "a.zarr.partial"
    stop_on_three(path, 5, sync=False)
    spoilt = next(partial.glob("dataset-*/data/1.0.0.0"))
    spoilt.write_bytes(bytes(spoilt.stat().st_size))
    assert write_on_three(path) == [{0, 2, 3, 4}] * 3
    assert verify.check(str(path)) == []


def test_other_ranks_may_go_on_if_they_keep_the_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_on_three(path, 5)
    with ShardedWriter(path, about(), {"run": 1}, range(6)) as writer:
        assert writer.done == set(range(5))
        assert np.array_equal(writer.read(3, slice(7, 90)), FIELDS[3][..., 7:90])
        for date in range(5, DATES):
            writer.put(date, FIELDS[date])
    assert np.array_equal(open_dataset(path)[:], FIELDS)


def test_another_run_neither_goes_on_nor_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_on_three(path, 5)
    with (
        pytest.raises(OutputError, match="unfinished output of another run: run was 1, now 2"),
        ShardedWriter(path, about(), {"run": 2}, range(6)),
    ):
        pass
    assert write_on_three(path) == [set(range(5))] * 3
    assert is_complete(path, about(), {"run": 1})
    assert is_complete(path, about(chunk_cells=50), {"run": 1}), "the cut does not matter"
    assert not is_complete(path, about(), {"run": 2})
    assert not is_complete(path, about(dates=13), {"run": 1})
    found = write_on_three(path)
    assert [str(error).partition(". ")[0] for error in found] == [f"{path} exists"] * 3
    assert not partial_of(path).exists()
    assert write_on_three(path, overwrite=True) == [set()] * 3


def test_the_first_ranks_error_is_told_to_all_and_leaves_no_lock(tmp_path: Path) -> None:
    found = write_on_three(tmp_path / "no" / "such" / "folder" / "a.zarr")
    assert all(isinstance(error, OutputError) for error in found)
    assert len({str(error) for error in found}) == 1
    assert "cannot be written: [Errno 2]" in str(found[0])


def test_ranks_that_disagree_all_stop(tmp_path: Path) -> None:
    def write(rank: int, tell: Any) -> None:
        with ShardedWriter(tmp_path / "a.zarr", about(), {"run": rank // 2}, OWN[rank], rank, tell):
            raise AssertionError("they began")

    found = together(write)
    assert all(isinstance(error, OutputError) for error in found)
    assert all("rank 2 was asked for something else than rank 0" in str(error) for error in found)


def test_a_rank_that_outlived_its_run_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    stop_on_three(path, 2)
    with lock_ranks(path.with_name("a.zarr.partial"), alone=False):
        found = write_on_three(path)
    assert all("ranks of an earlier run are still writing" in str(error) for error in found)
    assert write_on_three(path) == [{0, 1}] * 3


def test_a_date_that_no_rank_put_is_named(tmp_path: Path) -> None:
    found = write_on_three(tmp_path / "a.zarr", range(DATES - 1))
    assert all("2020-01-03T18:00:00 has no grid-chunk 0. Every rank has to `put` every date" in str(e) for e in found)
    assert write_on_three(tmp_path / "a.zarr") == [set(range(DATES - 1))] * 3


def test_fields_of_other_cells_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"fields \(2, 2, 102\) do not fit rank 0. Give \(2, 2, 103\)"),
        ShardedWriter(tmp_path / "a.zarr", about(), {}, range(6)) as writer,
    ):
        writer.put(0, FIELDS[0][..., 1:])


# ------------------------------------------------------------------------------------------------ disks, slow and full
THROTTLE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* write() to files below THROTTLED goes on at BYTES_PER_SECOND. */
ssize_t write(int file, const void *bytes, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    char link[64], path[4096] = "";
    if (!real) real = dlsym(RTLD_NEXT, "write");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, getenv("THROTTLED")))
        usleep(count * 1e6 / atof(getenv("BYTES_PER_SECOND")));
    return real(file, bytes, count);
}
"""
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[3])
from test_sharded_writer import about, ShardedWriter

path, ahead, dates, cells, compute = Path(sys.argv[1]), int(sys.argv[2]), 30, 65536, 0.01
random = np.random.default_rng(0)
puts, behind = [], []
with ShardedWriter(path, about(cells, cells, dates), {}, range(1), ahead=ahead, sync=False) as writer:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for date in range(dates):
        fields = random.standard_normal((2, 2, cells), np.float32)
        time.sleep(compute)  # the step
        began = time.perf_counter()
        writer.put(date, fields)
        puts.append(time.perf_counter() - began)
        behind.append(date + 1 - len(list(path.parent.glob("*.partial/dataset-*/data/*.0.0.0"))))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"puts": puts, "behind": behind, "waited": writer.waited, "grown": grown, "field": fields.nbytes}))
"""


@pytest.fixture(scope="module")
def slow_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which the system call write() takes 50 ms for each date."""
    folder = tmp_path_factory.mktemp("throttle")
    (folder / "throttle.c").write_text(THROTTLE)
    library = folder / "throttle.so"
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "throttle.c"), "-ldl"]
    subprocess.run(words, check=True)
    return os.environ | {"LD_PRELOAD": str(library), "THROTTLED": ".partial/dataset-", "BYTES_PER_SECOND": "18e6"}


def on_slow_disk(path: Path, ahead: int, environment: dict[str, str]) -> dict[str, Any]:
    words = [sys.executable, "-c", PROGRAM, str(path), str(ahead), str(Path(__file__).parent)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_on_a_slow_disk_nothing_waits_until_the_queue_is_full(tmp_path: Path, slow_disk: dict[str, str]) -> None:
    path, ahead = tmp_path / "a.zarr", 5
    found = on_slow_disk(path, ahead, slow_disk)
    puts = found["puts"]
    assert sorted(puts[:ahead])[ahead // 2] < 0.02, "the queue has room; the disk takes 50 ms for a date"
    assert max(found["behind"]) <= ahead + 2, "dates that are put and not on the disk: in the queue, and two in hand"
    assert max(found["behind"]) > ahead / 2, "a step takes 10 ms"
    assert found["waited"] > sum(puts[ahead:])
    assert found["grown"] < (ahead + 12) * found["field"], "30 dates would be 30 fields"
    assert verify.check(str(path)) == []
    assert open_dataset(path).shape[0] == 30


def test_with_room_for_all_dates_no_put_ever_waits(tmp_path: Path, slow_disk: dict[str, str]) -> None:
    found = on_slow_disk(tmp_path / "a.zarr", 30, slow_disk)
    assert sorted(found["puts"])[-3] < 0.02, "but for a moment in which other processes had the processor"
    assert found["waited"] > 0.5, "at the end, until all is written"
    assert verify.check(str(tmp_path / "a.zarr")) == []


def mounted(folder: Path, nbytes: int) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_disk_that_fills_up_stops_the_run_with_its_cause_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    is_mounted = mounted(disk, 60 * 1024)  # else files may not grow beyond 500 bytes
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sharded_writer import *
if not {is_mounted}:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    with ShardedWriter(Path({str(disk / "a.zarr")!r}), about(), {{"run": 1}}, range(6)) as writer:
        for date in range(DATES):
            writer.put(date, FIELDS[date])
            time.sleep(0.01)
            puts = date
except OutputError as error:
    print(puts, error)
"""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        cause = "No space left on device" if is_mounted else "File too large"
        assert cause in done.stdout
        assert "Free space or repair the disk, then run the same command again" in done.stdout
        assert not (disk / "a.zarr").exists()
        if is_mounted:
            assert int(done.stdout.split()[0]) < DATES - 1, "it did not try all dates"
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert write_on_three(disk / "a.zarr")[0] == set() or is_mounted
        assert verify.check(str(disk / "a.zarr")) == []
    finally:
        if is_mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_an_error_in_the_last_date_is_raised_on_all_ranks(tmp_path: Path) -> None:
    """No `put` comes after it that could raise it."""
    path = tmp_path / "a.zarr"

    def write(rank: int, tell: Any) -> None:
        with ShardedWriter(path, about(), {"run": 1}, OWN[rank], rank, tell, ahead=DATES) as writer:
            for date in range(DATES - 1):
                writer.put(date, FIELDS[date][..., cells_of(OWN[rank])])
            if rank == 1:
                for future in writer._writing:
                    future.result()
                (target,) = path.with_name("a.zarr.partial").glob("dataset-*/data")
                (target / f"{DATES - 1}.0.0.2" / "in the way").mkdir(parents=True)
            writer.put(DATES - 1, FIELDS[DATES - 1][..., cells_of(OWN[rank])])

    found = together(write)
    assert all(isinstance(error, OutputError) for error in found)
    assert all("2020-01-03T18:00:00 cannot be written: [Errno 21] Is a directory" in str(error) for error in found)
    assert not path.exists()
