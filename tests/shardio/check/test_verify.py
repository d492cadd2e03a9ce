"""Every damaged bit is found, named, and repaired, and nothing else is touched."""

import json
import shutil

import numpy as np
import pytest
import zarr

from shardio.check.verify import check, compare, repair
from shardio.errors import DatasetError, OutputError
from shardio.format.reader import NativeReader
from shardio.source.source import Selection

DATES, CHUNKS = 9, 5


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "a.zarr"
    return build(path, 2, shape=(DATES, 3, 2, 93), chunks=(2, 3, 2, 40), missing=(4,), extras=True).path


@pytest.fixture(params=[2, 3], ids=["v2", "v3"])
def made(request, source, rechunk, tmp_path):
    rechunk(source, tmp_path / "b.zarr", CHUNKS, zarr_format=request.param)
    return tmp_path / "b.zarr"


def chunk_files(path):
    return sorted(file for file in (path / "data").iterdir() if file.name not in (".zarray", ".zattrs", "zarr.json"))


def times(path):
    return {file: file.stat().st_mtime_ns for file in chunk_files(path)}


def place_of(file):
    """(date, grid-chunk or None) of a file name."""
    date, _, _, chunk = map(int, file.name.removeprefix("c.").split("."))
    return date, None if file.name.startswith("c.") else chunk


def dates_of_source():
    return [str(np.datetime64("2020-01-01T00:00:00", "s") + i * np.timedelta64(6, "h")) for i in range(DATES)]


def test_two_hundred_flips_and_truncations_are_all_found_and_repaired(made, source, tree):
    whole, dates = tree(made), dates_of_source()
    random = np.random.default_rng(0)
    files = chunk_files(made)
    for attempt in range(200):
        file = files[random.integers(len(files))]
        before, content = times(made), bytearray(file.read_bytes())
        if attempt % 4 == 3:
            content = content[: random.integers(len(content))]
        else:
            content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        date, chunk = place_of(file)
        found = check(str(made))
        assert found, f"damage {attempt} of {file.name} was not found"
        assert {fault.date for fault in found} == {dates[date]}
        assert {fault.file for fault in found} == {str(file)}
        if chunk is not None:
            assert {fault.grid_chunk for fault in found} == {chunk}
        before.pop(file)
        assert repair(str(made), str(source), found) == 1
        assert file.read_bytes() == whole[f"data/{file.name}"], f"damage {attempt} of {file.name} was not repaired"
        assert {other: written for other, written in times(made).items() if other != file} == before
    assert tree(made) == whole
    assert check(str(made)) == []


def test_much_damage_at_once_is_repaired_and_only_that_is_written(made, source, tree, cli):
    whole, files = tree(made), chunk_files(made)
    random = np.random.default_rng(1)
    bad = [files[i] for i in random.choice(len(files), 5, replace=False)]
    for number, file in enumerate(bad):
        content = bytearray(file.read_bytes())
        if number == 0:
            file.unlink()
            continue
        content[number * len(content) // 6] ^= 1
        file.write_bytes(content)
    good = {file: when for file, when in times(made).items() if file not in bad}
    damaged = cli("verify", made, "--json")
    assert damaged.exit_code == 1
    assert {fault["file"] for fault in json.loads(damaged.stdout)["faults"]} == {str(file) for file in bad}
    done = cli("verify", made, "--source", source, "--repair", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["dates_repaired"] == len({place_of(file)[0] for file in bad})
    assert tree(made) == whole
    assert {file: when for file, when in times(made).items() if file not in bad} == good


def test_stale_chunk_of_another_date_is_found_and_repaired(made, source, tree):
    whole, files = tree(made), chunk_files(made)
    shutil.copyfile(files[0], files[-1])
    found = check(str(made))
    assert {fault.file for fault in found} == {str(files[-1])}
    repair(str(made), str(source), found)
    assert tree(made) == whole


def test_absent_empty_and_swollen_files_are_found(made, source, tree):
    whole, files = tree(made), chunk_files(made)
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes() + b"more")
    files[3].unlink()
    files[3].mkdir()
    found = check(str(made))
    assert {fault.file for fault in found} == {str(file) for file in files[:4]}
    files[3].rmdir()
    repair(str(made), str(source), found)
    assert tree(made) == whole


SMALL = ["dates", "latitudes", "mean", "stdev", "statistics_tendencies_6h_mean", "table", "names", "_build/flags"]


def chunk_of_small_array(path, name):
    return next(file for file in sorted((path / name).rglob("*")) if file.is_file() and file.name[0] in "0123456789")


@pytest.mark.parametrize("name", SMALL)
def test_any_changed_small_array_is_found(name, made, cli):
    file = chunk_of_small_array(made, name)
    whole = file.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b""):
        file.write_bytes(content)
        done = cli("verify", made)
        assert done.exit_code == 1
        assert name in done.stdout + done.stderr
    file.unlink()
    assert cli("verify", made).exit_code == 1
    file.write_bytes(whole)
    assert cli("verify", made).exit_code == 0


