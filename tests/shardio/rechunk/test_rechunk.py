"""Whatever the source looks like, the output holds its bits, and everything else it came with."""

import filecmp
import json
import math
import warnings
from contextlib import contextmanager

import google_crc32c
import numcodecs
import numpy as np
import pytest
import xarray
import zarr.codecs

from shardio.errors import ChunkError, DatasetError, OutputError, PlanError, ShardioError
from shardio.format.arrays import stored_values
from shardio.format.store import LocalStore
from shardio.rechunk import Request, prepare, run
from shardio.source.source import Selection
from shardio.write.output import COORDINATES

SHAPE = (5, 3, 2, 23)
V2 = {
    "one chunk per date": {"chunks": (1, 3, 2, 23)},
    "two dates per chunk": {"chunks": (2, 3, 2, 23)},
    "every axis cut unevenly": {"chunks": (2, 2, 1, 5)},
    "one value per chunk": {"chunks": (1, 1, 1, 1), "shape": (2, 2, 2, 5)},
    "chunks larger than the array": {"chunks": (8, 4, 3, 40)},
    "slashes in keys": {"chunks": (2, 2, 1, 5), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "float64": {"chunks": (2, 2, 1, 5), "dtype": "f8"},
    "int16": {"chunks": (2, 2, 1, 5), "dtype": "i2"},
    "int32": {"chunks": (1, 3, 2, 7), "dtype": "i4"},
    "big-endian": {"chunks": (2, 2, 1, 5), "dtype": ">f4"},
    "Fortran order": {"chunks": (2, 2, 2, 5), "order": "F"},
    "no codec": {"chunks": (2, 3, 2, 5), "compressors": None},
    "zstd": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.Zstd(3)},
    "blosc-zstd bitshuffle": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.Blosc("zstd", 3, 2)},
    "blosc autoshuffle": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.Blosc("lz4", 5, -1)},
    "gzip": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.GZip(1)},
    "zlib": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.Zlib(1)},
    "zlib on float64": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.Zlib(1), "dtype": "f8"},
    "bz2": {"chunks": (2, 3, 2, 5), "compressors": numcodecs.BZ2(1)},
    "a filter": {"chunks": (2, 3, 2, 5), "filters": [numcodecs.Shuffle(4)], "compressors": numcodecs.Zlib(1)},
}
V3 = {
    "one chunk per date": {"chunks": (1, 3, 2, 23)},
    "every axis cut unevenly": {"chunks": (2, 2, 1, 5)},
    "Zarr-sharded": {"chunks": (1, 1, 1, 5), "shards": (2, 2, 2, 10)},
    "one Zarr shard": {"chunks": (1, 3, 1, 4), "shards": (5, 3, 2, 24)},
    "float64, Zarr-sharded": {"chunks": (1, 3, 1, 4), "shards": (2, 3, 2, 24), "dtype": "f8"},
    "int16": {"chunks": (2, 2, 1, 5), "dtype": "i2"},
    "dots in keys": {"chunks": (2, 2, 1, 5), "chunk_key_encoding": {"name": "default", "separator": "."}},
    "v2 keys": {"chunks": (2, 2, 1, 5), "chunk_key_encoding": {"name": "v2", "separator": "."}},
    "no codec": {"chunks": (2, 2, 1, 5), "compressors": None},
    "gzip": {"chunks": (2, 2, 1, 5), "compressors": zarr.codecs.GzipCodec(level=1)},
    "gzip, Zarr-sharded": {
        "chunks": (1, 1, 1, 5),
        "shards": (2, 2, 2, 10),
        "compressors": zarr.codecs.GzipCodec(level=1),
    },
    "blosc": {"chunks": (2, 2, 1, 5), "compressors": zarr.codecs.BloscCodec(cname="lz4", shuffle="shuffle")},
    "crc32c after zstd": {
        "chunks": (2, 2, 1, 5),
        "compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()],
    },
    "transposed": {"chunks": (2, 2, 1, 5), "filters": zarr.codecs.TransposeCodec(order=(3, 2, 1, 0))},
}
CASES = [pytest.param(2, case, id=f"v2-{name}") for name, case in V2.items()] + [
    pytest.param(3, case, id=f"v3-{name}") for name, case in V3.items()
]


