import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardio.errors import PlanError
from shardio.load.partition import LARGEST_ALIGNED_IMBALANCE, balanced, partition


@st.composite
def cuts(draw):
    cells = draw(st.integers(1, 500))
    return cells, draw(st.integers(1, cells)), draw(st.integers(1, cells + 5))


@given(cuts())
def test_every_cell_is_owned_once_and_no_rank_is_idle(cut):
    cells, ranks, chunk_cells = cut
    made = partition(cells, ranks, chunk_cells)
    owned = [cell for rank in range(ranks) for cell in range(cells)[made.cells(rank)]]
    assert owned == list(range(cells))
    assert min(made.sizes) >= 1
    assert made.ranks == ranks


@given(cuts())
def test_chunks_of_a_rank_are_exactly_those_that_hold_its_cells(cut):
    cells, ranks, chunk_cells = cut
    made = partition(cells, ranks, chunk_cells)
    for rank in range(ranks):
        owned = range(cells)[made.cells(rank)]
        chunks = {cell // chunk_cells for cell in owned}
        assert set(made.chunks(rank)) == chunks
        assert made.cells_read(rank) == sum(cell // chunk_cells in chunks for cell in range(cells))


@given(cuts())
def test_a_cut_is_aligned_or_balanced_to_one_cell(cut):
    cells, ranks, chunk_cells = cut
    made = partition(cells, ranks, chunk_cells)
    assert made.aligned == all(bound % chunk_cells == 0 for bound in made.bounds[:-1])
    if made.aligned:
        assert made.read_amplification == 1
    else:
        assert max(made.sizes) - min(made.sizes) <= 1
    if max(made.sizes) - min(made.sizes) > 1:
        chunks = -(-cells // chunk_cells)
        assert chunks % ranks == 0 or made.imbalance <= LARGEST_ALIGNED_IMBALANCE


@given(st.integers(1, 1000), st.integers(1, 100))
def test_balanced_sizes_differ_by_one_at_most_and_descend(cells, ranks):
    bounds = balanced(cells, ranks)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert sum(sizes) == cells
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_seven_cells_in_three_chunks_over_two_ranks_are_balanced():
    made = partition(7, 2, 3)
    assert made.sizes == (4, 3)
    assert made.read_amplification == pytest.approx(10 / 7)


def test_sixteen_chunks_over_four_ranks_are_aligned_though_the_last_is_short():
    made = partition(10_007, 4, 626)
    assert made.aligned
    assert made.sizes == (2504, 2504, 2504, 2495)


@pytest.mark.parametrize("ranks", [0, -1, 8])
def test_more_ranks_than_cells_or_none_is_an_error(ranks):
    with pytest.raises(PlanError, match="Use 1 to 7 ranks"):
        partition(7, ranks, 3)
