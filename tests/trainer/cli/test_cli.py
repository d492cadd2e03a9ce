"""The command `trainer`: it teaches, refuses what cannot work before any rank starts, and prints results only."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from runs import Run, fit, tiny, trace, waves

import shardio

VALIDATION = ["--data.train_end=2020-01-05", "--data.val_start=2020-01-06", "--model.validation_steps=2"]
UNITS = {"psi": "m2 s-1", "vo": "s-1", "u": "m s-1", "v": "m s-1", "t": "K"}
M4 = ["--trainer.devices=4", "--strategy.num_gpus_per_model=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("trained"), *tiny(*VALIDATION))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "trainer fit --config demo"),
        (["--help"], "  predict    forecasts from a checkpoint"),
        (["plan", "--help"], "usage: trainer plan --config FILE [--OPTION VALUE ...]\n"),
        (["plan", "--help"], "\n  trainer plan --config my.yaml --gpus-per-model 1,2,4,8,16\n"),
        (["fit", "--help"], "torchrun --nproc_per_node 4 -m trainer.cli fit"),
        (["fit", "--help"], "R, ranks that together read one sample; divides"),
        (["validate", "--help"], "compare with persistence"),
        (["--version"], shardio.__version__),
    ],
)
def test_help_teaches_on_stdout(tmp_path, arguments, words):
    run = Run(tmp_path, *arguments)
    assert (run.wait(), run.errors) == ([0], "")
    assert words in run.printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--nonsense=1"], "trainer fit has no option nonsense."),
        (["export", "--nonsense=1"], "trainer export has no option nonsense."),
        (["validate", "--ckpt-pathh=1"], "trainer validate has no option ckpt_pathh. Did you mean ckpt_path?"),
        (["fit", "--data.batch_size=many"], "Expected a <class 'int'>. Got value: many"),
        (["fitt"], "trainer has no command 'fitt'. Did you mean fit? It has: fit, validate, predict, export, plan."),
        (["fit", "--model.network.chanels=8"], "Did you mean model.network.channels?\nAll options: trainer fit --help"),
        (
            ["fit", "--config=typo.yaml"],
            "no option model.network.chanels (in typo.yaml). Did you mean model.network.channels?",
        ),
        (["fit", "--config=typo.yaml"], "All options: trainer fit --help"),
        (["fit", "--config", "lists.yaml"], "model.forcings is lsm,insol. Write [lsm,insol]."),
        (
            ["predict", "--config=typo.yaml", "--ckpt_path=last", "--start=2020"],
            "no option model.network.chanels (in typo",
        ),
        (["plan", "--config=typo.yaml"], "(in typo.yaml). Did you mean model.network.channels?"),
        (["fit", "--model.forcings=lsm,insol"], "model.forcings is lsm,insol. Write [lsm,insol]."),
        (["predict", "--start=2020"], "All options: trainer predict --help"),
        (["fit"], "arguments are required: fit.data.dataset"),
    ],
)
def test_wrong_usage_is_told_without_pages_of_usage(tmp_path, arguments, words):
    (tmp_path / "typo.yaml").write_text("model: {network: {chanels: 8}}\n")
    (tmp_path / "lists.yaml").write_text("model: {forcings: 'lsm,insol'}\n")
    run = Run(tmp_path, *arguments)
    assert run.wait() == [2]
    assert words in run.errors
    assert run.errors.startswith("Error: ")
    assert len(run.errors.splitlines()) <= 4


CANNOT_WORK = {
    "world": (
        ["--trainer.devices=3", "--strategy.num_gpus_per_model=2"],
        "num_gpus_per_model 2 does not divide the world size 3. Use one of: 1, 3.",
    ),
    "read group": (
        [*M4, "--strategy.read_group_size=3"],
        "read_group_size 3 does not divide num_gpus_per_model 4. Use one of: 1, 2, 4.",
    ),
    "forcing": (["--model.forcings=[sst]"], "forcings sst are not in the dataset. It has: psi, vo, u, v, t, lsm,"),
    "diagnostic": (["--model.diagnostics=[tp]"], "diagnostics tp are not in the dataset."),
    "allow_nan": (["--model.allow_nan=[sst]"], "allow_nan sst are not in the dataset."),
    "weights": (
        ["--model.loss.variable_weights.lsm=2"],
        "the loss has weights for lsm, which the model does not forecast. It forecasts: psi, vo, u, v, t.",
    ),
    "selection": (["--data.select=[t,q]"], "has no variable q. It has: psi"),
    "mesh": (["--model.graph.hidden=o32"], "hidden mesh o32 is finer than the grid: 1688 nodes, 544 cells. Try o16"),
    "no mesh": (["--model.graph.hidden=x3"], "'x3' names no hidden mesh. Use o1, o2,"),
    "heads over ranks": (
        [*M4, "--model.network.shard_strategy=heads"],
        "2 attention heads cannot be cut over 4 ranks. Use shard_strategy edges, or num_heads of 4 or more.",
    ),
    "channels": (["--model.network.num_heads=3"], "8 channels cannot be cut into 3 heads. Use num_heads of: 1, 2, 4"),
    "no dataset": (["--data.dataset=/nowhere.zarr"], "/nowhere.zarr does not exist. Check the path."),
    "relative dataset": (
        ["--data.dataset=no/where.zarr"],
        "/no/where.zarr. Paths are relative to the folder where the",
    ),
    "windows": (
        ["--model.rollout.maximum=40"],
        "28 training dates, 2020-01-01T00:00:00 to 2020-01-07T18:00:00, hold 0 windows of 1 + 40 dates without a gap",
    ),
    "batches": (
        ["--data.batch_size=14", "--trainer.devices=2"],
        "hold 27 windows of 1 + 1 dates without a gap: fewer than the 28 of one step (batch size 14, 2 data groups).",
    ),
    "validation windows": (
        ["--data.val_start=2020-01-07", "--model.validation_steps=9"],
        "4 validation dates, 2020-01-07T00:00:00 to 2020-01-07T18:00:00, hold 0 windows of 1 + 9 dates",
    ),
    "validation dates": (["--data.val_start=2021"], "lies between 2021 and its end: it holds 2020-01-01T00:00:00 to"),
    "no samples": (["--data.batch_size=0"], "batch_size is 0, input_steps 1. Use 1 or more for both."),
    "rollout": (["--model.rollout.start=3"], "rollout from 3 to 1 steps"),
    "optimizer": (["--model.optimizer.name=adam"], "optimizer name 'adam' is unknown. Use one of: adamw, sgd."),
    "timeout": (["--strategy.timeout_seconds=0"], "timeout_seconds is 0.0. Use more than 0"),
    "save_every": (["--save_every=0"], "save_every is 0. Use 1 step or more."),
    "half precision": (["--trainer.precision=bf16-true"], "would keep fields in 16 bits"),
    "strategy": (["--trainer.strategy=ddp"], "Set --strategy.num_gpus_per_model instead."),
    "checkpoint": (["--ckpt_path=my.ckpt"], "there is no checkpoint my.ckpt. Give the path of a .ckpt file"),
}


@pytest.mark.parametrize("name", CANNOT_WORK)
def test_what_cannot_work_fails_with_the_remedy_before_any_rank_starts(tmp_path, name):
    arguments, words = CANNOT_WORK[name]
    several = [] if any(word.startswith("--trainer.devices") for word in arguments) else ["--trainer.devices=2"]
    run = Run(tmp_path, "fit", *tiny(*several, *arguments))
    assert run.wait() == [1]
    assert run.errors.startswith("Error: ") and len(run.errors.splitlines()) == 1, run.errors
    assert words in run.errors
    assert run.started == ""
    assert not run.output.exists()


def test_tensorboard_that_is_not_installed_is_named(tmp_path):
    run = Run(tmp_path, "fit", *tiny("--tensorboard=true", "--trainer.max_steps=1"))
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert run.wait() == [1]
        assert "--tensorboard needs a package that is not installed. Run pip install tensorboard" in run.errors
    else:
        assert run.wait() == [0]
        assert list(run.output.glob("tensorboard/version_0/events*"))


def test_fit_prints_one_fact_and_leaves_log_picture_and_checkpoints(trained):
    assert trained.errors == ""
    assert trained.printed.startswith("trained to step 38 in ")
    assert len(trained.printed.splitlines()) == 1
    assert len(trace(trained.output)) == 38
    assert len(trace(trained.output, "val/rmse/t/12h")) == 2
    assert (trained.output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in (trained.output / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert (trained.output / "logs" / "version_0" / "config.yaml").exists()


def test_progress_goes_to_stderr(tmp_path):
    run = fit(tmp_path, *tiny("--trainer.max_steps=3", "--trainer.enable_progress_bar=true", "--json"))
    assert json.loads(run.printed)["step"] == 3
    assert "Epoch 1/2" in run.errors


def test_a_terminal_is_told_what_happens_before_the_first_step(tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    words = tiny("--trainer.max_epochs=1", "--trainer.enable_progress_bar=true", "--trainer.devices=2")
    command = [sys.executable, "-m", "trainer.cli", "fit", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    told = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 65536):
            told += part
    os.close(terminal)
    assert process.wait() == 0
    assert told.index(b"starting 2 ranks ...") < told.index(b"building the graph ...") < told.index(b"Epoch 1/1")
    assert told.count(b"building the graph ...") == 1
    assert b"v_num" not in told
    assert re.search(rb"train/loss: [0-9.e-]+", told)


def test_validate_prints_the_same_scores_as_a_table_and_as_json(trained):
    arguments = [*tiny(*VALIDATION), "--ckpt_path=last"]
    table, data = Run(trained.folder, "validate", *arguments), Run(trained.folder, "validate", *arguments, "--json")
    assert (table.wait(), table.errors) == ([0], "")
    assert data.wait() == [0]
    result = json.loads(data.printed)
    assert (result["from"], result["to"]) == ("2020-01-06T00:00:00", "2020-01-07T18:00:00")
    assert list(result["scores"]) == ["psi", "vo", "u", "v", "t"]
    for variable, leads in result["scores"].items():
        assert list(leads) == ["6h", "12h"]
        row = next(line for line in table.printed.splitlines() if f" {variable} " in line)
        assert f" {UNITS[variable]} " in row
        for score in leads.values():
            assert f"{score['rmse']:.4g} ({score['persistence']:.4g})" in row
            assert score["ratio"] == pytest.approx(score["rmse"] / score["persistence"])
    logged = float(trace(trained.output, "val/rmse/t/12h").popitem()[1])
    assert result["scores"]["t"]["12h"]["rmse"] == pytest.approx(logged, rel=1e-6)


def test_hyphens_do_for_underscores_in_every_command(trained):
    """Lightning's as well as ours."""
    for command, *more in (["fit", "--trainer.max-epochs=2"], ["validate"]):
        run = Run(
            trained.folder, command, *tiny(*VALIDATION), "--ckpt-path", "last", "--trainer.limit-val-batches=1", *more
        )
        assert run.wait() == [0], run.errors


def test_validation_without_a_checkpoint_is_refused(trained):
    run = Run(trained.folder, "validate", *tiny(*VALIDATION, "--trainer.devices=2"))
    assert (run.wait(), run.started) == ([1], "")
    assert run.errors.startswith("Error: no checkpoint is named")
    assert "Give --ckpt_path last, best, or the path" in run.errors


def test_ranks_that_torchrun_or_slurm_start_need_no_change_of_the_config(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(f"data: {{dataset: {waves()}}}\nstrategy: {{num_gpus_per_model: 2}}\n")
    words = [word for word in tiny("--trainer.max_steps=2") if not word.startswith("--data.dataset")]
    arguments = ["fit", "--config", str(config), *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*torchrun, "-m", "trainer.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("trained to step 2 in ")
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "1",
    }
    run = Run(tmp_path, *arguments, "--output=by_slurm", ranks=2, environment=slurm, launcher="slurm")
    assert run.wait() == [0, 0], run.errors
    assert trace(tmp_path / "run") == trace(tmp_path / "by_slurm")


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from trainer.cli.main import main; main(['--help']); "
        "assert not {'torch', 'lightning', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trainer plan --config demo" in done.stdout
