"""`trainer fit` itself gives the same weights on 1, 2 and 2 x 2 ranks, and those of a loop written by hand."""

import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DIAGNOSTICS, FORCINGS, MASKED, grid_of

from shardio import ShardedDataLoader, open_dataset
from shardio.load.partition import partition
from trainer.fit.optimizer import OptimizerOptions, build_optimizer
from trainer.model.assembly import assemble_areas, assemble_forecaster, assemble_graph, assemble_loss
from trainer.model.forecaster import Roles
from trainer.model.loss import LossOptions
from trainer.model.model import ModelOptions
from trainer.share import Share

STEPS, ACCUMULATED, CLIP, ROLLOUT, INPUTS, SEED = 3, 2, 2.0, 2, 2, 7
TOLERANCE = 1e-10
RUNS = {  # ranks, M, samples of a batch, more
    "1 rank": (1, 1, 2, ["--data.keep_batch_sharded=true"]),
    "2 ranks": (2, 2, 2, ["--data.keep_batch_sharded=false", "--model.network.num_chunks=3"]),
    "2 x 2 ranks": (4, 2, 1, ["--strategy.read_group_size=1", "--model.network.checkpointing=true"]),
}
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, dataset_of: Callable[[str], str]) -> dict[str, Weights]:
    """Weights in the checkpoint of every run; they run at the same time."""
    folder, path = tmp_path_factory.mktemp("fits"), dataset_of("octahedral")
    command = str(Path(sysconfig.get_path("scripts")) / "trainer")
    processes = {}
    for name, (ranks, model, batch, more) in RUNS.items():
        words = [command, "fit", *_words(path), *more, f"--output={folder / name}", f"--trainer.devices={ranks}"]
        words += [f"--strategy.num_gpus_per_model={model}", f"--data.batch_size={batch}"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes[name] = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    for name, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{name}: {output}"
    return {name: _weights(folder / name / "checkpoints" / "last.ckpt") for name in RUNS}


def _words(path: str) -> list[str]:
    graph = grid_of("octahedral").graph
    return [
        *("--seed_everything=5", f"--data.dataset={path}", f"--data.input_steps={INPUTS}", f"--data.seed={SEED}"),
        *(f"--model.forcings=[{','.join(FORCINGS)}]", f"--model.diagnostics=[{','.join(DIAGNOSTICS)}]"),
        *(f"--model.allow_nan=[{MASKED}]", f"--model.graph.hidden={graph.hidden}", "--model.network.channels=8"),
        *("--model.network.num_layers=2", "--model.network.num_heads=2", "--model.network.checkpointing=false"),
        *(f"--model.graph.neighbours={graph.neighbours}", "--model.loss.tendency_scaling=true"),
        *(f"--model.rollout.start={ROLLOUT}", f"--model.rollout.maximum={ROLLOUT}"),
        *("--model.optimizer.name=sgd", "--model.optimizer.learning_rate=0.3", "--model.optimizer.warmup_steps=1"),
        *(f"--trainer.max_steps={STEPS}", f"--trainer.accumulate_grad_batches={ACCUMULATED}"),
        *(f"--trainer.gradient_clip_val={CLIP}", "--trainer.precision=64-true"),
        *("--trainer.enable_progress_bar=false", "--data.threads=1", f"--save_every={STEPS}"),
    ]


def _weights(checkpoint: Path) -> Weights:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("forecaster."): tensor.numpy() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def by_hand(dataset_of: Callable[[str], str]) -> tuple[Weights, list[float]]:
    """Weights after a plain loop over the same samples, and the norms of the gradients before they were clipped."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _loop(dataset_of("octahedral"))
    finally:
        torch.set_default_dtype(before)


def _loop(path: str) -> tuple[Weights, list[float]]:
    dataset = open_dataset(path)
    share = Share(partition(dataset.shape[3], 1, dataset.chunk_cells))
    options = ModelOptions(8, 2, 2, checkpointing=False)
    graph = assemble_graph(dataset, share, grid_of("octahedral").graph, options)
    torch.manual_seed(5)
    roles = Roles(dataset.variables, FORCINGS, DIAGNOSTICS, (MASKED,))
    model = assemble_forecaster(dataset, share, roles, INPUTS, options, graph)
    loss = assemble_loss(dataset, model, assemble_areas(dataset, share), LossOptions(tendency_scaling=True), share)
    built = build_optimizer(model.parameters(), OptimizerOptions("sgd", learning_rate=0.3, warmup_steps=1), 4, STEPS)
    loader = ShardedDataLoader(
        dataset, batch_size=2, input_steps=INPUTS, target_steps=ROLLOUT, seed=SEED, drop_last=True, threads=1
    )
    norms = []
    for number, batch in zip(range(STEPS * ACCUMULATED), loader, strict=False):
        pairs = model.rollout(model.normalise(batch.fields), ROLLOUT)
        (torch.stack([loss(*pair).value for pair in pairs]).mean() / ACCUMULATED).backward()
        if number % ACCUMULATED:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            built["optimizer"].step()
            built["lr_scheduler"]["scheduler"].step()
            model.zero_grad()
    loader.close()
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}, norms


@pytest.mark.parametrize("name", RUNS)
def test_fit_gives_the_weights_of_a_loop_written_by_hand_on_any_ranks(
    fitted: dict[str, Weights], by_hand: tuple[Weights, list[float]], name: str
) -> None:
    expected, _ = by_hand
    assert list(fitted[name]) == list(expected)
    for key, weight in fitted[name].items():
        assert weight.dtype == np.float64
        assert np.abs(weight - expected[key]).max() <= TOLERANCE * np.abs(expected[key]).max(), key


def test_some_gradients_were_clipped_and_some_were_not(by_hand: tuple[Weights, list[float]]) -> None:
    _, norms = by_hand
    assert len(norms) == STEPS
    assert min(norms) < 0.9 * CLIP  # clipping, or Adam, would hide a factor that is common to all gradients
    assert max(norms) > 1.1 * CLIP
