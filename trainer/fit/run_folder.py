"""The folder of a run: one `trainer fit` at a time writes to it, and none replaces what another has trained unasked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from shardio import lock
from shardio.errors import DatasetError, HeldError, OutputError
from trainer.model.saved import step_of

RUN = "run"  # where it is unless --output says else
LOCK = ".lock"
CHECKPOINTS = "checkpoints"


def refuse_existing(folder: Path, resumed: str | None, overwrite: bool) -> bool:
    """Whether the run in `folder` goes on; OutputError where it would be replaced without being asked for.

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
    if own and resumed is not None and (last := _last_step(folder) or 0) > step_of(resumed):
        raise OutputError(
            f"to go on from {resumed}, step {step_of(resumed)}, would replace last.ckpt of the same run, step {last}. "
            "Give another --output with the path of this checkpoint, or move last.ckpt away."
        )
    return own


def described(folder: Path) -> str:
    """How far its run is: `last checkpoint: step 242`."""
    last = folder / CHECKPOINTS / "last.ckpt"
    if not last.exists():
        return "no last.ckpt"
    step = _last_step(folder)
    return f"{last} cannot be read" if step is None else f"last checkpoint: step {step}"


def _last_step(folder: Path) -> int | None:
    """Of its last.ckpt; None where there is none that can be read."""
    try:
        return step_of(folder / CHECKPOINTS / "last.ckpt")
    except DatasetError:
        return None


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it for the time of the `with`, at most until this process ends, however it ends.

    Raises: OutputError if another process holds it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / LOCK))
        except HeldError as error:
            raise OutputError(
                f"another `trainer fit` is writing to {folder}: {error.holder}. Wait for it, or choose another folder "
                "with --output."
            ) from None
        except OSError as error:
            raise OutputError(
                f"the folder {folder} cannot be written: {error}. Choose another with --output."
            ) from error
        yield


class Replace(Callback):
    """Removes what another run left in the folder, once the new one has taken a step: until then it may yet fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_done = False

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero and not self._is_done:
            for path in (self.folder / CHECKPOINTS).glob("*.ckpt"):
                path.unlink(missing_ok=True)
            for own in (Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir):
                for log in own.parent.glob("version_*"):
                    if log.name != own.name:
                        shutil.rmtree(log, ignore_errors=True)
            (self.folder / "curves.png").unlink(missing_ok=True)
        self._is_done = True
