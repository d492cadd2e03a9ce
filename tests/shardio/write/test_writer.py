import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorstore
import zarr

from shardio.format.codec import named
from shardio.format.layout import grid_chunked
from shardio.write.output import begin_data
from shardio.write.writer import ChunkWriter, chunk_slices


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_zarr_and_tensorstore_read_what_it_writes(zarr_format, codec, pieces, tmp_path):
    layout = grid_chunked((2, 3, 2, 50), 7, zarr_format, named(codec))
    begin_data(tmp_path, layout, {})
    values = np.random.default_rng(0).standard_normal(layout.shape).astype(np.float32)
    writer = ChunkWriter(tmp_path / "data", layout, 2, sync=False, with_moments=False)
    step = -(-7 // pieces)
    with ThreadPoolExecutor(3) as pool:
        for date in range(2):
            with writer.open_date(date) as file:
                for first in range(0, 7, step):
                    cells = slice(first * 8, min((first + step) * 8, 50))
                    cuts = chunk_slices(cells, 8)
                    part = values[date][..., cells]
                    assert len(list(file.write(first, [part[..., cut] for cut in cuts], pool))) == len(cuts)
    assert (zarr.open_array(tmp_path / "data", mode="r")[...] == values).all()
    driver = "zarr" if zarr_format == 2 else "zarr3"
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(tmp_path / "data")}}
    assert (tensorstore.open(spec, open=True).result().read().result() == values).all()
    files = [name for name in os.listdir(tmp_path / "data") if name not in (".zarray", ".zattrs", "zarr.json")]
    assert len(files) == (14 if zarr_format == 2 else 2)


def test_the_tail_of_a_short_chunk_is_nan_for_whoever_decodes_it_whole(tmp_path):
    layout = grid_chunked((1, 1, 1, 5), 2, 2, named("none"))
    begin_data(tmp_path, layout, {})
    writer = ChunkWriter(tmp_path / "data", layout, 1, sync=False, with_moments=False)
    writer.store(0, 0, np.ones((1, 1, 3), np.float32))
    writer.store(0, 1, np.ones((1, 1, 2), np.float32))
    tail = np.frombuffer((tmp_path / "data" / "0.0.0.1").read_bytes(), np.float32)
    assert np.isnan(tail).tolist() == [False, False, True]
