"""What the ranks of test_perf do: count as `make perf` does, then once more with something made worse."""

from __future__ import annotations

from typing import Any

from tools.perf.grids import Site
from tools.perf.matrix import Found, measure_rank
from trainer.graph import halo


def count_twice(rank: int, group: Any, site: Site) -> tuple[Found, Found]:
    """Loading and training as they are; and training with every halo exchanged twice."""
    as_it_is = measure_rank(rank, group, site, 0, ("load", "train"))
    exchange = halo._all_to_all

    def twice(*words: Any) -> None:
        exchange(*words)
        exchange(*words)

    halo._all_to_all = twice
    try:
        return as_it_is, measure_rank(rank, group, site, 0, ("train",))
    finally:
        halo._all_to_all = exchange
