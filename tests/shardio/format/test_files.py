"""A file is whole or absent; a lock has one holder, however it ends."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardio.errors import HeldError
from shardio.format.files import atomic, lock, remove_temporary


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_gets_its_name_only_when_complete(sync, tmp_path):
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.nc", sync) as partial:
        partial.write_bytes(b"half")
        assert partial.suffix == ".nc"
        assert not (tmp_path / "a.nc").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic(tmp_path / "a.nc", sync) as partial:
        partial.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.nc"]
    assert (tmp_path / "a.nc").read_bytes() == b"whole"


def test_a_failed_rewrite_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="write"), atomic(tmp_path / "a") as partial:
        partial.write_bytes(b"new")
        raise OSError("cannot write")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    """As after a retry of a task whose first worker was only thought lost."""
    together = threading.Barrier(4)

    def write(number):
        together.wait()
        with atomic(tmp_path / "a", sync=False) as partial, partial.open("xb") as file:
            for _ in range(50):
                file.write(bytes([number]) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 50_000
    assert len(set(content)) == 1
    assert os.listdir(tmp_path) == ["a"]


DIE = """
import os, pathlib, sys
from shardio.format.files import atomic
with atomic(pathlib.Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os._exit(1)
"""
HOLD = """
import pathlib, sys
from shardio.format.files import lock
with lock(pathlib.Path(sys.argv[1]), shared=sys.argv[2] == "True"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_a_kill_leaves_is_removed(python, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    assert python(DIE, tmp_path / "a").returncode == 1
    assert len(list(tmp_path.iterdir())) == 2
    remove_temporary(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_folder_that_is_not_there_yet_has_nothing_to_remove(tmp_path):
    remove_temporary(tmp_path / "checkpoints")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("theirs", "ours"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_lock_has_one_holder_until_that_is_killed(theirs, ours, tmp_path):
    path = tmp_path / "lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, path, str(theirs)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        if theirs and ours:
            with lock(path, shared=True):
                pass
        else:
            named = "another process" if theirs else f"process {holder.pid} on "
            with pytest.raises(HeldError, match=f"is held by {named}"), lock(path, shared=ours):
                pass
        holder.kill()
        holder.communicate()
    with lock(path):
        pass


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path):
    with lock(tmp_path / "lock"):
        (tmp_path / "lock").unlink()
        with lock(tmp_path / "lock"):
            assert (tmp_path / "lock").exists()


def test_a_lock_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError), lock(tmp_path / "gone" / "lock"):
        pass
