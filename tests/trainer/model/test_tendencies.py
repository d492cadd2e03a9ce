"""How much variables change over a step: as the dataset says, or from pairs of dates of all hours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from ahead import chained
from datasets import MASKED, VARIABLES, write_dataset

from shardio import Dataset, open_dataset
from shardio.errors import SelectionError
from shardio.load.partition import partition
from trainer.comm import Alone
from trainer.model import tendencies
from trainer.model.tendencies import MOST_PAIRS, relative_tendencies, sampled_pairs

KINDS = ("mean", "stdev", "minimum", "maximum")
STORED = np.array([0.0, 3.0, 0.6, 0.1, 0.5, 50.0])  # of VARIABLES
DAYS = 31  # and one more pair: 125 pairs, of which every fourth makes 32
FIRST_PAIRS = 4 * DAYS + 1


def store(path: str, delta: str, stdev: np.ndarray = STORED) -> None:
    """Statistics of the change over `delta`, as anemoi-datasets adds them."""
    group = zarr.open_group(path, mode="r+")
    for kind in KINDS:
        array = group.create_array(f"statistics_tendencies_{delta}_{kind}", shape=stdev.shape, dtype="f8")
        array[...] = stdev if kind == "stdev" else -1.0
    zarr.consolidate_metadata(path)


def of_all(dataset: Dataset) -> np.ndarray:
    return relative_tendencies(dataset, slice(0, dataset.shape[3]), Alone())


def measured(dataset: Dataset, pairs: np.ndarray) -> np.ndarray:
    """By NumPy, from whole fields."""
    changes = np.stack([dataset[first + 1] - dataset[first] for first in pairs]).astype(np.float64)
    stdev = np.nanstd(np.moveaxis(changes, 1, 0).reshape(len(dataset.variables), -1), axis=1)
    return np.where(stdev > 0.0, stdev / dataset.statistics["stdev"], 1.0)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "small.zarr", "irregular")


@pytest.fixture(scope="module")
def daily_cycle(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """t_850 of 00 UTC is 100 times as far from the mean as that of other hours."""
    path = write_dataset(tmp_path_factory.mktemp("cycle") / "cycle.zarr", "irregular", dates=FIRST_PAIRS + 1)
    data = zarr.open_group(path, mode="r+")["data"]
    place = VARIABLES.index("t_850")
    data[::4, place] = 280.0 + 100.0 * (data[::4, place] - 280.0)
    return open_dataset(path)


@pytest.mark.parametrize(("delta", "frequency"), [("6h", None), ("21600s", None), ("1d", "24h"), ("24h", "1d")])
def test_what_the_dataset_says_of_this_step_is_taken_of_the_selected_variables(
    path: str, delta: str, frequency: str | None
) -> None:
    store(path, delta)
    dataset = open_dataset(path, frequency=frequency, select=["tp", "t_850", "lsm"])
    expected = STORED[[4, 1, 0]] / dataset.statistics["stdev"]
    expected[2] = 1.0  # constant
    assert np.array_equal(of_all(dataset), expected)


def test_what_the_dataset_says_of_another_step_is_not_taken(path: str) -> None:
    plain = of_all(open_dataset(path, frequency="12h"))
    store(path, "6h")
    assert np.array_equal(of_all(open_dataset(path, frequency="12h")), plain)


def test_statistics_that_are_not_known_of_some_variable_are_not_taken(path: str) -> None:
    """As where they were computed without leaving out NaN."""
    sampled = of_all(open_dataset(path))
    store(path, "6h", np.where(np.arange(STORED.size) == 1, np.nan, STORED))
    assert np.array_equal(of_all(open_dataset(path)), sampled)


def test_statistics_of_another_dataset_are_taken_with_their_tendencies(path: str, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other.zarr", "octahedral")
    store(other, "6h")
    dataset = open_dataset(path, statistics=other)
    assert of_all(dataset)[1] == 3.0 / open_dataset(other).statistics["stdev"][1]


def test_pairs_are_of_all_hours_of_the_day(daily_cycle: Dataset) -> None:
    pairs = sampled_pairs(daily_cycle)
    assert len(set(pairs.tolist())) == len(pairs) == MOST_PAIRS
    assert (np.bincount(pairs % 4, minlength=4) >= MOST_PAIRS // 8).all()


def test_a_daily_cycle_does_not_alias(daily_cycle: Dataset) -> None:
    truth = measured(daily_cycle, np.arange(FIRST_PAIRS))
    assert of_all(daily_cycle) == pytest.approx(truth, rel=0.3)
    at_midnight = measured(daily_cycle, np.arange(0, FIRST_PAIRS, 4))
    assert abs(at_midnight[1] / truth[1] - 1.0) > 0.3, "the cycle is too small to see"


def test_the_standard_deviation_is_that_of_the_pairs_without_nan(path: str) -> None:
    dataset = open_dataset(path)
    assert np.isnan(dataset[0, VARIABLES.index(MASKED)]).any()
    assert of_all(dataset) == pytest.approx(measured(dataset, sampled_pairs(dataset)), rel=1e-6)


def test_changes_are_summed_in_pieces_of_any_size(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(path)
    whole = of_all(dataset)
    for piece in (1, 7, dataset.shape[3] - 1):
        monkeypatch.setattr(tendencies, "PIECE", piece)
        np.testing.assert_allclose(of_all(dataset), whole, rtol=1e-12)


def test_pairs_are_one_step_apart_and_not_missing(path: str) -> None:
    group = zarr.open_group(path, mode="r+")
    dates = group["dates"][...]
    group.attrs["missing_dates"] = [str(dates[7])]
    group["dates"][20:] = dates[20:] + np.timedelta64(6, "h")
    assert set(range(44)) - set(sampled_pairs(open_dataset(path, start=None)).tolist()) >= {6, 7, 19}
    with pytest.raises(SelectionError, match="no two neighbouring dates have data"):
        sampled_pairs(open_dataset(path, start=dates[6], end=dates[7]))


# ---------------------------------------------------------------------------------------------------------- many ranks
def bytes_read() -> int:
    """By this process, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def on_a_rank(rank: int, comm: Any, ranks: int, path: str) -> tuple[np.ndarray, int]:
    """What the rank comes to, and the bytes that it read."""
    dataset = open_dataset(path)
    cells = partition(dataset.shape[3], ranks, dataset.chunk_cells).cells(rank)
    before = bytes_read()
    return relative_tendencies(dataset, cells, comm), bytes_read() - before


def test_all_ranks_have_the_same_bits_from_their_own_cells(
    run: Callable[..., list[Any]], dataset_of: Callable[[str], str]
) -> None:
    path = dataset_of("watched")
    ((alone, all_bytes),) = run(on_a_rank, [{"ranks": 1, "path": path}])
    for ranks in (2, 4):
        found = run(on_a_rank, [{"ranks": ranks, "path": path}] * ranks)
        assert all(np.array_equal(relative, found[0][0]) for relative, _ in found)
        assert found[0][0] == pytest.approx(alone, rel=1e-12)
        assert max(read for _, read in found) < 1.1 * all_bytes / ranks


def test_the_next_pair_is_read_while_one_is_compared(path: str) -> None:
    pairs = sampled_pairs(open_dataset(path))
    dataset, reader = chained(path, int(pairs[-1]) + 1)
    assert np.array_equal(of_all(dataset), of_all(open_dataset(path)))
    assert set(pairs) <= set(reader.rows)
