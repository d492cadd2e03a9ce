"""All readers give the same bits for the same box, and count nothing twice."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardio.errors import ChunkError
from shardio.format.boxes import chunks_of
from shardio.format.layout import parse
from shardio.format.metadata import array_metadata
from shardio.format.reader import NativeReader, TensorstoreReader, ZarrReader
from shardio.format.store import LocalStore

SHAPE = (5, 4, 2, 23)
STORED = {
    "v2": {"zarr_format": 2, "chunks": (2, 3, 1, 5)},
    "v2 int16": {"zarr_format": 2, "chunks": (2, 3, 1, 5), "dtype": "i2"},
    "v2 float64": {"zarr_format": 2, "chunks": (1, 4, 2, 23), "dtype": "f8"},
    "v3": {"zarr_format": 3, "chunks": (2, 3, 1, 5)},
    "v3 Zarr-sharded": {"zarr_format": 3, "chunks": (1, 2, 1, 5), "shards": (2, 4, 2, 10)},
}


@pytest.fixture(scope="module")
def readers(build, tmp_path_factory):
    """By case: what is stored, and every reader of it."""
    found = {}
    for name, case in STORED.items():
        built = build(tmp_path_factory.mktemp("stored") / "a.zarr", shape=SHAPE, **case)
        folder = built.path / "data"
        layout = parse(array_metadata(LocalStore(built.path), "data"), name)
        assert layout.native
        found[name] = built.values, [kind(folder, layout) for kind in (NativeReader, ZarrReader)]
        found[name][1].append(TensorstoreReader(str(folder), layout))
    with ThreadPoolExecutor(3) as pool:
        yield found, pool


@st.composite
def boxes(draw):
    """A range along each axis, and along one perhaps a list in any order."""
    cuts = []
    for n in SHAPE:
        start = draw(st.integers(0, n - 1))
        cuts.append(slice(start, draw(st.integers(start + 1, n))))
    axis = draw(st.sampled_from([None, 0, 1, 2, 3]))
    if axis is not None:
        cuts[axis] = tuple(draw(st.lists(st.integers(0, SHAPE[axis] - 1), min_size=1, max_size=6, unique=True)))
    return tuple(cuts)


@pytest.mark.parametrize("name", STORED)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(box=boxes(), threads=st.booleans(), strided=st.booleans())
def test_all_readers_agree_to_the_bit(name, readers, box, threads, strided):
    by_name, pool = readers
    values, all_readers = by_name[name]
    expected = values[tuple(cut if isinstance(cut, slice) else list(cut) for cut in box)].astype(np.float32)
    for reader in all_readers:
        shape = expected.shape[::-1] if strided else expected.shape
        out = np.full(shape, 7, np.float32)
        out = out.T if strided else out
        reader.read(box, out, pool if threads else None)
        assert (out.copy().view(np.uint32) == expected.copy().view(np.uint32)).all(), type(reader)


@given(boxes(), st.tuples(*(st.integers(1, n + 2) for n in SHAPE)))
def test_chunks_of_a_box_are_those_that_hold_its_cells(box, chunks):
    axes = [range(n)[cut] if isinstance(cut, slice) else cut for cut, n in zip(box, SHAPE, strict=True)]
    touched = {()}
    for axis, n in zip(axes, chunks, strict=True):
        touched = {(*place, index // n) for place in touched for index in axis}
    found = list(chunks_of(box, chunks))
    assert len(found) == len(set(found))
    assert set(found) == touched


@pytest.mark.parametrize("kind", [NativeReader, TensorstoreReader, ZarrReader])
@pytest.mark.parametrize("name", ["v2", "v3"])
def test_absent_chunk_is_an_error_or_the_fill_value_on_demand(kind, name, build, tmp_path):
    built = build(tmp_path / "a.zarr", shape=SHAPE, **STORED[name])
    folder = built.path / "data"
    layout = parse(array_metadata(LocalStore(built.path), "data"), name)
    (folder / layout.file_of((1, 1, 1, 2))[0]).unlink()
    everything = tuple(slice(0, n) for n in SHAPE)
    out = np.zeros(SHAPE, np.float32)
    where = folder if kind is not TensorstoreReader else str(folder)
    with pytest.raises(ChunkError, match="1.1.1.2" if name == "v2" else "1/1/1/2"):
        kind(where, layout).read(everything, out)
    kind(where, layout, fill_absent=True).read(everything, out)
    assert np.isnan(out[2:4, 3:4, 1, 10:15]).all()
    expected = built.values.copy()
    expected[2:4, 3:4, 1, 10:15] = out[2:4, 3:4, 1, 10:15]
    assert (out.view(np.uint32) == expected.view(np.uint32)).all()


def test_absent_inner_chunk_of_a_zarr_shard_is_an_error(tmp_path):
    import zarr

    array = zarr.create_array(
        tmp_path / "a", shape=(1, 1, 1, 9), chunks=(1, 1, 1, 3), shards=(1, 1, 1, 9), dtype="f4", fill_value=np.nan
    )
    array[..., :6] = 1  # zarr leaves the last chunk out
    layout = parse(array_metadata(LocalStore(tmp_path), "a"), "a")
    out = np.zeros((1, 1, 1, 9), np.float32)
    box = tuple(slice(0, n) for n in out.shape)
    for reader in (NativeReader(tmp_path / "a", layout), TensorstoreReader(str(tmp_path / "a"), layout)):
        with pytest.raises(ChunkError):
            reader.read(box, out)
    NativeReader(tmp_path / "a", layout, fill_absent=True).read(box, out)
    assert out[0, 0, 0, :6].tolist() == [1] * 6
    assert np.isnan(out[0, 0, 0, 6:]).all()
