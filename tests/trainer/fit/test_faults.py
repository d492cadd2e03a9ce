"""A rank that dies, throws or hangs: all stop within seconds, one message says why, and what was saved stays whole."""

import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from forecasting import START
from runs import Run, checkpoint, fit, gone, tiny, waves

from trainer.ranks import failure

SECONDS = 15.0  # for all ranks to end; what hangs takes ten minutes
ENDLESS = "--trainer.max_epochs=100000"
TWO = [ENDLESS, "--strategy.num_gpus_per_model=2"]


def under_way(folder, *arguments, ranks=1):
    run = Run(folder, "fit", *arguments, ranks=ranks)
    run.until(lambda: run.steps >= 3)
    return run


def messages(run):
    """All that the user sees must be messages; each is one line."""
    lines = run.errors.strip().splitlines()
    assert all(line.startswith("Error: ") for line in lines), run.errors
    return lines


def interrupted(run):
    """What an interrupt says."""
    return f"Interrupted; last checkpoint: step {checkpoint(run.output)['global_step']}. Resume with --ckpt_path last."


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


LOST = "rank 0: stopped, because the connection to another rank was lost. Without a message of that rank it was killed"
WITH_THE_FIRST = "rank 1: stopped with rank 0, which was killed, often for lack of memory, if it left no message."


@pytest.mark.parametrize(("victim", "codes", "words"), [(1, [1, -9], LOST), (0, [-9, 1], WITH_THE_FIRST)])
def test_a_rank_killed_amid_a_step_stops_all(tmp_path, victim, codes, words):
    run = under_way(tmp_path, *tiny(*TWO), ranks=2)
    run.kill(victim)
    assert run.wait(SECONDS) == codes
    (message,) = messages(run)
    assert message.startswith(f"Error: {words}")
    assert "Resume with --ckpt_path last." in message
    assert checkpoint(run.output)["global_step"] >= 2


def test_a_killed_rank_of_those_that_the_trainer_started_is_named(tmp_path):
    run = under_way(tmp_path, *tiny(*TWO, "--trainer.devices=2"))
    (child,) = children(run.pids[0])
    os.kill(child, signal.SIGKILL)
    assert run.wait(SECONDS) == [1]
    (message,) = messages(run)
    assert message == (
        "Error: rank 1 was killed by SIGKILL, often for lack of memory. All ranks stop. Resume with --ckpt_path last."
    )


@pytest.fixture
def predicting(path, checkpoint, tmp_path):
    """`predicting(ranks, *more)`: the first of many forecasts under way."""
    dates = (f"--start={START}", "--end=2021-03-10", "--lead-time=24h")
    given = (f"--ckpt_path={checkpoint}", f"--dataset={path}", *dates)

    def begin(ranks, *more):
        run = Run(tmp_path, "predict", *given, "--num_gpus_per_model=2", *more, ranks=ranks)
        run.until(lambda: list(tmp_path.glob("forecasts/*.partial/ledger*")))
        return run

    return begin


GO_ON = "Run the same command again: it goes on where it stopped."


def test_a_forecast_whose_rank_is_killed_says_how_it_goes_on(predicting):
    run = predicting(2)
    run.kill(1)
    assert run.wait(SECONDS) == [1, -9]
    assert f"Error: {LOST}" in run.errors
    assert GO_ON in run.errors
    assert "ckpt_path" not in run.errors


def test_a_forecast_that_starts_its_ranks_says_how_it_goes_on(predicting):
    run = predicting(1, "--devices=2")
    (child,) = children(run.pids[0])
    os.kill(child, signal.SIGKILL)
    assert run.wait(SECONDS) == [1]
    assert f"Error: rank 1 was killed by SIGKILL, often for lack of memory. All ranks stop. {GO_ON}" in run.errors


def test_an_interrupted_forecast_says_how_it_goes_on(predicting):
    run = predicting(1, "--devices=1", "--num_gpus_per_model=1")
    os.kill(run.pids[0], signal.SIGINT)
    assert run.wait(SECONDS) == [130]
    assert run.errors.strip().endswith(f"Interrupted. {GO_ON}")


def test_a_validation_that_loses_a_rank_is_to_be_run_again(tmp_path):
    last = fit(tmp_path, *tiny("--trainer.max_steps=1")).output / "checkpoints" / "last.ckpt"
    more = tiny("--strategy.num_gpus_per_model=2", "--strategy.timeout_seconds=5", "--data.val_start=2020-01-05")
    run = Run(tmp_path, "validate", *more, f"--ckpt_path={last}", ranks=2)
    run.kill(1)
    assert run.wait()[0] == 1
    (message,) = messages(run)
    assert f"{LOST}, often for lack of memory, or hangs. Run the same command again. (" in message


