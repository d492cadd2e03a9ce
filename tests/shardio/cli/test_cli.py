"""Bad input: exit code 1 or 2, one clear message, no traceback, nothing left that looks complete."""

import json
import os
import re
import shutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from shardio.cli.main import ByteSize, main


@pytest.fixture(scope="module")
def pristine(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    build(folder / "a.zarr", 2, shape=(5, 3, 1, 23), chunks=(1, 3, 1, 23))
    build(folder / "c.zarr", 3, shape=(5, 3, 1, 23), chunks=(1, 3, 1, 23))
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    """A working folder with good sources and everything that can be wrong."""
    for name in ("a.zarr", "c.zarr"):
        shutil.copytree(pristine / name, tmp_path / name)
    for name, file in (("cut", "data/.zarray"), ("attrs", ".zattrs"), ("list", "data/.zarray"), ("meta", ".zmetadata")):
        shutil.copytree(pristine / "a.zarr", tmp_path / f"{name}.zarr")
        text = (tmp_path / f"{name}.zarr" / file).read_text()
        (tmp_path / f"{name}.zarr" / file).write_text("[]" if name == "list" else text[: len(text) // 2])
    shutil.copytree(pristine / "a.zarr", tmp_path / "chunk.zarr")
    (tmp_path / "chunk.zarr" / "data" / "3.0.0.0").write_bytes(b"short")
    shutil.copytree(pristine / "a.zarr", tmp_path / "places.zarr")
    (tmp_path / "places.zarr" / "longitudes" / "0").write_bytes(b"short")
    shutil.copytree(pristine / "a.zarr", tmp_path / "placeless.zarr")
    shutil.rmtree(tmp_path / "placeless.zarr" / "longitudes")
    shutil.copytree(pristine / "a.zarr", tmp_path / "unlabelled.zarr")
    (tmp_path / "unlabelled.zarr" / ".zattrs").write_text("{}")
    shutil.copytree(pristine / "a.zarr", tmp_path / "dateless.zarr")
    shutil.rmtree(tmp_path / "dateless.zarr" / "dates")
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "text.zarr").write_text("not a folder")
    (tmp_path / "noise.nc").write_bytes(os.urandom(500))
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = {
    "no such path": (["nope.zarr", "b.zarr", "-n", "4"], "nope.zarr does not exist"),
    "no name": (["", "b.zarr", "-n", "4"], "the path of the dataset is empty"),
    "no such pattern": (["nope-*.nc", "b.zarr", "-n", "4"], "nope-"),
    "an empty folder": (["empty.zarr", "b.zarr", "-n", "4"], "empty.zarr"),
    "a text file": (["text.zarr", "b.zarr", "-n", "4"], "text.zarr"),
    "a file of noise": (["noise.nc", "b.zarr", "-n", "4"], "noise.nc"),
    "metadata cut short": (["cut.zarr", "b.zarr", "-n", "4"], "data/.zarray is not valid JSON"),
    "attributes cut short": (["attrs.zarr", "b.zarr", "-n", "4"], ".zattrs is not valid JSON"),
    "metadata that are a list": (["list.zarr", "b.zarr", "-n", "4"], "holds a list"),
    "no names of variables": (["unlabelled.zarr", "b.zarr", "-n", "4"], "variables"),
    "no dates": (["dateless.zarr", "b.zarr", "-n", "4"], "`dates` is absent"),
    "a truncated chunk": (["chunk.zarr", "b.zarr", "-n", "4"], "3.0.0.0"),
    "truncated longitudes": (["places.zarr", "b.zarr", "-n", "4"], "places.zarr/longitudes cannot be read"),
    "no longitudes": (["placeless.zarr", "b.zarr", "-n", "4"], "`longitudes` is absent"),
    "no grid-chunks": (["a.zarr", "b.zarr"], "--grid-chunks"),
    "0 grid-chunks": (["a.zarr", "b.zarr", "-n", "0"], "Choose --grid-chunks from 1 to 23"),
    "negative grid-chunks": (["a.zarr", "b.zarr", "-n", "-3"], "Choose --grid-chunks from 1 to 23"),
    "more grid-chunks than cells": (["a.zarr", "b.zarr", "-n", "24"], "Choose --grid-chunks from 1 to 23"),
    "unattainable grid-chunks": (["a.zarr", "b.zarr", "-n", "10"], "Use --grid-chunks 8 or 12"),
    "grid-chunks in words": (["a.zarr", "b.zarr", "-n", "four"], "not a valid integer"),
    "unknown variable": (
        ["a.zarr", "b.zarr", "-n", "4", "--select", "v_0,q"],
        "no variable q. It has: v_0, v_1, v_2",
    ),
    "unknown variable dropped": (["a.zarr", "b.zarr", "-n", "4", "--drop", "q"], "has no variable q"),
    "a variable twice": (["a.zarr", "b.zarr", "-n", "4", "--select", "v_0,v_0"], "v_0 more than once"),
    "nothing selected": (["a.zarr", "b.zarr", "-n", "4", "--select", ","], "names nothing"),
    "everything dropped": (["a.zarr", "b.zarr", "-n", "4", "--drop", "v_0,v_1,v_2"], "no variable of a.zarr is left"),
    "selected and dropped": (["a.zarr", "b.zarr", "-n", "4", "--select", "v_0", "--drop", "v_0"], "is left"),
    "no date selected": (["a.zarr", "b.zarr", "-n", "4", "--start", "2030"], "no date of a.zarr lies between"),
    "start after end": (["a.zarr", "b.zarr", "-n", "4", "--start", "2020-01-02", "--end", "2020-01-01"], "no date of"),
    "a date in words": (["a.zarr", "b.zarr", "-n", "4", "--start", "yesterday"], "'yesterday' is not a date"),
    "an unknown codec": (["a.zarr", "b.zarr", "-n", "4", "--codec", "mp3"], "unsupported codec 'mp3'"),
    "an unknown format": (["a.zarr", "b.zarr", "-n", "4", "--zarr-format", "4"], "--zarr-format"),
    "another ending": (["a.zarr", "b.nc", "-n", "4"], "does not end in .zarr. Name the output b.nc.zarr"),
    "no folder to write in": (["a.zarr", "nope/b.zarr", "-n", "4"], "the folder nope does not exist"),
    "a file to write in": (["a.zarr", "text.zarr/b.zarr", "-n", "4"], "the folder text.zarr does not exist"),
    "a device to write in": (["a.zarr", "/proc/self/b.zarr", "-n", "4"], "/proc/self"),
    "a remote destination": (["a.zarr", "s3://bucket/b.zarr", "-n", "4"], "is remote"),
    "the same path": (["a.zarr", "a.zarr", "-n", "4"], "source and destination are the same"),
    "no memory": (["a.zarr", "b.zarr", "-n", "4", "--max-memory", "100"], "the memory bound of 100 bytes is too small"),
    "memory in words": (["a.zarr", "b.zarr", "-n", "4", "--max-memory", "lots"], "'lots' is not a size"),
    "memory with two points": (["a.zarr", "b.zarr", "-n", "4", "--max-memory", "1..5GB"], "is not a size"),
    "no workers": (["a.zarr", "b.zarr", "-n", "4", "--workers", "0"], "--workers"),
    "two kinds of workers": (
        ["a.zarr", "b.zarr", "-n", "4", "--workers", "2", "--scheduler", "tcp://x:1"],
        "choose one",
    ),
}


def errors(done):
    """How many messages say that they are an error."""
    return sum(line.startswith("Error:") for line in done.stderr.splitlines())


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_message_and_leaves_nothing_complete(what, here, cli):
    words, said = BAD[what]
    before = set(here.rglob("*"))
    done = cli("rechunk", *words)
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert errors(done) == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    created = set(here.rglob("*")) - before
    assert {path.relative_to(here).parts[0] for path in created} <= {"b.zarr.partial"}
    if created:
        assert what in ("a truncated chunk", "truncated longitudes")
        assert "is incomplete" in cli("info", "b.zarr").stderr


@pytest.mark.parametrize("what", ["no such path", "a file of noise", "a truncated chunk", "metadata cut short"])
def test_bad_input_is_the_same_in_a_real_process(what, here, process):
    words, said = BAD[what]
    done = process("rechunk", *words, cwd=here)
    assert done.returncode == 1
    assert said in done.stderr
    assert errors(done) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["info", "verify"])
@pytest.mark.parametrize(
    "path", ["nope.zarr", "empty.zarr", "text.zarr", "cut.zarr", "attrs.zarr", "dateless.zarr", "noise.nc"]
)
def test_what_cannot_be_shown_is_one_clear_message(command, path, here, cli):
    done = cli(command, path)
    assert done.exit_code == 1
    assert path.split(".")[0] in done.stderr
    assert errors(done) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words", [("info",), ("verify",), ("plot", "--variable", "t"), ("bench", "--ranks", "2")], ids=" ".join
)
@pytest.mark.parametrize("path", ["", ".", "/", ".."])
def test_a_path_without_a_name_is_one_clear_message(path, words, here, cli, monkeypatch):
    monkeypatch.chdir(here / "empty.zarr" if path == "." else here)
    done = cli(*words, path)
    assert done.exit_code == 1
    assert errors(done) == 1
    assert path in done.stderr
    assert ("path of the dataset is empty" in done.stderr) == (not path)


