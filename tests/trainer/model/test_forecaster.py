"""In a rollout a cell without a value stays without one: the network's answer there is seen by nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import DIAGNOSTICS, FORCINGS, MASKED, VARIABLES
from torch import Tensor
from training import INPUT_STEPS, Case, Setup

from shardio.errors import SelectionError
from trainer.model.forecaster import Roles

CASE = Case(rollout=4, ensemble=2, batch=3)
ROLES = Roles(VARIABLES, FORCINGS, DIAGNOSTICS, (MASKED,))
PLACE = ROLES.inputs.index(MASKED)  # in state and prediction


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def setup_of(dataset_of: Callable[[str, int], str], case: Case = CASE) -> tuple[Setup, Tensor]:
    """A rank that is alone, and its first batch."""
    setup = Setup(0, case, dataset_of(case.grid, case.ensemble))
    fields = setup.fields(next(iter(setup.loader))).clone()
    setup.loader.close()
    return setup, fields


def absent_of(fields: Tensor) -> Tensor:
    """[batch, ensemble, cells] of MASKED at the last input time."""
    return fields[:, INPUT_STEPS - 1, ..., VARIABLES.index(MASKED)].isnan()


def states(setup: Setup, fields: Tensor) -> list[Tensor]:
    """That the model is given, step after step."""
    found: list[Tensor] = []
    hook = setup.forecaster.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().clone()))
    setup.step(fields)
    hook.remove()
    return found


def saying(setup: Setup, there: Tensor, more: float) -> Any:
    """Let the network say so much more about MASKED in those cells; what it said, step after step, is kept."""
    setup.said = []  # type: ignore[attr-defined]

    def say(_: Any, __: Any, answer: Tensor) -> Tensor:
        answer.retain_grad()
        setup.said.append(answer)  # type: ignore[attr-defined]
        added = torch.zeros_like(answer)
        added[..., PLACE] = torch.where(there.flatten(0, 1), more, 0.0)
        return answer + added

    return setup.forecaster.network.register_forward_hook(say)


def results(setup: Setup, fields: Tensor) -> list[Tensor]:
    """Loss, its sums, and all gradients."""
    setup.forecaster.zero_grad()
    loss, sums, _ = setup.step(fields)
    return [loss, *sums, *(parameter.grad.clone() for parameter in setup.forecaster.parameters())]


def test_a_cell_without_a_value_is_the_mean_in_every_later_state(dataset_of: Callable[[str, int], str]) -> None:
    setup, fields = setup_of(dataset_of)
    with torch.no_grad():
        setup.forecaster.network.output[1].bias[PLACE] += 7.0
    absent = absent_of(fields)
    assert 0.25 < absent.double().mean() < 0.4
    found = states(setup, fields)
    assert len(found) == CASE.rollout
    for state in found:
        newest = state[:, -1, ..., PLACE]
        assert (newest[absent] == 0.0).all()
    for state in found[1:]:
        assert (state[:, -1, ..., PLACE][~absent].abs() > 0.1).double().mean() > 0.9, "the others follow the bias"


def test_what_the_network_says_there_changes_neither_loss_nor_gradients(dataset_of: Callable[[str, int], str]) -> None:
    """Not even infinity, and no gradient goes back to it."""
    setup, fields = setup_of(dataset_of)
    absent, expected = absent_of(fields), results(setup, fields)
    hook = saying(setup, absent, torch.inf)
    found = results(setup, fields)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for answer in setup.said:  # type: ignore[attr-defined]
        gradient = answer.grad.unflatten(0, absent.shape[:2])[..., PLACE]
        assert (gradient[absent] == 0.0).all()
        assert gradient.isfinite().all()
        assert (gradient[~absent] != 0.0).any()
    hook = saying(setup, ~absent, 0.1)
    assert not torch.equal(results(setup, fields)[0], expected[0])
    hook.remove()


def test_the_last_input_time_decides_which_cells_have_a_value(dataset_of: Callable[[str, int], str]) -> None:
    """Of a pattern that moves, such as sea ice: what comes later adds no cell, and what was before takes none."""
    setup, fields = setup_of(dataset_of)
    masked, sst = fields[..., VARIABLES.index(MASKED)], VARIABLES.index(MASKED)
    masked.fill_(290.0)
    masked[:, 0, :, 0:10] = torch.nan
    masked[:, 1, :, 5:20] = torch.nan
    masked[:, 2:, :, 30:40] = torch.nan
    model = setup.forecaster
    normal = model.normalise(fields)
    for step, (prediction, target) in enumerate(model.rollout(normal, CASE.rollout)):
        lacking = target[..., PLACE].isnan().all(dim=0).all(dim=0).nonzero()[:, 0].tolist()
        assert lacking == [*range(5, 20), *range(30, 40)], "no value at the start, or no target"
        assert target[..., PLACE].isnan().sum() == len(lacking) * CASE.batch * CASE.ensemble
        assert (prediction[..., 5:20, PLACE] == 0.0).all()
        assert (prediction[..., :5, PLACE] != 0.0).all()
        assert (prediction[..., 20:, PLACE] != 0.0).all()
        others = [place for place in range(len(ROLES.outputs)) if place != PLACE]
        expected = normal[:, INPUT_STEPS + step][..., ROLES.places(ROLES.outputs)]
        assert torch.equal(target[..., others], expected[..., others])
    assert fields[:, 2:, :, 5:20, sst].isfinite().all(), "the caller's fields are left alone"
    assert normal[:, 2:, :, 5:20, sst].isfinite().all()


def test_a_variable_that_may_not_lack_values_is_forecast_everywhere(dataset_of: Callable[[str, int], str]) -> None:
    setup, fields = setup_of(dataset_of, replace(CASE, masked=False))
    assert setup.forecaster.lacking == []
    rolled = setup.forecaster.rollout(setup.forecaster.normalise(fields), 2)
    assert all(torch.isfinite(pair).all() for step in rolled for pair in step)


def test_roles_name_variables_of_the_dataset() -> None:
    assert ROLES.lacking == (MASKED,)
    assert Roles(VARIABLES, FORCINGS, DIAGNOSTICS, ("tp", "sun")).lacking == (), "of forcings and diagnostics none"
    with pytest.raises(SelectionError, match=r"allow_nan ice are not in the dataset\. It has: lsm"):
        Roles(VARIABLES, allow_nan=("ice",))
