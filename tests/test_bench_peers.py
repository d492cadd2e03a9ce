"""One command makes every side-by-side number of the README, as its tables."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tools
from tools.bench_peers import ABSENT, BENCHES, loader_table, rechunk_table, trainer_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMES = ("limit", "loader", "loader, one tensor", "tensorstore ring", "DataLoader, 2 workers")


def test_benches_that_the_readme_quotes_are_run() -> None:
    quoted = re.findall(r"^\|.*`python -m (tools\.bench_\w+)", README, re.MULTILINE)
    ours = [bench.command(quick)[2] for bench in BENCHES.values() for quick in (False, True)]
    assert quoted
    assert set(quoted) <= set(ours)


@pytest.mark.parametrize("name", BENCHES)
def test_commands_are_those_that_a_user_can_run(name: str) -> None:
    for quick in (False, True):
        python, dash_m, module, *_ = BENCHES[name].command(quick)
        assert (python, dash_m) == ("python", "-m")
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_loader_table_has_a_row_for_a_peer_that_did_not_run() -> None:
    found = {"ranks": 4, "grid_chunks": 16, "ms_per_date": dict.fromkeys(NAMES, 6.04)}
    lines = loader_table(found, "python -m tools.bench_loader")
    assert lines[2].endswith("| 6.0 | `python -m tools.bench_loader` |")
    assert f"| anemoi-datasets, one chunk per date | {ABSENT} | |" in lines
    assert {line.count("|") for line in lines} == {4}


def test_rechunk_table_shows_both_formats_in_one_row() -> None:
    found = {"seconds": 6.9, "cpu_seconds": 7.1, "peak_mb": 467.3}
    medians = dict.fromkeys(("limit", "shardio-v2", "shardio-v3"), found)
    lines = rechunk_table({"shape": [24, 7, 1, 40], "chunks": 16, "medians": medians}, "command")
    assert "| `shardio rechunk`, Zarr v2 / v3 | 6.90 / 6.90 | 7.10 / 7.10 | 467 / 467 | |" in lines
    assert {line.count("|") for line in lines} == {6}


def test_trainer_table_has_both_worlds_side_by_side() -> None:
    row = {"step": 0.61, "peak_mb": 1500.2, "sent_mb": 6.0}
    lines = trainer_table({"rows": {"1 rank": {"shardio": row}, "2 ranks": {"shardio": row}}}, "command")
    assert lines[2] == "| shardio | 0.61 | 1500 | 0.61 | 1500 | 6.0 | `command` |"
