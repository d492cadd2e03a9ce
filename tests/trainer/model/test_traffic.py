"""What is sent in a step is what the halos say, and no more: bytes counted where they leave."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tools import trainer_traffic as traffic
from tools.trainer_step import Sizes, Step
from tools.trainer_traffic import UncountedError, measure

SIZES = Sizes("o8", "ico1", channels=16, layers=3, heads=4, variables=5, forcings=1, grid_chunks=7, checkpointing=False)


def counted(rank: int, comm: Any, sizes: Sizes) -> dict[str, Any]:
    return measure(comm, sizes)


def astray(rank: int, comm: Any, sizes: Sizes, lie: str) -> str:
    """What is told of a step in which a message does not leave by the communicator."""
    more = {
        "all_to_all": lambda: dist.all_to_all_single(torch.zeros(2), torch.zeros(2), group=comm.group),
        "broadcast": lambda: dist.broadcast(torch.zeros(2), 0, group=comm.group),
    }
    run = Step.run

    class Astray(Step):
        def run(self, batch: torch.Tensor) -> torch.Tensor:
            more[lie]()
            return run(self, batch)

    with patch.object(traffic, "Step", Astray), pytest.raises(UncountedError) as raised:
        measure(comm, sizes)
    return str(raised.value)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        replace(SIZES, checkpointing=True, num_chunks=4),  # what is computed twice is sent once
        replace(SIZES, rollout=2, batch=2),  # the second step's inputs want gradients
        replace(SIZES, channels=8, dtype="float64"),  # embedded rows are pulled
    ],
    ids=["plain", "checkpointing", "rollout", "embedded"],
)
def test_bytes_counted_are_those_that_the_halos_predict(
    run: Callable[..., list[Any]], sizes: Sizes, ranks: int
) -> None:
    results = run(counted, [{"sizes": sizes}] * ranks)
    for result in results:
        assert result["counted"] == {
            part: size for part, size in result["predicted"].items() if part in result["counted"]
        }
        assert sum(result["counted"].values()) == sum(result["predicted"].values())
        assert all(size > 0 for size in result["counted"].values())
    sums = [
        {part: sum(result[kind].get(part, 0) for result in results) for part in results[0]["predicted"]}
        for kind in ("counted", "lower bound", "all-gather")
    ]
    for part, counted_bytes in sums[0].items():
        assert counted_bytes == sums[1][part]
        assert counted_bytes <= sums[2][part]


def test_bytes_of_each_part_are_rows_borrowed_times_their_width(run: Callable[..., list[Any]]) -> None:
    results = run(counted, [{"sizes": SIZES}] * 4)
    for part, width, times in (("encoder", 2 * 5, 1), ("processor", 16, 3), ("decoder", 16, 1)):
        sent = sum(result["counted"][f"{part} forward"] for result in results)
        back = sum(result["counted"].get(f"{part} backward", 0) for result in results)
        assert sent % (width * 4 * times) == 0
        assert back == (0 if part == "encoder" else sent)
    whole = sum(sum(result["counted"].values()) - result["counted"]["gradients"] for result in results)
    heads = run(counted, [{"sizes": replace(SIZES, shard_strategy="heads")}] * 4)
    assert sum(sum(result["counted"].values()) - result["counted"]["gradients"] for result in heads) > whole


@pytest.mark.parametrize(("lie", "told"), [("all_to_all", "messages left"), ("broadcast", "not counted")])
def test_a_message_that_does_not_leave_by_the_communicator_is_caught(
    run: Callable[..., list[Any]], lie: str, told: str
) -> None:
    for said in run(astray, [{"sizes": SIZES, "lie": lie}] * 2):
        assert told in said
