"""Damaged stores, files that vanish, Ctrl-C: a clear error at the batch concerned, and a way on."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from shardio import ShardedDataLoader, Topology, open_dataset
from shardio.errors import ChunkError, DatasetError

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import bits, cut, noise, write_source

DATE, CHUNK = 5, 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    source = write_source(folder / "source.zarr", noise((12, 2, 1, 401)))
    return {
        (zarr_format, codec): cut(source, folder / f"{zarr_format}-{codec}.zarr", 4, zarr_format, codec)
        for zarr_format in (2, 3)
        for codec in ("lz4", "none")
    }


def copy_of(stored, folder):
    path = folder / "copy.zarr"
    shutil.copytree(stored.path, path)
    return path


def file_of(path, zarr_format):
    """The file that holds the chunk concerned."""
    return path / "data" / (f"{DATE}.0.0.{CHUNK}" if zarr_format == 2 else f"c.{DATE}.0.0.0")


def remove(path, zarr_format):
    file_of(path, zarr_format).unlink()


def cut_off(path, zarr_format):
    file = file_of(path, zarr_format)
    os.truncate(file, file.stat().st_size // 2)


def empty(path, zarr_format):
    os.truncate(file_of(path, zarr_format), 0)


def flip(path, zarr_format):
    """One bit in the middle of the chunk concerned."""
    file = file_of(path, zarr_format)
    content = bytearray(file.read_bytes())
    place = len(content) // 2
    if zarr_format == 3:
        offset, length = np.frombuffer(content[-4 * 16 - 4 : -4], "<u8").reshape(4, 2)[CHUNK].tolist()
        place = offset + length // 2
    content[place] ^= 4
    file.write_bytes(content)


def flip_index(path, zarr_format):
    """One bit of the index of the Zarr shard."""
    file = file_of(path, zarr_format)
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)


def swap(path, zarr_format):
    """A neighbour's chunk in its place: sound in itself, but another one."""
    shutil.copy(path / "data" / f"{DATE}.0.0.{CHUNK - 1}", file_of(path, zarr_format))


FAULTS = [
    *(
        (fault, zarr_format, codec)
        for fault in (remove, cut_off, empty)
        for zarr_format in (2, 3)
        for codec in ("lz4", "none")
    ),
    (flip, 2, "lz4"),
    (flip, 2, "none"),
    (flip, 3, "lz4"),
    (flip, 3, "none"),
    (flip_index, 3, "lz4"),
    (swap, 2, "none"),
]


@pytest.mark.parametrize(("fault", "zarr_format", "codec"), FAULTS)
@pytest.mark.parametrize("prefetch", [1, 5])
def test_a_damaged_chunk_is_named_at_the_batch_that_needs_it_and_read_again_once_restored(
    whole, tmp_path, fault, zarr_format, codec, prefetch
):
    stored = whole[zarr_format, codec]
    path = copy_of(stored, tmp_path)
    fault(path, zarr_format)
    verify = zarr_format == 2 and fault in (flip, swap)
    loader = ShardedDataLoader(open_dataset(path), shuffle=False, prefetch=prefetch, verify=verify)
    batches = iter(loader)
    for start in range(DATE - 1):
        batch = next(batches)
        assert batch.starts == [start]
        assert np.array_equal(bits(batch.fields), bits(stored.fields(batch.indices)))
    with pytest.raises(ChunkError) as raised:
        next(batches)
    message = str(raised.value)
    chunks = range(4) if fault in (remove, empty, cut_off, flip_index) and zarr_format == 3 else [CHUNK]
    assert any(message.startswith(f"date 2020-01-02T06:00:00, grid-chunk {chunk}: ") for chunk in chunks), message
    assert str(file_of(path, zarr_format)) in message
    assert loader.state_dict()["cursor"] == DATE - 1
    with pytest.raises(ChunkError):  # neither silence nor another error while it is not restored
        next(iter(loader))
    shutil.copy(file_of(stored.path, zarr_format), file_of(path, zarr_format))
    rest = [(batch.starts, bits(batch.fields)) for batch in loader]
    assert [starts for starts, _ in rest] == [[start] for start in range(DATE - 1, 11)]
    for (start,), fields in rest:
        assert np.array_equal(fields, bits(stored.fields([[start, start + 1]])))


