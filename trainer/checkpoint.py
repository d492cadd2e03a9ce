"""Checkpoints as files that are whole or absent, that load without running code, and from which training goes on.

What is in one: weights, optimizer, schedule, averaged weights, random numbers, Lightning's counters, the position in
the data, and what a forecast needs to know (module.py). Nothing in it depends on the number of ranks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from shardio.errors import DatasetError, OutputError

ZIP = b"PK\x03\x04"  # how every checkpoint begins


class AtomicCheckpointIO(CheckpointIO):
    """Written under another name, flushed to the disk, then renamed: a crash or a full disk leaves the last one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException as error:
            with suppress(OSError):
                partial.unlink()
            if not isinstance(error, OSError | RuntimeError):  # torch reports a full disk as RuntimeError
                raise  # an interrupt
            raise OutputError(
                f"the checkpoint {target} cannot be written: {_first_line(str(error))}. The previous checkpoint is "
                "untouched. Free space, then resume from it with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Numbers, texts and tensors only: a checkpoint from a stranger runs no code."""
        return load(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        with suppress(FileNotFoundError):
            Path(path).unlink()


class KeepLast(Checkpoint):
    """Writes `last.ckpt` every so many steps and at the end of every epoch, whence training goes on exactly.

    Lightning's own callback would also write it between two batches whose gradients are still being added up.

    Args:
      folder: of the checkpoints.
      every: steps between two.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int) -> None:
        if every < 1:
            raise OutputError(f"save_every is {every}. Use 1 step or more.")
        self.path, self.every = Path(folder) / "last.ckpt", every
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            for left_by_a_kill in self.path.parent.glob(".*.partial"):
                left_by_a_kill.unlink(missing_ok=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """At the last batch of an epoch it waits for the validation."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not trainer.is_last_batch and (self._step % self.every == 0 or self._step == trainer.max_steps):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch that max_steps cut short is not at its end: from its last step it can be continued."""
        if trainer.is_last_batch:
            trainer.save_checkpoint(self.path)


def step_of(path: str | os.PathLike[str]) -> int:
    """The step it was written at; its tensors stay on the disk."""
    found = load(path, mmap=True)
    if not isinstance(found, dict) or not {"global_step", "shardio"} <= found.keys():
        raise DatasetError(f"{path} is no checkpoint of `trainer fit`. Give the path of a .ckpt file.")
    return int(found["global_step"])


def load(path: str | os.PathLike[str], device: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The checkpoint at `path`; DatasetError if it is not there or not whole."""
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) != ZIP:  # torch would guess at an older format, and advise to run its code
                raise DatasetError(f"{path} is no checkpoint of `trainer fit`. Give the path of a .ckpt file.")
        checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        return checkpoint
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"there is no checkpoint {path}. Give the path of a .ckpt file.") from error
    except Exception as error:  # a damaged zip shows in many ways
        why = "it holds more than tensors, numbers and texts" if isinstance(error, UnpicklingError) else str(error)
        raise DatasetError(
            f"the checkpoint {path} cannot be read: {_first_line(why)}. Use another checkpoint of the run."
        ) from error


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]