def test_a_message_is_told_while_another_thread_keeps_torch_silent(capfd):
    """The thread that watches the ranks tells of a killed one just when the other asks the ranks' store."""
    hangs, done = threading.Event(), threading.Event()

    def ask(until):
        with failure.STDERR.silent():
            os.write(2, b"pages of C++")
            until.wait()

    threads = [threading.Thread(target=ask, args=(until,)) for until in (hangs, done)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    failure.tell("rank 1 was killed")
    done.set()
    threads[1].join()
    failure.tell("all stop")
    hangs.set()
    threads[0].join()
    os.write(2, b"and torch may speak again")
    assert capfd.readouterr().err == "Error: rank 1 was killed\nError: all stop\nand torch may speak again"


def test_an_interrupt_ends_all_ranks_and_leaves_a_checkpoint(tmp_path):
    run = under_way(tmp_path, *tiny(*TWO, "--trainer.devices=2"))
    (child,) = children(run.pids[0])
    os.killpg(run.pids[0], signal.SIGINT)  # as a terminal does
    assert run.wait(SECONDS) == [130]
    assert run.errors.strip() == interrupted(run)
    time.sleep(0.5)
    assert gone(child)
    assert checkpoint(run.output)["global_step"] >= 2
    assert list((run.output / "checkpoints").glob(".*")) == []


def test_a_request_to_terminate_is_an_interrupt(tmp_path):
    run = under_way(tmp_path, *tiny(ENDLESS))
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait(SECONDS) == [130]
    assert run.errors.strip() == interrupted(run)


def test_a_rank_that_hangs_is_given_up_after_the_timeout(tmp_path):
    run = under_way(tmp_path, *tiny(*TWO, "--strategy.timeout_seconds=2"), ranks=2)
    began = time.monotonic()
    os.kill(run.pids[1], signal.SIGSTOP)
    while not gone(run.pids[0]):
        assert time.monotonic() - began < SECONDS
        time.sleep(0.05)
    run.kill()
    assert run.wait()[0] == 1
    (message,) = messages(run)
    assert "Timed out waiting 2000ms" in message


def test_a_corrupt_chunk_that_one_rank_reads_is_the_one_message(tmp_path):
    dataset = shutil.copytree(waves(), tmp_path / "waves.zarr")
    run = under_way(tmp_path, *tiny(*TWO, dataset=dataset), ranks=2)
    file = dataset / "data" / "c.5.0.0.0"
    content = bytearray(file.read_bytes())
    offset, length = np.frombuffer(content[-4 * 16 - 4 : -4], "<u8").reshape(4, 2)[3].tolist()
    content[offset + length // 2] ^= 4  # of the last of four chunks
    file.write_bytes(content)
    assert run.wait(SECONDS) == [1, 1]
    (message,) = messages(run)
    assert message.startswith("Error: rank 1: date 2020-01-02T06:00:00, grid-chunk 3: ")
    assert "shardio verify" in message


@pytest.fixture
def holes(tmp_path):
    """A dataset with one value that is not a number: t of date 9, in the cells of the last rank."""
    dataset = shutil.copytree(waves(), tmp_path / "holes.zarr")
    stored = zarr.open(str(dataset), mode="r+")
    stored["data"][9, stored.attrs["variables"].index("t"), 0, -1] = np.nan
    return dataset


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_in_a_batch_stops_with_variable_and_date(holes, tmp_path, ranks):
    run = Run(tmp_path, "fit", *tiny(f"--strategy.num_gpus_per_model={ranks}", dataset=holes), ranks=ranks)
    assert run.wait() == [1] * ranks
    (message,) = messages(run)
    assert f"Error: {'rank 1: ' if ranks == 2 else ''}t of 2020-01-03T06:00:00 is not finite in 1 of" in message
    assert "--model.allow_nan" in message


def test_a_nan_in_a_variable_that_may_have_them_passes(holes, tmp_path):
    run = fit(tmp_path, *tiny("--model.allow_nan=[t]", "--data.val_start=2020-01-03", dataset=holes))
    weights = checkpoint(run.output)["state_dict"]
    assert all(bool(np.isfinite(weight.numpy()).all()) for weight in weights.values())


def test_a_training_that_diverges_stops_with_the_forecast_that_did(tmp_path):
    run = Run(tmp_path, "fit", *tiny("--model.optimizer.learning_rate=1e30"))
    assert run.wait() == [1]
    (message,) = messages(run)
    assert "is not finite in step" in message
    assert "Lower --model.optimizer.learning_rate" in message


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    run = under_way(tmp_path, *tiny(ENDLESS))
    last = run.output / "checkpoints" / "last.ckpt"
    limit = last.stat().st_size // 2
    resource.prlimit(run.pids[0], resource.RLIMIT_FSIZE, (limit, limit))
    assert run.wait(SECONDS) == [1]
    (message,) = messages(run)
    assert message.startswith("Error: the checkpoint ")
    assert message.endswith("Free space, then resume from it with --ckpt_path last.")
    assert list(last.parent.glob(".*")) == []
    step = checkpoint(run.output)["global_step"]
    resumed = fit(tmp_path, *tiny(f"--trainer.max_steps={step + 2}", "--trainer.max_epochs=-1", "--ckpt_path=last"))
    assert checkpoint(resumed.output)["global_step"] == step + 2


def test_a_traceback_is_shown_only_where_it_is_asked_for(holes, tmp_path):
    run = Run(tmp_path, "fit", *tiny("--debug", dataset=holes))
    assert run.wait() == [1]
    assert "Traceback (most recent call last)" in run.errors
    assert run.errors.strip().splitlines()[-1].startswith("Error: t of 2020-01-03T06:00:00")
