"""What the parity tests vary, and a rank's training with it: from the loader to the weights, as `trainer fit` does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import DIAGNOSTICS, FORCINGS, MASKED, grid_of
from ranks import comm_of

from shardio import ShardedDataLoader, Topology, open_dataset
from shardio.load.partition import partition
from trainer.comm import Comm
from trainer.fit.gradients import broadcast_parameters, reduce_gradients
from trainer.fit.optimizer import OptimizerOptions, build_optimizer
from trainer.model.assembly import assemble_areas, assemble_forecaster, assemble_graph, assemble_loss
from trainer.model.forecaster import Roles
from trainer.model.loss import LossOptions
from trainer.model.losses.measured import Measured
from trainer.model.model import ModelOptions
from trainer.share import Share
from trainer.step import forecast_loss

STEPS = 5
INPUT_STEPS = 2
LAYERS = 2
LOSSES = {
    "mse": LossOptions("mse", tendency_scaling=True),
    "mae": LossOptions("mae", pressure_scaling=True),
    "huber": LossOptions("huber", huber_delta=0.5, variable_weights={"t_850": 3.0, "tp": 0.1}),
}
KNOBS: dict[str, tuple[Any, ...]] = {
    # M, D, R: every M and D of the contract, every R that divides M
    "ranks": (
        *((1, 1, 1), (2, 1, 1), (2, 1, 2), (3, 1, 1), (3, 1, 3), (4, 1, 1), (4, 1, 2), (4, 1, 4)),
        *((1, 2, 1), (2, 2, 1), (2, 2, 2)),
    ),
    "grid": ("octahedral", "regular", "limited-area", "irregular"),
    "loss": ("mse", "mae", "huber"),
    "keep_batch_sharded": (True, False),
    "shard_strategy": ("edges", "heads"),
    "num_chunks": (1, 4),
    "checkpointing": (False, True),
    "batch": (1, 3),
    "ensemble": (1, 2),
    "rollout": (1, 3),
    "precision": ("float64", "float32"),
    "masked": (True, False),
    "channels": (8, 16),  # fewer and more than inputs: the encoder pulls embedded rows, and raw ones
}


@dataclass(frozen=True)
class Case:
    """One value of each knob."""

    ranks: tuple[int, int, int] = (1, 1, 1)
    grid: str = "octahedral"
    loss: str = "mse"
    keep_batch_sharded: bool = True
    shard_strategy: str = "edges"
    num_chunks: int = 1
    checkpointing: bool = False
    batch: int = 1
    ensemble: int = 1
    rollout: int = 1
    precision: str = "float64"
    masked: bool = True
    channels: int = 16

    def __str__(self) -> str:
        model, data, read = self.ranks
        flags = {"whole": not self.keep_batch_sharded, "ckpt": self.checkpointing, "nan": self.masked}
        words = [f"M{model}D{data}R{read}", self.grid, self.loss, self.shard_strategy, self.precision]
        words += [f"{name[:3]}{getattr(self, name)}" for name in ("num_chunks", "batch", "ensemble", "rollout")]
        return "-".join([*words, f"ch{self.channels}", *(name for name, set_ in flags.items() if set_)])

    @property
    def pairs(self) -> set[tuple[Any, ...]]:
        """Of the values of any two knobs."""
        return set(combinations([(name, getattr(self, name)) for name in KNOBS], 2))

    @property
    def optimizer(self) -> OptimizerOptions:
        """Adam turns rounding into signs where gradients are small: in float32 descent without it."""
        if self.precision == "float64":
            return OptimizerOptions("adamw", learning_rate=1e-2, warmup_steps=2)
        return OptimizerOptions("sgd", learning_rate=0.1 if self.loss == "mse" else 0.5, momentum=0.9)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and fields."""
        return torch.float32 if self.precision == "bf16-mixed" else getattr(torch, self.precision)

    def autocast(self) -> Any:
        """In which the model is called."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()

    @property
    def on_one_rank(self) -> Case:
        """The same samples, on one rank, without anything that saves memory."""
        plain = {"keep_batch_sharded": True, "shard_strategy": "edges", "num_chunks": 1, "checkpointing": False}
        return replace(self, ranks=(1, 1, 1), batch=self.batch * self.ranks[1], **plain)


def all_pairs() -> list[Case]:
    """Few cases, in which every value of every knob meets every value of every other."""
    assert list(KNOBS) == [field.name for field in fields(Case)]
    random, cases = Random(0), []
    missing = {pair for names in combinations(KNOBS, 2) for pair in _product(*names)}
    while missing:
        first = min(missing, key=repr)
        tries = [{name: random.choice(values) for name, values in KNOBS.items()} | dict(first) for _ in range(200)]
        case = max((Case(**one) for one in tries), key=lambda case: len(case.pairs & missing))
        missing -= case.pairs
        cases.append(case)
    return cases


def _product(a: str, b: str) -> list[tuple[Any, ...]]:
    return [((a, x), (b, y)) for x in KNOBS[a] for y in KNOBS[b]]


def train(rank: int, _: Any, case: Case, path: str) -> dict[str, Any]:
    """Outputs and gradients of the first step, the losses of all, and the weights after the last."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        return _train(rank, case, path)
    finally:
        torch.set_default_dtype(before)


