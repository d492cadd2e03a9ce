"""What is sent in a step is what the halos say, and no more: bytes counted where they leave."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tools.trainer_step import Sizes, Step
from tools.trainer_traffic import UncountedError, count_sent, measure, predict_sent

SIZES = Sizes("o8", "ico1", channels=16, layers=3, heads=4, variables=5, forcings=1, grid_chunks=7, checkpointing=False)


def counted(rank: int, group: Any, sizes: Sizes) -> dict[str, Any]:
    return measure(rank, group, sizes)


def astray(rank: int, group: Any, sizes: Sizes) -> dict[str, Any]:
    """A step to which a message was added, and one with a collective that is not counted."""
    step = Step(rank, group, sizes)
    plan = step.forecaster.network.graph
    with count_sent(plan) as sent:
        batch = step.fields()
        step.run(batch)
        dist.all_to_all_single(torch.zeros(2), torch.zeros(2), group=group)
        with pytest.raises(UncountedError, match="broadcast is used in a step"):
            dist.broadcast(torch.zeros(2), 0, group=group)
    return {"sent": dict(sent), "predicted": dict(predict_sent(step)["predicted"])}


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


def test_a_message_that_is_not_of_the_model_shows(run: Callable[..., list[Any]]) -> None:
    for result in run(astray, [{"sizes": SIZES}] * 2):
        assert result["sent"].pop("elsewhere") == 4
        assert sum(result["sent"].values()) == sum(result["predicted"].values())
