"""Whatever stops a run, the same command finishes it, and the bytes are those of a run that nothing stopped."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from shardio.check.info import describe
from shardio.check.verify import check
from shardio.errors import DatasetError, OutputError
from shardio.rechunk import Request, prepare, run
from shardio.source.source import Selection
from shardio.write.job import Job, partial_of
from shardio.write.written import WrittenDate

DATES, KILLS = 60, 20


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    """Sixty small dates, three to a chunk, without statistics: the ledger has to carry their moments."""
    path = tmp_path_factory.mktemp("source") / "a.zarr"
    return build(path, 2, shape=(DATES, 3, 1, 4001), chunks=(3, 3, 1, 1500), missing=(7,), statistics=False).path


def command(source, destination, *more, zarr_format=3):
    # Little memory and one file per grid-chunk: many tasks, many moments at which to be killed.
    small = ("--max-memory", "600kB", "--zarr-format", zarr_format)
    return ("rechunk", source, destination, "-n", 13, *small, *more)


@pytest.fixture(scope="module")
def uninterrupted(source, process, tree, tmp_path_factory):
    """By Zarr format, every file of a run that nothing stopped."""
    found = {}
    for zarr_format in (2, 3):
        destination = tmp_path_factory.mktemp("whole") / "b.zarr"
        done = process(*command(source, destination, "--no-fsync", zarr_format=zarr_format))
        assert done.returncode == 0, done.stderr
        found[zarr_format] = tree(destination)
    return found


def written_at(destination, pattern):
    """Files of `data` that have their name, with the time they were written; the run may rename them meanwhile."""
    found = {}
    for file in partial_of(destination).glob(f"dataset-*/data/{pattern}"):
        with suppress(FileNotFoundError):
            found[file.name] = file.stat().st_mtime_ns
    return {name: when for name, when in found.items() if ".tmp." not in name}


def stored_dates(destination):
    """Files of chunks that are there, with the time they were written."""
    files = written_at(destination, "*")
    return {name: when for name, when in files.items() if name[0] != "." and name != "zarr.json"}


def wait_for(running, destination, files):
    """Until `files` chunk files are there, or the run is over."""
    while running.poll() is None and len(stored_dates(destination)) < files:
        time.sleep(0.001)


def wait_for_begin(running, destination, before):
    """Until the run has written the metadata of `data` (again), or is over; gives what to wait for the next time."""
    while True:
        now = written_at(destination, "*z*r*")
        if now != before or running.poll() is not None:
            return now
        time.sleep(0.001)


@pytest.mark.parametrize("fsync", ["--fsync", "--no-fsync"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_resume_after_kill_is_bit_identical(zarr_format, fsync, source, uninterrupted, begin, process, tree, tmp_path):
    random = np.random.default_rng(zarr_format)
    destination = tmp_path / "b.zarr"
    words = command(source, destination, fsync, zarr_format=zarr_format)
    kills, begun, kept, written = 0, {}, set(), {}
    while kills < KILLS // 4:
        with begin(*words) as running:
            begun = wait_for_begin(running, destination, begun)
            time.sleep(random.random() * 0.15)
            running.kill()
            running.communicate()
        if destination.exists():  # it was done first: begin anew
            assert tree(destination) == uninterrupted[zarr_format]
            shutil.rmtree(destination)
            begun, kept, written = {}, set(), {}
            continue
        kills += 1
        now = stored_dates(destination)
        assert not {name for name in written if now[name] != written[name]}, "finished work was done again"
        assert kept <= ledger(destination)
        kept = ledger(destination)
        written = {name: when for name, when in now.items() if int(name.removeprefix("c.").split(".")[0]) in kept}
    resumed = process(*words, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_dates"] == len(kept)
    for name, when in written.items():
        assert (destination / "data" / name).stat().st_mtime_ns == when
    assert tree(destination) == uninterrupted[zarr_format]
    assert not partial_of(destination).exists()


def ledger(destination):
    """Dates that the ledger of an unfinished output holds."""
    file = partial_of(destination) / "ledger.jsonl"
    whole = [line for line in file.read_text().split("\n")[:-1] if line.endswith("]")] if file.exists() else []
    return {json.loads(line)[0] for line in whole}


@pytest.mark.parametrize(("written", "done"), [("dates", r"\d+"), ("mean", "60")], ids=["beside data", "at the end"])
def test_kill_while_the_small_arrays_are_written_is_bit_identical(
    written, done, source, uninterrupted, begin, process, tree, tmp_path
):
    random = np.random.default_rng(0)
    for attempt in range(4):
        destination = tmp_path / f"{attempt}.zarr"
        with begin(*command(source, destination, "--no-fsync")) as running:
            while running.poll() is None and not list(partial_of(destination).glob(f"dataset-*/{written}")):
                time.sleep(0.0005)
            time.sleep(random.random() * 0.02)
            running.kill()
            running.communicate()
        if not destination.exists():
            with pytest.raises(DatasetError, match=f"incomplete: {done} of 60"):
                describe(str(destination))
            assert process(*command(source, destination, "--no-fsync")).returncode == 0
        assert tree(destination) == uninterrupted[3]


def test_interrupt_exits_130_and_resumes(source, uninterrupted, begin, process, tree, tmp_path):
    destination = tmp_path / "b.zarr"
    with begin(*command(source, destination)) as running:
        wait_for(running, destination, 5)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert running.returncode == 130
    assert "run the same command again to continue" in said
    assert "Traceback" not in said
    assert not destination.exists()
    assert process(*command(source, destination)).returncode == 0
    assert tree(destination) == uninterrupted[3]


def test_file_that_cannot_grow_is_a_clear_error_and_resumes(source, uninterrupted, process, tree, tmp_path):
    destination = tmp_path / "b.zarr"

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    failed = process(*command(source, destination), preexec_fn=small_files)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("Error:") == 1
    assert f"cannot write {destination}: File too large" in failed.stderr
    assert "run the same command again" in failed.stderr
    assert not destination.exists()
    assert process(*command(source, destination)).returncode == 0
    assert tree(destination) == uninterrupted[3]


def mounted(folder, nbytes):
    """A disk of `nbytes` at `folder`; False where this user may not mount."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_disk_that_fills_up_is_a_clear_error_and_resumes(zarr_format, source, uninterrupted, process, tree, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    whole = sum(len(content) for content in uninterrupted[zarr_format].values())
    limited = {} if mounted(disk, whole // 2) else {"preexec_fn": small_files_only}
    try:
        words = command(source, disk / "b.zarr", "--no-fsync", zarr_format=zarr_format)
        failed = process(*words, **limited)
        assert failed.returncode == 1
        assert "Traceback" not in failed.stderr
        assert failed.stderr.count("Error:") == 1
        assert ("No space left on device" if not limited else "File too large") in failed.stderr
        assert not (disk / "b.zarr").exists()
        assert process(*words, **limited).returncode == 1  # still full
        if not limited:
            subprocess.run(["mount", "-o", f"remount,size={4 * whole + 2**20}", str(disk)], check=True)
        resumed = process(*words, "--json")
        assert resumed.returncode == 0, resumed.stderr
        assert json.loads(resumed.stdout)["resumed_dates"] > 0 or limited
        assert tree(disk / "b.zarr") == uninterrupted[zarr_format]
    finally:
        if not limited:
            subprocess.run(["umount", str(disk)], check=True)


def small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.fixture
def unfinished(source, tmp_path):
    """An output of which some dates are written, and what makes it."""
    return stop_after(3, source, tmp_path / "b.zarr")


def stop_after(reports, source, destination, **more):
    def stop(progress):
        nonlocal reports
        reports -= 1
        if reports <= 0:
            raise KeyboardInterrupt

    more = {"zarr_format": 3, "max_memory": 600_000, "command": f"shardio rechunk {source} {destination}", **more}
    request = Request(str(source), str(destination), 13, **more)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(request), stop)
    return request


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid_chunks": 7}, "grid-chunks was 13, now 7"),
        ({"codec": "zstd"}, "codec was 'lz4', now 'zstd'"),
        ({"zarr_format": 2}, "zarr-format was 3, now 2"),
        ({"selection": Selection(end="2020-01-05")}, "end was None, now '2020-01-05'"),
        ({"selection": Selection(select=("v_1",))}, r"select was \[\], now \['v_1'\]"),
        ({"selection": Selection(drop=("v_1",))}, r"drop was \[\], now \['v_1'\]"),
    ],
)
def test_other_arguments_are_refused_with_the_difference(change, said, unfinished, tree, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=said) as caught:
        run(prepare(replace(unfinished, **change)))
    assert "Finish that one with: shardio rechunk" in str(caught.value)
    assert tree(tmp_path) == before


