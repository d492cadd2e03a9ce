"""Memory divides by the ranks, but for what is replicated: bytes of live tensors, which are the same in every run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tools.trainer_memory import MARGIN, compare, measure
from tools.trainer_step import Sizes
from trainer.plan.live_bytes import LiveBytes

SIZES = Sizes("o32", "ico2", channels=32, layers=2, heads=4, variables=8, input_steps=2)
CELLS = 5248


def peak(rank: int, comm: Any, sizes: Sizes) -> dict[str, int]:
    return measure(comm, sizes)


Peaks = Callable[[Sizes, int], list[dict[str, int]]]


@pytest.fixture(scope="module")
def peaks(run: Callable[..., list[Any]]) -> Peaks:
    return lambda sizes, ranks: run(peak, [{"sizes": sizes}] * ranks)


@pytest.mark.parametrize(("num_chunks", "checkpointing"), [(1, True), (1, False), (4, True), (16, True)])
def test_peak_is_at_most_a_rank_s_part_and_a_tenth_plus_what_is_replicated(
    peaks: Peaks, num_chunks: int, checkpointing: bool
) -> None:
    sizes = replace(SIZES, num_chunks=num_chunks, checkpointing=checkpointing)
    for row in compare(sizes, {ranks: peaks(sizes, ranks) for ranks in (1, 2, 4)}):
        assert row["peak"] <= row["bound"], row
        assert row["ratio"] <= MARGIN, row  # without the weights, of which a part of the bound is made


def test_a_rank_that_keeps_a_full_field_breaks_the_bound(peaks: Peaks) -> None:
    results = {ranks: peaks(SIZES, ranks) for ranks in (1, 4)}
    assert all(row["ratio"] <= MARGIN for row in compare(SIZES, results))
    for found in results[4]:
        found["peak"] += 4 * CELLS * SIZES.channels
    assert compare(SIZES, results)[-1]["ratio"] > MARGIN


def test_chunks_and_checkpointing_lower_the_peak(peaks: Peaks) -> None:
    plain, checkpointed, chunked, finely = (
        peaks(replace(SIZES, checkpointing=checkpointing, num_chunks=chunks), 2)[0]["peak"]
        for checkpointing, chunks in ((False, 1), (True, 1), (True, 4), (True, 16))
    )
    assert finely < chunked < 0.6 * checkpointed
    assert checkpointed < 0.9 * plain


def test_a_step_counts_the_same_bytes_every_time(peaks: Peaks) -> None:
    assert peaks(SIZES, 4) == peaks(SIZES, 4)


# ------------------------------------------------------------------------------------------------------- the counter
def test_a_storage_counts_once_until_its_last_view_is_gone() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        part = whole[:10].view(2, 5)
        assert live.total == 4000
        del whole
        assert live.total == 4000
        del part
        assert live.total == 0
    assert live.peak == 4000


def test_what_backward_needs_counts_until_backward_is_done() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        live.hold("weights", weight)
        loss = (weight.exp() * 2.0).sum()  # exp keeps its result
        assert live.total == 4000 + 4000 + 4
        assert live.peak == 4000 + 8000 + 4
        loss.backward()
        assert live.peak >= 4000 + 4000 + 4 + 8000 - 4
        assert live.total == 4000 + 4000 + 4  # the gradient is there, what exp kept is gone


def test_what_is_made_and_freed_in_backward_shows_in_the_peak() -> None:
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
            return rows.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            torch.zeros(10**6)
            return gradient

    rows = torch.ones(10, requires_grad=True)
    with LiveBytes() as live:
        Wasteful.apply(rows).sum().backward()
    assert live.peak > 4 * 10**6
    assert live.total < 1000
