"""A checkpoint of version 0.1.0, from before options, optimizer and file changed, still trains on and forecasts.

old/0.1.0.ckpt is the fourth step of `trainer fit` with the arguments below, as that version wrote it.
"""

import shutil
from pathlib import Path

import pytest
import torch
from runs import Run, checkpoint, fit, trace, waves

OLD = Path(__file__).parent / "old" / "0.1.0.ckpt"
TRAINING = [
    *(f"--data.dataset={waves()}", "--model.forcings=[lsm]", "--model.graph.hidden=o2", "--data.threads=1"),
    *("--model.network.channels=4", "--model.network.num_layers=1", "--model.network.num_heads=2"),
    *("--trainer.enable_progress_bar=false", "--save_every=1"),
]


def edited(folder: Path, part: str, name: str) -> Path:
    """The same from before an option was there."""
    found = torch.load(OLD, weights_only=True)
    del found["shardio"][part][name]
    torch.save(found, folder / "older.ckpt")
    return folder / "older.ckpt"


@pytest.mark.parametrize("lacks", [None, ("network", "shard_strategy"), ("graph", "cutoff")])
def test_it_trains_on_where_it_stopped(tmp_path: Path, lacks: tuple[str, str] | None) -> None:
    path = OLD if lacks is None else edited(tmp_path, *lacks)
    run = fit(tmp_path, *TRAINING, "--trainer.max_steps=6", f"--ckpt_path={path}")
    assert run.printed.startswith("trained to step 6 in ")
    assert list(trace(run.output)) == [5, 6]
    before, after = torch.load(OLD, weights_only=True), checkpoint(run.output)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    moments = {
        tuple(one["exp_avg"].shape): one["step"].item() for one in after["optimizer_states"][0]["state"].values()
    }
    assert set(moments.values()) == {6}
    assert len(after["optimizer_states"][0]["param_groups"]) == 2


@pytest.mark.parametrize("lacks", [None, ("network", "shard_strategy"), ("graph", "cutoff")])
def test_it_forecasts(tmp_path: Path, lacks: tuple[str, str] | None) -> None:
    shutil.copytree(waves(), tmp_path / "o8.zarr")
    path = OLD if lacks is None else edited(tmp_path, *lacks)
    run = Run(tmp_path, "predict", f"--ckpt_path={path}", "--dataset=o8.zarr", "--start=2020-01-02", "--lead-time=24h")
    assert run.wait() == [0], run.errors
    assert "wrote forecasts/2020-01-02T0000.zarr: 4 lead times" in run.printed


def test_it_is_small() -> None:
    assert OLD.stat().st_size < 200_000
