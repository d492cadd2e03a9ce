"""The folder of a run: one `trainer fit` at a time writes to it, and none replaces what another has trained unasked."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from shardio.errors import DatasetError, OutputError
from trainer.checkpoint import step_of

RUN = "run"  # where it is unless --output says else
LOCK = ".lock"
CHECKPOINTS = "checkpoints"


def refuse_existing(folder: Path, resumed: str | None, overwrite: bool) -> None:
    """OutputError where the run in `folder` would be replaced without being asked for.

    Args:
      folder: of the run.
      resumed: path of the checkpoint from which training goes on.
      overwrite: replace the run.
    """
    held = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
    own = resumed is not None and Path(resumed).resolve() in [path.resolve() for path in held]
    if own and overwrite:
        raise OutputError(f"--overwrite would remove {resumed}, from which to go on. Give one of the two, or --output.")
    if held and not own and not overwrite:
        raise OutputError(
            f"{folder} holds a run, {described(folder)}. Use --ckpt_path last to go on with it, another --output to "
            "keep it, or --overwrite to replace it."
        )


def described(folder: Path) -> str:
    """How far its run is: `last checkpoint: step 242`."""
    last = folder / CHECKPOINTS / "last.ckpt"
    if not last.exists():
        return "no last.ckpt"
    try:
        return f"last checkpoint: step {step_of(last)}"
    except DatasetError:
        return f"{last} cannot be read"


def claim(folder: Path) -> int:
    """Make the folder, and lock it until this process ends, however it ends.

    Returns: the descriptor that holds the lock.
    Raises: OutputError if another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be written: {error}. Choose another with --output.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        os.close(descriptor)
        raise OutputError(
            f"another `trainer fit` is writing to {folder}: {holder}. Wait for it, or choose another folder with "
            "--output."
        ) from None
    except OSError:
        pass  # file systems without flock: one writer is then the user's promise
    with suppress(OSError):  # a full disk is told by the first checkpoint
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


def clear(folder: Path) -> None:
    """Remove checkpoints, logs and picture of the run that is to be replaced: none is taken for the new one's."""
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    (folder / "curves.png").unlink(missing_ok=True)
