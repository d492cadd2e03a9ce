"""Datasets behind a real web server and a real S3 server, and servers that fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shardio import ShardedDataLoader, Topology, open_dataset
from shardio.errors import ChunkError, DatasetError
from shardio.rechunk import Request, prepare, run
from shardio.source.synthetic_source import SyntheticSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from web_server import WebServer

FORMATS = (2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """waves-2.zarr and waves-3.zarr: o8, 3 dates, 4 grid-chunks."""
    where = tmp_path_factory.mktemp("served")
    for zarr_format in FORMATS:
        request = Request(
            source="synthetic",
            destination=str(where / f"waves-{zarr_format}.zarr"),
            grid_chunks=4,
            zarr_format=zarr_format,
            sync=False,
            opener=lambda: SyntheticSource("o8", 3),
        )
        run(prepare(request))
    return where


def read_by_two_ranks(url: str) -> list[np.ndarray]:
    """The first sample of an epoch, as the shards of two ranks side by side."""
    shards = []
    for rank in range(2):
        loader = ShardedDataLoader(open_dataset(url), Topology(2, rank, 2), shuffle=False)
        shards.append(next(iter(loader)).fields.numpy().copy())
        loader.close()
    return shards


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_web_server_gives_the_same_bits_as_the_disk(folder: Path, zarr_format: int) -> None:
    name = f"waves-{zarr_format}.zarr"
    local = open_dataset(folder / name)
    with WebServer(folder) as server:
        remote = open_dataset(f"{server.url}/{name}")
        assert np.array_equal(remote.dates, local.dates)
        assert np.array_equal(remote.latitudes, local.latitudes)
        assert all(np.array_equal(remote.statistics[key], local.statistics[key]) for key in local.statistics)
        assert np.array_equal(remote[1:, [4, 0], 0, 5:300], local[1:, [4, 0], 0, 5:300])
        together = np.concatenate(read_by_two_ranks(f"{server.url}/{name}"), axis=3)
    assert np.array_equal(together[0], local[0:2].transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def s3_server(folder: Path) -> str:
    """A local S3 server process that holds the same datasets in the bucket `weather`."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="tester",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="weather")
        for file in folder.rglob("*"):
            if file.is_file():
                client.upload_file(str(file), "weather", str(file.relative_to(folder)))
        client.close()
        yield endpoint
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_s3_server_gives_the_same_bits_as_the_disk(folder: Path, s3_server: str, zarr_format: int) -> None:
    name = f"waves-{zarr_format}.zarr"
    # tensorstore reads credentials once per process: a process of its own keeps them out of the other tests.
    program = (
        "import sys, numpy as np, shardio\n"
        "remote, local = map(shardio.open_dataset, sys.argv[1:])\n"
        "assert np.array_equal(remote[:], local[:])\n"
        "batch = next(iter(shardio.ShardedDataLoader(remote, shardio.Topology(2, 1, 2), shuffle=False)))\n"
        "assert np.array_equal(batch.fields[0], local[0:2, :, :, batch.cells].transpose(0, 2, 3, 1))\n"
        "print('equal')\n"
    )
    environment = os.environ | {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-c", program, f"s3://weather/{name}", str(folder / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_server_that_answers_500_is_an_error_with_date_and_chunk(folder: Path, zarr_format: int) -> None:
    with WebServer(folder, "fail") as server:
        dataset = open_dataset(f"{server.url}/waves-{zarr_format}.zarr")
        loader = ShardedDataLoader(dataset, shuffle=False)
        with pytest.raises(ChunkError, match=r"date 2020-01-01T00:00:00, grid-chunk \d"):
            next(iter(loader))
        loader.close()


def test_server_that_stalls_is_an_error_in_bounded_time(folder: Path) -> None:
    program = (
        "import sys, shardio\n"
        "dataset = shardio.open_dataset(sys.argv[1])\n"
        "try:\n"
        "    next(iter(shardio.ShardedDataLoader(dataset, shuffle=False)))\n"
        "except shardio.errors.ChunkError as error:\n"
        "    print(error)\n"
    )
    with WebServer(folder, "stall") as server:
        command = [sys.executable, "-c", program, f"{server.url}/waves-2.zarr"]
        environment = os.environ | {"SHARDIO_TIMEOUT": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert "no answer in 1 s" in done.stdout, done.stderr
    assert "date 2020-01-01T00:00:00" in done.stdout


def test_address_without_a_dataset_says_so(folder: Path) -> None:
    with WebServer(folder) as server, pytest.raises(DatasetError, match="not an anemoi dataset"):
        open_dataset(f"{server.url}/nothing.zarr")


def test_server_that_is_not_there_says_so() -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset("http://127.0.0.1:9/waves.zarr")
