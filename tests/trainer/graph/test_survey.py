"""Ranks look at their own part of the cells, and together they know what one would that looks at them all."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from shardio.errors import DatasetError
from shardio.load.partition import Partition, balanced, partition
from shardio.source.synthetic import octahedral
from trainer.graph import graph as graph_module
from trainer.graph import graph_cache, survey
from trainer.graph.graph import Graph, GraphOptions, build_graph

BLOCK = 500  # cells: some blocks for each rank
OPTIONS = GraphOptions("o16", cutoff=1.1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (survey, graph_module):
        monkeypatch.setattr(module, "BLOCK_CELLS", BLOCK)


class Stored:
    """Coordinates that are read range by range, and remember how much of them was."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.size, self.read = values, values.size, 0

    def __getitem__(self, cells: slice) -> np.ndarray:
        found = self.values[cells]
        self.read += found.size
        return found


def on_ranks(ranks: int, do: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """do(rank, gather) on threads that gather from one another."""
    said, together = [None] * ranks, Barrier(ranks, timeout=20)

    def run(rank: int) -> Any:
        def gather(thing: Any) -> list[Any]:
            said[rank] = thing
            together.wait()
            found = list(said)
            together.wait()
            return found

        return do(rank, gather)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def cells_of(order: str) -> tuple[np.ndarray, np.ndarray]:
    latitudes, longitudes, _ = octahedral("o48")
    if order == "native":
        return latitudes, longitudes
    shuffled = np.random.default_rng(0).permutation(latitudes.size)
    return latitudes[shuffled], longitudes[shuffled]


def same(one: Graph, other: Graph) -> bool:
    mine, yours = (graph_module._as_arrays(graph) for graph in (one, other))
    return all(np.array_equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize("ranks", [2, 3, 25])  # of 25 some have no block
@pytest.mark.parametrize("order", ["native", "shuffled"])
def test_a_shared_survey_builds_the_same_graph_bit_for_bit(order: str, ranks: int) -> None:
    grid = cells_of(order)
    cells = partition(grid[0].size, ranks, 1)
    shared = on_ranks(ranks, lambda rank, gather: build_graph(*grid, cells, rank, OPTIONS, gather=gather))
    for rank in range(ranks):
        assert same(shared[rank], build_graph(*grid, cells, rank, OPTIONS))


def test_a_rank_reads_its_own_cells_and_those_near_its_border() -> None:
    ranks, cells = 4, partition(10944, 4, 1)

    def read(rank: int, gather: Any) -> int:
        latitudes, longitudes = (Stored(values) for values in cells_of("native"))
        build_graph(latitudes, longitudes, cells, rank, OPTIONS, gather=gather)  # type: ignore[arg-type]
        assert latitudes.read == longitudes.read
        return latitudes.read

    own = 10944 // ranks
    # once for the survey, the encoder, the decoder and the list of its own; a border is a few blocks
    assert max(on_ranks(ranks, read)) <= 4 * own + 8 * BLOCK
    alone = Stored(cells_of("native")[0])
    build_graph(alone, Stored(cells_of("native")[1]), cells, 0, OPTIONS)  # type: ignore[arg-type]
    assert alone.read > 10944 + 2 * own


def test_what_is_no_coordinate_is_told_on_all_ranks() -> None:
    latitudes, longitudes = cells_of("native")
    latitudes = latitudes.copy()
    latitudes[7000] = np.nan

    def build(rank: int, gather: Any) -> str:
        with pytest.raises(DatasetError) as error:
            build_graph(latitudes, longitudes, partition(10944, 3, 1), rank, OPTIONS, gather=gather)
        return str(error.value)

    for message in on_ranks(3, build):
        assert "the first is cell 7000: latitude nan" in message


def test_a_graph_that_only_some_ranks_have_in_the_cache_is_built_by_all(tmp_path: Path) -> None:
    grid, cells = cells_of("native"), Partition(balanced(10944, 3), 10944, False)

    def build(rank: int, gather: Any) -> Graph:
        return build_graph(*grid, cells, rank, OPTIONS, tmp_path, gather)

    first = on_ranks(3, build)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    assert all(same(*pair) for pair in zip(on_ranks(3, build), first, strict=True))
    assert sorted(tmp_path.iterdir()) == kept
    assert graph_cache.load(kept[1], ["hidden_bounds"]) is not None
