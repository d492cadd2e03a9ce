"""`DDPGroupStrategy`: Lightning's DDP for models that span several ranks.

world 4, num_gpus_per_model 2          ranks 0 1 hold one model, ranks 2 3 another
forward, backward                      messages within the model group (halo.py)
after backward                         one all-reduce over all ranks: sum over models, mean over data (gradients.py)
optimizer                              the same step on every rank: weights stay equal without further messages
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from shardio import Topology
from shardio.errors import TopologyError
from trainer.comm import Alone, Comm, join_group, join_world
from trainer.fit.checkpoint import AtomicCheckpointIO
from trainer.fit.gradients import broadcast_parameters, reduce_gradients
from trainer.ranks.launcher import RankLauncher


class DDPGroupStrategy(DDPStrategy):
    """Train one model on groups of ranks, data-parallel over the groups.

    Works on CPU (gloo) and CUDA (nccl), launched by Lightning, torchrun or SLURM.

    Args:
      num_gpus_per_model: M, ranks that together hold one model; divides the world size. On CPU, processes.
      read_group_size: R, ranks that together read one sample; divides M. Default M.
      timeout_seconds: after which a rank gives up waiting for another.
      process_group_backend: gloo or nccl. Default: by device.

    Attributes:
      world: all ranks.
      model_comm: those that hold this rank's model.
    """

    strategy_name = "ddp_group"

    def __init__(
        self,
        num_gpus_per_model: int = 1,
        read_group_size: int | None = None,
        timeout_seconds: float = 600.0,
        process_group_backend: str | None = None,
    ):
        if not timeout_seconds > 0.0:
            raise TopologyError(f"timeout_seconds is {timeout_seconds}. Use more than 0; the slowest step must fit in.")
        super().__init__(
            checkpoint_io=AtomicCheckpointIO(),
            timeout=timedelta(seconds=timeout_seconds),
            process_group_backend=process_group_backend,
        )
        self.num_gpus_per_model, self.read_group_size = num_gpus_per_model, read_group_size
        self.world: Comm = Alone()
        self.model_comm: Comm = Alone()
        self._sync = True

    @property
    def topology(self) -> Topology:
        """Where this rank stands. TopologyError if the groups do not fit the world."""
        world = self.num_nodes * self.num_processes
        return Topology(world, self.global_rank, self.num_gpus_per_model, self.read_group_size)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Start the process group, then the model groups."""
        _ = self.topology  # refused before any rank waits for another
        super().setup_environment()
        if self.world.ranks == 1:
            self.world = join_world()
            self.model_comm = join_group(self.num_gpus_per_model, self._timeout)

    def configure_ddp(self) -> None:
        """No wrapper around the module: gradients are reduced in `post_backward`."""
        assert self.model is not None
        broadcast_parameters((parameter.data for parameter in self.model.parameters()), self.world)

    def on_train_start(self) -> None:
        """SIGTERM stops as Ctrl-C does: Lightning's handler would broadcast amid whatever the ranks are exchanging."""
        if not isinstance(self.cluster_environment, SLURMEnvironment):  # there Lightning's requeueing needs it
            signal.signal(signal.SIGTERM, _interrupt)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Gradients of the whole, on all ranks."""
        if not self._sync:
            return
        assert self.lightning_module is not None
        reduce_gradients(self.lightning_module.parameters(), self.topology.data_size, self.world)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients of several batches accumulate they stay on their rank."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
