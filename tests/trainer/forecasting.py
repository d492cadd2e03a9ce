"""A tiny trained model with every kind of variable, and forecasts of it in ranks of the pool."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from runs import fit

from shardio import open_dataset
from trainer.predict.forecast import forecast_partition, load
from trainer.predict.predict import plan, write
from trainer.share import Share

# Steps enough that errors do not grow: an untrained model amplifies the rounding in which ranks differ.
TRAINING = (
    *("--model.forcings=[lsm,sun]", "--model.diagnostics=[tp]", "--model.allow_nan=[sst]"),
    *("--model.graph.hidden=ico1", "--model.network.channels=8", "--model.network.num_layers=1"),
    *("--model.network.num_heads=2", "--data.input_steps=2", "--data.threads=1"),
    *("--model.optimizer.learning_rate=1e-2", "--model.optimizer.warmup_steps=1", "--trainer.max_epochs=1"),
    *("--trainer.limit_train_batches=20", "--trainer.enable_progress_bar=false"),
)
START = "2021-03-02T00:00"


@cache
def _trained(folder: Path, dataset: str, *more: str) -> Path:
    return (
        fit(Path(mkdtemp(dir=folder)), f"--data.dataset={dataset}", *TRAINING, *more).output
        / "checkpoints"
        / "last.ckpt"
    )


def trained(factory: pytest.TempPathFactory, dataset: str, *more: str) -> Path:
    """The checkpoint of 20 steps of `trainer fit`, trained once for all tests."""
    return _trained(factory.getbasetemp(), dataset, *more)


def share_of(comm: Any, ranks: int, dataset: Any) -> Share:
    return Share(forecast_partition(dataset, ranks), comm)


def forecast(rank: int, comm: Any, ranks: int, checkpoint: Path, path: str, lead_time: str) -> np.ndarray:
    """In a rank: [lead times, ensemble, cells/M, variables]."""
    dataset = open_dataset(path)
    model = load(checkpoint, dataset, share_of(comm, ranks, dataset))
    return np.stack([lead.fields.numpy() for lead in model.run(START, lead_time)])


def write_forecast(
    rank: int, comm: Any, ranks: int, checkpoint: Path, path: str, lead_time: str, folder: Path, **more: Any
) -> Any:
    """In a rank: what `trainer predict` does for one date."""
    dataset = open_dataset(path)
    model = load(checkpoint, dataset, share_of(comm, ranks, dataset))
    task = plan(model.trained, dataset, model.share.cells, np.datetime64(START, "s"), folder, lead_time, **more)
    return write(model, task)


def read_all(path: Path) -> np.ndarray:
    return open_dataset(path)[:]


def relative(a: np.ndarray, b: np.ndarray, axes: tuple[int, ...]) -> float:
    """Largest difference over the largest value, of each variable; infinite unless both lack the same values."""
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return np.inf
    return float((np.nanmax(np.abs(a - b), axis=axes) / np.nanmax(np.abs(b), axis=axes)).max())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of float32, NaN too."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