def test_the_folder_one_stands_in_is_a_dataset_like_any_other(here, cli, monkeypatch):
    monkeypatch.chdir(here / "a.zarr")
    assert cli("info", ".").exit_code == 0
    monkeypatch.chdir(here)
    assert cli("rechunk", "chunk.zarr", "b.zarr", "-n", "4").exit_code == 1
    monkeypatch.chdir(here / "b.zarr.partial")
    assert "b.zarr is incomplete" in cli("info", ".").stderr


def test_consolidated_metadata_that_are_damaged_do_not_matter(here, cli):
    assert cli("rechunk", "meta.zarr", "b.zarr", "-n", "4").exit_code == 0
    assert cli("verify", "b.zarr", "--source", "a.zarr").exit_code in (0, 1)


def test_unreadable_file_is_one_clear_message(here, cli):
    (here / "a.zarr" / ".zattrs").unlink()
    (here / "a.zarr" / ".zattrs").mkdir()
    done = cli("rechunk", "a.zarr", "b.zarr", "-n", "4")
    assert done.exit_code == 1
    assert errors(done) == 1


def test_strange_files_in_a_source_do_not_matter(here, cli):
    (here / "a.zarr" / "notes.txt").write_text("mine")
    (here / "a.zarr" / "folder").mkdir()
    (here / "a.zarr" / "folder" / "more.txt").write_text("mine")
    done = cli("rechunk", "a.zarr", "b.zarr", "-n", "4")
    assert done.exit_code == 0
    assert "not recognized" not in done.stderr


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_prints_the_plan_and_writes_nothing(zarr_format, as_json, here, cli):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    words = ["rechunk", "a.zarr", "b.zarr", "-n", "4", "--dry-run", "--zarr-format", zarr_format]
    done = cli(*words, *["--json"] * as_json)
    assert done.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
    if as_json:
        plan = json.loads(done.stdout)
        assert plan["read_amplification"] == 1
        assert plan["chunks"] == [1, 3, 1, 6]
    else:
        assert "amplification 1.00" in done.stdout