class Setup:
    """Loader, model and loss of one rank, in the type that is torch's default."""

    def __init__(self, rank: int, case: Case, path: str, through: Callable[[Comm], Comm] = lambda comm: comm) -> None:
        model, data, read = case.ranks
        self.topology = Topology(model * data, rank, model, read)
        self.world = through(comm_of(range(model * data)))
        dataset = open_dataset(path, drop=None if case.masked else [MASKED])
        cells = partition(dataset.shape[3], model, dataset.chunk_cells)
        self.share = Share(cells, through(comm_of(self.topology.model_ranks)))
        options = ModelOptions(case.channels, LAYERS, 4, 2, case.num_chunks, case.checkpointing, case.shard_strategy)
        graph = assemble_graph(dataset, self.share, grid_of(case.grid).graph, options)
        torch.manual_seed(rank)  # ranks draw different weights: only the broadcast makes them equal
        roles = Roles(dataset.variables, FORCINGS, DIAGNOSTICS, (MASKED,) if case.masked else ())
        self.forecaster = assemble_forecaster(dataset, self.share, roles, INPUT_STEPS, options, graph)
        with torch.no_grad():
            for parameter in self.forecaster.parameters():  # biases of 0 and scales of 1 would hide what they do
                parameter += 0.1 * torch.randn_like(parameter)
        broadcast_parameters((parameter.data for parameter in self.forecaster.parameters()), self.world)
        areas = assemble_areas(dataset, self.share)
        self.loss = assemble_loss(dataset, self.forecaster, areas, LOSSES[case.loss], self.share)
        self.loader = ShardedDataLoader(
            dataset,
            self.topology,
            batch_size=case.batch,
            input_steps=INPUT_STEPS,
            target_steps=case.rollout,
            seed=3,
            drop_last=True,
            keep_batch_sharded=case.keep_batch_sharded,
            group=self.share.comm.group,
            threads=1,
        )
        self.case = case
        self.outputs: list[torch.Tensor] = []

    def fields(self, batch: Any) -> torch.Tensor:
        """Of the rank's own cells, as ForecastDataModule hands them out."""
        fields = batch.fields
        assert fields.shape[3] == (self.share.owned.stop - self.share.owned.start) or not self.case.keep_batch_sharded
        return fields if self.case.keep_batch_sharded else fields[..., self.share.owned, :]

    def step(self, fields: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Loss, its sums and the outputs of each lead time; gradients are reduced."""
        self.outputs = []
        with self.case.autocast():
            loss = forecast_loss(self.forecaster, self._measure, fields, self.case.rollout)
        loss.value.backward()
        self.reduce()
        return loss.value.detach(), [one.sums for one in loss.leads], self.outputs

    def _measure(self, prediction: torch.Tensor, target: torch.Tensor) -> Measured:
        self.outputs.append(prediction.detach())
        return self.loss(prediction, target)

    def reduce(self) -> None:
        """Gradients of the whole."""
        reduce_gradients(self.forecaster.parameters(), self.topology.data_size, self.world)


def _train(rank: int, case: Case, path: str) -> dict[str, Any]:
    setup = Setup(rank, case, path)
    parameters = dict(setup.forecaster.named_parameters())
    start = _arrays(parameters)
    built = build_optimizer(parameters.values(), case.optimizer, case.batch * case.ranks[1], STEPS)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    losses, first = [], {}
    for _, batch in zip(range(STEPS), setup.loader, strict=False):
        optimizer.zero_grad()
        loss, sums, outputs = setup.step(setup.fields(batch))
        losses.append(loss / case.ranks[1])
        if not first:
            first = {
                "dates": batch.dates,
                "outputs": torch.stack(outputs).numpy(),
                "sums": torch.stack(sums).numpy(),
                "gradients": {name: parameter.grad.numpy().copy() for name, parameter in parameters.items()},
            }
        optimizer.step()
        schedule.step()
    setup.loader.close()
    trace = torch.stack(losses)
    if case.ranks[1] > 1:  # the mean over data groups: every rank of a model group has the same value
        trace = setup.world.sum(trace, "losses") / case.ranks[0]
    return {**first, "losses": trace.numpy(), "start": start, "weights": _arrays(parameters)}


def _arrays(parameters: dict[str, torch.nn.Parameter]) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
