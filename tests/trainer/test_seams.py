"""What a user adds as one file and one line of a table is trained, planned and counted; nothing else is touched."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tools.check_plan import compare, measure, predict
from tools.trainer_step import Sizes, Step
from trainer.comm import Comm
from trainer.fit.gradients import reduce_gradients
from trainer.model.kernel import KERNELS
from trainer.model.kernels.gather import GatherKernel
from trainer.model.kernels.kernel import Rows
from trainer.model.loss import LOSSES, LossOptions
from trainer.model.loss import Kind as LossKind
from trainer.model.losses.measured import Measured, Weighing, with_global_value
from trainer.model.processor import PROCESSORS
from trainer.model.processor import Kind as ProcessorKind
from trainer.step import forecast_loss

SIZES = Sizes("o8", "ico1", channels=16, layers=2, heads=4, variables=5, forcings=1, grid_chunks=7, checkpointing=False)


# --------------------------------------------------------------------------------------------------------------- a loss
@dataclass(frozen=True, eq=False)
class MeanLoss:
    """The square of the mean error of the globe, which no cell knows alone; with a table that the plan has to find."""

    weighing: Weighing
    table: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "MeanLoss":
        return self

    def __call__(self, prediction: Tensor, target: Tensor) -> Measured:
        areas = self.weighing.areas[:, None]
        own = (torch.where(torch.isfinite(target), prediction - target, 0.0) * areas).sum(dim=2)
        mean = self.weighing.comm.sum(own.detach().clone(), "mean error") * self.table[0]
        value = (mean.square() * self.weighing.weights).sum(dim=-1).mean()
        local = (2.0 * mean * own * self.table[0] * self.weighing.weights).sum(dim=-1).mean()
        return Measured(with_global_value(local, value), mean.square())


def mean_loss(weighing: Weighing, options: LossOptions) -> MeanLoss:
    return MeanLoss(weighing, weighing.areas.new_full((1000,), options.huber_delta))


# ---------------------------------------------------------------------------------------------------------- a processor
@dataclass(frozen=True, eq=False)
class Ring:
    """Attributes: the model group; the first node of every rank."""

    comm: Comm
    bounds: tuple[int, ...]


class _Shift(torch.autograd.Function):
    """Forward: the last row of the rank before, to go first. Backward: its gradient, back to it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        return _send(rows[:, -1].contiguous(), ring, 1, "processor forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ring = ctx.ring
        own = ring.bounds[ring.comm.rank + 1] - ring.bounds[ring.comm.rank]
        back = _send(gradient.contiguous(), ring, -1, "processor backward")
        return torch.cat([back.new_zeros(len(back), own - 1, back.shape[-1]), back[:, None]], dim=1), None


def _send(row: Tensor, ring: Ring, way: int, tag: str) -> Tensor:
    """[batch, channels] to the next rank, or the one before, of a ring."""
    rank, ranks = ring.comm.rank, ring.comm.ranks
    counts = [[len(row) * (other == (rank + step) % ranks) for other in range(ranks)] for step in (way, -way)]
    return ring.comm.all_to_all(row, *counts, tag)


class RingProcessor(nn.ModuleList):
    """Each hidden node takes from the one before it, in the order of the mesh; the first from the last."""

    def __init__(self, layers: Any) -> None:
        super().__init__(nn.Linear(16, 16) for _ in range(layers.count))

    def forward(self, hidden: Tensor, ring: Ring) -> Tensor:
        for layer in self:
            before = torch.cat([_Shift.apply(hidden, ring)[:, None], hidden[:, :-1]], dim=1)
            hidden = hidden + torch.tanh(layer(before))
        return hidden


RING = ProcessorKind(
    lambda graph, comm, placement: Ring(comm, graph.hidden_bounds),
    RingProcessor,
    lambda counts, pretence: Ring(pretence.comm, counts.hidden_bounds),
)


# ------------------------------------------------------------------------------------------------------------- a kernel
class ShyKernel(GatherKernel):
    """Attends most where others attend least."""

    def forward(self, rows: Rows, *more: Any) -> Any:
        return super().forward(_turned(rows), *more)

    def backward(self, rows: Rows, *more: Any) -> Rows:
        return _turned(super().backward(_turned(rows), *more))


def _turned(rows: Rows) -> Rows:
    return rows._replace(query=-rows.query, tilt=-rows.tilt)


# -------------------------------------------------------------------------------------------- what a rank can be told
def add_toys() -> None:
    LOSSES["toy"] = LossKind(mean_loss)
    PROCESSORS["toy"] = RING
    KERNELS["toy"] = ShyKernel()


def measured(rank: int, comm: Any, sizes: Sizes) -> dict[str, Any]:
    """Bytes held and sent in a step."""
    add_toys()
    return measure(comm, sizes, "32-true")


def gradients(rank: int, comm: Any, sizes: Sizes) -> list[np.ndarray]:
    """The loss, then the gradients of all weights, of the same fields whatever the ranks."""
    add_toys()
    step = Step(comm, replace(sizes, dtype="float64"))
    batch, dates, members, _, variables = step.shape
    shape = (batch, dates, members, step.cells.bounds[-1], variables)
    fields = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = forecast_loss(step.forecaster, step.loss, fields[:, :, :, step.cells.cells(comm.rank)], 1).value
    loss.backward()
    reduce_gradients(step.forecaster.parameters(), 1, comm)
    return [loss.detach().numpy(), *(weight.grad.numpy() for weight in step.forecaster.parameters())]


# ---------------------------------------------------------------------------------------------------------- the tests
@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    add_toys()
    yield
    del LOSSES["toy"], PROCESSORS["toy"], KERNELS["toy"]


@pytest.mark.parametrize("knob", [{"loss": "toy"}, {"shard_strategy": "toy"}, {"kernel": "toy"}], ids=str)
def test_a_new_part_is_planned_to_the_byte(run: Callable[..., list[Any]], knob: dict[str, str]) -> None:
    sizes = replace(SIZES, **knob)
    row = compare(predict(sizes, "32-true", 3), run(measured, [{"sizes": sizes}] * 3))
    assert row["sent_equal"]
    assert row["predicted"] == row["measured"]


@pytest.mark.parametrize("knob", [{"loss": "toy"}, {"shard_strategy": "toy"}, {"kernel": "toy"}], ids=str)
def test_a_new_part_trains_alike_on_any_number_of_ranks(run: Callable[..., list[Any]], knob: dict[str, str]) -> None:
    sizes = replace(SIZES, **knob)
    (alone,) = run(gradients, [{"sizes": sizes}])
    plain = run(gradients, [{"sizes": SIZES}])[0]
    assert not np.isclose(alone[0], plain[0]), "the toy was not used"
    for found in run(gradients, [{"sizes": sizes}] * 3):
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
