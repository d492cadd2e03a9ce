"""What is printed with --json is one object of the standard, whatever happens."""

import json

import numpy as np
import pytest

from trainer.cli.result import one_object


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    with one_object(True) as done:
        done["scores"] = [{"acc": float("nan"), "rmse": np.float64(0.5)}, {"acc": (float("inf"), -np.inf), "lead": 6}]
    assert capsys.readouterr().out == '{"scores": [{"acc": null, "rmse": 0.5}, {"acc": [null, null], "lead": 6}]}\n'


@pytest.mark.parametrize("shown", [True, False])
def test_what_was_done_before_an_error_is_printed_by_one_rank(capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    with pytest.raises(ValueError, match="late"), one_object(shown) as done:
        done["forecasts"] = ["a.zarr"]
        raise ValueError("late")
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.splitlines()] == ([{"forecasts": ["a.zarr"]}] if shown else [])