def test_other_memory_and_workers_continue(unfinished, uninterrupted, tree, tmp_path):
    done = run(prepare(replace(unfinished, max_memory=2**30, workers=2, sync=False)))
    assert done.resumed_dates > 0
    assert tree(tmp_path / "b.zarr") == uninterrupted[3]


def test_overwrite_discards_an_unfinished_run_of_other_arguments(unfinished, rechunk, opened, source, tmp_path):
    rechunk(source, tmp_path / "b.zarr", 7, zarr_format=2, overwrite=True)
    assert opened(tmp_path / "b.zarr")[1]["shardio"]["grid_chunks"] == 7
    assert check(str(tmp_path / "b.zarr")) == []
    assert not partial_of(tmp_path / "b.zarr").exists()


def test_changed_source_is_refused(build, tmp_path):
    source = build(tmp_path / "a.zarr", shape=(DATES, 3, 1, 4001), chunks=(1, 3, 1, 4001)).path
    request = stop_after(3, source, tmp_path / "b.zarr")
    file = source / "data" / "50.0.0.0"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(OutputError, match="source fingerprint was"):
        run(prepare(request))


def test_without_fsync_resume_reads_what_it_trusts(source, uninterrupted, tree, tmp_path):
    request = stop_after(4, source, tmp_path / "b.zarr", sync=False)
    folder = next(partial_of(tmp_path / "b.zarr").glob("dataset-*")) / "data"
    files = sorted(file for file in folder.glob("c.*"))
    assert len(files) >= 3
    for place, file in zip((20, -3, 400), files, strict=False):  # a chunk, the index, as power loss may leave them
        content = bytearray(file.read_bytes())
        content[place] ^= 255
        file.write_bytes(content)
    done = run(prepare(request))
    assert done.dates >= DATES - len(files) + 3
    assert tree(tmp_path / "b.zarr") == uninterrupted[3]


