import copy
import json
import math

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardio.errors import DatasetError, PlanError, ShardioError
from shardio.format.codec import NAMED, Codec
from shardio.format.layout import grid_chunked, parse
from shardio.source.open import open_source

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 60))
CODECS = st.sampled_from([*NAMED.values(), Codec("zstd", level=3)])


@given(SHAPES, st.integers(1, 60), st.sampled_from([2, 3]), CODECS)
def test_metadata_parse_to_the_layout_they_were_made_of(shape, grid_chunks, zarr_format, codec):
    try:
        layout = grid_chunked(shape, grid_chunks, zarr_format, codec)
    except PlanError:
        return
    metadata = json.loads(json.dumps(layout.metadata()))
    assert parse(metadata, "here") == layout
    assert math.isnan(parse(metadata, "here").fill_value)


@given(SHAPES, st.integers(-3, 70), st.sampled_from([2, 3]))
def test_grid_chunks_are_as_many_as_asked_for_or_an_error_names_numbers_that_work(shape, grid_chunks, zarr_format):
    try:
        layout = grid_chunked(shape, grid_chunks, zarr_format, NAMED["lz4"])
    except PlanError as error:
        within = 1 <= grid_chunks <= shape[3]
        hints = str(error).split("Use --grid-chunks ")[1].rstrip(".").split(" or ") if within else ["1", str(shape[3])]
        possible = [int(hint) for hint in hints]
        for n in possible:
            assert grid_chunked(shape, n, zarr_format, NAMED["lz4"]).grid[3] == n
    else:
        assert layout.grid == (shape[0], 1, 1, grid_chunks)
        assert layout.chunks[3] == math.ceil(shape[3] / grid_chunks)


@given(SHAPES, st.integers(1, 60))
def test_every_chunk_has_its_own_place(shape, grid_chunks):
    for zarr_format in (2, 3):
        try:
            layout = grid_chunked(shape, grid_chunks, zarr_format, NAMED["lz4"])
        except PlanError:
            return
        places = {layout.file_of((date, 0, 0, chunk)) for date in range(shape[0]) for chunk in range(grid_chunks)}
        assert len(places) == shape[0] * grid_chunks
        assert len({name for name, _ in places}) == shape[0] * (grid_chunks if zarr_format == 2 else 1)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_python_agrees_on_where_chunks_lie(zarr_format, tmp_path):
    storage = {"shards": (2, 4, 2, 10)} if zarr_format == 3 else {}
    array = zarr.create_array(
        tmp_path / "a", shape=(5, 4, 2, 23), chunks=(2, 2, 1, 5), dtype="f4", zarr_format=zarr_format, **storage
    )
    array[...] = 1
    files = {str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("*") if file.is_file()}
    name = ".zarray" if zarr_format == 2 else "zarr.json"
    layout = parse(json.loads((tmp_path / "a" / name).read_text()), "a")
    ours = {layout.file_of(chunk)[0] for chunk in np.ndindex(layout.grid)}
    assert ours == files - {name, ".zattrs"}


VALUES = [st.none(), st.integers(-5, 5), st.text(max_size=3), st.lists(st.integers(0, 3), max_size=5)]
JUNK = st.one_of(*VALUES, st.just({}), st.just([{}]))


def damaged(content, draw):
    """`content` with one value, at any depth, replaced or removed."""
    content = copy.deepcopy(content)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        del node[key]
    else:
        node[key] = draw(JUNK)
    return content


@pytest.fixture(scope="module")
def sources(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for zarr_format in (2, 3):
        shards = (2, 2, 1, 10) if zarr_format == 3 else None
        made[zarr_format] = build(
            folder / f"{zarr_format}.zarr",
            zarr_format,
            chunks=(2, 2, 1, 5),
            shards=shards,
            missing=(1,),
        ).path
    return made


@pytest.mark.parametrize(
    ("zarr_format", "name"),
    [(2, "data/.zarray"), (2, ".zattrs"), (2, "data/.zattrs"), (3, "data/zarr.json"), (3, "zarr.json")],
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_metadata_is_a_dataset_error_never_a_traceback(zarr_format, name, sources, data):
    file = sources[zarr_format] / name
    whole = file.read_bytes()
    content = json.loads(whole)
    content.pop("consolidated_metadata", None)
    file.write_text(json.dumps(damaged(content, data.draw)))
    try:
        source = open_source(sources[zarr_format])
        out = np.empty((len(source.dates), len(source.variables), *source.extent.shape[2:]), np.float32)
        if out.size < 10_000:
            source.read(slice(0, len(out)), slice(0, out.shape[3]), out)
    except ShardioError:
        pass
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"zarr_format": 2}', b"null"])
@pytest.mark.parametrize(
    ("zarr_format", "name"), [(2, "data/.zarray"), (2, ".zattrs"), (3, "data/zarr.json"), (3, "zarr.json")]
)
def test_what_is_not_metadata_is_refused(zarr_format, name, content, sources):
    file = sources[zarr_format] / name
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        with pytest.raises(DatasetError, match=r"zarr"):
            open_source(sources[zarr_format])
    finally:
        file.write_bytes(whole)
