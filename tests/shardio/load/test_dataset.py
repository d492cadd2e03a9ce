"""`open_dataset`: what is selected, joined, indexed and refused, and how little of it is read."""

import re
import shutil
import sys
import warnings
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import numcodecs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardio import open_dataset
from shardio.errors import ChunkError, DatasetError, SelectionError
from shardio.load.dataset import ReadCostWarning

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import bits, bytes_read, chunk_files, cut, every, noise, write_source

SHAPE = (9, 3, 2, 23)
NAMES = ["t_850", "z_500", "tp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def source(folder):
    return write_source(folder / "source.zarr", noise(SHAPE), names=NAMES, missing=(4,), tendencies=("6h", "24h"))


@pytest.fixture(scope="module")
def stored(folder, source):
    return cut(source, folder / "stored.zarr", 4)


@pytest.fixture(scope="module")
def dataset(stored):
    return open_dataset(stored.path)


@pytest.fixture(scope="module")
def complete(folder):
    """Without missing dates, for indices drawn at random."""
    return cut(write_source(folder / "complete.source.zarr", noise(SHAPE, 1)), folder / "complete.zarr", 4, 3)


def test_a_dataset_describes_itself(stored, dataset):
    assert dataset.shape == SHAPE
    assert len(dataset) == 9
    assert dataset.dtype == np.float32
    assert np.array_equal(dataset.dates, stored.dates)
    assert dataset.variables == tuple(NAMES)
    assert dataset.name_to_index == {"t_850": 0, "z_500": 1, "tp": 2}
    assert dataset.frequency == "6h"
    assert dataset.missing == {4}
    assert dataset.chunk_cells == 6
    assert dataset.field_shape == (23,)
    assert dataset.resolution == "tiny"
    assert np.array_equal(dataset.latitudes, np.linspace(90, -90, 23))
    assert np.array_equal(dataset.longitudes, np.linspace(0, 359, 23))
    assert all(np.array_equal(dataset.statistics[kind], stored.statistics[kind]) for kind in dataset.statistics)
    assert set(dataset.statistics) == {"mean", "stdev", "minimum", "maximum"}
    assert "9 dates" in repr(dataset) and "chunks of 6" in repr(dataset)


def axis(n):
    """Whatever NumPy takes as the index of an axis of n."""
    ends = st.none() | st.integers(-n - 2, n + 2)
    steps = st.none() | st.integers(-3, 3).filter(bool)
    ints = st.integers(-n, n - 1)
    masks = st.lists(st.booleans(), min_size=n, max_size=n).map(np.array)
    return st.one_of(
        ints,
        ints.map(np.int64),
        st.builds(slice, ends, ends, steps),
        st.lists(ints, max_size=5).map(lambda items: np.array(items, np.int64)),
        st.lists(ints, min_size=1, max_size=5),
        masks,
    )


@st.composite
def indices(draw):
    """Indices of up to four axes, with an ellipsis here or there."""
    first = draw(st.integers(0, 4))
    last = draw(st.integers(0, 4 - first))
    items = [draw(axis(n)) for n in SHAPE[:first]]
    if draw(st.booleans()):
        items += [Ellipsis, *(draw(axis(n)) for n in SHAPE[len(SHAPE) - last :])]
    return tuple(items)


@settings(deadline=None)
@given(index=indices())
@example(index=(slice(None), 0, Ellipsis, 0, np.array([], np.int64)))
def test_indexing_gives_what_numpy_gives(complete, index):
    try:
        expected = complete.values[index]
    except IndexError:  # lists of different lengths
        with pytest.raises(IndexError):
            open_dataset(complete.path)[index]
        return
    found = open_dataset(complete.path)[index]
    assert found.shape == expected.shape
    assert np.array_equal(bits(found), bits(expected))


@settings(deadline=None)
@given(item=axis(SHAPE[0]))
def test_an_index_of_dates_alone_needs_no_tuple(complete, item):
    assert np.array_equal(bits(open_dataset(complete.path)[item]), bits(complete.values[item]))


def test_several_lists_are_points_not_a_product(complete):
    found = open_dataset(complete.path)[[0, 1, 8], 0, 1, [22, 0, 5]]
    assert found.tolist() == [complete.values[d, 0, 1, c] for d, c in ((0, 22), (1, 0), (8, 5))]


@pytest.mark.parametrize(
    "index",
    [
        9,
        -10,
        (0, 3),
        (0, 0, 0, 23),
        [0, 9],
        (0, 0, 0, 0, 0),
        (..., 0, ...),
        0.5,
        [0.5],
        "t",
        None,
        [True],
        np.ones((9, 3), bool),
    ],
    ids=str,
)
def test_an_index_that_fits_no_axis_raises_index_error(complete, index):
    with pytest.raises(IndexError):
        open_dataset(complete.path)[index]


@pytest.mark.parametrize("index", [4, -5, slice(None), slice(3, 6), [0, 4], [0, -5], np.arange(9) == 4])
def test_a_missing_date_raises_and_is_named(dataset, index):
    with pytest.raises(DatasetError, match=r"2020-01-02T00:00:00 \(index 4\) is missing"):
        dataset[index]


def test_dates_beside_a_missing_one_are_read(stored, dataset):
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    assert np.array_equal(bits(dataset[kept]), bits(stored.values[kept]))
    assert np.array_equal(bits(dataset[8:4:-1]), bits(stored.values[8:4:-1]))


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        ("2020-01-02", None, 4, 8),
        (None, "2020-01-01", 0, 3),
        ("2020-01-01T12", "2020-01-02T12:00", 2, 6),
        (2020, 2020, 0, 8),
        ("2020", "2020-01", 0, 8),
        (date(2020, 1, 2), date(2020, 1, 2), 4, 7),
        (datetime(2020, 1, 1, 18), datetime(2020, 1, 2, 6), 3, 5),
        (datetime(2020, 1, 1, 19, tzinfo=timezone(timedelta(hours=1))), datetime(2020, 1, 2, 6, tzinfo=UTC), 3, 5),
        (np.datetime64("2020-01-02"), np.datetime64("2020-01-02T06:00:00", "ns"), 4, 5),
        ("2020-01-01T05", "2020-01-01T19", 1, 3),
    ],
)
def test_start_and_end_are_both_included_whatever_way_they_are_written(stored, start, end, first, last):
    found = open_dataset(stored.path, start=start, end=end)
    assert np.array_equal(found.dates, stored.dates[first : last + 1])
    assert found.missing == ({4 - first} if first <= 4 <= last else set())
    kept = [i for i in range(first, last + 1) if i != 4]
    assert np.array_equal(bits(found[[i - first for i in kept]]), bits(stored.values[kept]))


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        ({"start": "2021"}, "no date of"),
        ({"start": "2020-01-02", "end": "2020-01-01"}, "no date of"),
        ({"start": "soon"}, "'soon' is not a date"),
        ({"frequency": "7h"}, "frequency 7h is not a multiple of 6h"),
        ({"frequency": "3h"}, "frequency 3h is not a multiple of 6h"),
        ({"frequency": "often"}, "not a step"),
        ({"select": ["t_850", "q"]}, "no variable q"),
        ({"drop": "q"}, "no variable q"),
        ({"select": ["tp", "tp"]}, "more than once"),
        ({"drop": NAMES}, "no variable of"),
        ({"rename": {"q": "w"}}, "rename names q"),
        ({"select": "tp", "rename": {"t_850": "t"}}, "rename names t_850"),
        ({"rename": {"tp": "t_850"}}, "several variables are called t_850"),
    ],
)
def test_a_selection_that_is_not_there_is_refused_by_name(stored, selection, named):
    with pytest.raises(SelectionError, match=named):
        open_dataset(stored.path, **selection)


