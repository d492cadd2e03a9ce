"""Gradients are the sum over the model group and the mean over the data group, whatever the parameters are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import comm_of

from trainer.comm import Alone
from trainer.fit import gradients
from trainer.fit.gradients import broadcast_parameters, reduce_gradients

SHAPES = [(3, 2), (), (5,), (0, 4), (7, 1)]


def own(rank: int, kind: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A gradient for each shape; rank 1 has none for the third."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(kind) for shape in SHAPES]


def reduced(rank: int, comm: Any, data_size: int, bucket_bytes: int, mixed: bool = False) -> dict[str, Any]:
    kinds = [torch.float64, torch.float32 if mixed else torch.float64]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=kinds[i % 2])) for i, shape in enumerate(SHAPES)]
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    for i, (parameter, gradient) in enumerate(zip(parameters, own(rank), strict=True)):
        if (rank, i) != (1, 2):
            parameter.grad = gradient.to(parameter.dtype)
    kept, gradients.BUCKET_BYTES = gradients.BUCKET_BYTES, bucket_bytes
    try:
        reduce_gradients(iter([*parameters[:2], frozen, *parameters[2:]]), data_size, comm)
        buckets = len(gradients._buckets(parameters))
    finally:
        gradients.BUCKET_BYTES = kept
    assert frozen.grad is None
    return {"gradients": [parameter.grad.numpy() for parameter in parameters], "buckets": buckets}


def told(rank: int, comm: Any) -> list[np.ndarray]:
    values = [torch.full((2, 3), float(rank)), torch.arange(3) * (rank + 1)]
    broadcast_parameters(values, comm)
    return [value.numpy() for value in values]


def in_pairs(rank: int, comm: Any) -> list[float]:
    """A model of two ranks, twice: what a rank has after the gradients of its own model alone are added."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([10.0**rank])
    reduce_gradients([parameter], 1, comm_of((0, 1) if rank < 2 else (2, 3)))
    return parameter.grad.tolist()


@pytest.mark.parametrize(("model", "data"), [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("bucket_bytes", [1, 60, 2**20])
def test_gradients_are_summed_over_the_model_and_averaged_over_the_data(
    run: Callable[..., list[Any]], model: int, data: int, bucket_bytes: int
) -> None:
    ranks = model * data
    results = run(reduced, [{"data_size": data, "bucket_bytes": bucket_bytes}] * ranks)
    for i, shape in enumerate(SHAPES):
        expected = sum(own(rank)[i].numpy() * ((rank, i) != (1, 2)) for rank in range(ranks)) / data
        for result in results:
            assert result["gradients"][i].shape == shape
            np.testing.assert_allclose(result["gradients"][i], expected, rtol=1e-14, atol=1e-15)
            assert np.array_equal(result["gradients"][i], results[0]["gradients"][i])
    assert {result["buckets"] for result in results} == {{1: 5, 60: 3, 2**20: 1}[bucket_bytes]}


def test_parameters_of_two_types_keep_theirs(run: Callable[..., list[Any]]) -> None:
    for result in run(reduced, [{"data_size": 1, "bucket_bytes": 2**20, "mixed": True}] * 2):
        assert [gradient.dtype for gradient in result["gradients"]] == [np.float64, np.float32] * 2 + [np.float64]
        expected = own(0)[1].float().numpy() + own(1)[1].float().numpy()
        np.testing.assert_allclose(result["gradients"][1], expected, rtol=1e-6)


def test_all_ranks_get_the_numbers_of_the_first(run: Callable[..., list[Any]]) -> None:
    for first, second in run(told, [{}] * 4):
        assert np.array_equal(first, np.zeros((2, 3)))
        assert np.array_equal(second, [0, 1, 2])


def test_two_models_side_by_side_do_not_mix_where_the_group_is_one_model(run: Callable[..., list[Any]]) -> None:
    assert run(in_pairs, [{}] * 4) == [[11.0], [11.0], [1100.0], [1100.0]]


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda some: torch.optim.AdamW(some, lr=0.1, weight_decay=0.5),
    lambda some: torch.optim.SGD(some, lr=0.1, momentum=0.9, weight_decay=0.5),
]


def trained(rank: int, comm: Any, optimizer: int) -> list[float]:
    """A weight with gradients, and one that has none on any rank, after three steps."""
    used, unused = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    stepping = OPTIMIZERS[optimizer]([used, unused])
    for step in range(3):
        stepping.zero_grad()
        used.grad = torch.full_like(used, 1.0 + step)
        reduce_gradients([used, unused], comm.ranks, comm)
        stepping.step()
    return [used.item(), unused.item()]


@pytest.mark.parametrize("optimizer", range(len(OPTIMIZERS)))
def test_a_weight_without_gradient_is_trained_alike_on_any_number_of_ranks(
    run: Callable[..., list[Any]], optimizer: int
) -> None:
    alone = trained(0, Alone(), optimizer)
    assert run(trained, [{"optimizer": optimizer}] * 2) == [alone, alone]
    assert alone[1] != 1.0  # it decays
