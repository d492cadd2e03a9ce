"""The loss of the globe from the ranks' cells: against the formula, over any cut, with any cells missing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shardio.errors import PlanError, SelectionError
from trainer.comm import Alone
from trainer.model.loss import LossOptions, build_loss, variable_weights
from trainer.model.losses.measured import Weighing

BATCH, ENSEMBLE, CELLS, VARIABLES = 2, 2, 11, 3
WEIGHTS = np.array([1.0, 0.5, 4.0])
OPTIONS = [LossOptions("mse"), LossOptions("mae"), LossOptions("huber", huber_delta=0.7)]


def some_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, target and areas; of targets one variable is missing on the first cells, another everywhere once."""
    random = np.random.default_rng(0)
    prediction, target = random.standard_normal((2, BATCH, ENSEMBLE, CELLS, VARIABLES))
    target[..., :5, 1] = np.nan
    target[0, 1, :, 2] = np.nan
    return prediction, target, random.uniform(0.1, 2.0, CELLS)


def by_formula(prediction: np.ndarray, target: np.ndarray, areas: np.ndarray, options: LossOptions) -> float:
    """Sum by sum, as the head of loss.py has it."""
    total = 0.0
    for sample, member, variable in np.ndindex(BATCH, ENSEMBLE, VARIABLES):
        above = below = 0.0
        for cell in range(CELLS):
            wanted = target[sample, member, cell, variable]
            if np.isnan(wanted):
                continue
            off = abs(prediction[sample, member, cell, variable] - wanted)
            delta = options.huber_delta
            huber = 0.5 * off**2 if off <= delta else delta * (off - 0.5 * delta)
            above += areas[cell] * {"mse": off**2, "mae": off, "huber": huber}[options.kind]
            below += areas[cell]
        total += WEIGHTS[variable] / WEIGHTS.sum() * (above / below if below else 0.0)
    return total / (BATCH * ENSEMBLE)


def own_cells(rank: int, comm: Any, options: LossOptions, bounds: list[int], dtype: str = "float64") -> dict[str, Any]:
    mine = slice(bounds[rank], bounds[rank + 1])
    prediction, target, areas = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in some_cells())
    given = prediction[:, :, mine].requires_grad_()
    loss = build_loss(options, Weighing(areas[mine], areas.new_tensor(WEIGHTS), comm))(given, target[:, :, mine])
    loss.value.backward()
    return {"value": loss.value.item(), "sums": loss.sums.numpy(), "gradient": given.grad.numpy()}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.kind)
def test_one_rank_has_the_loss_of_the_formula_and_its_gradient(options: LossOptions) -> None:
    prediction, target, areas = some_cells()
    found = own_cells(0, Alone(), options, [0, CELLS])
    assert found["value"] == pytest.approx(by_formula(prediction, target, areas, options), rel=1e-13)
    for place in [(0, 0, 7, 0), (1, 1, 9, 1), (0, 1, 2, 2), (1, 0, 3, 1)]:
        step = np.zeros_like(prediction)
        step[place] = 1e-6
        around = [by_formula(prediction + sign * step, target, areas, options) for sign in (1, -1)]
        assert found["gradient"][place] == pytest.approx((around[0] - around[1]) / 2e-6, abs=1e-8)
    assert np.array_equal(found["gradient"] == 0.0, np.isnan(target))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.kind)
@pytest.mark.parametrize("bounds", [[0, 4, 11], [0, 5, 6, 11], [0, 1, 2, 3, 11]], ids=len)
def test_every_rank_has_the_loss_of_the_globe_and_the_gradient_of_its_cells(
    run: Callable[..., list[Any]], options: LossOptions, bounds: list[int]
) -> None:
    whole = own_cells(0, Alone(), options, [0, CELLS])
    parts = run(own_cells, [{"options": options, "bounds": bounds}] * (len(bounds) - 1))
    for part in parts:
        assert part["value"] == pytest.approx(whole["value"], rel=1e-14)
        np.testing.assert_allclose(part["sums"], whole["sums"], rtol=1e-14, atol=1e-16)
    assert len({part["value"] for part in parts}) == 1
    gradient = np.concatenate([part["gradient"] for part in parts], axis=2)
    np.testing.assert_allclose(gradient, whole["gradient"], rtol=1e-14, atol=1e-17)


