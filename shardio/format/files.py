"""Files that are whole or absent, and files that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardio.errors import HeldError

TEMPORARY = ".tmp."


@contextmanager
def atomic(path: Path, sync: bool = True) -> Iterator[Path]:
    """A path to write to, with the ending of `path`, which gets that name when the `with` ends well.

    A kill leaves a temporary file, never half of `path`; what fails leaves what was there before. `sync`: let the
    bytes be durable before the name is.
    """
    # Random: containers share process ids, and a lost worker may still write what another writes again.
    partial = path.with_name(f".{os.urandom(4).hex()}{TEMPORARY}{path.name}")
    try:
        yield partial
        if sync:
            sync_path(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, which nobody else may write to meanwhile.

    A folder that is not there yet has nothing in it.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as files:  # one by one: there may be millions
        for file in files:
            if file.name.startswith(".") and TEMPORARY in file.name:
                with suppress(FileNotFoundError):
                    os.unlink(file)


def sync_path(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a file for the time of the `with`, at most until this process ends, however it ends.

    Alone, or together with all who share it. On a file system without locks nobody is kept out: one writer is then the
    user's promise.

    Raises: HeldError, which names the process that holds it; FileNotFoundError where its folder is not there.
    """
    descriptor = _open_locked(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        if not shared:
            with suppress(OSError):  # a full disk is told by who writes more than this
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_locked(path: Path, kind: int) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise HeldError(path, holder or "another process") from None
        except OSError:
            return descriptor
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)  # its holder has removed it meanwhile
