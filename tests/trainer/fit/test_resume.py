"""Training killed at any time and resumed: the same losses and weights, to the last bit on the same ranks."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from runs import Run, checkpoint, fit, tiny, trace

VALIDATION = ["--data.train_end=2020-01-07T06", "--data.val_start=2020-01-07T12"]
EVERYTHING = tiny(
    *VALIDATION,
    *("--trainer.max_epochs=4", "--trainer.accumulate_grad_batches=2", "--data.batch_size=2", "--ema_decay=0.9"),
    *("--model.rollout.maximum=2", "--model.rollout.epochs_per_increment=2", "--save_every=2"),
    *("--model.optimizer.warmup_steps=3", "--trainer.gradient_clip_val=0.5"),
)
# 24 windows in an epoch, 4 in a step, whatever the ranks; double precision, since Adam turns rounding into signs.
DOUBLE = [*EVERYTHING, "--trainer.precision=64-true"]
TOPOLOGIES = {
    "1 rank, batch 4": (1, ["--data.batch_size=4", "--trainer.accumulate_grad_batches=1"]),
    "1 rank, 4 x batch 1": (1, ["--data.batch_size=1", "--trainer.accumulate_grad_batches=4"]),
    "M=2, batch 4": (
        2,
        ["--strategy.num_gpus_per_model=2", "--data.batch_size=4", "--trainer.accumulate_grad_batches=1"],
    ),
    "M=2, 2 x batch 2": (2, ["--strategy.num_gpus_per_model=2"]),
    "D=2, batch 2": (2, ["--trainer.accumulate_grad_batches=1"]),
    "D=2, 2 x batch 1": (2, ["--data.batch_size=1"]),
}
LOGGED = ("train/loss", "train/learning_rate", "val/rmse/t/6h", "val/rmse_over_persistence")


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Places where two checkpoints are not the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [place for i, pair in enumerate(pairs) for place in differences(*pair, f"{where}/{i}")]
    return [] if one == other else [where]


def state(output: Path) -> dict[str, object]:
    """What a run has come to; without the paths of its folder, and without how often it was begun."""
    found = checkpoint(output)
    for callback in list(found["callbacks"]):
        if callback.startswith("ModelCheckpoint"):
            del found["callbacks"][callback]
    return {key: found[key] for key in found if key != "loops"} | {"global_step": found["global_step"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody killed, by the size of the model group."""
    runs = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole-{ranks}")
        runs[ranks] = fit(folder, *EVERYTHING, f"--strategy.num_gpus_per_model={ranks}", ranks=ranks)
    return runs


@pytest.mark.parametrize(("ranks", "kills"), [(1, 6), (2, 4)])
def test_training_killed_at_random_steps_and_resumed_is_bit_identical(whole, tmp_path, ranks, kills):
    arguments = ["fit", *EVERYTHING, f"--strategy.num_gpus_per_model={ranks}", "--ckpt_path=last"]
    chance = random.Random(ranks)
    for step in sorted(chance.sample(range(1, 18), kills)):  # of 24: the kill must find it at work
        run = Run(tmp_path, *arguments, ranks=ranks)
        run.until(lambda run=run, step=step: run.steps >= step)
        run.kill()
        assert run.wait() == [-9] * ranks, run.errors
    resumed = Run(tmp_path, *arguments, ranks=ranks)
    assert resumed.wait() == [0] * ranks, resumed.errors
    assert len(trace(resumed.output)) == 24
    for name in LOGGED:
        assert trace(resumed.output, name) == trace(whole[ranks].output, name)
    assert differences(state(resumed.output), state(whole[ranks].output)) == []


@pytest.fixture(scope="module")
def in_double(tmp_path_factory):
    """A whole run in double precision, and runs of every topology killed in the middle of the second epoch."""
    reference = fit(tmp_path_factory.mktemp("double"), *DOUBLE, *TOPOLOGIES["1 rank, batch 4"][1])
    killed = {}
    for name in ("1 rank, 4 x batch 1", "M=2, batch 4", "D=2, 2 x batch 1"):
        ranks, more = TOPOLOGIES[name]
        run = Run(tmp_path_factory.mktemp("killed"), "fit", *DOUBLE, *more, ranks=ranks)
        run.until(lambda run=run: run.steps >= 9)
        run.kill()
        run.wait()
        assert checkpoint(run.output)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["cursor"] > 0
        killed[name] = run
    return reference, killed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1 rank, 4 x batch 1", "M=2, 2 x batch 2"),
        ("1 rank, 4 x batch 1", "D=2, batch 2"),
        ("M=2, batch 4", "D=2, 2 x batch 1"),
        ("D=2, 2 x batch 1", "1 rank, batch 4"),
        ("D=2, 2 x batch 1", "M=2, batch 4"),
    ],
)
def test_training_resumed_amid_an_epoch_on_other_ranks_is_the_same(in_double, tmp_path, before, after):
    reference, killed = in_double
    shutil.copytree(killed[before].output, tmp_path / "run")
    ranks, more = TOPOLOGIES[after]
    resumed = fit(tmp_path, *DOUBLE, *more, "--ckpt_path=last", ranks=ranks)
    expected, found = trace(reference.output), trace(resumed.output, version="1")
    first = checkpoint(killed[before].output)["global_step"] + 1
    assert list(found) == list(range(first, 25))
    for step, loss in found.items():
        assert float(loss) == pytest.approx(float(expected[step]), rel=1e-10)
    for part in ("state_dict", "current_model_state"):
        one, other = checkpoint(resumed.output)[part], checkpoint(reference.output)[part]
        for name in other:
            assert torch.allclose(one[name], other[name], rtol=1e-10, atol=1e-12), name


