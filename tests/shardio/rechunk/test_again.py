"""The same command once more, after all is done: a batch job that is put in the queue again must not fail."""

import json
import shutil
from dataclasses import replace

import pytest

from shardio.errors import OutputError
from shardio.rechunk import Request, prepare, run
from shardio.source.source import Selection


def stamps(folder):
    """Every file and folder, with the time at which it was written."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def source(build, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return build(folder / "a.zarr", 2, shape=(5, 3, 1, 23), chunks=(2, 3, 1, 10), statistics=False, missing=(1,)).path


@pytest.fixture
def done(source, tmp_path):
    """A request that has been carried out, of everything that is not the default."""
    (tmp_path / "out").mkdir()
    selection = Selection("2020-01-01T06", "2020-01-02", ("v_2", "v_0"), ())
    request = Request(str(source), str(tmp_path / "out" / "b.zarr"), 4, 3, "zstd", selection, sync=False)
    request = replace(request, order="compact")
    run(prepare(request))
    return request


@pytest.mark.parametrize("more", [{}, {"workers": 2}, {"scheduler": "tcp://127.0.0.1:1"}, {"max_memory": 10**6}])
def test_a_run_of_what_is_complete_writes_nothing(more, done, tmp_path):
    before = stamps(tmp_path / "out")
    result = run(prepare(replace(done, **more)))
    assert result.already_complete
    assert (result.dates, result.resumed_dates, result.nbytes, result.grid_chunks) == (0, 4, 0, 4)
    assert result.stored_bytes > 0
    assert stamps(tmp_path / "out") == before


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("order", [None, "compact"])
def test_every_format_and_codec_is_known_again(zarr_format, codec, order, source, tmp_path):
    request = Request(str(source), str(tmp_path / "b.zarr"), 4, zarr_format, codec, order=order, sync=False)
    assert not run(prepare(request)).already_complete
    assert run(prepare(request)).already_complete


def test_the_command_exits_0_and_says_so(source, process, tmp_path):
    words = ("rechunk", source, tmp_path / "b.zarr", "-n", 4, "--no-fsync", "--workers", 2)
    assert process(*words).returncode == 0
    before = stamps(tmp_path / "b.zarr")
    again, scripted, dry = process(*words), process(*words, "--json"), process(*words, "--dry-run", "--json")
    assert [each.returncode for each in (again, scripted, dry)] == [0, 0, 0]
    assert again.stdout == f"{tmp_path / 'b.zarr'} is already complete: 5 dates x 4 chunks; nothing was written\n"
    assert json.loads(scripted.stdout)["already_complete"] is True
    assert json.loads(dry.stdout)["already_complete"] is True
    assert stamps(tmp_path / "b.zarr") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zarr", "source"]


OTHERS = {
    "grid-chunks": ({"grid_chunks": 8}, "grid_chunks was 4, now 8"),
    "format": ({"zarr_format": 2}, "zarr_format was 3, now 2"),
    "codec": ({"codec": "lz4"}, "codec was 'blosc-zstd"),
    "order": ({"order": None}, "source_fingerprint was"),
    "variables": ({"selection": Selection("2020-01-01T06", "2020-01-02", ("v_0", "v_2"))}, "selection was"),
    "dates": ({"selection": Selection(None, "2020-01-02", ("v_2", "v_0"))}, "selection was"),
    "missing chunks": ({"fill_absent": True}, "missing_chunks_filled was None, now True"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_anything_else_is_refused_with_the_difference(what, done, tmp_path):
    more, said = OTHERS[what]
    before = stamps(tmp_path / "out")
    with pytest.raises(OutputError, match=r"b.zarr exists. Use --overwrite .* It is not what is asked for") as refused:
        prepare(replace(done, **more))
    assert said in str(refused.value)
    assert stamps(tmp_path / "out") == before


def test_another_source_is_refused(source, done, build):
    shutil.rmtree(source)
    build(source, 2, shape=(5, 3, 1, 23), chunks=(2, 3, 1, 10), seed=1)
    with pytest.raises(OutputError, match="source_fingerprint was"):
        prepare(done)


def test_what_shardio_did_not_make_or_finish_is_refused(source, done, tmp_path):
    with pytest.raises(OutputError, match=r"a.zarr exists. Use --overwrite"):
        prepare(Request(done.destination, str(source), 4))
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(OutputError, match=r"empty.zarr exists. Use --overwrite"):
        prepare(replace(done, destination=str(tmp_path / "empty.zarr")))
    attributes = tmp_path / "out" / "b.zarr" / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(OutputError, match=r"b.zarr exists. Use --overwrite"):
        prepare(done)


def test_overwrite_makes_it_again(done):
    assert run(prepare(replace(done, overwrite=True))).dates == 4
