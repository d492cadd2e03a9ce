"""The examples of the documentation run, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardio.rechunk import Request, prepare, run
from shardio.synthetic_source import SyntheticSource

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """o16 waves in 6 grid-chunks, 7 dates."""
    path = str(tmp_path_factory.mktemp("example") / "waves.zarr")
    run(prepare(Request("synthetic", path, 6, sync=False, opener=lambda: SyntheticSource("o16", 7))))
    return path


def losses(example: str, dataset: str, ranks: int) -> list[float]:
    """What the example prints on so many ranks."""
    script = str(EXAMPLES / example)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", script, dataset]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]


@pytest.mark.parametrize("example", ["train_plain_torch.py", "own_model.py"])
def test_example_learns_the_same_on_one_two_and_four_ranks(dataset: str, example: str) -> None:
    alone = losses(example, dataset, 1)
    assert len(alone) == 6
    assert alone[-1] < alone[0]
    # Two ranks divide the 6 grid-chunks evenly; four share chunks and exchange cells.
    for ranks in (2, 4):
        assert losses(example, dataset, ranks) == pytest.approx(alone, rel=1e-5)
