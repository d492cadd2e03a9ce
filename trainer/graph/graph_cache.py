"""A graph takes minutes to build on a large grid: what was built is kept on disk, under a name made of all inputs."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from shardio import atomic
from shardio.errors import OutputError

CACHE_FORMAT = 3  # raise it with every change to what is built

Arrays = dict[str, NDArray[Any]]


def cache_path(folder: Path, coordinates: tuple[NDArray[np.float64], ...], inputs: tuple[object, ...]) -> Path:
    """Other versions of numpy and SciPy may round, or break ties, otherwise."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, np.__version__, scipy.__version__, *inputs)).encode())
    for array in coordinates:
        digest.update(np.ascontiguousarray(array, np.float64))
    return folder / f"graph-{digest.hexdigest()[:32]}.npz"


def save(path: Path, arrays: Arrays) -> None:
    """Under another name first: what has the right name is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            np.savez(partial, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(
            f"the graph cannot be kept in {path.parent}: {error}. Free space, or cache elsewhere."
        ) from error


def load(path: Path, names: list[str]) -> Arrays | None:
    """None if there is no such file or it is damaged (each array has a checksum): then build anew."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
