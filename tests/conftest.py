"""Which tests are slow: those that start other processes. `make test-quick` leaves them out."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
STARTERS = {"process", "begin", "cluster", "pool", "checkpoint"}  # fixtures that start processes, or wait for some
SLOW = (  # that start some themselves, or take half a minute in one
    *("test_bench_peers.py", "test_examples.py", "test_package.py", "test_perf.py", "test_readme.py", "test_slurm.py"),
    *("shardio/check/test_verify.py", "shardio/load/test_ranks.py", "shardio/load/test_remote.py"),
    *("shardio/rechunk/test_again.py", "shardio/rechunk/test_plan.py", "shardio/write/test_written.py"),
    *("trainer/cli", "trainer/fit", "trainer/predict", "trainer/ranks", "trainer/plan"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(HERE).as_posix()
        if place.startswith(SLOW) or STARTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
