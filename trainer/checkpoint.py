"""Checkpoints as files that are whole or absent, and that load without running code from them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from shardio.errors import DatasetError, OutputError


class AtomicCheckpointIO(CheckpointIO):
    """Written under another name, flushed to the disk, then renamed: a crash or a full disk leaves the last one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None):
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            with suppress(OSError):
                partial.unlink()
            raise OutputError(
                f"the checkpoint {target} cannot be written: {_first_line(error)}. The previous checkpoint is "
                "untouched. Free space, then resume from it with --ckpt_path."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Numbers, texts and tensors only: a checkpoint from a stranger runs no code."""
        return load(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        with suppress(FileNotFoundError):
            Path(path).unlink()


def load(path: str | os.PathLike[str], device: Any = "cpu") -> dict[str, Any]:
    """The checkpoint at `path`; DatasetError if it is not there or not whole."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return checkpoint
    except FileNotFoundError as error:
        raise DatasetError(f"there is no checkpoint {path}. Give the path of a .ckpt file.") from error
    except Exception as error:  # a damaged zip shows in many ways
        raise DatasetError(
            f"the checkpoint {path} cannot be read: {_first_line(error)}. Use another checkpoint of the run."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
