"""Real processes: what ranks get together, what they read together, and what they exchange."""

import contextlib
import itertools
import subprocess
import sys
import time
from multiprocessing.connection import Listener, wait
from pathlib import Path

import numpy as np
import pytest

from shardio import Topology
from shardio.load.topology import divisors

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import bits, chunk_files, cut, noise, write_source

HERE = Path(__file__).parents[1]
WORLD = 8
SECONDS = 60.0
CELLS = 103
GRID_CHUNKS = (1, 4, 7, 16)


class Ranks:
    """Processes of one gloo world that run what they are told."""

    def __init__(self, folder):
        address = str(folder / "socket")
        with Listener(address, backlog=WORLD) as listener:
            program = str(HERE / "rank_programs.py")
            words = [str(WORLD), str(folder / "meeting"), address]
            self.processes = [subprocess.Popen([sys.executable, program, str(rank), *words]) for rank in range(WORLD)]
            accepted = [listener.accept() for _ in self.processes]
        by_rank = {connection.recv(): connection for connection in accepted}
        self.connections = [by_rank[rank] for rank in range(WORLD)]
        self.groups = set()

    def make_groups(self, groups):
        """Process groups, each made once."""
        new = sorted({tuple(group) for group in groups} - self.groups)
        if new:
            self.run("make_groups", new)
            self.groups |= set(new)

    def topologies(self, sizes):
        """Of all ranks of a world of these sizes; their model groups are there."""
        topologies = [Topology(sizes[0], rank, *sizes[1:]) for rank in range(sizes[0])]
        self.make_groups(topology.model_ranks for topology in topologies)
        return topologies

    def load(self, program, path, sizes, *arguments, **options):
        """`program` on all ranks of a world of these sizes."""
        ranks = range(len(self.topologies(sizes)))
        return self.run(program, str(path), sizes, *arguments, ranks=ranks, **options)

    def run(self, name, *arguments, ranks=range(WORLD), **options):
        """Results by rank; the first error of any, or the ranks that do not answer in bounded time."""
        for rank in ranks:
            self.connections[rank].send((name, arguments, options))
        results = {}
        end = time.monotonic() + SECONDS
        while len(results) < len(ranks):
            left = {self.connections[rank]: rank for rank in ranks if rank not in results}
            ready = wait(list(left), end - time.monotonic())
            if not ready:
                self.kill()
                pytest.fail(f"{name}: ranks {sorted(left.values())} did not answer in {SECONDS:g} s")
            for connection in ready:
                good, answer = connection.recv()
                if not good:
                    self.kill()
                    pytest.fail(f"{name} on rank {left[connection]}:\n{answer}")
                results[left[connection]] = answer
        return [results[rank] for rank in ranks]

    def kill(self):
        for process in self.processes:
            process.kill()

    def close(self):
        for connection in self.connections:
            if not connection.closed:
                with contextlib.suppress(BrokenPipeError):
                    connection.send(None)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for connection in self.connections:
            connection.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    source = write_source(folder / "source.zarr", noise((9, 2, 2, CELLS)))
    return {
        (n, zarr_format): cut(source, folder / f"{n}-{zarr_format}.zarr", n, zarr_format)
        for n, zarr_format in itertools.product((1, 4, 6, 15), (2, 3))
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    source = write_source(folder / "source.zarr", noise((4, 2, 1, 200_003)))
    return {n: cut(source, folder / f"{n}.zarr", n, 2 if n == 4 else 3) for n in GRID_CHUNKS}


def check_world(stored, sizes, answers, *, batch_size, steps, drop_last=False, whole=False, epochs=1):
    """All that is promised about one epoch of a whole world."""
    topologies = [Topology(sizes[0], rank, *sizes[1:]) for rank in range(sizes[0])]
    windows = len(stored.values) - steps + 1
    by_group = {}
    for topology, answer in zip(topologies, answers, strict=True):
        assert len(answer["batches"]) == epochs * answer["length"]
        for batch in answer["batches"]:
            expected = stored.fields(batch["indices"], batch["cells"])
            assert batch["shape"] == expected.shape
            assert np.array_equal(bits(batch["fields"]), bits(expected))
            assert whole is (batch["cells"] == slice(0, CELLS)) or topology.model_size == 1
        dates = [(batch["indices"], batch["padding"]) for batch in answer["batches"]]
        assert dates == by_group.setdefault(topology.data_rank, dates)
        assert {len(indices) for indices, _ in dates} == {batch_size}
    for topology in topologies:
        cells = [answers[rank]["batches"][0]["cells"] for rank in topology.model_ranks]
        if not whole:
            assert [cell.start for cell in cells] == [0, *(cell.stop for cell in cells[:-1])]
            assert cells[-1].stop == CELLS
    per_epoch = len(answers[0]["batches"]) // epochs
    for epoch in range(epochs):
        seen = [
            window[0]
            for dates in by_group.values()
            for indices, padding in dates[epoch * per_epoch : (epoch + 1) * per_epoch]
            for window, filler in zip(indices, padding, strict=True)
            if not filler
        ]
        assert len(set(seen)) == len(seen)
        assert len(seen) == windows - (windows % (batch_size * len(by_group)) if drop_last else 0)
    assert len({str(answer["state"]) for answer in answers}) == 1


def worlds(count):
    """(world, M, R) for every M that divides the world and every R that divides M."""
    return [(count, model, read) for model in divisors(count) for read in divisors(model)]


@pytest.mark.parametrize("keep_batch_sharded", [True, False])
@pytest.mark.parametrize("sizes", [sizes for count in (2, 3, 4) for sizes in worlds(count)], ids=str)
def test_ranks_together_hold_every_sample_once_and_to_the_bit(world, stores, sizes, keep_batch_sharded):
    for (n, zarr_format), stored in stores.items():
        batch_size = 1 + 2 * (n in (1, 6))
        answers = world.load(
            "load",
            stored.path,
            sizes,
            keep_batch_sharded=keep_batch_sharded,
            batch_size=batch_size,
            input_steps=1 + (zarr_format == 3),
            seed=n,
        )
        check_world(
            stored,
            sizes,
            answers,
            batch_size=batch_size,
            steps=2 + (zarr_format == 3),
            whole=not keep_batch_sharded,
        )


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("keep_batch_sharded", [True, False])
def test_two_nodes_of_four_gpus_with_two_per_model_take_sixteen_samples_a_step(
    world, stores, keep_batch_sharded, sharing
):
    stored = stores[6, 3]
    answers = world.load(
        "load", stored.path, (8, 2), sharing, keep_batch_sharded=keep_batch_sharded, batch_size=4, target_steps=0
    )
    check_world(stored, (8, 2), answers, batch_size=4, steps=1, whole=not keep_batch_sharded)
    groups = [{tuple(map(tuple, batch["indices"])) for batch in answer["batches"]} for answer in answers]
    assert groups[0::2] == groups[1::2]
    first_step = [window[0] for answer in answers[::2] for window in answer["batches"][0]["indices"]]
    assert len(first_step) == 16  # 9 dates: 7 of them are padding
    assert sum(sum(answer["batches"][0]["padding"]) for answer in answers[::2]) == 7


@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_follow_one_another_with_orders_of_their_own(world, stores, drop_last):
    stored = stores[4, 2]
    answers = world.load("load", stored.path, (4, 2, 1), epochs=3, batch_size=2, drop_last=drop_last)
    check_world(stored, (4, 2, 1), answers, batch_size=2, steps=2, drop_last=drop_last, epochs=3)
    assert answers[0]["state"]["epoch"] == 3
    orders = [[batch["indices"] for batch in answers[0]["batches"]][epoch::3] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_ranks_of_an_ensemble_share_their_samples(world, stores):
    stored = stores[4, 3]
    answers = world.load("load", stored.path, (8, 2, 2, 4), batch_size=2)
    check_world(stored, (8, 2, 2, 4), answers, batch_size=2, steps=2)
    indices = [[batch["indices"] for batch in answer["batches"]] for answer in answers]
    assert indices[0] == indices[1] == indices[2] == indices[3] != indices[4] == indices[7]


@pytest.mark.parametrize(
    "sizes", [(1, 1), (2, 2), (3, 3), (4, 4), (4, 4, 2), (4, 4, 1), (5, 5), (6, 6, 2), (2, 2, 1)], ids=str
)
@pytest.mark.parametrize("keep_batch_sharded", [True, False])
def test_a_model_group_reads_the_bytes_of_a_sample_once(world, large, sizes, keep_batch_sharded):
    for n, stored in large.items():
        sample = sum(file.stat().st_size for file in chunk_files(stored.path))
        world.load("read_only", stored.path, sizes, keep_batch_sharded=keep_batch_sharded)
        answers = world.load("read_only", stored.path, sizes, keep_batch_sharded=keep_batch_sharded)
        together = sum(answer["read"] for answer in answers)
        assert 0.99 * sample <= together <= 1.02 * sample, (n, sizes)
        copies = 1 if keep_batch_sharded else sizes[0]
        assert sum(answer["exchanged"] for answer in answers) == copies * stored.values.size


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ((8, 2), {rank: [rank % 4, rank % 4 + 4] for rank in range(8)}),  # data groups
        ((8, 2), {rank: list(range(4 * (rank // 4), 4 * (rank // 4) + 4)) for rank in range(8)}),  # two model groups
        ((8, 4), {rank: list(range(2 * (rank // 2), 2 * (rank // 2) + 2)) for rank in range(8)}),  # halves of one
    ],
    ids=["data group", "too large", "too small"],
)
def test_a_group_that_is_not_the_model_group_is_refused(world, stores, sizes, groups):
    world.make_groups(groups.values())
    answers = world.load("with_group", stores[4, 3].path, sizes, groups)
    for rank, answer in enumerate(answers):
        ours = list(Topology(8, rank, *sizes[1:]).model_ranks)
        assert answer.startswith("TopologyError: the process group holds ranks")
        assert str(groups[rank]) in answer and str(ours) in answer
    right = {rank: list(Topology(8, rank, *sizes[1:]).model_ranks) for rank in range(8)}
    assert set(world.load("with_group", stores[4, 3].path, sizes, right)) == {"accepted"}


def test_a_fault_is_raised_on_the_rank_that_needs_the_chunk_and_on_no_other(world, tmp_path):
    source = write_source(tmp_path / "source.zarr", noise((6, 1, 1, 40)))
    stored = cut(source, tmp_path / "stored.zarr", 4, 2)
    (stored.path / "data" / "3.0.0.2").unlink()
    answers = world.load("fault", stored.path, (4, 4))
    assert [count for count, _ in answers] == [5, 5, 2, 5]
    assert [bool(error) for _, error in answers] == [False, False, True, False]
    assert "ChunkError: date 2020-01-01T18:00:00, grid-chunk 2: " in answers[2][1]
    assert "3.0.0.2" in answers[2][1]
