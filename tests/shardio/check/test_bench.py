"""`shardio bench` measures whatever path a user names."""

import json
import os

import pytest

from shardio.format.store import kvstore_spec


@pytest.fixture
def waves(cli, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    cli("synth", "../waves.zarr", "--grid", "o4", "--dates", 8, "-n", 4, "--no-fsync")
    return tmp_path / "waves.zarr"


@pytest.mark.parametrize("path", ["../waves.zarr", "./../waves.zarr/", "."])
def test_a_relative_path_is_measured(path, waves, cli, monkeypatch):
    if path == ".":
        monkeypatch.chdir(waves)
    done = cli("bench", path, "--ranks", 2, "--rounds", 1, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["contenders"]["tensorstore ring"]["gb_per_s"] > 0


@pytest.mark.parametrize("path", ["../a.zarr", "./a.zarr", ".", "a.zarr/", "/b/../a.zarr"])
def test_what_tensorstore_opens_is_absolute(path):
    assert kvstore_spec(path) == {"driver": "file", "path": os.path.abspath(path) + "/"}


def test_a_damaged_chunk_is_one_clear_message(waves, cli):
    chunk = waves / "data" / "c.3.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    done = cli("bench", waves, "--ranks", 2)
    assert done.exit_code == 1
    assert done.stderr.count("Error:") == 1
