"""What a job notes of its dates takes the same few bytes for each, and what a kill leaves of it is enough."""

import json
import os
import re
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from shardio.errors import DatasetError, OutputError
from shardio.format.codec import named
from shardio.format.layout import grid_chunked
from shardio.rechunk import Request, prepare, run
from shardio.write import statistics
from shardio.write.job import Job, partial_of, refuse_unfinished
from shardio.write.output import begin_data
from shardio.write.writer import StoredChunk
from shardio.write.written import STATISTICS, Written, WrittenDate

DATES, CHUNKS, TOGETHER = 100_000, 5, 1000
IDENTITY = {"dates": DATES}


def some_moments(variables):
    return statistics.moments(np.random.default_rng(0).standard_normal((variables, 9)).astype(np.float32))


def written_date(date, moments):
    """As a worker gives it."""
    return WrittenDate.of(
        date,
        [StoredChunk(date * CHUNKS + chunk, 7, None) for chunk in range(CHUNKS - 1)]
        + [StoredChunk(2**32 - 1 - date, 7, moments)],
    )


def allocated(act):
    """Bytes that `act` leaves behind, bytes that it took at most, and what it returns."""
    tracemalloc.start()
    result = act()
    left, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return left, most, result


def test_a_hundred_thousand_dates_take_few_bytes_each_and_resume(tmp_path):
    variables = 5
    layout = grid_chunked((DATES, variables, 1, 23), CHUNKS, 3, named("lz4"))
    job = Job(tmp_path / "b.zarr", IDENTITY, "shardio rechunk", sync=True)
    begin_data(job.dataset, layout, {})
    (tmp_path / "chunks").write_bytes(bytes(7 * CHUNKS + 16 * CHUNKS + 4))  # of one date
    written, moments = Written(DATES, CHUNKS), some_moments(variables)

    def record():
        for first in range(0, DATES, TOGETHER):
            dates = [written_date(date, moments) for date in range(first, first + TOGETHER)]
            written.add(dates)
            job.record(dates, written)

    left, most, _ = allocated(record)
    assert left < 300_000, "nothing is kept per date but its place in three arrays"
    assert most < 2_000_000, "of the dates that are recorded together"
    ledger = partial_of(tmp_path / "b.zarr") / "ledger.jsonl"
    assert ledger.stat().st_size <= DATES * (len('[99999, ""]\n') + 16 * CHUNKS + 4)
    for date in range(DATES):
        os.symlink(tmp_path / "chunks", f"{job.dataset}/data/{layout.file_of((date, 0, 0, 0))[0]}")
    job.close()

    again = Job(tmp_path / "b.zarr", IDENTITY, "shardio rechunk", sync=True)
    left, most, resumed = allocated(lambda: again.written(layout, with_moments=True))
    again.close()
    assert most < DATES * (4 * CHUNKS + 2) + 500_000, "the arrays, and a line"
    assert resumed.done.all()
    assert (resumed.crc == written.crc).all()
    assert resumed.stored_bytes == 7 * CHUNKS * DATES
    assert resumed.moments.count.tolist() == [9 * DATES] * variables
    assert resumed.moments.total.tolist() == [DATES * total for total in moments.total]

    def refuse():
        with pytest.raises(DatasetError, match=f"{DATES} of {DATES} dates"):
            refuse_unfinished(tmp_path / "b.zarr")

    _, most, _ = allocated(refuse)
    assert most < DATES + 500_000


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    """Small dates of a source without statistics, three to a chunk."""
    path = tmp_path_factory.mktemp("source") / "a.zarr"
    return build(path, 2, shape=(30, 3, 1, 4001), chunks=(3, 3, 1, 1500), missing=(7,), statistics=False).path


@pytest.fixture(scope="module")
def whole(source, rechunk, tree, tmp_path_factory):
    """Every file of a run that nothing stopped."""
    destination = tmp_path_factory.mktemp("whole") / "b.zarr"
    rechunk(source, destination, 13)
    return tree(destination)


@pytest.fixture
def unfinished(source, tmp_path):
    """What makes an output of which some dates are written; beside it, its sums as they were before the last date."""
    notes, reports = partial_of(tmp_path / "b.zarr"), []

    def stop(progress):
        reports.append(progress.dates)
        if len(reports) == 2:
            shutil.copy(notes / STATISTICS, tmp_path / "earlier")
        if len(reports) == 4:
            raise KeyboardInterrupt

    request = Request(str(source), str(tmp_path / "b.zarr"), 13, max_memory=600_000, command="shardio rechunk")
    with pytest.raises(KeyboardInterrupt):
        run(prepare(request), stop)
    return request


def test_dates_that_are_summed_but_not_in_the_ledger_are_summed_once(unfinished, whole, tree, tmp_path):
    """As a kill leaves it between the two."""
    ledger = partial_of(tmp_path / "b.zarr") / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))
    assert run(prepare(unfinished)).resumed_dates == len(lines) - 1
    assert tree(tmp_path / "b.zarr") == whole


def test_dates_in_the_ledger_that_are_not_summed_are_written_again(unfinished, whole, tree, tmp_path):
    """As power loss may leave it."""
    notes = partial_of(tmp_path / "b.zarr")
    dates = len((notes / "ledger.jsonl").read_bytes().splitlines())
    shutil.copy(tmp_path / "earlier", notes / STATISTICS)
    assert 0 < run(prepare(unfinished)).resumed_dates < dates
    assert tree(tmp_path / "b.zarr") == whole


@pytest.mark.parametrize("left", [None, b"", b"12\n[]", b"\0" * 300, b"one\ntwo\nthree"])
def test_sums_that_are_damaged_are_made_again(left, unfinished, whole, tree, tmp_path):
    file = partial_of(tmp_path / "b.zarr") / STATISTICS
    if left is None:
        file.unlink()
    else:
        file.write_bytes(left)
    assert run(prepare(unfinished)).resumed_dates == 0
    assert tree(tmp_path / "b.zarr") == whole


def test_dates_that_another_cut_writes_again_count_once(unfinished, whole, tree, tmp_path):
    """With more memory all dates are one task, which is written as a whole."""
    reports = []
    done = run(prepare(replace(unfinished, max_memory=2**30)), lambda progress: reports.append(progress.dates))
    assert tree(tmp_path / "b.zarr") == whole
    assert done.resumed_dates > 0
    assert done.resumed_dates + done.dates == reports[-1] == 30
    chunks = [content for name, content in whole.items() if re.fullmatch(r"data/\d+\.0\.0\.\d+", name)]
    assert len(chunks) == 30 * 13
    assert done.stored_bytes == sum(len(content) for content in chunks)


def test_notes_of_another_version_are_refused_and_discarded_on_demand(unfinished, whole, tree, tmp_path):
    job = partial_of(tmp_path / "b.zarr") / "job.json"
    begun = json.loads(job.read_text())
    assert begun.pop("notes") == 2
    job.write_text(json.dumps(begun))
    with pytest.raises(OutputError, match="begun by another version of shardio") as caught:
        run(prepare(unfinished))
    assert "discard it with --overwrite" in str(caught.value)
    assert run(prepare(replace(unfinished, overwrite=True))).resumed_dates == 0
    assert tree(tmp_path / "b.zarr") == whole
