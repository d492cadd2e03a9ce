"""What is noticed when a source changes, and what is not."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from shardio.check.verify import check, repair
from shardio.errors import OutputError
from shardio.rechunk import Request, prepare, run
from shardio.source.open import open_source

sys.path.insert(0, str(Path(__file__).parents[2]))
from web_server import WebServer


@pytest.fixture
def source(build, tmp_path):
    """Without codec, a byte more or less does not show in any size."""
    return build(tmp_path / "a.zarr", 2, shape=(6, 2, 1, 23), chunks=(1, 2, 1, 23), compressors=None, extras=True).path


@pytest.fixture
def begun(source, tmp_path):
    """A request, stopped after its first date."""
    request = Request(str(source), str(tmp_path / "b.zarr"), 4, max_memory=10**6, sync=False)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepare(request), stop)
    return request


def flip(file):
    """Change a byte in place, a little later."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("file", ["data/3.0.0.0", "latitudes/0", "count/0", "table/0.0"])
def test_a_byte_changed_in_place_is_noticed(file, source, begun):
    flip(source / file)
    with pytest.raises(OutputError, match=r"unfinished output of another run: source changed was '20.* now '20"):
        run(prepare(begun))


def test_a_byte_changed_during_the_run_is_noticed(source, tmp_path):
    prepared = prepare(Request(str(source), str(tmp_path / "b.zarr"), 4, sync=False))
    with pytest.raises(OutputError, match="changed while it was read"):
        run(prepared, lambda _: flip(source / "data" / "3.0.0.0"))
    assert not (tmp_path / "b.zarr").exists()


def test_a_byte_changed_after_the_run_is_noticed(source, tmp_path):
    request = Request(str(source), str(tmp_path / "b.zarr"), 4, sync=False)
    run(prepare(request))
    flip(source / "data" / "3.0.0.0")
    with pytest.raises(OutputError, match="source_changed was"):
        prepare(request)


@pytest.mark.parametrize("file", ["data/3.0.0.0", "mean/0", "dates/0"])
def test_a_touched_source_is_refused_until_its_times_are_put_back(file, source, begun):
    """Nobody can tell it from one that was changed in place, but by reading all of it."""
    file = source / file
    before = file.stat()
    os.utime(file)
    with pytest.raises(OutputError, match="source changed was"):
        run(prepare(begun))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(prepare(begun)).resumed_dates


def test_a_copy_with_its_times_is_the_same_source(source, begun, tmp_path):
    shutil.move(source, tmp_path / "moved.zarr")
    shutil.copytree(tmp_path / "moved.zarr", source)  # as cp -a
    assert run(prepare(begun)).resumed_dates
    assert run(prepare(begun)).already_complete


def test_a_strange_file_in_the_source_does_not_matter(source, begun):
    (source / "notes.txt").write_text("nothing of the dataset")
    assert run(prepare(begun)).resumed_dates


def test_a_copy_without_its_times_repairs(source, tmp_path):
    """The bytes written again have to be those recorded, whatever the times."""
    request = Request(str(source), str(tmp_path / "b.zarr"), 4, sync=False)
    run(prepare(request))
    for file in source.rglob("*"):
        os.utime(file)
    (tmp_path / "b.zarr" / "data" / "2.0.0.1").write_bytes(b"damaged")
    assert repair(str(tmp_path / "b.zarr"), str(source), check(str(tmp_path / "b.zarr"))) == 1
    assert check(str(tmp_path / "b.zarr")) == []


def test_an_array_that_appears_is_noticed(source, begun):
    zarr.open_group(source, mode="a").create_array("more", data=np.zeros(3))
    with pytest.raises(OutputError, match="source fingerprint was"):
        run(prepare(begun))


@pytest.mark.parametrize("file", ["data/0.0.0.0", "data/5.0.0.0", "latitudes/0"])
def test_a_server_is_asked_for_the_version_of_a_few_files(file, source):
    with WebServer(source.parent) as server:
        opened = open_source(f"{server.url}/a.zarr")
        before, fingerprint = opened.changed(), opened.fingerprint()
        assert opened.changed() == before
        flip(source / file)
        assert opened.changed() != before
        assert opened.fingerprint() == fingerprint


def test_dates_of_a_server_are_part_of_the_fingerprint(source):
    with WebServer(source.parent) as server:
        opened = open_source(f"{server.url}/a.zarr")
        before = opened.fingerprint()
        group = zarr.open_group(source, mode="a", use_consolidated=False)
        group["dates"][-1] = group["dates"][-1] + 1
        assert open_source(f"{server.url}/a.zarr").fingerprint() != before
        assert open_source(f"{server.url}/a.zarr").changed() == opened.changed()


def test_a_selection_looks_at_its_own_dates(source):
    request = Request(str(source), "b.zarr", 4)
    with WebServer(source.parent) as server:
        some = replace(request.selection, start="2020-01-01T12", end="2020-01-01T18")
        opened = open_source(f"{server.url}/a.zarr", some)
        before = opened.changed()
        flip(source / "data" / "0.0.0.0")
        assert opened.changed() == before
        flip(source / "data" / "3.0.0.0")
        assert opened.changed() != before
