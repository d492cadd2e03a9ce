"""Read a checkpoint: numbers, texts and tensors only, so that one from a stranger runs no code."""

from __future__ import annotations

import os
from pickle import UnpicklingError
from typing import Any

import torch

from shardio.errors import DatasetError

ZIP = b"PK\x03\x04"  # how every checkpoint begins


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
            f"the checkpoint {path} cannot be read: {first_line(why)}. Use another checkpoint of the run."
        ) from error


def first_line(message: str) -> str:
    """Of a message of torch, which may go on for pages."""
    return message.strip().partition("\n")[0]
