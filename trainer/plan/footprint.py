"""Bytes that one rank holds and sends in a training step: the step itself, taken on tensors that have no numbers.

There is no second model of the memory that could drift from the first: forward, loss, backward, the sum of the
gradients and the optimizer run as in training (fake_graph.py), and live_bytes.py watches.

For GPUs the step runs as on a CPU, but for what is known to differ: attention by torch's operations, in blocks for
GPUs; the optimizer on all weights at once; and, with autocast, LayerNorm in float32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.comm import Comm, Counting
from trainer.fit.gradients import reduce_gradients
from trainer.fit.optimizer import OptimizerOptions, build_optimizer
from trainer.graph.counts import RankCounts
from trainer.graph.pretend import FakeComm, Pretence, pretend_graph
from trainer.graph.sharded_graph import Links, ShardedGraph
from trainer.model.forecaster import Forecaster, Roles
from trainer.model.kernel import find_kernel
from trainer.model.kernels.kernel import Kernel
from trainer.model.loss import LossOptions, build_loss
from trainer.model.losses.measured import Weighing
from trainer.model.model import ModelOptions
from trainer.model.precision import Precision
from trainer.model.processor import PROCESSORS
from trainer.plan.live_bytes import LiveBytes
from trainer.step import forecast_loss


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
      roles: of the variables.
      input_steps, rollout: dates given, and steps forecast in one training step.
      batch, ensemble: samples, and their members.
      network, loss, optimizer: as in training.
      precision: as in training.
      accelerator: cpu or cuda.
      averages: whether averaged weights are kept (ema_decay).
    """

    roles: Roles
    input_steps: int = 1
    rollout: int = 1
    batch: int = 1
    ensemble: int = 1
    network: ModelOptions = ModelOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    precision: Precision = Precision()
    accelerator: str = "cpu"
    averages: bool = False

    @property
    def kernel(self) -> Kernel:
        """What stands for the kernel of attention."""
        device = torch.device("cpu" if self.accelerator == "cpu" else "cuda")
        return find_kernel(self.network.kernel, device).planned(device)


@dataclass(frozen=True)
class Footprint:
    """Of one rank in one step.

    Attributes:
      peak: bytes of all tensors at the worst moment.
      at_peak: what they are for.
      kept: likewise, between forward and backward.
      sent, gathered: bytes to other ranks by part and direction, and what all-gathers would send.
      collectives: how many.
    """

    peak: int
    at_peak: Counter[str]
    kept: Counter[str]
    sent: Counter[str]
    gathered: Counter[str]
    collectives: int


def footprint(job: Job, counts: RankCounts) -> Footprint:
    """What a rank with so much of the graph holds and sends, from the second step on."""
    comm, live = Counting(FakeComm(counts.rank, counts.ranks)), LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = _Step(job, counts, live, comm)
        with live:
            step.begin()
            live.forget_peak()
            step.take()
    gathered = _gathered(comm, counts, step.graph)
    return Footprint(live.peak, live.at_peak, step.kept, comm.sent, gathered, comm.messages.total())


def _gathered(comm: Counting, counts: RankCounts, graph: ShardedGraph) -> Counter[str]:
    """Bytes, had every rank given its rows to all others, and their gradients back; where all travel, as it is."""
    gathered = comm.sent.copy()
    for name, part in counts.parts.items():
        if isinstance(getattr(graph, name), Links):
            owned, nodes = part.bounds[comm.rank + 1] - part.bounds[comm.rank], part.bounds[-1]
            for way, rows in (("forward", owned * (comm.ranks - 1)), ("backward", nodes - owned)):
                if (tag := f"{name} {way}") in comm.rows:
                    gathered[tag] = comm.rows[tag] * rows
    return gathered


class _Step:
    def __init__(self, job: Job, counts: RankCounts, live: LiveBytes, comm: Comm) -> None:
        self.job, self.live, self.comm = job, live, comm
        roles, dtype, network = job.roles, job.precision.weights, job.network
        pretence, processor = Pretence(comm, dtype, job.kernel), PROCESSORS[network.shard_strategy]
        self.graph = graph = pretend_graph(counts, pretence, network.num_chunks, processor.pretend)
        some = np.ones(len(roles.variables))
        statistics, outputs = {"mean": some, "stdev": some}, len(roles.outputs)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):  # draws no weights
                model = Forecaster(roles, statistics, np.ones(outputs), job.input_steps, network, graph)
        finally:
            torch.set_default_dtype(before)
        self.model = _without_numbers(model)
        areas, weights = torch.empty(counts.owned_cells, dtype=dtype), torch.empty(outputs, dtype=dtype)
        loss = build_loss(job.loss, Weighing(areas, weights, comm))
        self.loss = _labelled(live, "loss", loss)
        self.optimizer = build_optimizer(self.model.parameters(), job.optimizer, 1, 1)["optimizer"]
        dates = job.input_steps + job.rollout
        shape = (job.batch, dates, len(roles.variables), job.ensemble, counts.owned_cells)
        self.fields = torch.empty(shape).permute(0, 1, 3, 4, 2)  # in the order in which the loader hands them out
        self.kept: Counter[str] = Counter()
        live.hold("weights", self.model, loss)
        live.hold("graph", graph, areas)
        live.hold("batch", self.fields)
        if job.averages:
            self.average = [torch.empty_like(one) for one in (*self.model.parameters(), *self.model.buffers())]
            live.hold("averaged weights", *self.average)
        for part, method in (("encoder", "_encode"), ("processor", "_process"), ("decoder", "_decode")):
            setattr(self.model.network, method, _labelled(live, part, getattr(self.model.network, method)))
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda weight: live.hold("gradients", weight.grad))
        if job.accelerator != "cpu":
            _as_gpus_do(self.model, self.optimizer, job.precision.products is not None)

    def begin(self) -> None:
        """Leave what a step leaves: gradients, and the state of the optimizer."""
        with self.live.labelled("gradients"):
            for parameter in self.model.parameters():
                parameter.grad = torch.empty_like(parameter)
        with self.live.labelled("optimizer"):
            self.optimizer.step()

    def take(self) -> None:
        """In Lightning's order: old gradients go after the forward pass."""
        with self.live.labelled("inputs"), self.job.precision.autocast("cpu"):
            loss = forecast_loss(self.model, self.loss, self.fields, self.job.rollout).value
        self.kept = self.live.now.copy()
        self.optimizer.zero_grad()
        with self.live.labelled("backward"):
            loss.backward()
        with self.live.labelled("gradients"):
            reduce_gradients(self.model.parameters(), 1, self.comm)
        with self.live.labelled("optimizer"):
            self.optimizer.step()


def _labelled(live: LiveBytes, label: str, function: Any) -> Any:
    def call(*inputs: Any) -> Any:
        with live.labelled(label):
            return function(*inputs)

    return call


def _without_numbers(model: Forecaster) -> Forecaster:
    """With fake weights in the place of those of the meta device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="cpu"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return model


# --------------------------------------------------------------------------------------- what differs between devices
def _as_gpus_do(model: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool) -> None:
    for group in optimizer.param_groups:
        group["foreach"] = True
    for module in model.modules():
        if autocast and isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
