"""Batches are one view of the memory that chunks were decoded into; nothing is used again while it is looked at."""

import ctypes
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardio import Reads, ShardedDataLoader, Topology, Wanted, open_dataset
from shardio.errors import ChunkError, DatasetError
from shardio.load.dataset import ReadCostWarning
from shardio.load.memory import Recycler
from shardio.load.pinned import PinnedMemory

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import bits, cut, noise, write_source


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """20 dates of 5 variables and 2 members in 4 chunks."""
    folder = tmp_path_factory.mktemp("buffers")
    source = write_source(folder / "source.zarr", noise((20, 5, 2, 403)), missing=(19,))
    return cut(source, folder / "cut.zarr", 4, 3)


class Calls(TorchDispatchMode):
    """What torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


VIEWS = {f"aten.{name}" for name in ("view.default", "permute.default", "slice.Tensor", "lift_fresh.default")}


@pytest.mark.parametrize("select", [None, ["v_1", "v_2"], ["v_4", "v_0", "v_2"]], ids=["all", "neighbours", "any"])
@pytest.mark.parametrize(("ranks", "batch_size", "steps"), [(1, 1, 1), (1, 2, 2), (2, 1, 3), (3, 2, 1)])
def test_fields_are_one_view_of_what_was_decoded(stored, select, ranks, batch_size, steps):
    dataset = open_dataset(stored.path, select=select)
    places = [stored.names.index(name) for name in dataset.variables]
    for rank in range(ranks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReadCostWarning)
            loader = ShardedDataLoader(
                dataset, Topology(ranks, rank, ranks), batch_size=batch_size, input_steps=steps, target_steps=0
            )
        for batch in loader:
            with Calls() as calls:
                fields, pieces = batch.fields, batch.pieces
            assert set(calls.names) <= VIEWS  # no memory is asked for, and no value is copied
            assert fields.untyped_storage().nbytes() == 4 * fields.numel()  # what is not selected takes no memory
            assert all(piece.values.data_ptr() >= fields.data_ptr() for piece in pieces)
            assert fields.permute(0, 1, 4, 2, 3).is_contiguous()
            assert np.array_equal(bits(fields), bits(stored.fields(batch.indices, batch.cells)[..., places]))


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_may_be_written_into_although_others_hold_its_dates(stored, prefetch, batch_size):
    loader = ShardedDataLoader(
        open_dataset(stored.path), batch_size=batch_size, input_steps=2, shuffle=False, prefetch=prefetch, threads=2
    )
    for _ in range(5):
        for batch in loader:
            assert np.array_equal(bits(batch.fields), bits(stored.fields(batch.indices)))
            batch.fields.fill_(7.0)


def test_memory_comes_back_with_the_last_view_of_it():
    memory = Recycler(spare=1)
    buffer = memory.take(100)
    view = buffer.values[3:50].reshape(47, 1)[2:]
    del buffer
    other = memory.take(80)
    assert not np.shares_memory(other.values, view) and memory.buffers == 2
    address = view.ctypes.data - 20
    del view
    assert memory.take(60).values.ctypes.data == address
    assert memory.take(0).values.size == 0
    larger = memory.take(200)
    assert larger.values.size == 200 and memory.buffers == 2
    del other, larger
    assert memory.buffers == 1


class PinnedBlocks:
    """The contract of torch's pinned memory, with streams that end when they are told to.

    A copy notes its stream with the block of the storage that it reads, if that is one; a block without an owner is
    lent again when all streams noted with it have ended.
    """

    def __init__(self):
        self.blocks = []  # of [memory, weak storage, streams]

    def empty(self, length):
        for block in self.blocks:
            memory, storage, streams = block
            if storage() is None and memory.size >= length and all(stream.is_set() for stream in streams):
                break
        else:
            block = [np.full(max(length, 1), np.nan, np.float32), None, []]
            self.blocks.append(block)
        owner = torch.from_numpy(block[0][:length])
        block[1:] = weakref.ref(owner.untyped_storage()), []
        return owner

    def copy(self, fields, stream):
        """Begin a copy that does not block; it reads `fields` when the stream ends."""
        for _, storage, streams in self.blocks:
            if storage() is not None and storage() is fields.untyped_storage():
                streams.append(stream)
                break
        address, shape, strides = fields.data_ptr(), fields.shape, [4 * n for n in fields.stride()]
        whole = (ctypes.c_float * (fields.untyped_storage().nbytes() // 4)).from_address(address)

        def end():
            flat = np.frombuffer(whole, np.float32)
            seen = np.lib.stride_tricks.as_strided(flat, shape, strides).copy()
            stream.set()
            return seen

        return end


@pytest.mark.parametrize("way", ["fields", "part"])
def test_pinned_memory_is_not_used_again_before_copies_out_of_it_have_ended(stored, way):
    blocks, copies = PinnedBlocks(), []
    loader = ShardedDataLoader(open_dataset(stored.path), shuffle=False, prefetch=2, threads=2)
    loader._ring._memory = PinnedMemory(blocks.empty)
    for batch in loader:
        part = batch.fields if way == "fields" else batch.fields[:, 1:, :, 100:]
        if way == "part":
            part = part[..., :1]
        expected = stored.fields(batch.indices)
        expected = expected if way == "fields" else expected[:, 1:, :, 100:, :1]
        copies.append((blocks.copy(part, threading.Event()), expected))  # on whatever stream, and dropped at once
        del batch, part
        if len(copies) > 5:
            end, wanted = copies.pop(0)
            assert np.array_equal(bits(end()), bits(wanted))
    assert 5 < len(blocks.blocks) < 14  # used again, but only those whose copies have ended


class Gate:
    """A reader that says what it reads, and can be made to wait."""

    def __init__(self, reader):
        self._reader, self.begun, self.layout = reader, [], reader.layout
        self._changed = threading.Condition()

    def read(self, box, out, pool=None):
        with self._changed:
            self.begun.append(box)
            self._changed.notify_all()
        self._reader.read(box, out, pool)

    def wait_for(self, count):
        """Whether so many reads have begun; a reader that nobody asks for more never gets there."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.begun) >= count, timeout=20)


