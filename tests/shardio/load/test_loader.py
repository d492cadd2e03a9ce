"""The loader: shards that make up the source, buffers that nobody overwrites, a position that is exact."""

import gc
import math
import sys
import threading
import time
import tracemalloc
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardio import ShardedDataLoader, Topology, open_dataset
from shardio.errors import ChunkError, SelectionError, ShardioError
from shardio.load.dataset import ReadCostWarning
from shardio.load.partition import partition
from shardio.load.topology import divisors

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import bits, bytes_read, cut, every, noise, resident, stored_bytes, write_source

CELLS = 1003
GRID_CHUNKS = (1, 4, 7, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loading")


@pytest.fixture(scope="module")
def uneven(folder):
    """1003 cells in N grid-chunks, by (N, Zarr format)."""
    source = write_source(folder / "uneven.source.zarr", noise((7, 3, 2, CELLS)))
    return {
        (n, zarr_format): cut(source, folder / f"uneven-{n}-{zarr_format}.zarr", n, zarr_format)
        for n in GRID_CHUNKS
        for zarr_format in (2, 3)
    }


@pytest.fixture(scope="module")
def large(folder):
    """Chunks so large that indexes and metadata vanish beside them, by (N, Zarr format)."""
    source = write_source(folder / "large.source.zarr", noise((3, 2, 1, 200_003)))
    return {
        (n, zarr_format): cut(source, folder / f"large-{n}-{zarr_format}.zarr", n, zarr_format)
        for n in GRID_CHUNKS
        for zarr_format in (2, 3)
    }


@pytest.fixture(scope="module")
def many(folder):
    """40 small dates in 4 chunks."""
    source = write_source(folder / "many.source.zarr", noise((40, 3, 1, 101)))
    return cut(source, folder / "many.zarr", 4, 3)


def quiet(*arguments, **options):
    """A loader whose cost is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReadCostWarning)
        return ShardedDataLoader(*arguments, **options)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("grid_chunks", GRID_CHUNKS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_shards_of_all_ranks_put_together_are_the_source(uneven, ranks, grid_chunks, zarr_format):
    stored = uneven[grid_chunks, zarr_format]
    dataset = open_dataset(stored.path)
    owners = partition(CELLS, ranks, math.ceil(CELLS / grid_chunks))
    for batch_size, input_steps, target_steps in ((1, 1, 0), (1, 2, 1), (3, 1, 1), (3, 2, 2)):
        options = {"batch_size": batch_size, "input_steps": input_steps, "target_steps": target_steps, "seed": 3}
        loaders = [quiet(dataset, Topology(ranks, rank, ranks), **options) for rank in range(ranks)]
        seen = []
        for batches in zip(*loaders, strict=True):
            for rank, batch in enumerate(batches):
                assert batch.cells == owners.cells(rank)
                assert batch.partition == owners
                shape = (batch_size, input_steps + target_steps, 2, owners.sizes[rank], 3)
                assert batch.fields.shape == batch.shape == shape
                assert np.array_equal(batch.dates, stored.dates[batch.indices])
                assert batch.indices == batches[0].indices
            whole = torch.cat([batch.fields for batch in batches], dim=3)
            assert np.array_equal(bits(whole), bits(stored.fields(batches[0].indices)))
            seen += [start for start, padding in zip(batch.starts, batch.padding, strict=True) if not padding]
        assert sorted(seen) == list(range(7 - input_steps - target_steps + 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid_chunks", GRID_CHUNKS)
def test_a_loader_without_sharing_tells_what_it_costs_where_it_does(uneven, ranks, grid_chunks):
    dataset = open_dataset(uneven[grid_chunks, 2].path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = ShardedDataLoader(dataset, Topology(ranks, 0, ranks))
    amplification = loader.reading.read_amplification
    assert bool(caught) == (amplification > 1.01)
    if caught:
        assert caught[0].filename == __file__
        assert f"{ranks} ranks read {amplification:.2f} x the bytes" in str(caught[0].message)


def test_without_a_group_the_whole_field_costs_every_rank_all_bytes(uneven):
    stored = uneven[4, 3]
    with pytest.warns(ReadCostWarning, match=r"2 ranks read 2.00 x .* every rank reads all cells"):
        loader = ShardedDataLoader(open_dataset(stored.path), Topology(2, 1, 2), keep_batch_sharded=False)
    batch = next(iter(loader))
    assert batch.cells == slice(0, CELLS)
    assert np.array_equal(bits(batch.fields), bits(stored.fields(batch.indices)))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("grid_chunks", GRID_CHUNKS)
def test_each_rank_reads_no_more_than_the_stored_bytes_of_its_chunks(large, grid_chunks, zarr_format):
    stored = large[grid_chunks, zarr_format]
    _ = [batch.fields for batch in quiet(open_dataset(stored.path), shuffle=False)]  # whatever is imported on the way
    for ranks in (1, 2, 3, 4, 5):
        dataset = open_dataset(stored.path)
        owners = partition(200_003, ranks, math.ceil(200_003 / grid_chunks))
        for rank in range(ranks):
            loader = quiet(dataset, Topology(ranks, rank, ranks), shuffle=False)
            before = bytes_read()
            assert sum(1 for _ in loader) == 2  # windows of two dates that overlap: each date is read once
            read = bytes_read() - before
            needed = sum(stored_bytes(stored.path, date, owners.chunks(rank), grid_chunks) for date in range(3))
            assert needed <= read <= 1.02 * needed


def test_consecutive_windows_read_each_date_once(large):
    stored = large[4, 3]
    for batch_size, steps in ((1, 3), (2, 2), (3, 1)):
        loader = ShardedDataLoader(
            open_dataset(stored.path), batch_size=batch_size, input_steps=steps, target_steps=0, shuffle=False
        )
        before = bytes_read()
        for batch in loader:
            batch.wait()
        read = bytes_read() - before
        needed = sum(stored_bytes(stored.path, date, range(4), 4) for date in range(3))
        assert needed <= read <= 1.02 * needed


@pytest.mark.parametrize("targets", [0, 1, 2])
def test_an_epoch_reads_no_more_targets_than_it_is_to(large, targets):
    stored = large[4, 3]
    dataset = open_dataset(stored.path)
    loader = ShardedDataLoader(dataset, input_steps=1, target_steps=2, targets_read=lambda epoch: epoch)
    loader.set_epoch(targets)
    before = bytes_read()
    (batch,) = loader
    read = bytes_read() - before
    assert batch.fields.shape[1] == batch.dates.shape[1] == 1 + targets
    assert np.array_equal(bits(batch.fields), bits(stored.fields(batch.indices)))
    needed = sum(stored_bytes(stored.path, date, range(4), 4) for date in range(1 + targets))
    assert needed <= read <= 1.02 * needed


def test_epochs_of_fewer_targets_have_the_samples_and_positions_of_the_others(many):
    options = {"input_steps": 2, "target_steps": 3, "batch_size": 4, "seed": 5, "drop_last": True}
    dataset = open_dataset(many.path)
    whole = ShardedDataLoader(dataset, **options)
    growing = ShardedDataLoader(dataset, **options, targets_read=lambda epoch: min(1 + epoch, 3))
    for epoch in range(4):
        for expected, batch in zip(whole, growing, strict=True):
            assert batch.starts == expected.starts
            assert batch.fields.shape[1] == min(3 + epoch, 5)
            assert np.array_equal(bits(batch.fields), bits(expected.fields[:, : batch.fields.shape[1]]))
            assert growing.state_dict() == whole.state_dict()
    growing.set_epoch(1)
    next(iter(growing))
    resumed = ShardedDataLoader(dataset, **options, targets_read=lambda epoch: min(1 + epoch, 3))
    resumed.load_state_dict(growing.state_dict())
    assert [batch.fields.shape[1] for batch in resumed] == [4] * 8


@pytest.mark.parametrize("targets", [-1, 3])
def test_targets_that_a_sample_lacks_are_refused(many, targets):
    loader = ShardedDataLoader(open_dataset(many.path), target_steps=2, targets_read=lambda _: targets)
    with pytest.raises(SelectionError, match=rf"targets_read\(0\) is {targets}. Let it be 0 to 2"):
        next(iter(loader))


def variants(folder, many):
    """The same 40 dates, stored and opened in every way that takes another path through the loader."""
    values = many.values

    def write(name, **storage):
        return open_dataset(write_source(folder / f"{name}.zarr", **{"values": values, **storage}).path)

    yield "cut", open_dataset(many.path)
    yield "verified", open_dataset(many.path)
    yield "F order, by tensorstore", write("fortran", chunks=(1, 3, 1, 26), order="F")
    yield "several dates in a chunk", write("dates", chunks=(7, 2, 1, 26))
    yield "float64", write("double", values=values.astype("f8"), chunks=(1, 3, 1, 30))
    yield "chunk larger than the grid", write("wide", chunks=(1, 3, 1, 300))
    left = write_source(folder / "left.zarr", values[:, :1], names=["v_0"], chunks=(1, 1, 1, 26))
    right = write_source(folder / "right.zarr", values[:, 1:], names=["v_1", "v_2"], chunks=(1, 2, 1, 101))
    yield "joined", open_dataset([left.path, right.path])
    early = write_source(folder / "early.zarr", values[:15], chunks=(1, 3, 1, 26))
    late = write_source(folder / "late.zarr", values[15:], many.dates[15:], chunks=(1, 3, 1, 40))
    yield "concatenated", open_dataset([late.path, early.path])


def test_however_it_is_stored_the_batches_are_equal_to_the_bit(folder, many):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReadCostWarning)
        for name, dataset in variants(folder, many):
            for rank in range(3):
                loader = quiet(dataset, Topology(3, rank, 3), batch_size=2, verify=name == "verified")
                for batch in loader:
                    expected = many.fields(batch.indices, batch.cells)
                    assert np.array_equal(bits(batch.fields), bits(expected)), name
                loader.close()


def test_datasets_concatenated_in_time_need_no_more_memory_than_one(folder, many):
    sources = [
        write_source(
            folder / f"year-{i}.zarr", many.values[10 * i :][:10], many.dates[10 * i :][:10], chunks=(1, 3, 1, 26)
        )
        for i in range(4)
    ]
    dataset = open_dataset([source.path for source in sources])
    loader = ShardedDataLoader(dataset)
    batch = next(iter(loader))
    assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices)))
    piece = batch.pieces[0].values
    assert piece.untyped_storage().nbytes() < 1.3 * many.values[:2].nbytes


def test_selected_variables_come_in_the_order_selected(many):
    dataset = open_dataset(many.path, select=["v_2", "v_0"], rename={"v_2": "x"})
    for batch in ShardedDataLoader(dataset, Topology(2, 1, 2), batch_size=3):
        assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices, batch.cells)[..., [2, 0]]))


def test_windows_that_touch_a_missing_date_or_a_gap_are_left_out(tmp_path):
    dates = np.delete(every(6, 12), [8])
    source = write_source(tmp_path / "holes.zarr", noise((11, 1, 1, 9)), dates, missing=(3,), chunks=(1, 1, 1, 5))
    dataset = open_dataset(source.path)
    loader = ShardedDataLoader(dataset, input_steps=2, target_steps=1, shuffle=False)
    batches = list(loader)
    assert [batch.starts[0] for batch in batches] == [0, 4, 5, 8]
    for batch in batches:
        assert (np.diff(batch.dates) == np.timedelta64(6, "h")).all()
        assert np.array_equal(bits(batch.fields), bits(source.fields(batch.indices)))
    daily = ShardedDataLoader(open_dataset(source.path, frequency="12h"), shuffle=False)
    assert [str(batch.dates[0, 0])[5:13] for batch in daily] == ["01-01T00", "01-01T12", "01-02T00"]


def test_two_dates_far_apart_are_no_window(tmp_path):
    source = write_source(
        tmp_path / "apart.zarr", noise((6, 1, 1, 9)), np.delete(every(6, 9), [2, 3, 4]), chunks=(1, 1, 1, 5)
    )
    with pytest.raises(SelectionError, match="no sample is left"):
        ShardedDataLoader(open_dataset(source.path, start="2020-01-01T06", end="2020-01-02T06"))


def test_one_chunk_that_is_the_whole_shard_is_handed_out_without_a_copy(uneven):
    stored = uneven[1, 2]
    loader = ShardedDataLoader(open_dataset(stored.path), target_steps=0)
    for batch in loader:
        assert batch.fields.untyped_storage().data_ptr() == batch.pieces[0].values.untyped_storage().data_ptr()
        assert batch.fields.is_contiguous() is False
        assert batch.fields.permute(0, 1, 4, 2, 3).is_contiguous()


@pytest.mark.parametrize(("grid_chunks", "steps", "batch_size"), [(1, 1, 1), (4, 1, 1), (4, 3, 2)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_are_all_kept_stay_as_they_were(uneven, grid_chunks, steps, batch_size, shuffle):
    stored = uneven[grid_chunks, 3]
    loader = ShardedDataLoader(
        open_dataset(stored.path), batch_size=batch_size, input_steps=steps, target_steps=0, shuffle=shuffle
    )
    kept = [batch for _ in range(4) for batch in loader]
    for batch in kept:
        assert np.array_equal(bits(batch.fields), bits(stored.fields(batch.indices)))
        for place, piece in enumerate(batch.pieces):
            date = [index for sample in batch.indices for index in sample][place]
            assert np.array_equal(bits(piece.values), bits(stored.values[date][..., piece.cells]))


@pytest.mark.parametrize(("grid_chunks", "steps"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize(
    "part",
    [
        lambda batch: batch.fields[0, 0, 1, 3:9],
        lambda batch: batch.fields.numpy()[0, 0, 1, 3:9],
        lambda batch: memoryview(batch.fields.numpy())[0:1],
        lambda batch: batch.fields.permute(4, 3, 2, 1, 0)[..., 0],
        lambda batch: batch.pieces[0].values[0, 0],
        lambda batch: batch.pieces[0].values.numpy().T,
        lambda batch: torch.utils.dlpack.from_dlpack(batch.fields),
    ],
    ids=["tensor", "numpy", "memoryview", "permuted", "piece", "numpy of a piece", "dlpack"],
)
def test_a_view_that_outlives_its_batch_is_not_overwritten(uneven, grid_chunks, steps, part):
    loader = ShardedDataLoader(open_dataset(uneven[grid_chunks, 2].path), input_steps=steps, target_steps=0)
    kept = []
    for _ in range(4):
        for batch in loader:
            view = part(batch)
            kept.append((view, bits(np.asarray(view)).copy()))
            del view
        del batch
    assert all(np.array_equal(bits(np.asarray(view)), then) for view, then in kept)
    assert len({then.tobytes() for _, then in kept}) > 3


def test_a_slow_consumer_finds_its_batch_unchanged(many):
    loader = ShardedDataLoader(open_dataset(many.path), batch_size=2, prefetch=4, threads=3)
    for batch in islice(loader, 10):
        pieces, fields = batch.pieces, batch.fields
        time.sleep(0.02)  # the threads have read all that they may by now
        assert np.array_equal(bits(fields), bits(many.fields(batch.indices)))
        first = pieces[0]
        assert np.array_equal(bits(first.values), bits(many.values[batch.starts[0]][..., first.cells]))


def test_buffers_that_come_back_by_garbage_collection_on_any_thread_are_not_mixed_up(many):
    loader = ShardedDataLoader(open_dataset(many.path), batch_size=2, prefetch=3, threads=3)
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            cycle = []
            cycle.append(cycle)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    before = gc.get_threshold()
    gc.set_threshold(20)
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            for batch in loader:
                assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices)))
                cycle = {"batch": batch, "pieces": batch.pieces}
                cycle["self"] = cycle
                del cycle
    finally:
        stop.set()
        gc.set_threshold(*before)
        for thread in threads:
            thread.join()


def test_a_lease_may_end_between_any_two_lines_of_the_ring(many):
    loader = ShardedDataLoader(open_dataset(many.path, end="2020-01-02T12"), prefetch=1, threads=2)  # 7 dates
    loader._memory._spare = 1  # so that a buffer that is wrongly free is soon filled again
    kept, ended = [], 0
    random = np.random.default_rng(0)

    def at_every_line(frame, event, argument):
        nonlocal ended
        if len(kept) > 3 and random.random() < 0.1:
            indices, pieces = kept.pop(random.integers(len(kept)))
            for date, piece in zip(indices, pieces, strict=True):
                assert np.array_equal(bits(piece.values), bits(many.values[date][..., piece.cells]))
            ended += 1
        return at_every_line

    def in_the_ring(frame, event, argument):
        return at_every_line if frame.f_code.co_name in ("lease", "_begin", "_find", "take", "_collect") else None

    before = sys.gettrace()
    sys.settrace(in_the_ring)
    try:
        for _ in range(100):
            for batch in loader:
                dates = [date for sample in batch.indices for date in sample]
                kept.append((dates, batch.pieces))
                assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices)))
    finally:
        sys.settrace(before)
    assert ended > 150


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_no_more_than_prefetch_and_two_batches_are_in_memory(many, prefetch, shuffle):
    loader = ShardedDataLoader(
        open_dataset(many.path), batch_size=2, input_steps=2, target_steps=1, prefetch=prefetch, shuffle=shuffle
    )
    most = 0
    for _ in range(4):
        for batch in loader:
            most = max(most, loader._memory.buffers)
            assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices)))
    assert prefetch + 1 <= most <= prefetch + 2


def test_memory_of_batches_that_were_all_kept_is_given_back(many):
    loader = ShardedDataLoader(open_dataset(many.path), prefetch=2)
    kept = [batch for _ in range(3) for batch in loader]
    assert loader._memory.buffers >= 40
    del kept
    assert loader._memory.buffers <= 2 + 2


def test_memory_does_not_grow_over_two_thousand_batches(many):
    loader = ShardedDataLoader(open_dataset(many.path), Topology(2, 1, 2), batch_size=2, prefetch=3)

    def take(count):
        while count:
            for batch in islice(loader, count):
                assert batch.fields.shape[3] == batch.cells.stop - batch.cells.start
                count -= 1

    tracemalloc.start()
    take(500)  # what is kept once, caches and the names of threads, is there now and counted
    gc.collect()
    buffers, before, rss = loader._memory.buffers, tracemalloc.get_traced_memory()[0], resident()
    take(2000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert loader._memory.buffers <= max(buffers, 3 + 2)
    assert grown < 100_000  # 50 bytes a batch: less than any object that were kept
    assert resident() - rss < 20e6


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_resume_after_any_batch_under_another_topology_continues_exactly(many, data):
    def draw():
        model = data.draw(st.integers(1, 3))
        read = data.draw(st.sampled_from(divisors(model)))
        return model * data.draw(st.integers(1, 3)), model, read, data.draw(st.integers(1, 3))

    dataset = open_dataset(many.path, end="2020-01-04")  # 15 windows
    (world, model, read, size), after = draw(), draw()
    before = quiet(dataset, Topology(world, data.draw(st.integers(0, world - 1)), model, read), batch_size=size)
    taken = 0
    prefetch = data.draw(st.integers(1, 4))
    before.prefetch = prefetch
    for _ in islice(before, data.draw(st.integers(0, len(before)))):
        taken += 1
    state = before.state_dict()
    steps = taken * size * (world // model)
    assert state["epoch"] * 15 + state["cursor"] == min(steps, 15)
    world, model, read, size = after
    groups = world // model
    rest = {}
    for group in range(groups):
        loader = quiet(dataset, Topology(world, group * model, model, read), batch_size=size, prefetch=prefetch)
        loader.load_state_dict(state)
        position = state["cursor"] % 15
        rest[group] = []
        for batch in loader:
            assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices, batch.cells)))
            rest[group] += [(start, bool(padding)) for start, padding in zip(batch.starts, batch.padding, strict=True)]
        rest[group] = iter(rest[group])
        assert loader.state_dict() == {**state, "epoch": state["epoch"] + 1, "cursor": 0}
        loader.close()
    merged = [next(rest[k % groups]) for k in range(position, 15)]
    order = before.sampler.order(state["epoch"])[position:].tolist()
    assert merged == [(start, False) for start in order]


def test_the_position_is_that_of_batches_handed_out_not_of_those_read_ahead(many):
    loader = ShardedDataLoader(open_dataset(many.path), batch_size=2, prefetch=5)
    batches = iter(loader)
    assert loader.state_dict()["cursor"] == 0
    for count in range(1, 4):
        next(batches)
        assert loader.state_dict()["cursor"] == 2 * count


def test_the_epoch_after_the_last_batch_is_the_next_one(many):
    loader = ShardedDataLoader(open_dataset(many.path), batch_size=7)
    orders = [[start for batch in loader for start in batch.starts] for _ in range(2)]
    assert len(loader) == 6 and [len(order) for order in orders] == [42, 42]
    assert orders[0] != orders[1]
    assert loader.state_dict()["epoch"] == 2
    loader.set_epoch(0)
    assert [start for batch in loader for start in batch.starts] == orders[0]


def test_two_iterators_do_not_disturb_each_other(many):
    loader = ShardedDataLoader(open_dataset(many.path), shuffle=False, prefetch=8, threads=1)
    for _ in range(30):
        loader.set_epoch(1)
        loader.set_epoch(0)
        first = iter(loader)
        next(first)
        loader.set_epoch(1)
        loader.set_epoch(0)
        second = iter(loader)
        batch = next(second)
        del first  # its reads are given up, but not those that the second waits for
        for batch in islice(second, 8):
            assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices)))
        loader._memory._free.clear()


def test_breaking_off_drops_reads_that_nobody_waits_for(large):
    loader = ShardedDataLoader(open_dataset(large[16, 3].path), input_steps=1, target_steps=0, threads=1, prefetch=3)
    _ = open_dataset(large[16, 3].path)[0, 0, 0, 0]  # whatever is imported on the way
    before = bytes_read()
    batches = iter(loader)
    next(batches)
    del batches
    loader._pool.submit(int).result()  # the one thread has done all that it had to do before
    read = bytes_read() - before
    whole = sum(stored_bytes(large[16, 3].path, date, range(16), 16) for date in range(3))
    assert whole / 3 <= read < 0.9 * whole


def test_threads_end_with_their_loader(many):
    def reading():
        return {thread for thread in threading.enumerate() if thread.name.startswith("shardio-read")}

    others = reading()
    loader = ShardedDataLoader(open_dataset(many.path), threads=3)
    assert not reading() - others  # those of other tests' loaders may end meanwhile
    batch = next(iter(loader))
    mine = reading() - others
    assert len(mine) == 3
    del loader, batch
    gc.collect()
    for thread in mine:
        thread.join(10)
    assert not reading() & mine


def test_a_closed_loader_says_so(many):
    loader = ShardedDataLoader(open_dataset(many.path))
    next(iter(loader))
    loader.close()
    loader.close()
    with pytest.raises(ShardioError, match="was closed"):
        for _ in loader:
            pass


def test_a_released_batch_keeps_its_fields_but_not_its_pieces(many):
    batch = next(iter(ShardedDataLoader(open_dataset(many.path))))
    fields = batch.fields
    batch.release()
    assert batch.fields is fields
    with pytest.raises(ShardioError, match="was released"):
        _ = batch.pieces


def test_fields_copied_to_a_device_leave_no_buffer_behind(many):
    batch = next(iter(ShardedDataLoader(open_dataset(many.path), batch_size=2)))
    fields = batch.to("meta")  # a device that is not the CPU, on any machine
    assert fields.shape == batch.shape and fields.device.type == "meta"
    assert batch.to("meta").shape == fields.shape
    with pytest.raises(ShardioError, match="was released"):
        _ = batch.pieces


def test_fields_copied_to_the_cpu_are_the_fields(many):
    batch = next(iter(ShardedDataLoader(open_dataset(many.path))))
    assert batch.to("cpu") is batch.fields
    assert np.array_equal(bits(batch.fields), bits(many.fields(batch.indices)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefetch": 0}, "prefetch is 0"),
        ({"input_steps": 0}, "input_steps is 0"),
        ({"target_steps": -1}, "target_steps is -1"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"input_steps": 40}, "no sample is left"),
        ({"batch_size": 40, "drop_last": True}, "39 samples are fewer than one batch of 40"),
    ],
)
def test_a_loader_that_could_give_nothing_is_refused(many, options, named):
    with pytest.raises(SelectionError, match=named):
        ShardedDataLoader(open_dataset(many.path), **options)


def test_more_ranks_than_cells_are_refused(tmp_path):
    source = write_source(tmp_path / "few.zarr", noise((3, 1, 1, 3)), chunks=(1, 1, 1, 2))
    with pytest.raises(ShardioError, match="3 cells cannot be cut over 4 ranks"):
        ShardedDataLoader(open_dataset(source.path), Topology(4, 0, 4))


def test_verify_needs_checksums(tmp_path):
    source = write_source(tmp_path / "plain.zarr", noise((3, 1, 1, 9)), chunks=(1, 1, 1, 2))
    with pytest.raises(ChunkError, match="carries no checksums"):
        ShardedDataLoader(open_dataset(source.path), verify=True)


def test_verify_of_joined_datasets_of_different_grid_chunks_is_refused_with_the_remedy(folder):
    values = noise((6, 2, 1, 101))
    left = write_source(folder / "verify-left.source.zarr", values[:, :1], names=["v_0"])
    right = write_source(folder / "verify-right.source.zarr", values[:, 1:], names=["v_1"])
    four = cut(left, folder / "verify-4.zarr", 4, 2)
    for chunks, equal in ((4, True), (5, False)):
        other = cut(right, folder / f"verify-right-{chunks}.zarr", chunks, 2)
        joined = open_dataset([four.path, other.path])
        if equal:
            assert len(list(quiet(joined, verify=True))) == 5
            continue
        with pytest.raises(ChunkError, match=r"equal grid-chunks.*Rechunk them alike, or use verify=False"):
            quiet(joined, verify=True)


def test_a_loader_for_the_cpu_pins_no_memory_where_there_are_gpus(many, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batch = next(iter(ShardedDataLoader(open_dataset(many.path), prefetch=1, threads=1)))
    assert not batch.fields.is_pinned()