# What makes each of the three readers read it.
READERS = {
    (2, "native"): {},
    (2, "tensorstore"): {"compressors": numcodecs.BZ2(1)},
    (2, "zarr"): {"filters": [numcodecs.Shuffle(4)], "compressors": numcodecs.Zlib(1)},
    (3, "native"): {},
    (3, "tensorstore"): {"filters": zarr.codecs.TransposeCodec(order=(3, 2, 1, 0))},
}
BY_READER = pytest.mark.parametrize(("zarr_format", "reader"), READERS)


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bits(values):
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize(("zarr_format", "case"), CASES)
def test_output_equals_source_to_the_bit(zarr_format, case, build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, **{"shape": SHAPE, **case})
    for target in (2, 3):
        rechunk(source.path, tmp_path / f"{target}.zarr", 5, zarr_format=target)
        arrays, attributes = opened(tmp_path / f"{target}.zarr")
        assert arrays["data"].dtype == np.float32
        assert (bits(arrays["data"]) == bits(source.expected)).all()
        assert attributes["chunks"] == [1, *source.values.shape[1:3], math.ceil(source.values.shape[3] / 5)]
        assert attributes["dtype"] == "float32"


@pytest.mark.parametrize(("cells", "grid_chunks"), [(10_007, 7), (7, 3), (7, 1), (7, 7), (1, 1)])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_any_unevenness_is_equal_to_the_bit(cells, grid_chunks, zarr_format, build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, shape=(3, 2, 1, cells), chunks=(1, 2, 1, cells))
    rechunk(source.path, tmp_path / "b.zarr", grid_chunks)
    assert (bits(opened(tmp_path / "b.zarr")[0]["data"]) == bits(source.expected)).all()
    files = {file.name for file in (tmp_path / "b.zarr" / "data").iterdir()} - {".zarray", ".zattrs", "zarr.json"}
    assert len(files) == (3 * grid_chunks if zarr_format == 2 else 3)


