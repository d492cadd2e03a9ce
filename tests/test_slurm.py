"""The SLURM scripts run: whole, by bash, with stand-ins for the two commands of SLURM that start a job's nodes here."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from shardio import open_dataset

SCRIPTS = Path(__file__).parents[1] / "tools" / "slurm"
# As srun does: the command once per node, all at once; the first that fails ends the others.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
nodes=()
trap 'kill "${nodes[@]}" 2>/dev/null' TERM
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" > "node-$node.log" 2>&1 &
    nodes+=($!)
done
for _ in "${nodes[@]}"; do
    wait -n || { kill "${nodes[@]}" 2>/dev/null; exit 1; }
done
"""
TINY = [
    *(
        "--config",
        "demo",
        "--data.dataset",
        "o8.zarr",
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "2",
    ),
    *("--model.graph.hidden", "ico1", "--model.network.channels", "8", "--model.network.num_layers", "1"),
    *("--data.train_end", "2020-01-05", "--data.val_start", "2020-01-06", "--data.threads", "1"),
]


def submit(folder: Path, script: str, *arguments: str, **environment: str) -> str:
    """Run a script as the first of two nodes would; what it and all nodes printed."""
    commands = folder / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\necho localhost\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = [str(commands), str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]]
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost"}
    done = subprocess.run(
        ["bash", SCRIPTS / script, *arguments],
        cwd=folder,
        env=os.environ | slurm | {"PATH": ":".join(path), "SLURM_CPUS_PER_TASK": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    printed = "\n".join([done.stdout, *(log.read_text() for log in sorted(folder.glob("node-*.log")))])
    assert done.returncode == 0, printed
    return printed


def synth(path: Path) -> None:
    command = [sys.executable, "-m", "shardio.cli", "synth", str(path), "--grid", "o8", "--dates", "28"]
    subprocess.run([*command, "--grid-chunks", "4", "--no-fsync"], check=True, capture_output=True)


def test_one_model_is_trained_over_two_nodes(tmp_path: Path) -> None:
    synth(tmp_path / "o8.zarr")
    arguments = [*TINY, "--strategy.num_gpus_per_model", "2"]
    submit(tmp_path, "train_cpu.sbatch", *arguments, RANKS_PER_NODE="1")
    (metrics,) = (tmp_path / "run" / "logs").glob("version_0/metrics.csv")
    assert "train/loss" in metrics.read_text()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    # Without the other node's rank a model group of two could not have been formed; both logs are of one world.
    assert {log.name for log in tmp_path.glob("node-*.log")} == {"node-0.log", "node-1.log"}


def test_dates_are_rechunked_by_the_workers_of_two_nodes(tmp_path: Path) -> None:
    synth(tmp_path / "o8.zarr")
    arguments = ["o8.zarr", "o8-2.zarr", "--grid-chunks", "2"]
    printed = submit(tmp_path, "rechunk_dask.sbatch", *arguments, WORKERS_PER_NODE="1")
    source, cut = (open_dataset(str(tmp_path / name)) for name in ("o8.zarr", "o8-2.zarr"))
    assert (source[:] == cut[:]).all()
    assert printed.count("Registered to") == 2
    assert not list(tmp_path.glob(".dask-*")), "the scheduler's file is left"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_every_script_says_how_to_submit_it_and_stops_at_errors(script: Path) -> None:
    text = script.read_text()
    assert f"tools/slurm/{script.name} " in text
    assert "set -euo pipefail" in text


def test_gpu_script_differs_from_the_tested_one_in_device_and_settings_only() -> None:
    launch = [(SCRIPTS / name).read_text().partition("srun ")[2] for name in ("train_cpu.sbatch", "train_gpu.sbatch")]
    same = launch[0].replace("ranks_per_node", "gpus_per_node").replace("accelerator cpu", "accelerator cuda")
    assert same == launch[1]