def gated(path, **options):
    """A dataset that reads through a gate, box by box."""
    dataset = open_dataset(path, **options)
    source = dataset.parts[0].source
    source._reader = Gate(source._reader)
    return dataset, source._reader


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_next_fields_are_read_while_one_is_used(stored, ahead):
    dataset, gate = gated(stored.path)
    reads = Reads([Wanted(dataset, date) for date in range(8)], slice(0, 101), ahead)
    for taken, fields in enumerate(reads, 1):
        assert gate.wait_for(min(taken + ahead, 8))
        assert len(gate.begun) == min(taken + ahead, 8)  # and no more
        assert np.array_equal(bits(fields), bits(stored.values[taken - 1, ..., :101]))
        fields[:] = 0.0  # its taker's own
    assert taken == 8


def test_reads_give_what_the_dataset_gives(stored):
    dataset, other = open_dataset(stored.path), open_dataset(stored.path, select=["v_3", "v_1"])
    wanted = [
        Wanted(dataset, 3, (4, 0)),
        Wanted(other, 3),
        Wanted(dataset, 3, (4, 0), 1),
        Wanted(dataset, 3, (4, 0), 1),
        Wanted(dataset, 0),
    ]
    cells = slice(50, 350)
    kept = list(Reads(wanted, cells, ahead=2))
    for each, fields in zip(wanted, kept, strict=True):
        variables = slice(None) if each.variables is None else list(each.variables)
        expected = each.dataset[each.date, variables, slice(0, each.members), cells]
        assert np.array_equal(bits(fields), bits(expected))


def test_no_more_than_ahead_and_two_fields_are_in_memory(stored):
    dataset = open_dataset(stored.path)
    reads = Reads([Wanted(dataset, date) for date in range(18)], slice(0, 403), ahead=2)
    (ring,) = reads._rings.values()
    for _ in reads:
        assert ring._memory.buffers <= 4


def test_a_missing_date_and_a_lost_chunk_are_named(stored, tmp_path):
    dataset = open_dataset(stored.path)
    with pytest.raises(DatasetError, match=r"index 19.* is missing"):
        Reads([Wanted(dataset, 19)], slice(0, 9))
    source = write_source(tmp_path / "lost.zarr", noise((4, 1, 1, 9)), chunks=(1, 1, 1, 5))
    (source.path / "data" / "2.0.0.1").unlink()
    reads = Reads([Wanted(open_dataset(source.path), date) for date in range(4)], slice(0, 9), ahead=3)
    assert [next(reads).shape for _ in range(2)] == [(1, 1, 9)] * 2
    with pytest.raises(ChunkError, match=r"grid-chunk 1: .* is missing"):
        next(reads)
    assert np.array_equal(bits(next(reads)), bits(source.values[3]))
