"""The compiled kernel of attention on CPUs: built by the user's own compiler, kept for later runs, never required.

A library is named after all that it was made of: the source, the flags, and what the compiler says of itself and of
this machine. It gets its name when it is whole, so that ranks that start together may each build it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from shardio import atomic
from trainer.graph.edge_lists import EdgeLists
from trainer.model.kernels.kernel import Rows

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention_kernel.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
NATIVE = "-march=native"
TIME_TO_COMPILE = 300  # seconds
TYPES = (torch.bfloat16, torch.float32, torch.float64)


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    try:
        return _open(_library()), ""
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["it says nothing"]
        why = f"{error.cmd[0]} failed: {lines[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    logger.info("attention runs without its compiled kernel: %s", why)
    return None, why


def _library() -> Path:
    """Path of the library; compiles it if need be."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"there is no C++ compiler {compiler[0]!r}; install one, or name it in CXX")
    flags, about = _target(compiler)
    digest = hashlib.sha256("\0".join([*compiler, *flags, about]).encode() + SOURCE.read_bytes())
    folder = _cache_folder()
    library = folder / f"attention-{digest.hexdigest()[:32]}.so"
    if not library.exists():
        with atomic(library) as partial:
            _run([*compiler, *flags, str(SOURCE), "-o", str(partial)])
    return library


def _cache_folder() -> Path:
    """Where compiled kernels are kept; what lies there runs in every training, so that nobody else may write to it."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user id without a home, as in containers
        raise FileNotFoundError(f"{error}; set XDG_CACHE_HOME to a folder for the compiled kernel") from error
    folder = home / "shardio" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"others may write to {folder} (owner {status.st_uid}, mode {stat.filemode(status.st_mode)}), and code "
            "from there would run here; make it your own with mode 0700, or set XDG_CACHE_HOME"
        )
    return folder


def _target(compiler: list[str]) -> tuple[list[str], str]:
    """Flags, and all that the compiler predefines with them: its version and what this processor can do."""
    ask = ["-x", "c++", "-dM", "-E", os.devnull]
    try:
        return [*FLAGS, NATIVE], _run([*compiler, *FLAGS, NATIVE, *ask])
    except subprocess.CalledProcessError:
        return [*FLAGS], _run([*compiler, *FLAGS, *ask])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIME_TO_COMPILE)
    return done.stdout


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in (library.attend_forward, library.attend_backward):
        function.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p)]
        function.restype = None
    return library


@dataclass(frozen=True)
class CppKernel:
    """Attributes: idle: computes nothing, for plans."""

    idle: bool = False
    tables = False

    def lacking(self, device: torch.device) -> str:
        """Why there is no library, or that the device is no CPU."""
        return load()[1] if device.type == "cpu" else f"it is for CPUs, not {device.type}"

    def supports(self, dtype: torch.dtype) -> bool:
        """Those of TYPES."""
        return dtype in TYPES

    def planned(self, device: torch.device) -> CppKernel:
        """It makes what it makes before it is called."""
        return CppKernel(idle=True)

    def forward(self, rows: Rows, features: Tensor, lists: EdgeLists) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        out, carried = torch.empty_like(rows.query), torch.empty_like(rows.tilt)
        offset = features.new_empty(rows.query.shape[:3])
        self._call("attend_forward", rows, features, lists, (out, carried, offset))
        return out, carried, offset

    def backward(
        self, rows: Rows, features: Tensor, offset: Tensor, out: Tensor, carried: Tensor, lists: EdgeLists
    ) -> Rows:
        """See Kernel."""
        gradients = Rows(*(torch.empty_like(tensor) for tensor in rows))
        batch, _, heads, _ = rows.query.shape
        weights, slopes = features.new_empty(2, batch, len(features), heads)
        self._call("attend_backward", rows, features, lists, (offset, out, carried, *gradients, weights, slopes))
        return gradients

    def _call(self, name: str, rows: Rows, features: Tensor, lists: EdgeLists, more: tuple[Tensor, ...]) -> None:
        if self.idle:
            return
        library, why = load()
        if library is None:
            raise RuntimeError(f"the lists ask for a compiled kernel that this process cannot have: {why}")
        batch, destinations, heads, depth = rows.query.shape
        edges, width = features.shape
        sizes = (
            batch,
            destinations,
            rows.key.shape[1],
            heads,
            depth,
            width,
            edges,
            lists.most,
            torch.get_num_threads(),
        )
        arrays = (lists.offsets, lists.ends, *rows, features, *more)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in arrays]
        lengths, places = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_void_p * len(pointers))(*pointers)
        getattr(library, name)(rows.query.element_size(), lengths, places)
