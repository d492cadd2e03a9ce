"""The order of the cells is of no consequence to training and forecast: they go by latitudes and longitudes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import MASKED
from forecasting import trained, write_forecast
from training import Case, train

from shardio import open_dataset
from shardio.rechunk import Request, prepare
from shardio.rechunk import run as make

GRID_CHUNKS, RANKS = 5, 3


def in_order(source: str | Path, path: Path, order: str) -> str:
    make(prepare(Request(str(source), str(path), GRID_CHUNKS, order=order, sync=False)))
    return str(path)


@pytest.fixture(scope="module", params=["octahedral", "regular", "irregular", "limited-area"])
def grid(request: pytest.FixtureRequest) -> str:
    """The first two have cells as near to one hidden node as to another."""
    return request.param


@pytest.fixture(scope="module")
def paths(grid: str, dataset_of: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dataset in both orders."""
    source, folder = dataset_of(grid, 1), tmp_path_factory.mktemp("orders")
    return {order: in_order(source, folder / f"{order}.zarr", order) for order in ("native", "compact")}


@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 1, 1)], ids=str)
def test_losses_and_weights_do_not_depend_on_the_order(
    run: Callable[..., list[Any]], grid: str, paths: dict[str, str], ranks: tuple[int, int, int]
) -> None:
    case = Case(ranks=ranks, grid=grid, rollout=3)
    count = ranks[0] * ranks[1]
    (native, *_), (compact, *_) = (run(train, [{"case": case, "path": paths[order]}] * count) for order in paths)
    assert np.array_equal(native["dates"], compact["dates"])
    assert np.abs(native["losses"] / compact["losses"] - 1.0).max() < 1e-10
    for name, weights in native["weights"].items():
        assert np.array_equal(native["start"][name], compact["start"][name]), name
        assert np.abs(weights - compact["weights"][name]).max() < 1e-10 * np.abs(weights).max(), name


def test_a_forecast_in_compact_order_comes_back_in_native_order(
    run: Callable[..., list[Any]],
    paths: dict[str, str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    checkpoint = trained(tmp_path_factory, paths["compact"], "--trainer.precision=64-true")
    fields = {}
    for order, path in paths.items():
        folder = tmp_path / order
        folder.mkdir()
        more = {"ranks": RANKS, "checkpoint": checkpoint, "path": path, "lead_time": "24h", "folder": folder}
        run(write_forecast, [more] * RANKS)
        (written,) = folder.glob("*.zarr")
        fields[order] = open_dataset(in_order(written, tmp_path / f"{order}.zarr", "native"))
    native, compact = fields["native"], fields["compact"]
    assert compact.shape == native.shape
    assert len(compact) == 4
    assert np.array_equal(compact.latitudes, native.latitudes)
    assert np.array_equal(compact.longitudes, native.longitudes)
    assert compact.resolution == native.resolution
    lacking = np.isnan(native[:])
    assert lacking[:, native.name_to_index[MASKED]].any()
    assert np.array_equal(np.isnan(compact[:]), lacking)
    scale = np.nanstd(native[:], axis=(0, 2, 3), keepdims=True)
    assert np.nanmax(np.abs(compact[:] - native[:]) / scale) < 1e-6, "fields are written in single precision"