def test_unattainable_number_of_chunks_names_those_that_are(build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", shape=(2, 1, 1, 7), chunks=(1, 1, 1, 7))
    with pytest.raises(PlanError, match=r"7 cells cannot be cut into 5 .* Use --grid-chunks 4 or 7"):
        rechunk(source.path, tmp_path / "b.zarr", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("target", [2, 3])
def test_everything_that_came_with_the_data_survives(zarr_format, target, build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, missing=(1, 3), extras=True)
    rechunk(source.path, tmp_path / "b.zarr", 4, zarr_format=target)
    arrays, attributes = opened(tmp_path / "b.zarr")
    before, their_attributes = opened(source.path)
    for name in before.keys() - {"data"}:
        assert arrays[name].dtype == before[name].dtype or arrays[name].dtype.kind in "TU"
        assert (arrays[name] == before[name]).all(), name
    refreshed = {"chunks", "shape", "dtype", "uuid", "shardio"}
    for name in their_attributes.keys() - refreshed:
        assert attributes[name] == their_attributes[name], name
    assert attributes["uuid"] != their_attributes["uuid"]
    with quiet():
        group = zarr.open_group(tmp_path / "b.zarr", mode="r")
        assert group["_build"].attrs["history"] == "made by hand"
        assert group["table"].attrs["units"] == "K"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_strings_of_any_length_survive_and_verify(zarr_format, build, rechunk, opened, cli, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format)
    words = np.array(["short", "a string that is far too long to be stored in place", ""], dtype=object)
    with quiet():
        group = zarr.open_group(source.path, mode="a")
        group.create_array("words", shape=3, dtype="str")[...] = words
    rechunk(source.path, tmp_path / "b.zarr", 4)
    assert opened(tmp_path / "b.zarr")[0]["words"].tolist() == words.tolist()
    assert cli("verify", tmp_path / "b.zarr").exit_code == 0


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("absent", [False, True])
def test_missing_dates_keep_their_row_and_are_listed(zarr_format, absent, build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, missing=(0, 3), absent=absent)
    rechunk(source.path, tmp_path / "b.zarr", 4)
    arrays, attributes = opened(tmp_path / "b.zarr")
    assert np.isnan(arrays["data"][[0, 3]]).all()
    assert (bits(arrays["data"][[1, 2, 4]]) == bits(source.expected[[1, 2, 4]])).all()
    assert attributes["missing_dates"] == [str(source.dates[i]) for i in (0, 3)]


def test_several_dates_per_chunk_with_missing_ones_among_them(build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", 2, missing=(1, 2), chunks=(4, 2, 1, 9))
    rechunk(source.path, tmp_path / "b.zarr", 4)
    assert (bits(opened(tmp_path / "b.zarr")[0]["data"]) == bits(source.expected)).all()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_xarray_opens_the_output(zarr_format, build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, shape=SHAPE, chunks=(2, 2, 1, 5))
    rechunk(source.path, tmp_path / "b.zarr", 5)
    with quiet(), xarray.open_zarr(tmp_path / "b.zarr", consolidated=None) as dataset:
        assert dataset["data"].dims == ("time", "variable", "ensemble", "cell")
        assert (bits(dataset["data"].values) == bits(source.expected)).all()
        assert (dataset["dates"].values.astype("datetime64[s]") == source.dates).all()
        assert dataset["latitudes"].dims == ("cell",)
        assert dataset["mean"].dims == ("variable",)


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_codec_is_equal_to_the_bit(codec, zarr_format, build, rechunk, opened, cli, tmp_path):
    source = build(tmp_path / "a.zarr", shape=SHAPE, chunks=(2, 3, 2, 23))
    rechunk(source.path, tmp_path / "b.zarr", 5, codec=codec, zarr_format=zarr_format)
    assert (bits(opened(tmp_path / "b.zarr")[0]["data"]) == bits(source.expected)).all()
    assert cli("verify", tmp_path / "b.zarr", "--source", source.path).exit_code == 0


def test_an_output_is_a_source(build, rechunk, opened, tree, tmp_path):
    source = build(tmp_path / "a.zarr", 2, shape=SHAPE, chunks=(2, 2, 1, 5), missing=(2,), extras=True)
    rechunk(source.path, tmp_path / "b.zarr", 5, zarr_format=3)
    rechunk(tmp_path / "b.zarr", tmp_path / "c.zarr", 3, zarr_format=2)
    arrays, attributes = opened(tmp_path / "c.zarr")
    assert (bits(arrays["data"]) == bits(source.expected)).all()
    assert attributes["missing_dates"] == [str(source.dates[2])]
    assert arrays["shardio_crc32c"].shape == (5, 3)


def test_selection_takes_everything_along(build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", 3, shape=(6, 4, 1, 9), chunks=(4, 3, 1, 5), missing=(0, 2), extras=True)
    chosen = Selection(start="2020-01-01T06", end="2020-01-02T00", select=("v_3", "v_0", "v_1"), drop=("v_0",))
    rechunk(source.path, tmp_path / "b.zarr", 2, selection=chosen)
    arrays, attributes = opened(tmp_path / "b.zarr")
    assert (bits(arrays["data"]) == bits(source.expected[1:5][:, [3, 1]])).all()
    assert (arrays["dates"] == source.dates[1:5]).all()
    for name, values in source.statistics.items():
        assert (arrays[name] == values[[3, 1]]).all()
    assert (arrays["statistics_tendencies_6h_mean"] == source.extras["statistics_tendencies_6h_mean"][[3, 1]]).all()
    assert (arrays["_build/flags"] == source.extras["_build/flags"][1:5]).all()
    assert attributes["variables"] == ["v_3", "v_1"]
    assert sorted(attributes["variables_metadata"]) == ["v_1", "v_3"]
    assert attributes["missing_dates"] == [str(source.dates[2])]
    assert (attributes["start_date"], attributes["end_date"]) == (str(source.dates[1]), str(source.dates[4]))
    assert attributes["shape"] == [4, 2, 1, 9]
    assert attributes["statistics_start_date"] == str(source.dates[0])  # of the source, whose statistics they are


def test_end_2020_means_all_of_2020(build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", shape=(5, 1, 1, 4), chunks=(1, 1, 1, 4))
    rechunk(source.path, tmp_path / "b.zarr", 2, selection=Selection(start="2020-01-01T12", end="2020-01-01"))
    assert (opened(tmp_path / "b.zarr")[0]["dates"] == source.dates[2:4]).all()


@BY_READER
def test_missing_source_chunk_is_an_error_that_names_it(zarr_format, reader, build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, **READERS[zarr_format, reader])
    name = "2.0.0.0" if zarr_format == 2 else "c/2/0/0/0"
    (source.path / "data" / name).unlink()
    with pytest.raises(ChunkError, match=name.replace(".", r"\.")):
        rechunk(source.path, tmp_path / "b.zarr", 4)
    assert not (tmp_path / "b.zarr").exists()
    rechunk(source.path, tmp_path / "c.zarr", 4, fill_absent=True)


def test_fill_missing_chunks_takes_the_fill_value(build, opened, cli, tmp_path):
    source = build(tmp_path / "a.zarr", 2, chunks=(1, 1, 1, 5))
    (source.path / "data" / "2.1.0.3").unlink()
    refused = cli("rechunk", source.path, tmp_path / "b.zarr", "-n", 4)
    assert refused.exit_code == 1
    assert "2.1.0.3" in refused.stderr
    assert cli("rechunk", source.path, tmp_path / "b.zarr", "-n", 4, "--fill-missing-chunks").exit_code == 0
    expected = source.expected.copy()
    expected[2, 1, 0, 15:20] = np.nan
    data = opened(tmp_path / "b.zarr")[0]["data"]
    assert np.isnan(data[2, 1, 0, 15:20]).all()
    assert (bits(data) == bits(expected))[~np.isnan(expected)].all()


def test_a_flipped_bit_in_coordinates_with_a_checksum_is_an_error(build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", 3)
    group = zarr.open_group(source.path, mode="a")
    values = group["latitudes"][...]
    codecs = [zarr.codecs.Crc32cCodec()]
    group.create_array("latitudes", data=values, chunks=values.shape, compressors=codecs, overwrite=True)
    file = source.path / "latitudes" / "c" / "0"
    content = bytearray(file.read_bytes())
    rechunk(source.path, tmp_path / "b.zarr", 4)
    content[5] ^= 64
    file.write_bytes(content)
    with pytest.raises(DatasetError, match="latitudes cannot be read: the crc32c of the stored bytes does not match"):
        rechunk(source.path, tmp_path / "c.zarr", 4)


LATITUDES = {
    "as they are written": ("f8", 301, "blosc", True),
    "in zstd": ("f8", 301, "zstd", False),
    "in two chunks": ("f8", 151, "blosc", False),
    "in single precision": ("f4", 301, "blosc", False),
}


@pytest.mark.parametrize("written", [2, 3])
@pytest.mark.parametrize("read", [2, 3])
@pytest.mark.parametrize(("dtype", "chunk", "codec", "copied"), LATITUDES.values(), ids=LATITUDES)
def test_coordinates_are_copied_undecoded_where_that_is_the_same(
    dtype, chunk, codec, copied, read, written, build, tmp_path
):
    source = build(tmp_path / "a.zarr", read, shape=(2, 1, 1, 301), chunks=(1, 1, 1, 301))
    known = {
        2: {"blosc": numcodecs.Blosc("lz4", 5, 1), "zstd": numcodecs.Zstd(1)},
        3: {"blosc": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), "zstd": zarr.codecs.ZstdCodec()},
    }
    values = np.cumsum(np.random.default_rng(0).uniform(0, 1e-3, 301)).round(2).astype(dtype)
    group = zarr.open_group(source.path, mode="a", zarr_format=read)
    group.create_array("latitudes", data=values, chunks=(chunk,), compressors=known[read][codec], overwrite=True)
    prepared = prepare(Request(str(source.path), str(tmp_path / "b.zarr"), 4, written, sync=False))
    run(prepared)
    assert ("latitudes" in vars(prepared.source)) == (not copied)
    group = zarr.open_group(tmp_path / "b.zarr", mode="r")
    assert np.array_equal(group["latitudes"][...], values.astype("f8"))
    assert group["latitudes"].chunks == (301,)
    assert group.attrs["shardio"]["arrays"]["latitudes"] == google_crc32c.value(values.astype("f8").tobytes())
    file = source.path / "latitudes" / {2: "0", 3: "c/0"}[read]
    there = tmp_path / "b.zarr" / "latitudes" / {2: "0", 3: "c/0"}[written]
    assert filecmp.cmp(there, file, shallow=False) == copied
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ShardioError, match="latitudes"):
        run(prepare(Request(str(source.path), str(tmp_path / "c.zarr"), 4, written, sync=False)))
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("cells", [131_072, 300_001])
def test_the_checksum_of_copied_coordinates_is_that_of_all_values(cells, zarr_format, tmp_path):
    """More of them than are decoded at a time."""
    values = np.cumsum(np.random.default_rng(0).uniform(0, 1e-3, cells)).round(2)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=zarr_format)
    lz4 = {2: numcodecs.Blosc("lz4", 5, 1), 3: zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")}
    group.create_array("latitudes", data=values, chunks=(cells,), compressors=lz4[zarr_format])
    found = stored_values(LocalStore(tmp_path / "a.zarr"), "latitudes", COORDINATES)
    assert found is not None
    assert found[1] == google_crc32c.value(values.tobytes())


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("codec", ["blosc", "zstd", "none", "gzip"])
def test_truncated_source_chunk_is_an_error(zarr_format, codec, build, rechunk, tmp_path):
    of_format = {
        2: {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd(), "none": None, "gzip": numcodecs.GZip()},
        3: {
            "blosc": zarr.codecs.BloscCodec(),
            "zstd": zarr.codecs.ZstdCodec(),
            "none": None,
            "gzip": zarr.codecs.GzipCodec(),
        },
    }
    source = build(tmp_path / "a.zarr", zarr_format, compressors=of_format[zarr_format][codec])
    file = source.path / "data" / ("2.0.0.0" if zarr_format == 2 else "c/2/0/0/0")
    content = file.read_bytes()
    for length in (0, 1, 15, 17, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ChunkError, match="data"):
            rechunk(source.path, tmp_path / f"{length}.zarr", 4)


def test_flipped_bits_of_a_source_chunk_are_never_a_crash(build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", 2, compressors=numcodecs.Blosc("lz4", 5, 1))
    file = source.path / "data" / "2.0.0.0"
    content = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    for attempt in range(40):
        flipped = content.copy()
        flipped[random.integers(len(content))] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        try:  # blosc has no checksum: a flip in the values cannot be seen, a flip in the structure must be
            rechunk(source.path, tmp_path / f"{attempt}.zarr", 4)
        except ChunkError as error:
            assert "2.0.0.0" in str(error)


def test_any_flipped_bit_of_a_checked_source_is_found(build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", 3)
    rechunk(source.path, tmp_path / "b.zarr", 4)
    file = tmp_path / "b.zarr" / "data" / "c.2.0.0.0"
    content = file.read_bytes()
    random = np.random.default_rng(0)
    for attempt in range(40):
        flipped = bytearray(content)
        flipped[random.integers(len(content))] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(ChunkError, match=r"c\.2\.0\.0\.0"):
            rechunk(tmp_path / "b.zarr", tmp_path / f"{attempt}.zarr", 3)


@BY_READER
def test_numbers_too_large_for_float32_are_an_error(zarr_format, reader, build, rechunk, tmp_path):
    source = build(tmp_path / "a.zarr", zarr_format, dtype="f8", **READERS[zarr_format, reader])
    with quiet():
        zarr.open_array(source.path, path="data", mode="a")[2, 1, 0, 3] = -1e300
    with pytest.raises(ChunkError, match=r"1e\+300 does not fit in float32"):
        rechunk(source.path, tmp_path / "b.zarr", 4)
    assert not (tmp_path / "b.zarr").exists()


def test_infinity_is_kept(build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", 2, dtype="f8", statistics=False)
    zarr.open_array(source.path, path="data", mode="a")[2, 1, 0, 3] = -np.inf
    rechunk(source.path, tmp_path / "b.zarr", 4)
    arrays, _ = opened(tmp_path / "b.zarr")
    assert arrays["data"][2, 1, 0, 3] == -np.inf
    assert arrays["minimum"][1] == -np.inf


def test_fill_value_given_as_bits_is_understood(build, rechunk, opened, tmp_path):
    source = build(tmp_path / "a.zarr", 3, missing=(1,), absent=True)
    metadata = source.path / "data" / "zarr.json"
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**content, "fill_value": "0x7fc12345"}))
    rechunk(source.path, tmp_path / "b.zarr", 4)
    assert (opened(tmp_path / "b.zarr")[0]["data"][1].view(np.uint32) == 0x7FC12345).all()


def test_the_same_path_through_a_link_is_refused_and_untouched(build, rechunk, tree, tmp_path):
    source = build(tmp_path / "a.zarr")
    before = tree(source.path)
    (tmp_path / "link.zarr").symlink_to(source.path)
    (tmp_path / "folder").symlink_to(tmp_path)
    for destination in (source.path, tmp_path / "link.zarr", tmp_path / "folder" / "a.zarr"):
        with pytest.raises(OutputError, match="the same"):
            rechunk(source.path, destination, 4, overwrite=True)
    assert tree(source.path) == before


def test_one_inside_the_other_is_refused_and_untouched(build, rechunk, tree, tmp_path):
    source = build(tmp_path / "a.zarr")
    inner = build(tmp_path / "b.zarr" / "inner.zarr")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="inside its source"):
        rechunk(source.path, source.path / "b.zarr", 4)
    with pytest.raises(OutputError, match="inside the destination"):
        rechunk(inner.path, tmp_path / "b.zarr", 4, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"overwrite": True, "source": "absent.zarr"},
        {"overwrite": True, "grid_chunks": 0},
        {"overwrite": True, "codec": "mp3"},
        {"overwrite": True, "selection": Selection(select=("nope",))},
        {"overwrite": True, "selection": Selection(start="1900", end="1901")},
        {"overwrite": True, "max_memory": 10},
        {"overwrite": True, "broken": True},
    ],
    ids=str,
)
def test_existing_output_is_untouched_when_anything_is_wrong(wrong, build, rechunk, tree, tmp_path):
    source = build(tmp_path / "a.zarr")
    rechunk(source.path, tmp_path / "b.zarr", 4)
    before = tree(tmp_path / "b.zarr")
    options = dict(wrong)
    if options.pop("broken", False):
        (source.path / "data" / "3.0.0.0").write_bytes(b"half")
    path = tmp_path / options.pop("source", "a.zarr")
    with pytest.raises(ShardioError):
        rechunk(path, tmp_path / "b.zarr", options.pop("grid_chunks", 3), **options)
    assert tree(tmp_path / "b.zarr") == before


def test_overwrite_replaces_and_leaves_nothing_else(build, rechunk, opened, tmp_path):
    rechunk(build(tmp_path / "a.zarr", seed=1).path, tmp_path / "b.zarr", 4)
    source = build(tmp_path / "c.zarr", seed=2)
    rechunk(source.path, tmp_path / "b.zarr", 3, overwrite=True)
    arrays, attributes = opened(tmp_path / "b.zarr")
    assert (bits(arrays["data"]) == bits(source.expected)).all()
    assert attributes["shardio"]["grid_chunks"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", "b.zarr", "c.zarr"}


def test_an_output_that_appears_during_the_run_is_not_replaced(build, tmp_path):
    source = build(tmp_path / "a.zarr")
    prepared = prepare(Request(str(source.path), str(tmp_path / "b.zarr"), 4, sync=False))
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "precious").write_text("data")
    with pytest.raises(OutputError, match="exists"):
        run(prepared)
    later = prepare(Request(str(source.path), str(tmp_path / "c.zarr"), 4, sync=False))

    def meanwhile(_):
        (tmp_path / "c.zarr").mkdir(exist_ok=True)
        (tmp_path / "c.zarr" / "precious").write_text("data")

    with pytest.raises(OutputError, match="exists"):
        run(later, meanwhile)
    assert [path.name for path in (tmp_path / "b.zarr").iterdir()] == ["precious"]
    assert [path.name for path in (tmp_path / "c.zarr").iterdir()] == ["precious"]


def test_a_source_that_changes_during_the_run_is_refused(build, tmp_path):
    source = build(tmp_path / "a.zarr")

    def meanwhile(_):
        (source.path / "data" / "0.0.0.0").write_bytes(b"another size")

    with pytest.raises(OutputError, match="changed while it was read"):
        run(prepare(Request(str(source.path), str(tmp_path / "b.zarr"), 4, sync=False)), meanwhile)
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_bytes_do_not_depend_on_the_memory_bound(zarr_format, build, rechunk, tree, tmp_path):
    source = build(
        tmp_path / "a.zarr", 2, shape=(7, 3, 1, 101), chunks=(4, 2, 1, 30), statistics=False, compressors=None
    )
    trees = []
    for i, memory in enumerate((4 * 2**30, 20_000, 12_000)):
        folder = tmp_path / str(i)
        folder.mkdir()
        rechunk(source.path, folder / "b.zarr", 6, max_memory=memory, zarr_format=zarr_format)
        trees.append(tree(folder / "b.zarr"))
    assert trees[0] == trees[1] == trees[2]