@pytest.mark.parametrize(("frequency", "step"), [("6h", 1), ("12h", 2), ("1d", 4), ("24h", 4)])
def test_a_coarser_frequency_keeps_multiples_from_the_first_date(stored, frequency, step):
    found = open_dataset(stored.path, start="2020-01-01T06", frequency=frequency)
    kept = list(range(1, 9, step))
    assert np.array_equal(found.dates, stored.dates[kept])
    assert found.missing == {kept.index(4)} if 4 in kept else not found.missing
    assert np.array_equal(bits(found[-1]), bits(stored.values[kept[-1]]))
    assert found.frequency == ("1d" if step == 4 else frequency)


def test_the_frequency_is_counted_over_gaps(folder):
    kept = [0, 1, 2, 3, 6, 7, 8]
    dates = every(6, 9)[kept]
    source = write_source(folder / "gappy.zarr", noise((7, 1, 1, 5), 2), dates, chunks=(1, 1, 1, 3))
    found = open_dataset(source.path, frequency="12h")
    assert np.array_equal(found.dates, every(12, 5)[[0, 1, 3, 4]])
    assert np.array_equal(bits(found[:]), bits(source.values[[0, 2, 4, 6]]))


def test_a_single_date_has_no_frequency(stored):
    assert open_dataset(stored.path, end="2020-01-01T00").frequency == "6h"  # the dataset has
    assert len(open_dataset(stored.path, end="2020-01-01T00")) == 1


