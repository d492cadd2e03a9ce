"""The order of samples: one for all topologies, nothing lost, resumable at any sample."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shardio import ReadGroupSampler, Topology
from shardio.errors import SelectionError
from shardio.load.sampler import valid_starts
from shardio.load.topology import divisors

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import every


@st.composite
def topologies(draw, most=12):
    """(world, M, R, E) of a topology."""
    model = draw(st.integers(1, 4))
    read = draw(st.sampled_from(divisors(model)))
    ensemble = model * draw(st.integers(1, 2))
    return ensemble * draw(st.integers(1, most // ensemble)), model, read, ensemble


def samplers(sizes, starts, **options):
    world, model, read, ensemble = sizes
    return [ReadGroupSampler(starts, Topology(world, rank, model, read, ensemble), **options) for rank in range(world)]


def in_order(batches, data_size, cursor):
    """One step of all data groups, as the global order has it: sample k is the next one of group k mod D."""
    taken = [iter(batch) for batch in batches]
    count = sum(len(batch) for batch in batches)
    return [next(taken[k % data_size]) for k in range(cursor, cursor + count)]


def global_order(ranks, state=None):
    """Samples of the rest of an epoch in global order, padding left out."""
    groups = list({rank.topology.data_rank: rank for rank in ranks}.values())
    cursor = groups[0].cursor
    order = []
    for batches in zip(*(group.batches() for group in groups), strict=True):
        step = in_order(batches, len(groups), cursor)
        order += [sample.start for sample in step if not sample.padding]
        cursor += len(step)
    return order


STARTS = np.arange(3, 50, 2)[:23]


@settings(deadline=None)
@given(topologies(), st.integers(1, 5), st.booleans(), st.integers(0, 3), st.integers(0, 2))
def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(sizes, batch_size, shuffle, seed, epoch):
    alone = ReadGroupSampler(STARTS, Topology(), 1, shuffle, seed)
    ranks = samplers(sizes, STARTS, batch_size=batch_size, shuffle=shuffle, seed=seed)
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
    order = global_order(ranks)
    assert order == list(alone)
    assert sorted(order) == STARTS.tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(ReadGroupSampler(STARTS, Topology(), seed=s).order(e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@settings(deadline=None)
@given(topologies(), st.integers(1, 5), st.booleans())
def test_ranks_of_an_ensemble_get_the_same_batches_and_data_groups_disjoint_ones(sizes, batch_size, drop_last):
    world, _, _, ensemble = sizes
    if len(STARTS) < batch_size * world // ensemble:
        drop_last = False
    ranks = samplers(sizes, STARTS, batch_size=batch_size, drop_last=drop_last)
    epochs = [list(rank.batches()) for rank in ranks]
    by_group = {}
    for rank, epoch in zip(ranks, epochs, strict=True):
        assert epoch == by_group.setdefault(rank.topology.data_rank, epoch)
        assert len(epoch) == rank.batches_per_epoch
        assert {len(batch) for batch in epoch} == {batch_size}
    kept = [[s.start for batch in epoch for s in batch if not s.padding] for epoch in by_group.values()]
    together = [start for group in kept for start in group]
    assert len(set(together)) == len(together) == len(STARTS) - ranks[0].dropped
    if not drop_last:
        assert sorted(together) == STARTS.tolist()


@settings(deadline=None)
@given(topologies(), st.integers(1, 7))
def test_padding_is_marked_and_is_less_than_a_step(sizes, batch_size):
    ranks = samplers(sizes, STARTS, batch_size=batch_size)
    groups = list({rank.topology.data_rank: rank for rank in ranks}.values())
    padding = sum(sample.padding for group in groups for batch in group.batches() for sample in batch)
    assert padding == -len(STARTS) % groups[0].samples_per_step


def test_drop_last_tells_how_many_samples_it_drops(caplog):
    caplog.set_level("INFO", "shardio.load.sampler")
    sampler = ReadGroupSampler(STARTS, Topology(), batch_size=5, drop_last=True)
    assert sum(len(batch) for batch in sampler.batches()) == 20
    assert sampler.dropped == 3
    assert [record.getMessage() for record in caplog.records] == ["3 samples of epoch 0 fill no batch and are dropped"]


@settings(deadline=None)
@given(st.data(), topologies(), topologies(), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_resume_after_any_batch_under_another_topology_gives_the_rest_of_the_order(
    data, before, after, batch_before, batch_after, shuffle
):
    uninterrupted = ReadGroupSampler(STARTS, Topology(), 1, shuffle, seed=7)
    whole = [*uninterrupted, *uninterrupted, *uninterrupted]
    ranks = samplers(before, STARTS, batch_size=batch_before, shuffle=shuffle, seed=7)
    stop = data.draw(st.integers(0, 2 * ranks[0].batches_per_epoch))
    taken = 0
    for rank in ranks:
        left = stop
        while left:
            for _ in rank.batches():
                left -= 1
                if not left:
                    break
    states = [rank.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    taken = states[0]["epoch"] * len(STARTS) + states[0]["cursor"]
    assert taken == sum(
        min(ranks[0].samples_per_step, len(STARTS) - step % ranks[0].batches_per_epoch * ranks[0].samples_per_step)
        for step in range(stop)
    )
    resumed = samplers(after, STARTS, batch_size=batch_after, shuffle=shuffle, seed=7)
    for rank in resumed:
        rank.load_state_dict(states[0])
    rest = []
    while taken + len(rest) < len(whole):
        rest += global_order(resumed)
    assert rest == whole[taken:]


@settings(deadline=None)
@given(topologies(), st.integers(1, 4), st.integers(0, 60))
def test_single_samples_move_the_position_one_by_one(sizes, batch_size, stop):
    ranks = samplers(sizes, STARTS, batch_size=batch_size)
    whole = [start for epoch in range(99) for start in ranks[0].order(epoch)]
    stop = min(stop, 3 * len(ranks[0]))
    for rank in ranks:
        left = stop
        while left:
            for _ in rank:
                left -= 1
                if not left:
                    break
    state = ranks[0].state_dict()
    assert all(rank.state_dict() == state for rank in ranks)
    alone = ReadGroupSampler(STARTS, Topology(), 1)
    alone.load_state_dict(state)
    taken = state["epoch"] * len(STARTS) + min(state["cursor"], len(STARTS))
    assert [next(iter(alone))] == whole[taken : taken + 1]
    epochs, rest = divmod(stop, len(ranks[0]))
    assert taken == epochs * len(STARTS) + min(rest * ranks[0].topology.data_size, len(STARTS))


def test_resume_with_batches_too_large_for_what_is_left_goes_to_the_next_epoch(caplog):
    caplog.set_level("INFO", "shardio.load.sampler")
    sampler = ReadGroupSampler(STARTS, Topology(), batch_size=5, drop_last=True)
    sampler.load_state_dict({**sampler.state_dict(), "cursor": 20})
    assert [sample.start for sample in next(sampler.batches())] == sampler.order(1)[:5].tolist()
    assert "3 samples of epoch 0" in caplog.text


@pytest.mark.parametrize("other", [{"seed": 1}, {"shuffle": False}, {"starts": STARTS[:-1]}])
def test_a_state_of_another_run_is_refused(other):
    state = ReadGroupSampler(STARTS, Topology()).state_dict()
    with pytest.raises(SelectionError, match="another run"):
        ReadGroupSampler(**{"starts": STARTS, "topology": Topology(), **other}).load_state_dict(state)


def test_set_epoch_keeps_the_position_within_the_same_epoch_alone():
    sampler = ReadGroupSampler(STARTS, Topology())
    order = list(sampler.order(0))
    taken = iter(sampler)
    assert [next(taken), next(taken)] == order[:2]
    sampler.set_epoch(0)
    assert next(iter(sampler)) == order[2]
    sampler.set_epoch(1)
    assert list(sampler) == list(sampler.order(1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"starts": STARTS[:0]}, "no sample is left"),
        ({"batch_size": 24, "drop_last": True}, "23 samples are fewer than one batch of 24"),
    ],
)
def test_a_sampler_that_could_give_nothing_is_refused(options, named):
    with pytest.raises(SelectionError, match=named):
        ReadGroupSampler(**{"starts": STARTS, "topology": Topology(), **options})


class Windows(torch.utils.data.Dataset):
    """What a user of plain PyTorch writes: the window that begins at a date."""

    def __getitem__(self, start):
        return torch.tensor([start, start + 1])


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_torch_dataloader_takes_it_as_sampler(drop_last):
    for rank in range(3):
        sampler = ReadGroupSampler(STARTS, Topology(3, rank), 4, seed=5, drop_last=drop_last)
        loader = DataLoader(Windows(), batch_size=4, sampler=sampler)
        own = ReadGroupSampler(STARTS, Topology(3, rank), 4, seed=5, drop_last=drop_last)
        expected = [[[s.start, s.start + 1] for s in batch] for batch in own.batches()]
        assert [batch.tolist() for batch in loader] == expected
        assert len(loader) == len(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_dataloader_takes_it_as_batch_sampler(workers):
    sampler = ReadGroupSampler(STARTS, Topology(2, 1), 4, seed=5)
    loader = DataLoader(
        Windows(),
        batch_sampler=sampler.as_batch_sampler(),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    for _ in range(2):
        own = ReadGroupSampler(STARTS, Topology(2, 1), 4, seed=5)
        own.set_epoch(sampler.epoch)
        expected = [[[s.start, s.start + 1] for s in batch] for batch in own.batches()]
        assert len(loader) == len(expected)
        assert [batch.tolist() for batch in loader] == expected


@pytest.mark.parametrize("as_batches", [True, False])
@pytest.mark.parametrize("stop", range(6))
def test_a_torch_dataloader_resumes_where_its_sampler_stood(stop, as_batches):
    def stock(sampler):
        if as_batches:
            return DataLoader(Windows(), batch_sampler=sampler.as_batch_sampler())
        return DataLoader(Windows(), batch_size=4, sampler=sampler)

    interrupted = ReadGroupSampler(STARTS, Topology(), 4)
    batches = iter(stock(interrupted))
    seen = [start for _ in range(stop) for start in next(batches)[:, 0].tolist()]
    resumed = ReadGroupSampler(STARTS, Topology(), 4)
    resumed.load_state_dict(interrupted.state_dict())
    rest = [start for batch in stock(resumed) for start in batch[:, 0].tolist()]
    assert (seen + rest)[: len(STARTS)] == resumed.order(0).tolist()


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=0, max_size=12), st.lists(st.integers(1, 3), max_size=12), st.integers(1, 4))
def test_windows_are_all_those_that_touch_no_missing_date_and_cross_no_gap(gone, jumps, steps):
    count = min(len(gone), len(jumps))
    gone, jumps = np.array(gone[:count], bool), jumps[:count]
    hours = np.cumsum([0, *jumps])[:count] * 6
    dates = np.datetime64("2020-01-01", "s") + hours * np.timedelta64(3600, "s")
    found = valid_starts(dates, gone, steps, 6 * 3600)
    by_hand = [
        first
        for first in range(count - steps + 1)
        if not gone[first : first + steps].any() and all(hours[first + i] == hours[first] + 6 * i for i in range(steps))
    ]
    assert found.tolist() == by_hand


def test_the_commonest_step_counts_where_none_is_given():
    dates = np.delete(every(6, 12), [4, 5])
    dates = np.append(dates, dates[-1] + np.timedelta64(3600, "s"))  # one odd date does not break all windows
    assert valid_starts(dates, np.zeros(11, bool), 2).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
