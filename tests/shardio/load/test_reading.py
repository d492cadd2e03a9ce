"""Who reads which chunks: nothing twice, nothing left out, turns taken fairly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardio import Topology
from shardio.load.partition import partition
from shardio.load.reading import Reading, meet, within
from shardio.load.topology import divisors

CELLS = 1003
CHUNKS = {1: 1003, 4: 251, 7: 144, 16: 63}


def readings():
    for model in range(1, 7):
        for read in divisors(model):
            for n, chunk_cells in CHUNKS.items():
                for whole in (False, True):
                    topology = Topology(model, 0, model, read)
                    yield n, Reading(partition(CELLS, model, chunk_cells), topology, True, whole)


@pytest.mark.parametrize(("n", "reading"), list(readings()))
def test_a_sharing_model_group_reads_each_chunk_once(n, reading):
    ranks = range(reading.topology.model_size)
    for date in range(9):
        read = [chunk for rank in ranks for chunk in reading.chunks_read(date, rank)]
        assert sorted(read) == list(range(n))


@pytest.mark.parametrize(("n", "reading"), list(readings()))
def test_over_some_dates_all_ranks_read_equally_many_chunks(n, reading):
    if not reading.exchanges:
        assert reading.owners.aligned
        return
    ranks = range(reading.topology.model_size)
    counts = [sum(len(reading.chunks_read(date, rank)) for date in ranks) for rank in ranks]
    assert set(counts) == {n}


@pytest.mark.parametrize(("n", "reading"), list(readings()))
def test_one_read_group_alone_reads_a_date(n, reading):
    topology = reading.topology
    for date in range(9):
        groups = {rank // topology.read_size for rank in range(topology.model_size) if reading.chunks_read(date, rank)}
        assert len(groups) == 1 or not reading.exchanges


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from(sorted(CHUNKS)), st.booleans())
def test_without_sharing_every_rank_reads_all_that_it_wants(model, n, whole):
    reading = Reading(partition(CELLS, model, CHUNKS[n]), Topology(model, 0, model), False, whole)
    assert not reading.exchanges
    for rank in range(model):
        chunks, read = reading.chunks_read(0, rank), reading.cells_read(0, rank)
        assert read == reading.wanted(rank)
        assert reading.cells_of(chunks[0]).start <= read.start < reading.cells_of(chunks[0]).stop
        assert reading.cells_of(chunks[-1]).start < read.stop <= reading.cells_of(chunks[-1]).stop


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from(sorted(CHUNKS)), st.booleans())
def test_read_amplification_is_what_the_ranks_decode_over_the_grid(model, n, whole):
    for shared in (False, True):
        reading = Reading(partition(CELLS, model, CHUNKS[n]), Topology(model, 0, model), shared, whole)
        decoded = sum(
            reading.cells_of(chunk).stop - reading.cells_of(chunk).start
            for rank in range(model)
            for chunk in reading.chunks_read(0, rank)
        )
        assert reading.read_amplification == pytest.approx(decoded / CELLS)


ranges = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: slice(min(ends), max(ends)))


@settings(deadline=None)
@given(ranges, ranges)
def test_meet_is_the_common_part(a, b):
    everything = range(40)
    assert set(everything[meet(a, b)]) == set(everything[a]) & set(everything[b])
    common = meet(a, b)
    if common.stop > common.start:
        assert everything[b][within(common, b)] == everything[common]