def test_select_gives_the_order_and_drop_and_rename_apply_to_stored_names(stored):
    found = open_dataset(stored.path, select=["tp", "t_850", "z_500"], drop="z_500", rename={"tp": "rain"})
    assert found.variables == ("rain", "t_850")
    assert found.name_to_index == {"rain": 0, "t_850": 1}
    assert np.array_equal(bits(found[0]), bits(stored.values[0, [2, 0]]))
    for kind, values in found.statistics.items():
        assert np.array_equal(values, stored.statistics[kind][[2, 0]])
    for kind, values in found.statistics_tendencies().items():
        assert np.array_equal(values, stored.statistics[f"statistics_tendencies_6h_{kind}"][[2, 0]])


def test_tendencies_are_those_of_the_frequency_or_of_the_delta_asked_for(stored):
    daily = open_dataset(stored.path, frequency="12h", start="2020-01-01T06")
    with pytest.raises(SelectionError, match=r"no statistics_tendencies_12h_mean. It has: .*24h_mean"):
        daily.statistics_tendencies()
    found = daily.statistics_tendencies("24h")
    assert set(found) == {"mean", "stdev", "minimum", "maximum"}
    assert np.array_equal(found["stdev"], stored.statistics["statistics_tendencies_24h_stdev"])
    assert np.array_equal(daily.statistics_tendencies("1d")["stdev"], found["stdev"])  # the same time
    assert np.array_equal(open_dataset(stored.path, frequency="1d").statistics_tendencies()["stdev"], found["stdev"])


