"""Every rank writes its own part of a forecast; a run that is killed goes on exactly where it stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import MASKED, VARIABLES, values_of
from forecasting import START, forecast, read_all, relative, share_of, trained, tree, write_forecast
from runs import Run
from watch import Heard, Watch, living_ids

from shardio import open_dataset
from shardio.check import verify
from shardio.errors import OutputError, SelectionError
from shardio.rechunk import Request, prepare
from shardio.rechunk import run as rechunk
from shardio.source.synthetic import octahedral
from trainer.cli import predict as predict_cli
from trainer.cli.predict import DESCRIPTION, build_parser
from trainer.predict.forecast import load
from trainer.predict.predict import initial_dates, plan, write
from trainer.predict.trained import read_trained

NAME = "2021-03-02T0000.zarr"
LEAD_TIME, STEPS = "120h", 20
LONG = "240h"
AXES = (0, 2, 3)  # all but the variables


@pytest.fixture(scope="module")
def written(
    run: Callable[..., list[Any]], checkpoint: Path, path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """The same forecast by 1 to 4 ranks."""
    folder, paths = tmp_path_factory.mktemp("written"), {}
    for ranks in (1, 2, 3, 4):
        own = folder / str(ranks)
        own.mkdir()
        more = {"checkpoint": checkpoint, "path": path, "lead_time": LEAD_TIME, "folder": own}
        run(write_forecast, [{"ranks": ranks, **more}] * ranks)
        paths[ranks] = own / NAME
    return paths


def predict(folder: Path, checkpoint: Path, path: str, *more: str, ranks: int = 1, **options: Any) -> Run:
    groups = f"--num_gpus_per_model={ranks}"
    given = ("--ckpt_path", str(checkpoint), "--dataset", path, "--start", START, "--lead-time", LONG, groups)
    return Run(folder, "predict", *given, *more, ranks=ranks, **options)


# --------------------------------------------------------------------------------------------------- what is written
def test_files_of_1_to_4_ranks_hold_the_same_values(written: dict[int, Path], tmp_path: Path) -> None:
    """After `shardio rechunk` to one layout; to rounding, since sums are added in other orders."""
    recut = {}
    for ranks, output in written.items():
        rechunk(prepare(Request(str(output), str(tmp_path / f"{ranks}.zarr"), 7)))
        assert np.array_equal(read_all(tmp_path / f"{ranks}.zarr"), read_all(output), equal_nan=True)
        recut[ranks] = read_all(tmp_path / f"{ranks}.zarr")
    for ranks in (2, 3, 4):
        assert relative(recut[ranks], recut[1], AXES) < 1e-5


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_written_is_what_the_model_forecasts(
    run: Callable[..., list[Any]], written: dict[int, Path], checkpoint: Path, path: str, ranks: int
) -> None:
    more = {"ranks": ranks, "checkpoint": checkpoint, "path": path, "lead_time": LEAD_TIME}
    fields = np.concatenate(run(forecast, [more] * ranks), axis=2)  # [lead times, ensemble, cells, variables]
    assert np.array_equal(read_all(written[ranks]), fields.transpose(0, 3, 1, 2), equal_nan=True)


@pytest.mark.parametrize("ranks", [1, 4])
def test_cells_without_an_initial_value_are_nan_in_the_file_and_no_others(written: dict[int, Path], ranks: int) -> None:
    """Of four ranks the first has none but such cells. Initial values are those of the fifth date."""
    lacking = np.isnan(read_all(written[ranks]))
    absent = np.isnan(values_of(208, 2)[4, VARIABLES.index(MASKED)])
    assert 0.25 < absent.mean() < 0.4
    for variable, name in enumerate(open_dataset(written[ranks]).variables):
        assert (lacking[:, variable] == (absent if name == MASKED else False)).all()
    assert verify.check(str(written[ranks])) == []


@pytest.mark.parametrize(("names", "lacks"), [(["sst"], True), (["t_850", "tp"], False)])
def test_the_dataset_says_whether_values_may_lack(
    run: Callable[..., list[Any]], checkpoint: Path, path: str, tmp_path: Path, names: list[str], lacks: bool
) -> None:
    """Of one variable the first grid-chunk is NaN only, like a chunk that was never written."""
    more = {"checkpoint": checkpoint, "path": path, "lead_time": "12h", "folder": tmp_path, "variables": names}
    run(write_forecast, [{"ranks": 4, **more}] * 4)
    output = tmp_path / NAME
    assert json.loads((output / ".zattrs").read_text())["allow_nans"] is lacks
    assert np.isnan(read_all(output)[..., :52]).all() == np.isnan(read_all(output)).any() == lacks
    assert verify.check(str(output)) == []


def test_the_same_ranks_write_the_same_bytes_again(
    run: Callable[..., list[Any]], written: dict[int, Path], checkpoint: Path, path: str, tmp_path: Path
) -> None:
    more = {"checkpoint": checkpoint, "path": path, "lead_time": LEAD_TIME, "folder": tmp_path}
    run(write_forecast, [{"ranks": 3, **more}] * 3)
    assert tree(tmp_path / NAME) == tree(written[3])


def test_a_forecast_is_a_dataset_of_its_valid_times(written: dict[int, Path], checkpoint: Path, path: str) -> None:
    dataset, source = open_dataset(written[2]), open_dataset(path)
    assert dataset.variables == ("t_850", "sst", "q_500", "tp")
    assert dataset.shape == (STEPS, 4, 2, 208)
    assert (str(dataset.dates[0]), str(dataset.dates[-1])) == ("2021-03-02T06:00:00", "2021-03-07T00:00:00")
    assert dataset.frequency == "6h"
    assert np.array_equal(dataset.latitudes, source.latitudes)
    assert dataset.statistics["mean"][0] == source.statistics["mean"][source.name_to_index["t_850"]]
    about = json.loads((written[2] / ".zattrs").read_text())
    assert about["forecast"]["initial_date"] == "2021-03-02T00:00:00"
    assert about["forecast"]["checkpoint"] == read_trained(checkpoint).digest
    assert about["forecast"]["model"]["network"]["channels"] == 8
    assert about["shardio"]["complete"] is True


# ------------------------------------------------------------------------------------------- who sends and writes what
def watched(rank: int, comm: Any, ranks: int, checkpoint: Path, path: str, folder: Path) -> dict[str, Any]:
    """In a rank: sizes of all tensors, bytes of all messages, and those that the halo needs; bytes of each file."""
    dataset = open_dataset(path)
    heard = Heard(comm)
    model = load(checkpoint, dataset, share_of(heard, ranks, dataset))
    heard.heard.clear()
    task = plan(model.trained, dataset, model.share.cells, np.datetime64(START, "s"), folder, "24h")
    renamed: list[tuple[str, int]] = []
    before, replace_file = living_ids(), os.replace

    def rename(source: Any, target: Any) -> None:
        renamed.append((str(target), Path(source).stat().st_size))
        replace_file(source, target)

    watch = Watch()
    try:
        os.replace = rename
        with watch:
            done = write(model, task)
            watch.see_living(before, "at the end")
    finally:
        os.replace = replace_file
    network = model.forecaster.network
    graph, options = network.graph, network.options
    row = 4 * options.channels
    halo = [graph.encoder.halo.traffic(row).sent, *[graph.processor.halo.traffic(row).sent] * options.num_layers]
    halo.append(graph.decoder.halo.traffic(row).sent)
    chunks = [
        (name, size) for name, size in renamed if f"{folder}/{NAME}.partial/dataset-" in name and "/data/" in name
    ]
    return {
        "sizes": watch.sizes,
        "messages": watch.messages,
        "heard": heard.heard,
        "halo": halo * task.steps,
        "chunks": [(Path(name).name, size) for name, size in chunks if "/.z" not in name],
        "nbytes": done.nbytes,
        "owned": model.share.owned.stop - model.share.owned.start,
    }


@pytest.fixture(scope="module")
def four(
    run: Callable[..., list[Any]], dataset_of: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """What four ranks do that write four lead times of 1,600 cells; the folder."""
    path, folder = dataset_of("watched", 1), tmp_path_factory.mktemp("four")
    checkpoint = trained(tmp_path_factory, path, "--model.graph.hidden=o12")
    return folder, run(watched, [{"ranks": 4, "checkpoint": checkpoint, "path": path, "folder": folder}] * 4)


def test_no_rank_holds_or_sends_a_full_field(four: tuple[Path, list[dict[str, Any]]]) -> None:
    hidden = octahedral("o12")[0].size
    for found in four[1]:
        assert found["owned"] == 400
        assert not {1600, hidden, 1600 * 4, 1600 * 6} & set(found["sizes"])
        assert any("at the end" in where or "aten" in where for where in found["sizes"].values())


def test_bytes_sent_are_those_of_the_halo(four: tuple[Path, list[dict[str, Any]]]) -> None:
    """Beyond it, ranks only tell one another that all is well, at the start and the end."""
    for found in four[1]:
        assert [nbytes for kind, _, nbytes in found["heard"] if kind == "all_to_all"] == found["halo"]
        assert sum(found["halo"]) > 0
        others = [one for one in found["heard"] if one[0] != "all_to_all"]
        assert others == [("gather", "writer", 0)] * 4, "an empty text: no error"
        assert len(found["messages"]) == len(found["halo"]) + 2 * 4, "a text is a length, then letters"


def test_every_byte_is_written_once_by_the_rank_that_owns_it(four: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = four
    stored = {file.name: file.stat().st_size for file in (folder / NAME / "data").glob("[0-9]*")}
    assert len(stored) == 4 * 16  # lead times, grid-chunks
    written = [chunk for found in ranks for chunk in found["chunks"]]
    assert sorted(written) == sorted(stored.items())
    for rank, found in enumerate(ranks):
        assert {int(name.split(".")[3]) // 4 for name, _ in found["chunks"]} == {rank}
        assert sum(size for _, size in found["chunks"]) == found["nbytes"]


# ------------------------------------------------------------------------------------------------- kills, and going on
@pytest.fixture(scope="module")
def uninterrupted(checkpoint: Path, path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 lead times, by two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = predict(folder, checkpoint, path, ranks=2)
    assert process.wait() == [0, 0], process.errors
    return folder / "forecasts" / NAME


def killed(folder: Path, checkpoint: Path, path: str, chunks: int, ranks: int, *more: str) -> Path:
    """What is left of a run that is killed when so many grid-chunks are noted."""
    process = predict(folder, checkpoint, path, *more, ranks=ranks)
    partial = folder / "forecasts" / f"{NAME}.partial"
    process.until(lambda: noted(partial) >= chunks)
    process.kill()
    assert all(process.wait()), "it ended before it was killed"
    assert not partial.with_suffix("").exists()
    return partial


def noted(partial: Path) -> int:
    """Grid-chunks in all ledgers."""
    return sum(line.startswith("[") for ledger in partial.glob("ledger*") for line in _lines(ledger))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_any_lead_time_goes_on_to_the_same_bytes(
    uninterrupted: Path, checkpoint: Path, path: str, tmp_path: Path, seed: int
) -> None:
    chunks = random.Random(seed).randrange(1, 2 * 36)
    partial = killed(tmp_path, checkpoint, path, chunks, ranks=2)
    there = {
        file.name: file.stat().st_mtime_ns for file in partial.glob("dataset-*/data/[0-9]*") if ".tmp" not in file.name
    }
    assert len(there) >= chunks
    process = predict(tmp_path, checkpoint, path, "--json", ranks=2)
    assert process.wait() == [0, 0], process.errors
    output = tmp_path / "forecasts" / NAME
    assert tree(output) == tree(uninterrupted)
    (told,) = json.loads(process.printed)["forecasts"]
    assert told["steps"] <= 40 - chunks // 2 + 1
    again = [name for name, then in there.items() if (output / "data" / name).stat().st_mtime_ns != then]
    assert len(again) <= 2, "written, but not yet noted, when it was killed: at most one by each rank"
    assert not partial.exists()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 2), (3, 1)])
def test_a_run_killed_goes_on_on_fewer_ranks_to_the_same_values(
    uninterrupted: Path, checkpoint: Path, path: str, tmp_path: Path, before: int, after: int
) -> None:
    killed(tmp_path, checkpoint, path, 5 * before, before, f"--lead-time={LEAD_TIME}")
    process = predict(tmp_path, checkpoint, path, f"--lead-time={LEAD_TIME}", "--json", ranks=after)
    assert process.wait() == [0] * after, process.errors
    assert json.loads(process.printed)["forecasts"][0]["steps"] <= STEPS - 4
    found, expected = read_all(tmp_path / "forecasts" / NAME), read_all(uninterrupted)[:STEPS]
    assert relative(found, expected, AXES) < 1e-5


def test_more_ranks_than_chunks_cannot_go_on_and_are_told_so(checkpoint: Path, path: str, tmp_path: Path) -> None:
    killed(tmp_path, checkpoint, path, 10, 2)
    process = predict(tmp_path, checkpoint, path, ranks=3)
    assert process.wait() == [1, 1, 1]
    assert process.errors.count("make 2 chunks: too few for 3 ranks") == 1
    assert "Traceback" not in process.errors


def test_without_fsync_bytes_are_checked_before_a_run_goes_on(
    uninterrupted: Path, checkpoint: Path, path: str, tmp_path: Path
) -> None:
    """After power loss a file may have its size, but not its bytes."""
    process, partial = predict(tmp_path, checkpoint, path, "--no-fsync"), tmp_path / "forecasts" / f"{NAME}.partial"
    process.until(lambda: noted(partial) >= 5)
    process.kill()
    process.wait()
    spoilt = next(partial.glob("dataset-*/data/0.*"))
    spoilt.write_bytes(bytes(spoilt.stat().st_size))
    process = predict(tmp_path, checkpoint, path)
    assert process.wait() == [0], process.errors
    assert verify.check(str(tmp_path / "forecasts" / NAME)) == []


# ---------------------------------------------------------------------------------------------------------- the command
def test_a_complete_forecast_is_kept_and_another_never_overwritten(checkpoint: Path, path: str, tmp_path: Path) -> None:
    def call(*more: str) -> tuple[int, Run]:
        process = predict(tmp_path, checkpoint, path, "--lead-time=24h", *more)
        return process.wait()[0], process

    output = tmp_path / "forecasts" / NAME
    assert call()[0] == 0
    content, times = tree(output), [file.stat().st_mtime_ns for file in output.rglob("*")]
    left = output.with_name(f"{NAME}.partial")  # by a kill between the last rename and the end
    left.mkdir()
    (left / "job.json").write_text("{}")
    code, process = call()
    assert code == 0
    assert f"kept forecasts/{NAME}: it is complete" in process.printed
    assert not left.exists()
    code, process = call("--variables=t_850")
    assert code == 1
    assert f"forecasts/{NAME} is another forecast" in process.errors
    assert process.errors.count("Error:") == 1
    assert tree(output) == content
    assert [file.stat().st_mtime_ns for file in output.rglob("*")] == times
    assert call("--variables=t_850", "--overwrite")[0] == 0
    assert open_dataset(output).variables == ("t_850",)
    assert not left.exists()


def test_another_precision_is_another_forecast(checkpoint: Path, path: str, tmp_path: Path) -> None:
    """That of the weights is what forecasts had before there was a choice: they are still known."""

    def call(*more: str) -> str:
        process = predict(tmp_path, checkpoint, path, "--lead-time=24h", *more)
        process.wait()
        return process.printed + process.errors

    assert "4 lead times" in call()
    about = json.loads((tmp_path / "forecasts" / NAME / ".zattrs").read_text())["forecast"]
    assert "precision" not in about and about["model"]["precision"] == "32-true"
    assert "it is complete" in call("--precision=32")
    assert "is another forecast, of another checkpoint, lead time, precision" in call("--precision=bf16")
    assert "4 lead times" in call("--precision=bf16-mixed", "--overwrite")
    about = json.loads((tmp_path / "forecasts" / NAME / ".zattrs").read_text())["forecast"]
    assert about["precision"] == "bf16-mixed"


def test_two_data_groups_share_the_dates(checkpoint: Path, path: str, tmp_path: Path) -> None:
    more = ("--start=2021-03-02", "--end=2021-03-03", "--every=12h", "--lead-time=24h", "--members=1")
    process = Run(
        tmp_path, "predict", f"--ckpt_path={checkpoint}", f"--dataset={path}", *more, "--num_gpus_per_model=1", ranks=2
    )
    assert process.wait() == [0, 0], process.errors
    names = [f"2021-03-0{day}T{hour}00.zarr" for day in (2, 3) for hour in ("00", "12")]
    assert sorted(file.name for file in (tmp_path / "forecasts").iterdir()) == names
    assert process.printed.count("wrote ") == 4
    for name in names:
        assert open_dataset(tmp_path / "forecasts" / name).shape == (4, 4, 1, 208)


def test_the_command_starts_its_ranks_and_when_one_is_killed_all_end_and_the_next_run_goes_on(
    uninterrupted: Path, checkpoint: Path, path: str, tmp_path: Path
) -> None:
    """Dataset and ranks are those of the configuration, in which dates are dates to Python."""
    config = tmp_path / "my.yaml"
    data = f"data: {{dataset: {path}, train_end: 2021-03-08}}"
    config.write_text(f"{data}\ntrainer: {{devices: 2}}\nstrategy: {{num_gpus_per_model: 2}}\n")
    words = [sys.executable, "-m", "trainer.cli", "predict", f"--config={config}", f"--ckpt_path={checkpoint}"]
    words += [f"--start={START}", f"--lead-time={LONG}"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    partial = tmp_path / "forecasts" / f"{NAME}.partial"
    with subprocess.Popen(words, **streams) as process:
        while noted(partial) < 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("Error:") == 1
    assert "Traceback" not in errors
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True)
    assert f"wrote forecasts/{NAME}" in done.stdout
    found = tree(tmp_path / "forecasts" / NAME)
    about = json.loads(found.pop(".zattrs"))
    assert about["forecast"]["config"]["data"]["train_end"] == "2021-03-08"
    expected = tree(uninterrupted)
    assert {name: found[name] for name in found if name != ".zmetadata"} == {
        name: expected[name] for name in expected if name not in (".zattrs", ".zmetadata")
    }


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--start=2031-01-01"], 1, "2031-01-01T00:00:00 is not in the dataset, which has 2021-03-01T00:00:00 to"),
        (["--start=2021-03-02,2031-01-01"], 1, "2031-01-01T00:00:00 is not in the dataset"),
        (["--lead-time=7h"], 1, "a lead time of 7h is no multiple of the model's step, 6h"),
        (["--lead-time=300h"], 1, "needs its lsm, sun; give a dataset that reaches further, or a shorter lead time"),
        (["--variables=t_850,snow"], 1, "the model does not forecast snow. It forecasts: t_850, sst, q_500, tp"),
        (["--members=3"], 1, "3 members: the dataset has 2"),
        (["--every=12h"], 1, "--every 12h needs --end"),
        (["--ckpt_path=none.ckpt"], 1, "there is no checkpoint none.ckpt"),
        (["--dataset=none.zarr"], 1, "none.zarr does not exist"),
        (["--config=none.yaml"], 1, "the configuration none.yaml cannot be read"),
        (["--num_gpus_per_model=2"], 1, "num_gpus_per_model"),
        (["--ahead=0"], 1, "0 dates may be on their way to the disk. Let it be 1 or more"),
        (["--output=/dev/null/forecasts"], 1, "the folder /dev/null/forecasts cannot be made"),
        (["--steps=3"], 2, "steps"),
        (["--members=many"], 2, "members"),
    ],
)
def test_what_cannot_work_is_one_message_with_a_remedy(
    checkpoint: Path, path: str, tmp_path: Path, more: list[str], code: int, said: str
) -> None:
    given = ("predict", f"--ckpt_path={checkpoint}", f"--dataset={path}", f"--start={START}", "--lead-time=24h")
    process = Run(tmp_path, *given, *more)
    assert process.wait() == [code]
    assert said in process.errors
    assert "Traceback" not in process.errors
    if code == 1:
        assert process.errors.count("Error:") == 1


def test_last_is_that_of_the_run_of_the_configuration(checkpoint: Path, path: str, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(f"data: {{dataset: {path}}}\noutput: {checkpoint.parents[1]}\n")
    given = ("predict", f"--start={START}", "--lead-time=6h", "--ckpt_path=last")
    process = Run(tmp_path, *given, f"--config={config}")
    assert process.wait() == [0], process.errors
    assert "1 lead time in " in process.printed
    process = Run(tmp_path, *given, f"--dataset={path}")
    assert process.wait() == [1]
    assert "--ckpt_path last is that of a run. Give its --config too, or the path of a .ckpt file." in process.errors
    config.write_text(f"data: {{dataset: {path}}}\n")
    process = Run(tmp_path, *given, f"--config={config}")
    assert process.wait() == [1]
    assert f"there is no run/checkpoints/last.ckpt, which --ckpt_path last means with {config}." in process.errors
    config.write_text(f"data: {{datset: {path}}}\n")
    process = Run(tmp_path, *given, f"--config={config}")
    assert process.wait() == [2]
    assert f"has no option data.datset (in {config}). Did you mean data.dataset?" in process.errors


def test_what_was_done_is_printed_also_when_a_late_part_fails(
    checkpoint: Path, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--ckpt_path={checkpoint}", f"--dataset={path}", f"--output={tmp_path}", "--lead-time=6h", "--json"]
    words += [f"--start={START},2021-03-03", "--netcdf"]
    taken = tmp_path / "2021-03-03T0000.nc"
    taken.write_text("of somebody else")
    with pytest.raises(OutputError, match=r"2021-03-03T0000.nc exists and is something else"):
        predict_cli.main(words)
    done = json.loads(capsys.readouterr().out)
    assert [(Path(one["path"]).name, one["steps"], one["kept"]) for one in done["forecasts"]] == [
        (NAME, 1, False),
        ("2021-03-03T0000.zarr", 1, False),
    ]
    assert done["netcdf"] == [str((tmp_path / NAME).with_suffix(".nc"))]


def test_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert DESCRIPTION in capsys.readouterr().out


def test_initial_dates_are_named_or_follow_each_other(path: str) -> None:
    dataset = open_dataset(path)

    def dates(*asked: str | None) -> list[str]:
        return [str(date)[5:13] for date in initial_dates(dataset, *asked)]

    assert dates("2021-03-04,2021-03-02T12:00, 2021-03-04", None, None) == ["03-02T12", "03-04T00"]
    assert dates("2021-03-02", "2021-03-03", "12h") == ["03-02T00", "03-02T12", "03-03T00", "03-03T12"]
    assert dates("2021-03-02", "2021-03-02T06:00", None) == ["03-02T00", "03-02T06"]
    with pytest.raises(SelectionError, match="no date from 2021-03-03 to 2021-03-02"):
        dates("2021-03-03", "2021-03-02", None)
