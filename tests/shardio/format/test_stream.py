"""A date taken grid-chunk by grid-chunk is the date decoded as a whole; damage is an error that names the file."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, blosc

from shardio.errors import ChunkError
from shardio.rechunk import blocks as module
from shardio.rechunk import plan
from shardio.source.source import Selection

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import write_source

from shardio.format.blocks import HEADER, UNCOMPRESSED, streams
from shardio.format.stream import BloscRows


def compressed(values, cname="lz4", shuffle=1, blocksize=0):
    return np.frombuffer(blosc.compress(values, cname.encode(), 5, shuffle, blocksize), np.uint8).copy()


def smooth(rows, cells, seed=0):
    steps = np.random.default_rng(seed).standard_normal((rows, cells), np.float32)
    return np.cumsum(steps, axis=1).round(1)


def reordered(stored):
    """The same blocks in another order, as threads of blosc may leave them."""
    nbytes, block, size = stored[4:HEADER].view("<u4").tolist()
    first = HEADER + 4 * -(-nbytes // block)
    begins = stored[HEADER:first].view("<i4")
    parts = np.split(stored[first:], begins[1:] - first)
    order = np.random.default_rng(0).permutation(len(parts))
    ends = first + np.cumsum([len(parts[i]) for i in order])
    begins[order] = ends - [len(parts[i]) for i in order]
    stored[first:] = np.concatenate([parts[i] for i in order])
    assert len(stored) == size
    return stored


@settings(deadline=None, max_examples=160)
@given(st.data())
def test_rows_taken_in_any_steps_are_the_rows(data):
    rows, cells = data.draw(st.integers(1, 5)), data.draw(st.integers(40, 2000))
    cname = data.draw(st.sampled_from(["lz4", "zstd", "blosclz", "zlib"]))
    values = smooth(rows, cells)
    stored = compressed(values, cname, data.draw(st.integers(0, 2)), data.draw(st.sampled_from([0, 128, 1000, 4096])))
    if stored[2] & UNCOMPRESSED:
        return
    if data.draw(st.booleans()):
        stored = reordered(stored)
    before = stored.copy()
    wanted = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    taken = BloscRows(stored, values.nbytes, [4 * cells * row for row in wanted], "a file")
    start = 0
    while start < cells:
        step = min(data.draw(st.integers(1, cells)), cells - start)
        gap = data.draw(st.sampled_from([0, 3]))  # without one, blocks may go over the rows that follow
        out = np.full((len(wanted), step + gap), np.nan, np.float32)
        taken.take(out[:, :step])
        assert np.array_equal(out[:, :step], values[wanted, start : start + step])
        assert np.isnan(out[:, step:]).all()
        start += step
    assert np.array_equal(stored, before)


def test_only_blocks_smaller_than_asked_for_stream():
    header = compressed(smooth(3, 9000), blocksize=1024)[:HEADER]
    block = int(header[8:12].view("<u4")[0])
    assert streams(header, block)
    assert not streams(header, block - 1)
    assert not streams(header[:-1], block)
    noise = np.random.default_rng(0).integers(0, 255, 9000, np.uint8)
    assert not streams(compressed(noise)[:HEADER], 2**20)


def test_damage_is_named():
    values = smooth(3, 9000)
    good = compressed(values, blocksize=1024)
    begins = [0, 36_000, 72_000]

    def taken(stored, nbytes=values.nbytes):
        out = np.empty((3, 9000), np.float32)
        BloscRows(stored, nbytes, begins, "x/data/0.0.0.0").take(out)
        return out

    assert np.array_equal(taken(good), values)
    beyond, before, swollen = good.copy(), good.copy(), good.copy()
    beyond[HEADER : HEADER + 4].view("<i4")[0] = len(good)
    before[HEADER : HEADER + 4].view("<i4")[0] = 3
    swollen[8:12].view("<u4")[0] = 0
    tiny = good.copy()
    tiny[8:12].view("<u4")[0] = 1
    for damaged in (good[:-1], good[:10], beyond, before, swollen, tiny):
        with pytest.raises(ChunkError, match=r"x/data/0.0.0.0: blosc cannot decode .* Copy it again"):
            taken(damaged)
    with pytest.raises(ChunkError, match="expected 4 decoded"):
        taken(good, 4)
    end = int(good[HEADER + 4 : HEADER + 8].view("<i4")[0])
    first = int(good[HEADER : HEADER + 4].view("<i4")[0])
    good[first:end] = 255  # the first block is no lz4
    with pytest.raises(ChunkError, match="error during blosc decompression"):
        taken(good)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_streamed_rechunk_writes_the_bytes_of_one_by_blocks(
    zarr_format, ensemble, rechunk, tree, tmp_path, monkeypatch
):
    shape = (6, 3, ensemble, 120_001)
    values = smooth(18 * ensemble, shape[3]).reshape(shape)  # noise would be stored as it is
    values[2] = np.nan
    source = write_source(tmp_path / "a.zarr", values, missing=(2,), compressors=Blosc("lz4", 5, 1, 1024))
    streamed = []
    original = module._write_streams

    def write(*arguments):
        streamed.append(module._streams(arguments[0], arguments[1].layout, arguments[2]))
        return original(*arguments)

    monkeypatch.setattr(module, "_write_streams", write)
    monkeypatch.setattr(plan, "SMALLEST_TASK", 1)  # one task per date, as large dates have
    for name, chosen in (("all", Selection()), ("some", Selection(select=("v_2", "v_0")))):
        options = {"zarr_format": zarr_format, "selection": chosen}
        rechunk(source.path, tmp_path / f"{name}.zarr", 7, **options)
        with monkeypatch.context() as patched:
            patched.setattr(module, "_streams", lambda *_: False)
            rechunk(source.path, tmp_path / f"{name}-blocks.zarr", 7, **options)
        assert tree(tmp_path / f"{name}.zarr") == tree(tmp_path / f"{name}-blocks.zarr")
    assert sorted(streamed) == [False] * 2 + [True] * 10
