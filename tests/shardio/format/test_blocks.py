"""Parts of a chunk decoded each to its own place are the chunk, and every block is decoded once."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from shardio.errors import ChunkError
from shardio.format.blocks import HEADER, UNCOMPRESSED, BloscBlocks
from shardio.format.layout import parse
from shardio.format.metadata import array_metadata
from shardio.format.reader import NativeReader
from shardio.format.store import LocalStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading_fixtures import bits, cut, noise, write_source


class Counting(BloscBlocks):
    """Says which blocks it decodes."""

    decoded: list[int]

    def decode(self, first, out):
        self.decoded += range(first, first - (-len(out) // self.size))
        super().decode(first, out)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_rows_scattered_are_the_rows_and_every_block_is_decoded_once(data):
    rows, cells = data.draw(st.integers(1, 6)), data.draw(st.integers(8, 1500))
    steps = np.random.default_rng(0).standard_normal((rows, cells), np.float32)
    values = np.cumsum(steps, axis=1).round(1)
    cname = data.draw(st.sampled_from(["lz4", "zstd"])).encode()
    block, shuffle = data.draw(st.sampled_from([0, 128, 1000, 4096])), data.draw(st.integers(0, 2))
    stored = np.frombuffer(blosc.compress(values, cname, 5, shuffle, block), np.uint8).copy()
    if stored[2] & UNCOMPRESSED:
        return
    before = stored.copy()
    first = data.draw(st.integers(0, cells - 1))
    last = data.draw(st.integers(first + 1, cells))
    wanted = sorted(data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))])
    out = np.full((len(wanted), last - first + 3), np.nan, np.float32)
    blocks = Counting(stored, values.nbytes, "a file")
    blocks.decoded = []
    begins = [4 * (row * cells + first) for row in wanted]
    spare = np.empty(blocks.size, np.uint8)
    blocks.scatter([(b, row[: last - first].view(np.uint8)) for b, row in zip(begins, out, strict=True)], spare)
    assert np.array_equal(out[:, : last - first], values[wanted, first:last])
    assert np.isnan(out[:, last - first :]).all()
    assert np.array_equal(stored, before)
    ends = [begin + 4 * (last - first) for begin in begins]
    needed = {i for b, e in zip(begins, ends, strict=True) for i in range(b // blocks.size, -(-e // blocks.size))}
    assert blocks.decoded == sorted(needed)


def test_damage_of_a_block_is_named():
    values = np.cumsum(np.ones(9000, np.float32))
    stored = np.frombuffer(blosc.compress(values, b"lz4", 5, 1, 1024), np.uint8).copy()
    blocks = BloscBlocks(stored, values.nbytes, "x/data/0.0.0.0")
    first, end = stored[HEADER : HEADER + 8].view("<i4").tolist()
    stored[first:end] = 255
    with pytest.raises(ChunkError, match=r"x/data/0.0.0.0: blosc cannot decode"):
        blocks.scatter([(0, np.empty(8, np.uint8))], np.empty(blocks.size, np.uint8))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("smooth", [False, True])  # blosc stores what it cannot make smaller as it is
def test_rows_of_a_chunk_in_every_codec(tmp_path, codec, zarr_format, smooth):
    values = noise((2, 3, 2, 5000))
    if smooth:
        values = np.cumsum(np.ones_like(values), axis=-1, dtype=np.float32)
    stored = cut(write_source(tmp_path / "source.zarr", values), tmp_path / "cut.zarr", 4, zarr_format, codec)
    layout = parse(array_metadata(LocalStore(stored.path), "data"), "data")
    reader = NativeReader(stored.path / "data", layout)
    out = np.zeros((2, 100), np.float32)
    begins = [4 * (1250 * row + 7) for row in (1, 4)]  # variable 0, member 1; variable 2, member 0
    reader.read_rows((1, 0, 0, 2), [(b, row.view(np.uint8)) for b, row in zip(begins, out, strict=True)])
    assert np.array_equal(bits(out), bits(values[1, [0, 2], [1, 0], 2507:2607]))
