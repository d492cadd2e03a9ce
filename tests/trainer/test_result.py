"""What is printed with --json is one object, whatever happens."""

import json

import pytest

from trainer.result import one_object


@pytest.mark.parametrize("shown", [True, False])
def test_what_was_done_before_an_error_is_printed_by_one_rank(capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    with pytest.raises(ValueError, match="late"), one_object(shown) as done:
        done["forecasts"] = ["a.zarr"]
        raise ValueError("late")
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.splitlines()] == ([{"forecasts": ["a.zarr"]}] if shown else [])
