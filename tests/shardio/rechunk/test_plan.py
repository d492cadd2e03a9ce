"""The plan against a count by hand, for every shape and chunking; and the memory of real runs against the plan."""

import math
import os
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardio.errors import PlanError
from shardio.format.codec import named
from shardio.format.layout import grid_chunked
from shardio.rechunk import Request, prepare, run
from shardio.rechunk.plan import make_plan
from shardio.source.extent import SourceExtent

AMPLE = 2**50


@st.composite
def cases(draw):
    """(source, target) of any shape, chunking and selection."""
    shape = tuple(draw(st.integers(1, n)) for n in (30, 5, 3, 60))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    first = draw(st.integers(0, shape[0] - 1))
    dates = range(first, draw(st.integers(first + 1, shape[0])))
    variables = draw(st.lists(st.integers(0, shape[1] - 1), min_size=1, unique=True))
    source = SourceExtent(shape, chunks, draw(st.sampled_from([2, 4, 8])), dates, tuple(variables))
    grid_chunks = draw(st.sampled_from(sorted({math.ceil(shape[3] / c) for c in range(1, shape[3] + 1)})))
    wanted = (len(dates), len(variables), shape[2], shape[3])
    return source, grid_chunked(wanted, grid_chunks, draw(st.sampled_from([2, 3])), named("lz4"))


def planned(source, target, memory, workers, threads):
    try:
        return make_plan(source, target, memory, workers, threads)
    except PlanError:
        return None


def touched(chunk, indices):
    return {index // chunk for index in indices}


def bytes_by_hand(source, plan):
    """Every chunk that every piece of every task touches, clipped to the array, counted one by one."""
    total = 0
    for task in plan.tasks:
        dates = [source.dates[date] for date in range(task.start, task.stop)]
        for piece in plan.pieces:
            wanted = (dates, source.variables, range(source.shape[2]), range(piece.start, piece.stop))
            extents = [
                sum(min(n, (i + 1) * c) - i * c for i in touched(c, indices))
                for n, c, indices in zip(source.shape, source.chunks, wanted, strict=True)
            ]
            total += math.prod(extents) * source.itemsize
    return total


limits = st.sampled_from([*(2**i for i in range(8, 24)), AMPLE])


@settings(max_examples=400, deadline=None)
@given(cases(), limits, st.integers(1, 3), st.integers(1, 4))
def test_every_date_is_in_one_task_and_every_cell_in_one_piece_of_whole_chunks(case, memory, workers, threads):
    source, target = case
    plan = planned(source, target, memory, workers, threads)
    assume(plan)
    assert [date for task in plan.tasks for date in range(task.start, task.stop)] == list(range(len(source.dates)))
    assert [cell for piece in plan.pieces for cell in range(piece.start, piece.stop)] == list(range(target.shape[3]))
    assert all(piece.start % target.chunks[3] == 0 for piece in plan.pieces)
    assert all(piece.stop % target.chunks[3] == 0 for piece in plan.pieces[:-1])


@settings(max_examples=400, deadline=None)
@given(cases(), limits, st.integers(1, 3), st.integers(1, 4))
def test_bytes_are_those_counted_by_hand(case, memory, workers, threads):
    source, target = case
    plan = planned(source, target, memory, workers, threads)
    assume(plan)
    assert plan.bytes_read == bytes_by_hand(source, plan)
    assert plan.bytes_needed == math.prod(target.shape) * source.itemsize
    assert plan.amplification >= 1


@settings(max_examples=400, deadline=None)
@given(cases(), limits, st.integers(1, 3), st.integers(1, 4))
def test_memory_stays_within_the_bound_or_the_least_that_works_is_named(case, memory, workers, threads):
    source, target = case
    try:
        plan = make_plan(source, target, memory, workers, threads)
    except PlanError as error:
        least = int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))
        assert least > memory
        assert make_plan(source, target, least, workers, threads).peak_memory == least
    else:
        assert plan.peak_memory <= memory
        assert plan.in_flight >= 1


