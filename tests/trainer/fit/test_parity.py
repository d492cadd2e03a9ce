"""The same data, seed and model give the same numbers, however the ranks are arranged: four real processes tell."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from training import KNOBS, Case, all_pairs, train

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
CASES = all_pairs()
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def alone(run: Callable[..., list[Any]], dataset_of: Callable[[str, int], str]) -> Callable[[Case], Arrays]:
    """`alone(case)`: what one rank gets from the same samples, in one piece."""

    @cache
    def alone(case: Case) -> Arrays:
        (result,) = run(train, [{"case": case, "path": dataset_of(case.grid, case.ensemble)}])
        return result

    return lambda case: alone(case.on_one_rank)


def assert_close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """To a fraction of the largest number expected; NaN and infinity are never close."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    scale = np.abs(expected).max()
    assert scale > 0.0, f"{what} is zero: it cannot be compared"
    error = np.abs(found - expected).max() / scale
    assert error <= tolerance, f"{what}: {error:.1e}, more than {tolerance:.0e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_on_many_ranks_is_training_on_one(
    run: Callable[..., list[Any]], dataset_of: Callable[[str, int], str], alone: Callable[[Case], Arrays], case: Case
) -> None:
    model, data, _ = case.ranks
    tolerance = TOLERANCE[case.precision]
    path = dataset_of(case.grid, case.ensemble)
    results = run(train, [{"case": case, "path": path}] * (model * data))
    expected = alone(case)
    for group in range(data):
        ranks = results[group * model : (group + 1) * model]
        for result in ranks:  # global sample k goes to data group k mod D
            assert np.array_equal(result["dates"], expected["dates"][group::data])
            assert_close(result["sums"], expected["sums"][:, group::data], tolerance, "errors by variable")
        outputs = np.concatenate([result["outputs"] for result in ranks], axis=3)
        assert_close(outputs, expected["outputs"][:, group::data], tolerance, "outputs")
    for result in results:
        assert_close(result["losses"], expected["losses"], tolerance, "losses of all steps")
        for part in ("gradients", "weights"):
            assert list(result[part]) == list(expected[part])
            for name, array in result[part].items():
                assert_close(array, expected[part][name], tolerance, f"{part} of {name}")
                assert np.array_equal(array, results[0][part][name]), f"ranks drifted apart in {part} of {name}"
        for name, start in expected["start"].items():
            assert np.array_equal(result["start"][name], start)
            change, expected_change = result["weights"][name] - start, expected["weights"][name] - start
            # Scales and biases do not decay: in float32 they move by their gradients alone, fifty tolerances.
            least = 0.003 if start.ndim > 1 or case.precision == "float64" else 50 * tolerance
            assert np.abs(expected_change).max() > least * np.abs(start).max(), f"{name} hardly moved: nothing is shown"
            if case.precision == "float64":
                assert_close(change, expected_change, tolerance, f"change of {name}")


MIXED = [
    Case((2, 1, 1), "octahedral", precision="bf16-mixed"),
    Case((3, 1, 3), "irregular", "mae", shard_strategy="heads", precision="bf16-mixed"),
    Case((4, 1, 2), "regular", num_chunks=4, checkpointing=True, rollout=3, precision="bf16-mixed", channels=8),
    Case((2, 2, 1), "limited-area", "huber", False, ensemble=2, precision="bf16-mixed"),
]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_in_mixed_precision_ranks_change_less_than_the_precision_does(
    run: Callable[..., list[Any]], dataset_of: Callable[[str, int], str], alone: Callable[[Case], Arrays], case: Case
) -> None:
    """Every rank rounds its part of a gradient to bfloat16: they differ by that, and the first loss not at all."""
    model, data, _ = case.ranks
    path = dataset_of(case.grid, case.ensemble)
    results = run(train, [{"case": case, "path": path}] * (model * data))
    expected, exact = alone(case), alone(replace(case, precision="float32"))
    assert_close(results[0]["losses"][0], expected["losses"][0], 1e-5, "the first loss")
    for part in ("gradients", "weights"):
        found, mixed, single = (_joined(one[part], exact[part]) for one in (results[0], expected, exact))
        rounding = np.linalg.norm(mixed - single)
        assert rounding > 1e-4 * np.linalg.norm(single), "autocast had no effect"
        assert np.linalg.norm(found - mixed) < 2.0 * rounding, part
        for other in results:
            assert np.array_equal(_joined(other[part], exact[part]), found), f"ranks drifted apart in {part}"


def _joined(arrays: Arrays, names: Arrays) -> Any:
    return np.concatenate([arrays[name].ravel() for name in names])


def test_cases_bring_each_value_of_each_knob_together_with_each_of_every_other() -> None:
    met = set().union(*(case.pairs for case in CASES))
    for a, b in combinations(KNOBS, 2):
        assert all(((a, x), (b, y)) in met for x in KNOBS[a] for y in KNOBS[b])