def test_with_fsync_resume_still_finds_short_and_absent_files(source, uninterrupted, tree, tmp_path):
    request = stop_after(4, source, tmp_path / "b.zarr")
    folder = next(partial_of(tmp_path / "b.zarr").glob("dataset-*")) / "data"
    files = sorted(file for file in folder.glob("c.*"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].unlink()
    (folder / ".1234.tmp.c.40.0.0.0").write_bytes(b"half")
    run(prepare(request))
    assert tree(tmp_path / "b.zarr") == uninterrupted[3]


@pytest.mark.parametrize(
    "garbage", [b"[17, [1,2", b"\0\0\0\0", b"\xff\xfe\n", b"3\n", b'{"a": 1}\n', b"[1, 2]\n", b"\n\n"]
)
def test_torn_ledger_lines_are_ignored(garbage, unfinished, uninterrupted, tree, tmp_path):
    with (partial_of(tmp_path / "b.zarr") / "ledger.jsonl").open("ab") as file:
        file.write(garbage)
    assert run(prepare(unfinished)).resumed_dates > 0
    assert tree(tmp_path / "b.zarr") == uninterrupted[3]


def test_a_date_is_the_same_after_its_line_in_the_ledger():
    date = WrittenDate(3, (1, 2**32 - 1), (10, 2**33), None)
    assert WrittenDate.from_line(date.to_line()) == date


@pytest.mark.parametrize("words", [("info",), ("verify",)])
@pytest.mark.parametrize("suffix", ["", ".partial", "/"])
def test_incomplete_output_is_refused_with_the_command_that_finishes_it(words, suffix, unfinished, cli, tmp_path):
    done = cli(*words, f"{tmp_path / 'b.zarr'}{suffix}")
    assert done.exit_code == 1
    assert "is incomplete:" in done.stderr
    assert f"of 60 dates are written. Finish it with: {unfinished.command}" in done.stderr


def test_what_lies_inside_an_unfinished_output_is_no_dataset(unfinished, cli, tmp_path):
    inside = next(partial_of(tmp_path / "b.zarr").glob("dataset-*"))
    for words in (("info", inside), ("verify", inside), ("rechunk", inside, tmp_path / "c.zarr", "-n", 2)):
        assert cli(*words).exit_code == 1


def test_a_second_process_is_refused(source, begin, process, tmp_path):
    destination = tmp_path / "b.zarr"
    with begin(*command(source, destination)) as running:
        wait_for(running, destination, 1)
        running.send_signal(signal.SIGSTOP)
        second = process(*command(source, destination))
        third = process(*command(source, destination, "--overwrite", "--codec", "zstd"))
        running.send_signal(signal.SIGCONT)
        running.communicate()
    assert running.returncode == 0
    for refused in (second, third):
        assert refused.returncode == 1
        assert "another shardio process is writing" in refused.stderr
    assert check(str(destination)) == []


def test_kill_between_replacing_and_naming_loses_neither(source, uninterrupted, rechunk, tree, tmp_path, unfinished):
    """As `publish` leaves it when killed between its two renames: the old output is among the partial's files."""
    rechunk(source, tmp_path / "old.zarr", 7)
    old = tree(tmp_path / "old.zarr")
    os.replace(tmp_path / "old.zarr", partial_of(tmp_path / "b.zarr") / "replaced.1")
    seen = []
    other = replace(unfinished, codec="zstd", overwrite=True)
    run(prepare(other), lambda _: seen.append(tree(tmp_path / "b.zarr") == old))
    assert all(seen)
    assert check(str(tmp_path / "b.zarr")) == []


def test_what_a_kill_after_naming_leaves_is_swept(source, rechunk, tree, tmp_path):
    rechunk(source, tmp_path / "b.zarr", 7)
    left = partial_of(tmp_path / "b.zarr")
    (left / "replaced.1").mkdir(parents=True)
    (left / "job.json").write_text("{}")
    before = tree(tmp_path / "b.zarr")
    assert describe(str(tmp_path / "b.zarr"))["complete"]
    assert rechunk(source, tmp_path / "b.zarr", 7).already_complete
    assert not left.exists()
    assert tree(tmp_path / "b.zarr") == before


@pytest.mark.parametrize("locks", [("lock",), ("lock", "ranks.lock")])
def test_locks_of_a_run_that_never_began_are_swept(locks, source, rechunk, tmp_path):
    rechunk(source, tmp_path / "b.zarr", 7)
    left = partial_of(tmp_path / "b.zarr")
    left.mkdir()
    for name in locks:
        (left / name).touch()
    assert rechunk(source, tmp_path / "b.zarr", 7).already_complete
    assert not left.exists()


@pytest.mark.parametrize("kept", ["dataset-1", "precious"])
def test_what_may_be_needed_is_not_swept(kept, source, rechunk, tmp_path):
    rechunk(source, tmp_path / "b.zarr", 7)
    (partial_of(tmp_path / "b.zarr") / kept).mkdir(parents=True)
    assert rechunk(source, tmp_path / "b.zarr", 7).already_complete
    assert (partial_of(tmp_path / "b.zarr") / kept).exists()


def test_a_refused_job_leaves_nothing(tmp_path):
    (tmp_path / "b.zarr").mkdir()
    with pytest.raises(OutputError, match="exists"):
        Job(tmp_path / "b.zarr", {}, "command", sync=False)
    assert [path.name for path in tmp_path.iterdir()] == ["b.zarr"]


def test_damaged_job_file_is_refused_and_discarded_on_demand(unfinished, source, rechunk, tmp_path):
    (partial_of(tmp_path / "b.zarr") / "job.json").write_text("{")
    with pytest.raises(OutputError, match=r"job\.json is damaged"):
        rechunk(source, tmp_path / "b.zarr", 7)
    rechunk(source, tmp_path / "b.zarr", 7, overwrite=True)
    assert check(str(tmp_path / "b.zarr")) == []
