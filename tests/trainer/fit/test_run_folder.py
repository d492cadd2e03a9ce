"""The folder of a run: nothing in it is replaced unasked, and one training at a time writes to it."""

import json
import re

import pytest
import torch
from runs import Run, checkpoint, fit, gone, tiny, trace

from trainer.fit.run_folder import described

LONG = tiny("--trainer.max_epochs=100000")
SHORT = tiny("--trainer.max_steps=3", "--trainer.max_epochs=-1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("trained"), *SHORT)


@pytest.mark.parametrize("more", [[], ["--ckpt_path=other.ckpt"]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_not_replaced_unasked(trained, ranks, more):
    (trained.folder / "other.ckpt").write_bytes((trained.output / "checkpoints" / "last.ckpt").read_bytes())
    run = Run(trained.folder, "fit", *SHORT, *more, ranks=ranks)
    assert run.wait() == [1] * ranks
    assert run.errors.endswith(
        "run holds a run, last checkpoint: step 3. Use --ckpt_path last to go on with it, another --output to keep "
        "it, or --overwrite to replace it.\n"
    )
    assert len(run.errors.splitlines()) == 1
    assert run.started == ""
    assert trained.steps == 3


def test_overwrite_replaces_a_run_and_all_that_it_logged(tmp_path):
    before = fit(tmp_path, *tiny("--trainer.max_steps=5", "--data.val_start=2020-01-06", "--trainer.max_epochs=-1"))
    weights = checkpoint(before.output)["state_dict"]
    run = fit(tmp_path, *SHORT, "--seed_everything=1", "--overwrite")
    assert list(trace(run.output)) == [1, 2, 3]
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["last.ckpt"]
    assert any(not weights[name].equal(values) for name, values in checkpoint(run.output)["state_dict"].items())


def test_what_is_to_be_overwritten_stays_until_the_new_run_has_taken_a_step(trained, tmp_path):
    before = fit(tmp_path, *SHORT)
    kept = {path: path.read_bytes() for path in before.output.rglob("*") if path.is_file() and path.name != ".lock"}
    other = trained.output / "checkpoints" / "last.ckpt"
    run = Run(tmp_path, "fit", *SHORT, "--overwrite", f"--ckpt_path={other}", "--model.graph.hidden=ico0")
    assert run.wait() == [1]
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_run_that_replaced_another_does_not_say_so_in_the_configuration_it_keeps(trained):
    run = fit(trained.folder, *SHORT, "--overwrite", "--output=again")
    (kept,) = run.output.parent.glob("again/logs/version_*/config.yaml")
    assert "overwrite: false" in kept.read_text()


def test_logs_of_a_run_that_left_no_checkpoint_are_not_taken_for_the_new_one(tmp_path):
    dead = tmp_path / "run" / "logs" / "version_0"
    dead.mkdir(parents=True)
    (dead / "metrics.csv").write_text("step,train/loss\n9,1e9\n")
    run = fit(tmp_path, *SHORT, "--json")
    assert list(trace(run.output)) == [1, 2, 3]
    assert json.loads(run.printed)["loss"] < 1e3


@pytest.mark.parametrize("content", [b"model: {}", b"PK\x03\x04cut short", None])
def test_what_is_no_checkpoint_is_told_as_such(trained, content):
    path = trained.folder / "no.ckpt"
    torch.save({"global_step": 3}, path) if content is None else path.write_bytes(content)
    run = Run(trained.folder, "fit", *SHORT, "--ckpt_path=no.ckpt", "--output=elsewhere")
    assert run.wait() == [1]
    assert len(run.errors.splitlines()) == 1
    assert "no.ckpt is no checkpoint of" in run.errors or "no.ckpt cannot be read" in run.errors
    assert "weights_only" not in run.errors


def test_what_is_to_be_overwritten_cannot_be_resumed(trained):
    run = Run(trained.folder, "fit", *SHORT, "--ckpt_path=last", "--overwrite")
    assert run.wait() == [1]
    assert "--overwrite would remove run/checkpoints/last.ckpt, from which to go on." in run.errors


def test_a_second_training_into_the_same_folder_is_refused_until_the_first_has_ended(tmp_path):
    first = Run(tmp_path, "fit", *LONG)
    first.until(lambda: first.steps >= 1)
    second = Run(tmp_path, "fit", *LONG, "--ckpt_path=last")
    assert second.wait() == [1]
    assert re.match(r"Error: another `trainer fit` is writing to run: process \d+ on \S+\. Wait", second.errors)
    assert not gone(first.pids[0])
    first.kill()
    first.wait()
    fit(tmp_path, *SHORT, "--ckpt_path=last", "--trainer.max_steps=-1", "--trainer.max_epochs=1")


def test_a_folder_that_cannot_be_written_is_told_before_ranks_start(tmp_path):
    (tmp_path / "file").touch()
    run = Run(tmp_path, "fit", *tiny("--output=file/run", "--trainer.devices=2"))
    assert (run.wait(), run.started) == ([1], "")
    assert run.errors.startswith("Error: the folder file/run cannot be written: ")
    assert run.errors.endswith("Choose another with --output.\n")


def test_a_run_whose_checkpoint_is_damaged_is_described_all_the_same(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert described(tmp_path) == "no last.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert described(tmp_path).endswith("last.ckpt cannot be read")
    torch.save([torch.zeros(1)], tmp_path / "checkpoints" / "last.ckpt")
    assert described(tmp_path).endswith("last.ckpt cannot be read")


def test_one_process_trains_twice_in_the_same_folder(tmp_path):
    """As in a notebook, on one rank: nothing of the first training stands in the way of the second."""
    more = ["--ckpt_path=last", "--trainer.max_steps=5"]
    code = f"from trainer.cli.main import main; main({['fit', *SHORT]}); main({['fit', *SHORT, *more]})"
    run = Run(tmp_path, "-c", code)
    assert run.wait() == [0], run.errors
    assert [line.split(" in ")[0] for line in run.printed.splitlines()] == ["trained to step 3", "trained to step 5"]
    assert list(trace(run.output)) == [1, 2, 3, 4, 5]