def test_statistics_of_another_dataset_are_taken_by_name(folder, stored):
    names = ["q", "tp", "z_500", "t_850"]
    other = write_source(folder / "other.zarr", noise((2, 4, 1, 7)), names=names, tendencies=("6h",), seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its fields are never read: no cost to tell
        found = open_dataset(stored.path, select=["z_500", "tp"], rename={"tp": "rain"}, statistics=other.path)
    assert found.variables == ("z_500", "rain")
    for kind, values in found.statistics.items():
        assert np.array_equal(values, other.statistics[kind][[2, 1]])
    for kind, values in found.statistics_tendencies().items():
        assert np.array_equal(values, other.statistics[f"statistics_tendencies_6h_{kind}"][[2, 1]])
    assert np.array_equal(bits(found[0]), bits(stored.values[0, [1, 2]]))


def test_statistics_that_lack_a_variable_are_refused(folder, stored):
    other = write_source(folder / "lacking.zarr", noise((2, 2, 1, 7)), names=["tp", "q"])
    with pytest.raises(DatasetError, match="no statistics of t_850, z_500"):
        open_dataset(stored.path, statistics=other.path)


def test_datasets_of_the_same_dates_are_joined_by_variables(folder, stored):
    more = write_source(
        folder / "more.source.zarr",
        noise((9, 2, 2, 23), 3),
        names=["q", "sst"],
        missing=(7,),
        tendencies=("6h",),
        seed=3,
    )
    more = cut(more, folder / "more.zarr", 6, 3)
    found = open_dataset([stored.path, more.path], select=["sst", "t_850", "q"])
    assert found.missing == {4, 7}
    assert found.chunk_cells == 6
    together = np.concatenate([stored.values, more.values], 1)[:, [4, 0, 3]]
    assert np.array_equal(bits(found[[0, 8], :, 1, 4:20]), bits(together[[0, 8], :, 1, 4:20]))
    for kind in ("mean", "maximum"):
        both = np.concatenate([stored.statistics[kind], more.statistics[kind]])[[4, 0, 3]]
        assert np.array_equal(found.statistics[kind], both)
        name = f"statistics_tendencies_6h_{kind}"
        both = np.concatenate([stored.statistics[name], more.statistics[name]])[[4, 0, 3]]
        assert np.array_equal(found.statistics_tendencies()[kind], both)
    assert open_dataset([stored.path, more.path], select=["q"]).missing == {7}


def test_datasets_of_the_same_variables_are_concatenated_in_time_in_whatever_order(folder, stored):
    later = write_source(
        folder / "later.source.zarr",
        noise((4, 3, 2, 23), 4),
        every(6, 4, stored.dates[-1] + np.timedelta64(2, "D")),
        NAMES,
        missing=(1,),
        tendencies=("6h",),
        seed=4,
    )
    later = cut(later, folder / "later.zarr", 2)
    together = np.concatenate([stored.values, later.values])
    for paths, first in (([stored.path, later.path], stored), ([later.path, stored.path], later)):
        found = open_dataset(paths)
        assert np.array_equal(found.dates, np.concatenate([stored.dates, later.dates]))
        assert found.missing == {4, 10}
        assert found.frequency == "6h"
        kept = [0, 3, 8, 9, 12]
        assert np.array_equal(bits(found[kept]), bits(together[kept]))
        assert np.array_equal(bits(found[-1, ..., 7]), bits(together[-1, ..., 7]))
        assert np.array_equal(found.statistics["mean"], first.statistics["mean"])
        tendencies = first.statistics["statistics_tendencies_6h_mean"]
        assert np.array_equal(found.statistics_tendencies()["mean"], tendencies)
    assert open_dataset([stored.path, later.path], start=later.dates[0]).missing == {1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latitudes": np.linspace(80, -80, 23), "names": ["q", "r", "s"]}, "not on the same cells"),
        ({"values": noise((9, 3, 1, 23)), "names": ["q", "r", "s"]}, "not on the same cells and members"),
        ({"names": ["q", "r", "tp"]}, "several of the datasets have tp"),
        ({"names": ["q", "r", "s"], "dates": every(6, 9) + 3600}, "neither the same dates .* nor the same variables"),
        ({"names": NAMES, "dates": every(6, 9) + 3600}, "Concatenate datasets whose dates do not overlap"),
    ],
    ids=["grid", "members", "variables", "nothing in common", "overlap"],
)
def test_datasets_that_do_not_fit_are_not_joined(tmp_path, stored, changes, named):
    other = write_source(tmp_path / "other.zarr", **{"values": noise(SHAPE), "chunks": (1, 3, 2, 9), **changes})
    with pytest.raises(DatasetError, match=named):
        open_dataset([stored.path, other.path])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_only_the_chunks_that_hold_the_answer_are_read(tmp_path, zarr_format):
    source = write_source(tmp_path / "source.zarr", noise((3, 2, 1, 80_000)))
    stored = cut(source, tmp_path / "stored.zarr", 8, zarr_format, "none")
    dataset = open_dataset(stored.path)
    dataset[0, 0, 0, 0]
    chunk = 2 * 10_000 * 4
    for index, chunks in (
        ((1, 0, 0, 5), 1),
        ((1, 0, 0, slice(9_999, 10_001)), 2),
        ((slice(1, 3), 1), 16),
        ((2, slice(None), 0, [5, 79_999, 6]), 2),
        ((slice(0, 0),), 0),
        (([0, 2], slice(None), slice(None), slice(20_000, 30_000)), 2),
    ):
        before = bytes_read()
        found = dataset[index]
        read = bytes_read() - before
        assert chunks * chunk <= read <= 1.02 * chunks * chunk + 2_000
        assert np.array_equal(bits(found), bits(stored.values[index]))


