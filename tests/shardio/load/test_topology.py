"""Rank arithmetic: groups partition the world, and errors name what would work."""

import pydoc
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardio import Topology
from shardio.errors import TopologyError
from shardio.load.topology import divisors


@st.composite
def worlds(draw):
    """(world, M, R, E) that fit."""
    model = draw(st.integers(1, 8))
    read = draw(st.sampled_from(divisors(model)))
    ensemble = model * draw(st.integers(1, 4))
    return ensemble * draw(st.integers(1, 5)), model, read, ensemble


def all_ranks(world, model, read, ensemble):
    return [Topology(world, rank, model, read, ensemble) for rank in range(world)]


@settings(deadline=None)
@given(worlds())
def test_each_kind_of_group_has_every_rank_once_and_all_members_agree_on_it(sizes):
    ranks = all_ranks(*sizes)
    world, model, read, ensemble = sizes
    for groups, size in (
        ([rank.model_ranks for rank in ranks], model),
        ([rank.read_ranks for rank in ranks], read),
        ([rank.ensemble_ranks for rank in ranks], ensemble),
        ([rank.data_ranks for rank in ranks], world // ensemble),
    ):
        distinct = {tuple(group) for group in groups}
        assert sorted(rank for group in distinct for rank in group) == list(range(world))
        assert {len(group) for group in distinct} == {size}
        assert all(rank in group for rank, group in enumerate(groups))


@settings(deadline=None)
@given(worlds())
def test_groups_nest_and_places_count_along_them(sizes):
    for rank in all_ranks(*sizes):
        assert set(rank.read_ranks) <= set(rank.model_ranks) <= set(rank.ensemble_ranks)
        assert rank.model_ranks[rank.model_rank] == rank.rank
        assert rank.read_ranks[rank.read_rank] == rank.rank
        assert rank.data_ranks[rank.data_rank] == rank.rank
        assert rank.read_group * rank.read_size + rank.read_rank == rank.model_rank
        assert rank.read_groups * rank.read_size == rank.model_size
        assert len(rank.data_ranks) == rank.data_size


@settings(deadline=None)
@given(worlds())
def test_ranks_that_share_an_ensemble_share_their_samples_and_others_do_not(sizes):
    ranks = all_ranks(*sizes)
    for rank in ranks:
        same = [other.rank for other in ranks if other.data_rank == rank.data_rank]
        assert same == list(rank.ensemble_ranks)


def test_two_nodes_of_four_gpus_with_two_per_model_and_batch_four_have_an_effective_batch_of_sixteen():
    ranks = all_ranks(8, 2, 2, 2)
    assert {rank.effective_batch_size(4) for rank in ranks} == {16}
    assert [list(rank.model_ranks) for rank in ranks[::2]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(rank.data_ranks) for rank in ranks[:2]] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [rank.data_rank for rank in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
def test_sizes_that_do_not_fit_are_refused_with_choices_that_do(world, model, read, ensemble):
    fits = world % model == 0 and model % read == 0 and world % ensemble == 0 and ensemble % model == 0
    if fits:
        Topology(world, 0, model, read, ensemble)
        return
    with pytest.raises(TopologyError) as refused:
        Topology(world, 0, model, read, ensemble)
    message = str(refused.value)
    name, value = re.match(r"(\w+) (\d+) ", message).groups()
    asked = {"num_gpus_per_model": model, "read_group_size": read, "num_gpus_per_ensemble": ensemble}
    assert asked[name] == int(value)
    choices = [int(choice) for choice in re.search(r"Use one of: (.*)\.$", message)[1].split(", ")]
    right = {
        "num_gpus_per_model": divisors(world),
        "read_group_size": divisors(model),
        "num_gpus_per_ensemble": [d for d in divisors(world) if d % model == 0],
    }
    assert choices == right[name]


@pytest.mark.parametrize(
    ("arguments", "named"), [((0,), "world_size is 0"), ((2, 2), "rank 2"), ((2, -1), "rank is -1")]
)
def test_a_rank_outside_its_world_is_refused(arguments, named):
    with pytest.raises(TopologyError, match=named):
        Topology(*arguments)


@pytest.mark.parametrize("name", ["num_gpus_per_model", "read_group_size", "num_gpus_per_ensemble"])
def test_a_size_of_zero_is_refused_by_name(name):
    with pytest.raises(TopologyError, match=f"{name} is 0"):
        Topology(4, 0, **{name: 0})


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
        {"WORLD_SIZE": "8", "RANK": "5", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    ],
    ids=["torchrun", "SLURM", "torchrun within a SLURM job"],
)
def test_world_and_rank_come_from_the_launcher(environment):
    assert Topology.from_environment(4, 2, 8, environment=environment) == Topology(8, 5, 4, 2, 8)


def test_without_a_launcher_there_is_one_rank():
    assert Topology.from_environment(environment={"SLURM_NTASKS": "8"}) == Topology()


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "4")
    assert Topology.from_environment(2) == Topology(6, 4, 2)


def test_help_does_not_print_the_environment(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "it-is-secret")
    assert "it-is-secret" not in pydoc.render_doc(Topology)
