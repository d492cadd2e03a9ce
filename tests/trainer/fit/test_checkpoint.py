"""Checkpoints: whole or absent, without code, the same for every topology, at moments from which one can go on."""

import os
import zipfile

import pytest
import torch
from runs import Run, checkpoint, fit, tiny

from shardio.errors import DatasetError, OutputError
from trainer.fit.checkpoint import AtomicCheckpointIO, KeepLast
from trainer.model.saved import load, step_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training on 1 rank and on 2 x 1 ranks, with averaged weights, two batches to a step."""
    words = tiny("--trainer.max_epochs=1", "--ema_decay=0.9", "--trainer.accumulate_grad_batches=2", "--save_every=3")
    return [
        fit(tmp_path_factory.mktemp("run"), *words, f"--strategy.num_gpus_per_model={ranks}", ranks=ranks)
        for ranks in (1, 2)
    ]


def test_a_checkpoint_holds_no_code(runs):
    for run in runs:
        path = run.output / "checkpoints" / "last.ckpt"
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: shapes(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shapes(part) for part in value]
    return type(value)


def test_a_checkpoint_does_not_depend_on_the_number_of_ranks(runs):
    one, two = (checkpoint(run.output) for run in runs)
    assert shapes(one) == shapes(two)
    assert one["loops"] == two["loops"]
    assert one["shardio"] == two["shardio"]


def test_a_checkpoint_says_what_a_forecast_needs(runs):
    about = checkpoint(runs[0].output)["shardio"]
    assert about["variables"] == ["psi", "vo", "u", "v", "t", "lsm", "latitude"]
    assert about["forcings"] == ["lsm", "latitude"]
    assert (about["input_steps"], about["step_seconds"]) == (1, 21600)
    assert about["network"]["channels"] == 8
    assert about["graph"]["hidden"] == "ico1"


def test_averaged_weights_are_the_weights_and_those_of_training_are_kept(runs):
    found = checkpoint(runs[0].output)
    averaged, current = found["state_dict"], found["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)
    for name in ("mean", "stdev", "tendencies"):  # what is not trained is not averaged
        assert torch.equal(averaged[f"forecaster.{name}"], current[f"forecaster.{name}"])


def test_gradients_that_add_up_are_never_between_a_checkpoint_and_its_data(tmp_path):
    words = tiny("--trainer.accumulate_grad_batches=4", "--save_every=1", "--trainer.max_epochs=100000")
    for _ in range(3):  # also right after it was resumed
        run = Run(tmp_path, "fit", *words, "--ckpt_path=last")
        before = run.steps
        run.until(lambda run=run, before=before: run.steps >= before + 2)
        run.kill()
        run.wait()
        position = checkpoint(run.output)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        assert position["cursor"] % 4 == 0


def test_an_existing_file_is_replaced_only_by_a_whole_one(tmp_path):
    writer, path = AtomicCheckpointIO(), tmp_path / "folder" / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    with pytest.raises(OutputError, match="The previous checkpoint is untouched"):
        writer.save_checkpoint({"step": Unwritable()}, path)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"step": Interrupted()}, path)
    assert load(path) == {"step": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]
    writer.remove_checkpoint(path)
    writer.remove_checkpoint(path)
    assert os.listdir(path.parent) == []


class Unwritable:
    """As a disk that is full."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


class Interrupted:
    """As by Ctrl-C."""

    def __reduce__(self):
        raise KeyboardInterrupt


def test_what_is_no_checkpoint_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no checkpoint .*Give the path of a \.ckpt file"):
        load(tmp_path / "none.ckpt")
    whole = tmp_path / "whole.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, whole)
    (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"cannot be read: .*Use another checkpoint of the run"):
        load(tmp_path / "cut.ckpt")
    torch.save({"code": OutputError}, tmp_path / "code.ckpt")
    with pytest.raises(DatasetError, match=r"cannot be read: it holds more than tensors, numbers and texts\."):
        load(tmp_path / "code.ckpt")
    (tmp_path / "my.yaml").write_text("data: {}\n")
    with pytest.raises(DatasetError, match=r"my.yaml is no checkpoint of `trainer fit`. Give the path of a"):
        load(tmp_path / "my.yaml")


def test_the_step_of_a_checkpoint_is_known(runs):
    assert step_of(runs[0].output / "checkpoints" / "last.ckpt") == checkpoint(runs[0].output)["global_step"] == 14


def test_a_checkpoint_every_less_than_one_step_is_refused(tmp_path):
    with pytest.raises(OutputError, match="save_every is 0"):
        KeepLast(tmp_path, 0)