def test_float32_loses_no_more_than_rounding(run: Callable[..., list[Any]]) -> None:
    whole = own_cells(0, Alone(), OPTIONS[0], [0, CELLS])
    for part in run(own_cells, [{"options": OPTIONS[0], "bounds": [0, 4, 11], "dtype": "float32"}] * 2):
        assert part["value"] == pytest.approx(whole["value"], rel=1e-6)


def test_a_prediction_that_is_not_finite_makes_the_loss_so_on_all_ranks() -> None:
    prediction, target, areas = (torch.from_numpy(array) for array in some_cells())
    prediction[0, 0, 7, 0] = torch.nan
    loss = build_loss(LossOptions(), Weighing(areas, areas.new_tensor(WEIGHTS)))(prediction, target)
    assert torch.isnan(loss.value)
    assert torch.isnan(loss.sums).sum() == 1


def test_variables_are_weighed_by_name_pressure_and_how_much_they_change() -> None:
    names, changes = ["t_850", "q_50", "sst"], {"t_850": 0.5, "q_50": 0.2, "sst": 0.1}
    assert variable_weights(names, LossOptions(), changes) == [1.0, 1.0, 1.0]
    assert variable_weights(names, LossOptions(pressure_scaling=True), changes) == [0.85, 0.2, 1.0]
    assert variable_weights(names, LossOptions(variable_weights={"sst": 3.0}), changes) == [1.0, 1.0, 3.0]
    squared = variable_weights(names, LossOptions("mse", tendency_scaling=True), changes)
    assert squared == pytest.approx([4.0, 25.0, 100.0])
    assert variable_weights(names, LossOptions("mae", tendency_scaling=True), changes) == pytest.approx(
        [2.0, 5.0, 10.0]
    )


def test_only_levels_of_pressure_are_weighed_by_it() -> None:
    """Of the type that the dataset says; where it says none, of a parameter whose levels are all standard ones."""
    about = {
        "t_500": {"mars": {"levtype": "ml", "levelist": 500}},
        "swvl_1000": {"mars": {"levtype": "sol"}},
        "q_925": {"mars": {"levtype": "pl", "levelist": 925}},
        "wind": {"mars": {"levtype": "pl", "levelist": 300}},
        "u_90": {"mars": {"levtype": "pl"}},
        "z_850": {"mars": {"param": "z"}},
    }
    weights = dict.fromkeys([*about, "stl_1", "stl_2", "v_137", "v_500", "r_700", "r_1"], 1.0)
    expected = weights | {"q_925": 0.925, "wind": 0.3, "u_90": 0.2, "z_850": 0.85, "r_700": 0.7, "r_1": 0.2}
    found = variable_weights(list(weights), LossOptions(pressure_scaling=True), {}, about)
    assert dict(zip(weights, found, strict=True)) == expected


def test_what_cannot_be_weighed_is_refused_with_a_remedy() -> None:
    with pytest.raises(SelectionError, match=r"weights for z, which the model does not forecast. It forecasts: t\."):
        variable_weights(["t"], LossOptions(variable_weights={"z": 1.0}), {"t": 1.0})
    with pytest.raises(PlanError, match=r"loss 'rmse' is unknown. Use one of: mse, mae, huber"):
        LossOptions("rmse")
    with pytest.raises(PlanError, match=r"huber_delta is 0.0. Use more than 0"):
        LossOptions(huber_delta=0.0)


@pytest.mark.parametrize("given", [{"a": 0.0, "b": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"b": float("inf")}])
def test_weights_that_weigh_nothing_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(SelectionError, match=r"cannot weigh its variables by a .*one at least be more than 0"):
        variable_weights(["a", "b"], LossOptions(variable_weights=given), {})