def test_small_arrays_cannot_be_repaired_and_nothing_is_written(made, source, tree, cli):
    chunk_of_small_array(made, "table").write_bytes(b"other")
    chunk = chunk_files(made)[0]
    chunk.write_bytes(b"")
    before = tree(made)
    done = cli("verify", made, "--source", source, "--repair")
    assert done.exit_code == 1
    assert "only chunks can be repaired" in done.stderr
    assert tree(made) == before


def test_equality_is_to_the_bit_of_a_nan(made, source, tmp_path):
    assert compare(str(made), str(source)) == []
    shutil.copytree(source, tmp_path / "c.zarr")
    array = zarr.open_array(tmp_path / "c.zarr", path="data", mode="a")
    fields = array[3]
    place = tuple(np.argwhere(np.isnan(fields))[0])
    fields.view(np.uint32)[place] ^= 1
    array[3] = fields
    found = compare(str(made), str(tmp_path / "c.zarr"))
    assert [(fault.date, fault.grid_chunk, fault.problem) for fault in found if fault.date] == [
        ("2020-01-01T18:00:00", place[2] // 19, "1 values differ from the source")
    ]


def test_other_statistics_or_coordinates_in_the_source_are_found(made, source, tmp_path):
    shutil.copytree(source, tmp_path / "c.zarr")
    zarr.open_array(tmp_path / "c.zarr", path="stdev", mode="a")[1] = 7
    zarr.open_array(tmp_path / "c.zarr", path="latitudes", mode="a")[1] = 7
    problems = {fault.problem for fault in compare(str(made), str(tmp_path / "c.zarr"))}
    assert problems == {"latitudes differ from the source", "the statistics `stdev` differ from the source"}


def test_repair_from_another_source_is_refused(made, build, tree, tmp_path):
    other = build(tmp_path / "c.zarr", 2, shape=(DATES, 3, 2, 93), chunks=(2, 3, 2, 40), seed=5).path
    chunk_files(made)[0].write_bytes(b"")
    before = tree(made)
    with pytest.raises(OutputError, match="fingerprint differs"):
        repair(str(made), str(other), check(str(made)))
    smaller = build(tmp_path / "d.zarr", 2).path
    with pytest.raises(DatasetError, match="has shape"):
        repair(str(made), str(smaller), check(str(made)))
    assert tree(made) == before


def test_repair_takes_the_selection_of_the_dataset(build, rechunk, cli, tree, tmp_path):
    source = build(tmp_path / "a.zarr", 3, shape=(6, 4, 1, 9), chunks=(4, 3, 1, 5)).path
    chosen = Selection(start="2020-01-01T06", select=("v_3", "v_1"))
    rechunk(source, tmp_path / "b.zarr", 3, selection=chosen)
    before = tree(tmp_path / "b.zarr")
    chunk_files(tmp_path / "b.zarr")[1].write_bytes(b"")
    assert cli("verify", tmp_path / "b.zarr", "--source", source, "--repair").exit_code == 0
    assert tree(tmp_path / "b.zarr") == before


def test_a_dataset_without_checksums_is_refused(source, cli, tmp_path):
    assert "shardio did not make it" in cli("verify", source).stderr
    assert cli("verify", tmp_path / "nope.zarr").exit_code == 1
    assert cli("verify", source, "--repair").exit_code == 2


def test_what_a_comparison_found_is_repaired_wherever_in_the_date_it_is(made, source, tree):
    whole = tree(made)
    file = chunk_files(made)[-1]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])  # in v2 that of the last grid-chunk
    found = compare(str(made), str(source))
    assert {fault.grid_chunk for fault in found} == {None}
    assert repair(str(made), str(source), found) == 1
    assert tree(made) == whole
    assert compare(str(made), str(source)) == []


def test_a_check_reads_what_is_stored_once(made, monkeypatch):
    read = []
    monkeypatch.setattr(
        NativeReader,
        "_pread",
        lambda self, *where, do=NativeReader._pread: read.append(where[2]) or do(self, *where),
    )
    assert check(str(made)) == []
    assert sum(read) <= sum(file.stat().st_size for file in chunk_files(made))
