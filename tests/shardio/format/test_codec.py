import gzip
import zlib

import numcodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shardio.errors import ChunkError, ShardioError
from shardio.format.codec import NAMED, Codec, crc32c, from_v2, from_v3, named

WRITTEN = [*NAMED.values(), Codec("zstd", level=1)]


@pytest.mark.parametrize("codec", WRITTEN, ids=str)
@given(values=arrays.arrays(np.uint32, st.integers(1, 300)))
def test_decoding_gives_the_bits_that_were_encoded(codec, values):
    out = np.zeros_like(values)
    codec.decode(memoryview(codec.encode(values.view(np.float32))), out.view(np.float32))
    assert (out == values).all()


def stored_by(codec, values):
    packed = {"zlib": zlib.compress, "gzip": gzip.compress}
    return packed[codec.kind](values.tobytes()) if codec.kind in packed else codec.encode(values)


@pytest.mark.parametrize("codec", [*WRITTEN, Codec("zlib"), Codec("gzip")], ids=str)
@pytest.mark.parametrize("count", [1, 99, 101, 200])
def test_chunk_of_another_size_is_an_error_and_never_leaves_a_stale_tail(codec, count):
    stored = stored_by(codec, np.arange(count, dtype=np.float32))
    with pytest.raises(ChunkError, match="cannot decode"):
        codec.decode(memoryview(stored), np.zeros(100, np.float32))


@pytest.mark.parametrize("codec", [*WRITTEN, Codec("zlib"), Codec("gzip")], ids=str)
def test_every_truncation_is_an_error(codec):
    values = np.random.default_rng(0).integers(0, 9, 100).astype(np.float32)
    stored = stored_by(codec, values)
    for length in range(len(stored)):
        with pytest.raises(ChunkError):
            codec.decode(memoryview(stored[:length]), np.zeros(100, np.float32))


@pytest.mark.parametrize("codec", [Codec("zlib"), Codec("gzip")], ids=str)
def test_codecs_with_a_checksum_find_every_flip_that_changes_a_value(codec):
    values = np.random.default_rng(0).integers(0, 9, 100).astype(np.float32)
    stored = stored_by(codec, values)
    for bit in range(8 * len(stored)):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        out = np.zeros(100, np.float32)
        try:
            codec.decode(memoryview(flipped), out)
        except ChunkError:
            continue
        assert (out == values).all()  # a flip in the header's date, say


def test_unknown_names_are_refused_with_those_known():
    with pytest.raises(ShardioError, match=r"unsupported codec 'mp3'. Use one of: lz4, zstd, none"):
        named("mp3")


@pytest.mark.parametrize("codec", WRITTEN, ids=str)
def test_metadata_are_what_numcodecs_and_zarr_call_the_codec(codec):
    assert from_v2(codec.v2_metadata(), None) == codec
    assert from_v3([{"name": "bytes"}, *codec.v3_metadata(4)]) == (codec, False)
    assert from_v3([{"name": "bytes"}, *codec.v3_metadata(4), {"name": "crc32c"}]) == (codec, True)
    values = np.arange(50, dtype=np.float32)
    if codec.v2_metadata():
        theirs = numcodecs.get_codec(codec.v2_metadata())
        assert np.frombuffer(theirs.decode(codec.encode(values)), np.float32).tolist() == values.tolist()


@pytest.mark.parametrize(
    "chain",
    [
        [],
        [{"name": "transpose", "configuration": {"order": [1, 0]}}, {"name": "bytes"}],
        [{"name": "bytes", "configuration": {"endian": "big"}}],
        [{"name": "bytes"}, {"name": "lzma"}],
        [{"name": "bytes"}, {"name": "crc32c"}, {"name": "zstd"}],
    ],
)
def test_chains_it_cannot_decode_are_left_to_tensorstore(chain):
    assert from_v3(chain) is None


def test_crc32c_is_that_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