def test_an_epoch_that_fills_no_more_batch_on_other_ranks_is_over(tmp_path):
    common = tiny("--data.train_end=2020-01-07T06", "--trainer.max_epochs=3")
    fit(tmp_path, *common, "--trainer.max_steps=24")  # of the 25 windows of an epoch one is left
    resumed = fit(tmp_path, *common, "--data.batch_size=5", "--ckpt_path=last")
    found = checkpoint(resumed.output)
    assert found["global_step"] == 24 + 2 * 5
    assert found["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["epoch"] == 3


@pytest.mark.parametrize("name", ["last", "best"])
def test_training_that_max_steps_ended_goes_on_as_if_it_had_not(tmp_path, name):
    common = tiny(*VALIDATION, "--model.optimizer.final_fraction=1", "--data.batch_size=4", "--save_every=100")
    reference = fit(tmp_path, *common, "--output=whole")
    short = fit(tmp_path, *common, "--trainer.max_steps=9")
    if name == "best":  # which is older
        refused = Run(tmp_path, "fit", *common, "--ckpt_path=best")
        assert refused.wait() == [1]
        assert "best.ckpt, step 6, would replace last.ckpt of the same run, step 9. Give another" in refused.errors
        (short.output / "checkpoints" / "last.ckpt").unlink()
    resumed = fit(tmp_path, *common, f"--ckpt_path={name}")
    assert differences(state(resumed.output), state(tmp_path / "whole")) == []
    assert trace(resumed.output) == trace(reference.folder / "whole")


def test_epochs_of_few_batches_are_resumed_exactly(tmp_path):
    common = tiny("--trainer.limit_train_batches=5", "--trainer.max_epochs=3", "--model.rollout.maximum=3")
    reference = fit(tmp_path, *common, "--output=whole")
    run = Run(tmp_path, "fit", *common)
    run.until(lambda: run.steps >= 6)
    run.kill()
    run.wait()
    resumed = fit(tmp_path, *common, "--ckpt_path=last")
    assert differences(state(resumed.output), state(reference.folder / "whole")) == []
    assert len(trace(resumed.output)) == 15


def test_a_checkpoint_older_than_an_option_goes_on_with_its_default(tmp_path):
    fit(tmp_path, *tiny("--trainer.max_steps=1"))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)
    del kept["shardio"]["graph"]["neighbours"]  # as if it had not existed
    torch.save(kept, last)
    fit(tmp_path, *tiny("--trainer.max_steps=2", "--ckpt_path=last"))
    refused = Run(tmp_path, "fit", *tiny("--trainer.max_steps=3", "--ckpt_path=last", "--model.graph.neighbours=7"))
    assert refused.wait() == [1]
    assert refused.errors.startswith("Error: the checkpoint was trained with graph")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("--data.drop=[vo]", "variables ['psi', 'vo', 'u'"),
        ("--model.forcings=[latitude,lsm]", "forcings ['lsm', 'latitude'], this run has ['latitude', 'lsm']"),
        ("--data.frequency=12h", "step_seconds 21600, this run has 43200"),
    ],
)
def test_a_checkpoint_whose_weights_would_mean_something_else_is_refused(tmp_path, change, name):
    fit(tmp_path, *tiny("--trainer.max_steps=1"))
    run = Run(tmp_path, "fit", *tiny(change, "--ckpt_path=last"))
    assert run.wait() == [1]
    assert run.errors.startswith(f"Error: the checkpoint was trained with {name}")
    assert "Use the configuration and the grid that it was trained with." in run.errors


def test_one_seed_draws_the_weights_and_the_order_of_samples(tmp_path):
    common = tiny("--trainer.max_steps=3", "--seed_everything=5")
    one, same, other = (
        trace(fit(tmp_path, *common, *words, f"--output={number}").folder / str(number))
        for number, words in enumerate(([], ["--data.seed=5"], ["--data.seed=0"]))
    )
    assert one == same != other


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_is_none_is_refused(tmp_path, seed):
    run = Run(tmp_path, "fit", *tiny(f"--seed_everything={seed}"))
    assert run.wait() == [1]
    assert run.errors == f"Error: seed_everything is {seed}. Use 0 to 4294967295.\n"


def test_a_logger_that_is_asked_for_logs_beside_our_own(tmp_path):
    words = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'mine'}"]
    run = fit(tmp_path, *tiny("--trainer.max_steps=2"), *words)
    (mine,) = (tmp_path / "mine").rglob("metrics.csv")
    assert len(mine.read_text().splitlines()) >= 2
    assert len(trace(run.output)) == 2
