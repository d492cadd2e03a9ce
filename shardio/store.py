"""Where bytes lie: a local folder, or a bucket or web server reached through tensorstore."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from shardio.errors import DatasetError

REMOTE = ("s3://", "gs://", "http://", "https://")


class Store(Protocol):
    """A folder of named byte strings."""

    url: str

    def get(self, name: str) -> bytes | None:
        """The content of `name`, None where there is no such name."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file below `folder`, names relative to it."""


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
        top = self.root / folder if folder else self.root
        found: dict[str, int] = {}
        for parent, folders, files in os.walk(top):
            folders.sort()
            with os.scandir(parent) as entries:
                by_name = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            for name in sorted(files):
                if name in by_name:
                    found[os.path.relpath(os.path.join(parent, name), top)] = by_name[name]
        return found


class RemoteStore:
    """Objects below one `s3://`, `gs://` or `http(s)://` address."""

    def __init__(self, url: str):
        import tensorstore as ts

        self.url = url.rstrip("/")
        try:
            self._kvstore = ts.KvStore.open(self.url + "/").result()
        except ValueError as error:
            raise DatasetError(f"{url} cannot be opened: {error}") from error

    def get(self, name: str) -> bytes | None:
        try:
            read = self._kvstore.read(name).result()
        except ValueError as error:
            raise DatasetError(f"{self.url}/{name} cannot be read: {error}") from error
        return bytes(read.value) if read.state == "value" else None

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {}  # listing gives names without sizes, and web servers give neither


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store behind a path or address."""
    text = os.fspath(url)
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
