"""DDPGroupStrategy: launched in any way, it gives the same training, and knows whose failure it sees."""

import pytest
import torch
import torch.distributed as dist
from runs import Run, checkpoint, fit, tiny, trace

from shardio.errors import ChunkError, TopologyError
from trainer import DDPGroupStrategy
from trainer.ranks.failure import _words, lost_a_rank

STEPS = ["--trainer.max_steps=4", "--trainer.precision=64-true", "--trainer.gradient_clip_val=0.01"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("alone"), *tiny(*STEPS, "--data.batch_size=2"))


def same(run, other):
    one, two = checkpoint(run.output)["state_dict"], checkpoint(other.output)["state_dict"]
    assert all(torch.allclose(one[name], two[name], rtol=1e-10, atol=1e-12) for name in two)
    pairs = zip(trace(run.output).values(), trace(other.output).values(), strict=True)
    assert all(float(first) == pytest.approx(float(second), rel=1e-10) for first, second in pairs)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, ["--strategy.num_gpus_per_model=2", "--data.batch_size=2"]),
        (2, ["--data.batch_size=1"]),
        (4, ["--strategy.num_gpus_per_model=2", "--data.batch_size=1"]),
    ],
)
def test_gradients_are_summed_over_models_and_averaged_over_data(alone, tmp_path, ranks, arguments):
    same(fit(tmp_path, *tiny(*STEPS, *arguments), ranks=ranks), alone)


def test_ranks_that_the_trainer_starts_train_the_same(alone, tmp_path):
    two = ["--trainer.devices=2", "--strategy.num_gpus_per_model=2", "--data.batch_size=2"]
    run = Run(tmp_path, "fit", *tiny(*STEPS, *two))
    assert run.wait() == [0], run.errors
    assert len(run.started.splitlines()) == 1
    assert run.errors == ""
    same(run, alone)


def test_a_timeout_of_nothing_is_refused():
    with pytest.raises(TopologyError, match="timeout_seconds is 0"):
        DDPGroupStrategy(timeout_seconds=0)


DUPLICATE = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:268, invalid usage (run with NCCL_DEBUG=WARN for "
    "details), NCCL version 2.21.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000\nException raised from ..."
)
REMOTE = (
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, remote process exited or there was a "
    "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer node<49152>"
)
WATCHDOG = "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600000 milliseconds"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ChunkError("Connection reset by peer"), False),  # of a remote store
        (OSError("Connection reset by peer"), False),
        (dist.DistBackendError(DUPLICATE), False),
        (dist.DistBackendError(DUPLICATE.replace("invalid usage", "unhandled cuda error")), False),
        (dist.DistBackendError(REMOTE), True),
        (dist.DistBackendError(WATCHDOG), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
    ],
)
def test_the_echo_of_a_lost_rank_is_told_from_an_error_of_this_one(error, lost):
    assert lost_a_rank(error) is lost


def test_what_nccl_says_at_last_is_the_message():
    told = _words(dist.DistBackendError(DUPLICATE), debug=True)
    assert told == (
        "NCCL cannot connect the ranks: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000. "
        "NCCL_DEBUG=WARN tells more"
    )


def test_one_rank_takes_zeros_for_a_weight_without_gradient_as_many_ranks_do():
    strategy = DDPGroupStrategy()
    strategy.parallel_devices = [torch.device("cpu")]
    strategy._lightning_module = torch.nn.Linear(2, 1)
    strategy.post_backward(torch.zeros(()))
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in strategy._lightning_module.parameters())
