"""What the ranks of test_perf do: count as `make perf` does, then once more with something made worse."""

from __future__ import annotations

from typing import Any

from tools.perf.grids import Site
from tools.perf.matrix import Found, measure_rank
from trainer.comm import Comm, Counting


def count_twice(comm: Comm, site: Site) -> tuple[Found, Found]:
    """Loading and training as they are; and training with every halo exchanged twice."""
    return measure_rank(comm, site, 0, ("load", "train")), measure_rank(Twice(comm), site, 0, ("train",))


class Twice(Counting):
    """Exchanges all rows twice."""

    def all_to_all(self, *words: Any) -> Any:
        super().all_to_all(*words)
        return super().all_to_all(*words)
