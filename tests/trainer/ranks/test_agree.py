"""Ranks that see two things on the file system do what the first one sees: a stale directory starts no second run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forecasting import START, tree
from runs import Run, fit, tiny, trace

from shardio.errors import OutputError
from trainer.comm import Alone
from trainer.ranks.agree import Finding, hear, look

STALE = """
import os, pathlib, sys
if os.environ["RANK"] == "1":
    import trainer.predict.predict, trainer.predict.asked
    exists, glob = pathlib.Path.exists, pathlib.Path.glob
    hidden = lambda path: path.suffix in (".ckpt", ".zarr", ".partial") and "{folder}" in str(path.absolute())
    pathlib.Path.exists = lambda path, **more: not hidden(path) and exists(path, **more)
    pathlib.Path.glob = lambda path, *more: (one for one in glob(path, *more) if not hidden(one))
    trainer.predict.predict.is_complete = lambda *given: False
    trainer.predict.asked.begun_chunk_cells = lambda path: None
sys.argv = ["trainer", *{arguments}]
from trainer.cli.main import main
main()
"""


def on_two_that_see_two_things(folder: Path, *arguments: str) -> Run:
    """The second sees neither checkpoints nor forecasts."""
    return Run(folder, "-c", STALE.format(folder=folder, arguments=list(arguments)), ranks=2)


def test_a_training_goes_on_where_the_first_rank_sees_it(tmp_path: Path) -> None:
    two = ("--strategy.num_gpus_per_model=2", "--data.batch_size=14", "--model.optimizer.final_fraction=1")
    whole = fit(tmp_path, *tiny(*two, "--output=whole", "--trainer.max_epochs=3"), ranks=2)
    fit(tmp_path, *tiny(*two, "--trainer.max_epochs=2"), ranks=2)
    go_on = tiny(*two, "--trainer.max_epochs=3", "--ckpt_path=last")
    run = on_two_that_see_two_things(tmp_path, "fit", *go_on)
    assert run.wait() == [0, 0], run.errors
    assert trace(tmp_path / "run").keys() == {1, 2, 3}
    assert whole.printed.startswith("trained to step 3")
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_a_run_is_refused_by_all_ranks_where_the_first_sees_another(tmp_path: Path) -> None:
    fit(tmp_path, *tiny("--trainer.max_steps=1"))
    run = on_two_that_see_two_things(tmp_path, "fit", *tiny("--strategy.num_gpus_per_model=2", "--trainer.max_steps=1"))
    assert run.wait() == [1, 1]
    assert run.errors.count("Error:") == 1
    assert "run holds a run, last checkpoint: step 1" in run.errors


def test_forecasts_that_the_first_rank_sees_complete_are_kept_and_begun_ones_go_on(
    checkpoint: Path, path: str, tmp_path: Path
) -> None:
    """The second would begin the first date anew, alone, and cut the second date in other grid-chunks."""
    given = ["predict", f"--ckpt_path={checkpoint}", f"--dataset={path}", "--lead-time=120h"]
    both = [*given, "--num_gpus_per_model=2", f"--start={START},2021-03-03"]
    assert Run(tmp_path, *both, "--output=whole", ranks=2).wait() == [0, 0]
    assert Run(tmp_path, *given, f"--start={START}", "--num_gpus_per_model=2", ranks=2).wait() == [0, 0]
    killed = Run(tmp_path, *both, ranks=2)
    killed.until(lambda: list((tmp_path / "forecasts").glob("2021-03-03T0000.zarr.partial/dataset-*/data/3.*")))
    killed.kill()
    killed.wait()
    run = on_two_that_see_two_things(tmp_path, *both)
    assert run.wait() == [0, 0], run.errors
    assert "kept forecasts/2021-03-02T0000.zarr" in run.printed
    assert tree(tmp_path / "forecasts") == tree(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------- in one rank
def test_only_the_first_rank_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert look(lambda: 1 / 0) == Finding()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("NODE_RANK", "1")
    assert look(lambda: 1 / 0) == Finding()
    monkeypatch.setenv("NODE_RANK", "0")
    assert look(lambda: 3) == Finding(3)


def refuse() -> Any:
    raise OutputError("there is another")


def test_a_refusal_ends_the_first_rank_at_once_unless_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="there is another"):
        look(refuse)
    monkeypatch.setenv("NODE_RANK", "0")
    finding: Finding[Callable[..., Any]] = look(refuse)
    with pytest.raises(OutputError, match="there is another"):
        hear(finding, Alone())