def test_a_flipped_bit_in_a_v2_store_passes_only_where_nobody_verifies(whole, tmp_path):
    path = copy_of(whole[2, "none"], tmp_path)
    flip(path, 2)
    for _ in ShardedDataLoader(open_dataset(path), shuffle=False):
        pass
    with pytest.raises(ChunkError, match="not the one recorded"):
        for _ in ShardedDataLoader(open_dataset(path), shuffle=False, verify=True):
            pass


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_rank_that_does_not_need_the_chunk_is_not_disturbed(whole, tmp_path, zarr_format):
    stored = whole[zarr_format, "lz4"]
    path = copy_of(stored, tmp_path)
    flip(path, zarr_format)
    for rank in range(4):
        loader = ShardedDataLoader(open_dataset(path), Topology(4, rank, 4), shuffle=False, verify=True)
        if rank == CHUNK:
            with pytest.raises(ChunkError, match=f"grid-chunk {CHUNK}"):
                list(loader)
        else:
            for batch in loader:
                assert np.array_equal(bits(batch.fields), bits(stored.fields(batch.indices, batch.cells)))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_file_removed_during_an_epoch_is_named_when_it_is_needed(whole, tmp_path, zarr_format):
    stored = whole[zarr_format, "lz4"]
    path = copy_of(stored, tmp_path)
    loader = ShardedDataLoader(open_dataset(path), shuffle=False, prefetch=2)
    batches = iter(loader)
    next(batches)
    remove(path, zarr_format)
    assert [batch.starts for batch in islice(batches, 3)] == [[1], [2], [3]]
    with pytest.raises(ChunkError, match=f"date 2020-01-02T06:00:00.*{file_of(path, zarr_format).name}.* is missing"):
        next(batches)


def test_a_shuffled_epoch_with_a_fault_loses_and_repeats_no_sample(whole, tmp_path):
    stored = whole[3, "lz4"]
    path = copy_of(stored, tmp_path)
    remove(path, 3)
    loader = ShardedDataLoader(open_dataset(path), batch_size=2, prefetch=4)
    order = loader.sampler.order(0).tolist()
    seen = []
    with pytest.raises(ChunkError):
        for batch in loader:
            seen += batch.starts
    shutil.copy(file_of(stored.path, 3), file_of(path, 3))
    for batch in loader:
        seen += [start for start, padding in zip(batch.starts, batch.padding, strict=True) if not padding]
    assert seen == order


def test_a_store_replaced_by_another_of_the_same_name_is_read_as_it_is_now(whole, tmp_path):
    first, second = whole[3, "lz4"], whole[3, "none"]
    path = copy_of(first, tmp_path)
    dataset = open_dataset(path)
    assert np.array_equal(bits(dataset[DATE]), bits(first.values[DATE]))
    shutil.copy(second.path / "data" / f"c.{DATE}.0.0.0", file_of(path, 3))
    with pytest.raises(ChunkError):  # its index is read again: the chunks lie elsewhere, in another codec
        dataset[DATE]


def test_damaged_small_arrays_are_refused_when_the_dataset_is_opened(whole, tmp_path):
    path = copy_of(whole[2, "lz4"], tmp_path)
    (path / "latitudes" / "0").write_bytes(b"no")
    with pytest.raises(DatasetError, match="latitudes"):
        open_dataset(path)


PROGRAM = """
import sys, time
from shardio import ShardedDataLoader, open_dataset
batches = iter(ShardedDataLoader(open_dataset(sys.argv[1]), shuffle=False, threads=2))
for _ in range(4):
    next(batches)
print("ready", flush=True)
if sys.argv[2] == "reading":
    next(batches)
time.sleep(600)
"""


@pytest.mark.parametrize("where", ["reading", "computing"])
def test_an_interrupt_stops_at_once_even_while_a_read_hangs(whole, tmp_path, where):
    path = copy_of(whole[2, "lz4"], tmp_path)
    pipe = file_of(path, 2)
    pipe.unlink()
    os.mkfifo(pipe)  # to open it waits for a writer that never comes
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in its background has them, and all they start, ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)  # where it does not stop, it hangs for ever
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_program_that_ends_in_the_middle_of_an_epoch_ends_in_good_order(whole):
    program = (
        "import sys\n"
        "from shardio import ShardedDataLoader, open_dataset\n"
        "batches = iter(ShardedDataLoader(open_dataset(sys.argv[1]), prefetch=8))\n"
        "print(float(next(batches).fields.nansum()) != 0)\n"
    )
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-X", "dev", "-c", program, whole[3, "lz4"].path],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")
