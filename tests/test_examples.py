"""The examples of the documentation run, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardio.rechunk import Request, prepare, run
from shardio.source.synthetic_source import SyntheticSource

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """o16 waves in 6 grid-chunks, 7 dates."""
    path = str(tmp_path_factory.mktemp("example") / "waves.zarr")
    run(prepare(Request("synthetic", path, 6, sync=False, opener=lambda: SyntheticSource("o16", 7))))
    return path


def test_the_first_lines_of_the_loading_guide_run_with_several_models(dataset: str, tmp_path: Path) -> None:
    guide = (EXAMPLES.parent / "loading.md").read_text()
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    for old, new in (
        ('"era5-16.zarr", start=2000, end=2019', repr(dataset)),
        ("num_gpus_per_model=4", "num_gpus_per_model=2"),
        ("init_process_group()", 'init_process_group("gloo")'),
    ):
        assert old in code
        code = code.replace(old, new)
    code += """
assert dist.get_process_group_ranks(model_group) == list(topology.model_ranks)
taken = [next(iter(loader)).starts, *([batch.starts for batch in loader])]
assert len(taken) == len(loader), "who leaves the loop early goes on after the last batch"
assert loader.state_dict()["epoch"] == 2, "one for is one epoch"
loader.close()
dist.destroy_process_group()
"""
    (tmp_path / "guide.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", str(tmp_path / "guide.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr


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