def test_one_date_is_read_without_a_list_of_its_cells(tmp_path):
    import tracemalloc

    stored = cut(write_source(tmp_path / "source.zarr", noise((2, 1, 1, 300_000))), tmp_path / "stored.zarr", 4)
    dataset = open_dataset(stored.path)
    dataset[0]
    tracemalloc.start()
    found = dataset[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * found.nbytes


def test_a_dataset_that_was_never_cut_works_and_says_once_what_it_costs(tmp_path):
    source = write_source(tmp_path / "whole.zarr", noise((3, 2, 1, 9)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            found = open_dataset(source.path)
            assert np.array_equal(bits(found[1:, :, 0, 3]), bits(source.values[1:, :, 0, 3]))
    assert [warning.category for warning in caught] == [ReadCostWarning]
    assert f"shardio rechunk {source.path}" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_several_dates_in_one_chunk_work_and_say_what_it_costs(tmp_path):
    source = write_source(tmp_path / "whole.zarr", noise((5, 2, 1, 9)), chunks=(2, 1, 1, 4))
    with pytest.warns(ReadCostWarning, match="2 dates in one chunk"):
        found = open_dataset(source.path)
    assert np.array_equal(bits(found[:]), bits(source.values))


@pytest.mark.parametrize(
    "storage",
    [
        {"compressors": numcodecs.GZip(3)},
        {"order": "F"},
        {"filters": numcodecs.Delta("f4")},
    ],
    ids=["gzip", "F order", "filter"],
)
def test_codecs_that_shardio_does_not_decode_itself_give_the_same_bits(tmp_path, storage):
    values = np.arange(4 * 3 * 2 * 24, dtype="f4").reshape(4, 3, 2, 24)  # which a filter of differences keeps exactly
    source = write_source(tmp_path / "odd.zarr", values, chunks=(1, 3, 2, 6), **storage)
    found = open_dataset(source.path)
    assert np.array_equal(bits(found[:]), bits(source.values))
    assert np.array_equal(bits(found[::-2, [2, 0], 1, 4:20:3]), bits(source.values[::-2][:, [2, 0]][:, :, 1, 4:20:3]))


def test_an_incomplete_dataset_is_refused_with_the_command_that_finishes_it(tmp_path, stored, begin):
    destination = tmp_path / "made.zarr"
    source = write_source(tmp_path / "source.zarr", noise((60, 3, 1, 40_000)))
    words = ("rechunk", source.path, destination, "--grid-chunks", "4", "--codec", "zstd")
    process = begin(*words)
    partial = destination.with_name("made.zarr.partial")
    while not (partial / "ledger.jsonl").exists() or not (partial / "ledger.jsonl").read_text().count("\n"):
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.wait()
    process.stderr.close()
    for path in (destination, partial):
        with pytest.raises(
            DatasetError, match=r"is incomplete: \d+ of 60 dates are written. Finish it with: "
        ) as refused:
            open_dataset(path)
        assert re.search("shardio rechunk .*made.zarr --grid-chunks 4 --codec zstd", str(refused.value))


def test_a_dataset_without_its_complete_mark_is_refused(tmp_path, stored):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(stored.path, copy)
    attributes = copy / ".zattrs"
    attributes.write_text(attributes.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(DatasetError, match="is incomplete"):
        open_dataset(copy)


def test_what_is_no_dataset_is_refused(tmp_path, stored):
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset(tmp_path / "nothing.zarr")
    with pytest.raises(DatasetError, match="not an anemoi dataset"):
        open_dataset(tmp_path)
    with pytest.raises(SelectionError, match="no dataset is named"):
        open_dataset([])


def test_a_chunk_that_is_not_there_raises_and_names_its_file(tmp_path, stored):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(stored.path, copy)
    gone = next(file for file in chunk_files(copy) if file.name == "2.0.0.1")
    gone.unlink()
    dataset = open_dataset(copy)
    assert np.array_equal(bits(dataset[2, ..., :6]), bits(stored.values[2, ..., :6]))
    with pytest.raises(ChunkError, match=re.escape(str(gone))):
        dataset[2]