def test_json_outputs_parse_and_stand_alone(here, cli):
    made = json.loads(cli("rechunk", "a.zarr", "b.zarr", "-n", "4", "--json").stdout)
    assert (made["dates"], made["grid_chunks"], made["resumed_dates"]) == (5, 4, 0)
    assert json.loads(cli("info", "b.zarr", "--json").stdout)["grid_chunks"] == 4
    assert json.loads(cli("verify", "b.zarr", "--json").stdout)["faults"] == []
    synth = json.loads(cli("synth", "w.zarr", "--grid", "o4", "--dates", 2, "--json").stdout)
    assert synth["dates"] == 2


def test_the_run_ends_with_one_fact(here, cli):
    done = cli("rechunk", "a.zarr", "b.zarr", "-n", "4")
    assert done.stdout.startswith("wrote 5 dates x 4 chunks, ")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.startswith("plan: 5 dates, 3 variables, 1 member, 23 cells -> 4 grid-chunks of 6 cells")


def commands(group, *path):
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(commands(main)), ids=" ".join)
def test_help_of_every_command_shows_examples(path):
    done = CliRunner().invoke(main, [*path, "--help"])
    assert done.exit_code == 0
    assert f"shardio {' '.join(path)}".strip() in done.stdout.split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_produced(shell, process):
    done = process(env={**os.environ, "_SHARDIO_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0, done.stderr
    assert "_SHARDIO_COMPLETE" in done.stdout


def test_closed_stdout_is_no_traceback(here, cli):
    cli("rechunk", "a.zarr", "b.zarr", "-n", "4")
    code = "from shardio.cli.main import main; main(['info', 'b.zarr'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here) as p:
        p.stdout.close()
        said = p.stderr.read()
    assert b"Traceback" not in said


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1024", 1024),
        ("4GiB", 4 * 2**30),
        ("500MB", 500_000_000),
        ("1.5kB", 1500),
        (" 2 KiB ", 2048),
        ("3t", 3 * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert ByteSize().convert(text, None, None) == nbytes


def test_names_of_repeated_options_are_joined(here, cli):
    chosen = ("--select", "v_2", "--select", "v_0,v_1", "--drop", "v_0")
    assert cli("rechunk", "a.zarr", "b.zarr", "-n", "4", *chosen).exit_code == 0
    assert json.loads(cli("info", "b.zarr", "--json").stdout)["variables"] == ["v_2", "v_1"]
    done = cli("rechunk", "a.zarr", "d.zarr", "-n", "4", "--select", "v_2", "--select", "v_2")
    assert "v_2 more than once" in done.stderr
    assert cli("rechunk", "a.zarr", "d.zarr", "-n", "4", "--select", "v_2", "--drop", ",").exit_code == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "  1 task in 1 piece; "),
        (("--workers", "2"), "; 2 processes x 1 thread, "),
        (("--scheduler", "tcp://x:1"), "; every worker of the cluster: "),
    ],
)
def test_the_plan_counts_as_people_do(more, said, here, cli):
    plan = cli("rechunk", "a.zarr", "b.zarr", "-n", "4", "--dry-run", *more).stdout
    assert said in plan
    assert not re.search(r"\b1 \w+s\b|\(s\)|\(es\)", plan)
    assert ("in each worker" in plan) == ("--scheduler" in more)


def test_waiting_for_a_scheduler_is_told(here, cli, monkeypatch):
    monkeypatch.setattr("shardio.rechunk.cluster.SECONDS_TO_CONNECT", 1)
    done = cli("rechunk", "a.zarr", "b.zarr", "-n", "4", "--scheduler", "tcp://127.0.0.1:9")
    assert done.exit_code == 1
    assert "waiting for the dask scheduler at tcp://127.0.0.1:9, 1 s at most" in done.stderr
    assert done.stderr.index("waiting for") < done.stderr.index("Error: no dask scheduler answers")


def test_warnings_of_ours_are_a_line_without_code(here, process):
    process("synth", "w.zarr", "--grid", "o4", "--dates", "8", "-n", "3", "--no-fsync")
    done = process("bench", "w.zarr", "--ranks", "7", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "x the bytes of each date" in line)
    assert line.startswith("Warning: 7 ranks read")
    assert ".py" not in done.stderr