@settings(max_examples=400, deadline=None)
@given(cases(), st.integers(1, 3), st.integers(1, 4))
def test_ample_memory_reads_each_source_chunk_once(case, workers, threads):
    source, target = case
    plan = make_plan(source, target, AMPLE, workers, threads)
    wanted = (source.dates, source.variables, range(source.shape[2]), range(source.shape[3]))
    extents = [
        sum(min(n, (i + 1) * c) - i * c for i in touched(c, indices))
        for n, c, indices in zip(source.shape, source.chunks, wanted, strict=True)
    ]
    assert plan.bytes_read == math.prod(extents) * source.itemsize
    assert plan.reason == ""
    if len(source.dates) == source.shape[0] and len(source.variables) == source.shape[1]:
        assert plan.amplification == 1


@settings(max_examples=200, deadline=None)
@given(cases(), limits, st.integers(1, 4))
def test_less_memory_never_reads_less_and_says_why_it_reads_more(case, memory, threads):
    source, target = case
    plan = planned(source, target, memory, 1, threads)
    assume(plan)
    ample = make_plan(source, target, AMPLE, 1, threads)
    assert plan.bytes_read >= ample.bytes_read
    assert bool(plan.reason) == (plan.bytes_read > ample.bytes_read)


def test_a_bound_that_cannot_be_kept_is_an_error_with_remedies():
    source = SourceExtent((4, 1, 1, 1000), (4, 1, 1, 1000), 4, range(4), (0,))
    with pytest.raises(PlanError, match=r"--max-memory 1MiB, fewer --workers, or more grid-chunks"):
        make_plan(source, grid_chunked((4, 1, 1, 1000), 4, 3, named("lz4")), 1000)


# Beside the buffers: ledger, coordinates, small arrays as zarr-python writes them, threads, strings.
SLACK = 500_000
LARGE = {
    "one date per chunk": {"chunks": (1, 40, 1, 4_000)},
    "several dates per chunk": {"chunks": (5, 20, 1, 700)},
    "float64": {"chunks": (3, 40, 1, 900), "dtype": "f8"},
    "no statistics": {"chunks": (2, 40, 1, 4_000), "statistics": False},
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_buffers_of_a_real_run_stay_within_the_plan(name, zarr_format, build, tmp_path):
    source = build(tmp_path / "a.zarr", **{"shape": (12, 40, 1, 4_000), **LARGE[name]}).path
    request = Request(str(source), str(tmp_path / "b.zarr"), 5, zarr_format=zarr_format, sync=False, overwrite=True)
    run(prepare(request))  # imports are no buffers
    ample = prepare(request).plan.peak_memory
    for bound in (ample, max(ample // 2, least(request)), least(request)):
        prepared = prepare(replace(request, max_memory=bound))
        tracemalloc.start()
        try:
            run(prepared)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= prepared.plan.peak_memory + SLACK


def least(request):
    """The smallest bound that a plan of `request` can keep."""
    try:
        return prepare(replace(request, max_memory=1)).plan.peak_memory
    except PlanError as error:
        return int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))


def test_peak_memory_does_not_grow_with_the_number_of_dates():
    def extent(dates):
        return SourceExtent((dates, 8, 1, 10_000), (1, 8, 1, 10_000), 4, range(dates), tuple(range(8)))

    def plan(dates):
        return make_plan(extent(dates), grid_chunked((dates, 8, 1, 10_000), 16, 3, named("lz4")), AMPLE, 1, 2)

    assert plan(5_000).peak_memory == plan(50_000).peak_memory


def test_a_job_that_was_given_one_core_plans_for_one():
    source = SourceExtent((3, 2, 1, 60), (1, 2, 1, 60), 4, range(3), (0, 1))
    target, allowed = grid_chunked(source.shape, 4, 2, named("lz4")), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert make_plan(source, target, AMPLE).threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert make_plan(source, target, AMPLE).threads == len(allowed)
