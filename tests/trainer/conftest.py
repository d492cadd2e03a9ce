"""One pool of ranks, and one copy of each dataset, for all tests of the trainer."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tools
sys.path.insert(0, str(Path(__file__).parent))  # as in the ranks
from datasets import write_dataset
from forecasting import trained
from ranks import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Four processes."""
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def run(pool: Pool) -> Callable[..., list[Any]]:
    """`run(function, [arguments of rank 0, of rank 1, ...])`: what it returns on each rank of a group of that size."""
    return pool.run


@pytest.fixture(scope="session")
def dataset_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], str]:
    """`dataset_of(grid, ensemble)`: path of a small dataset."""
    folder = tmp_path_factory.mktemp("datasets")

    @cache
    def dataset_of(grid: str, ensemble: int = 1) -> str:
        return write_dataset(folder / f"{grid}-{ensemble}.zarr", grid, ensemble)

    return dataset_of


@pytest.fixture(scope="session")
def path(dataset_of: Callable[..., str]) -> str:
    """Of a dataset of two members, that forecasts start from."""
    return dataset_of("octahedral", 2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, path: str) -> Path:
    """Of a model that was trained on it."""
    return trained(tmp_path_factory, path)
