"""Checkpoints as files that are whole or absent, that load without running code, and from which training goes on.

What is in one: weights, optimizer, schedule, averaged weights, random numbers, Lightning's counters, the position in
the data, and what a forecast needs to know (module.py). Nothing in it depends on the number of ranks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from shardio import atomic, remove_temporary
from shardio.errors import OutputError
from trainer.model.saved import first_line, load


class AtomicCheckpointIO(CheckpointIO):
    """Written under another name, flushed to the disk, then renamed: a crash or a full disk leaves the last one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic(target) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise OutputError(
                f"the checkpoint {target} cannot be written: {first_line(str(error))}. The previous checkpoint is "
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
            remove_temporary(self.path.parent)  # left by a kill

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
