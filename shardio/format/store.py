"""Where bytes lie: a local folder, or a bucket or web server reached through tensorstore."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from shardio.errors import DatasetError

SECONDS_TO_ANSWER = float(os.environ.get("SHARDIO_TIMEOUT", "60"))
CACHE_BYTES = 64 * 2**20
REMOTE = ("s3://", "gs://", "http://", "https://")


class Store(Protocol):
    """A folder of named byte strings."""

    url: str

    def get(self, name: str) -> bytes | None:
        """The content of `name`, None where there is no such name."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file below `folder`, names relative to it; nothing where the store cannot list them."""

    def times(self, folder: str = "") -> dict[str, int]:
        """When each of them was last written, nanoseconds since 1970; nothing where the store cannot list them."""

    def version(self, name: str) -> str:
        """What changes when `name` is written again, as the server says (its ETag); empty where it says nothing."""


class LocalStore:
    """Files below one folder."""

    def __init__(self, path: str | os.PathLike[str]):
        self.root = Path(path)
        self.url = str(path)

    def get(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {name: status.st_size for name, status in self._files(folder)}

    def times(self, folder: str = "") -> dict[str, int]:
        return {name: status.st_mtime_ns for name, status in self._files(folder)}

    def version(self, name: str) -> str:
        return ""  # `times` says it of every file

    def _files(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        top = self.root / folder if folder else self.root
        for parent, folders, files in os.walk(top):
            folders.sort()
            with os.scandir(parent) as entries:
                by_name = {entry.name: entry.stat() for entry in entries if entry.is_file()}
            for name in sorted(files):
                if name in by_name:
                    yield os.path.relpath(os.path.join(parent, name), top), by_name[name]


class RemoteStore:
    """Objects below one `s3://`, `gs://` or `http(s)://` address."""

    def __init__(self, url: str):
        import tensorstore as ts

        self.url = url.rstrip("/")
        try:
            self._kvstore = ts.KvStore.open(kvstore_spec(self.url), context=remote_context()).result(SECONDS_TO_ANSWER)
        except (ValueError, TimeoutError) as error:
            raise DatasetError(f"{url} cannot be opened: {error}") from error

    def get(self, name: str) -> bytes | None:
        read = self._read(name)
        return bytes(read.value) if read.state == "value" else None

    def _read(self, name: str, part: slice | None = None) -> Any:
        try:
            return self._kvstore.read(name, byte_range=part).result(SECONDS_TO_ANSWER)
        except TimeoutError as error:
            raise DatasetError(f"{self.url}/{name}: no answer in {SECONDS_TO_ANSWER} s. Is the server up?") from error
        except ValueError as error:
            raise DatasetError(f"{self.url}/{name} cannot be read: {error}") from error

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {}  # listing gives names without sizes, and web servers give neither

    def times(self, folder: str = "") -> dict[str, int]:
        return {}

    def version(self, name: str) -> str:
        return str(self._read(name, slice(0, 1)).stamp.generation.hex())


def kvstore_spec(url: str) -> dict[str, Any] | str:
    """What tensorstore opens: a local path or an address; `AWS_ENDPOINT_URL` names an S3 server other than Amazon's."""
    if "://" not in url:
        return {"driver": "file", "path": os.path.abspath(url) + "/"}  # it takes no . or .. in a path
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if url.startswith("s3://") and endpoint:
        bucket, _, path = url.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        return {"driver": "s3", "bucket": bucket, "path": f"{path}/", "endpoint": endpoint, "aws_region": region}
    return url.rstrip("/") + "/"


@lru_cache(maxsize=1)
def remote_context() -> Any:
    """Shared by all remote reads of this process: few retries, and a cache for the indexes of Zarr shards."""
    import tensorstore as ts

    retries = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "2s"}
    return ts.Context(
        {
            "http_request_retries": retries,
            "s3_request_retries": retries,
            "gcs_request_retries": retries,
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
        }
    )


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store behind a path or address.

    Raises: DatasetError where the path is empty, or the server does not answer.
    """
    text = os.fspath(url)
    if not text:
        raise DatasetError("the path of the dataset is empty. Name a dataset.")
    return RemoteStore(text) if text.startswith(REMOTE) else LocalStore(text)


def read_json(store: Store, name: str) -> dict[str, Any] | None:
    """The JSON object in `name`, None where it is absent; DatasetError where it is not one."""
    content = store.get(name)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DatasetError(
            f"{store.url}/{name} is not valid JSON ({error}). Restore it from a copy, or make the dataset again."
        ) from error
    if not isinstance(value, dict):
        raise DatasetError(f"{store.url}/{name} holds a {type(value).__name__}, not the metadata of a dataset.")
    return value
