"""A trained model as one program: in the units of the dataset, on one rank, without the code it was written in.

    export(forecast, "model.pt2")     torch.export: graph, weights, what it needs to know; for Python and compilers
    compile_program("model.pt2")      AOTInductor: model.aoti.pt2, machine code for this kind of processor; for C++

fields    [batch, input time, ensemble, cells, prognostic + forcing]    in; NaN is taken as the mean, as in training
forecast  [batch, ensemble, cells, prognostic + diagnostic]             out, one step after the last input time, and NaN
                                                                        where a variable in `lacking` is NaN there

Prognostic variables come first on both sides: the next input is the last one without its oldest time, and with the
forecast of them and the forcings of the time forecast behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

import shardio
from shardio import atomic
from shardio.errors import DatasetError, OutputError, PlanError
from trainer.graph.sharded_graph import ShardedGraph
from trainer.model.forecaster import Forecaster, known_or_mean, put, without_value
from trainer.predict.forecast import Forecast

ABOUT = "shardio.json"  # the extra file of a .pt2
TRACED = 2  # batch and members of the example: a size of 1 would be taken for the only one
SUFFIX, COMPILED = ".pt2", ".aoti.pt2"


class Step(nn.Module):
    """One step of the forecast, from and to the units of the dataset.

    Args:
      forecaster: the model on all cells.
      latitudes, longitudes: float64 [cells], kept with the weights.
    """

    mean: Tensor
    stdev: Tensor

    def __init__(self, forecaster: Forecaster, latitudes: Tensor, longitudes: Tensor):
        super().__init__()
        self.forecaster = forecaster
        inputs = forecaster.roles.places(forecaster.roles.inputs)
        self.register_buffer("mean", forecaster.mean[inputs])
        self.register_buffer("stdev", forecaster.stdev[inputs])
        self.register_buffer("latitudes", latitudes)
        self.register_buffer("longitudes", longitudes)

    def forward(self, fields: Tensor) -> Tensor:
        """[batch, input time, ensemble, cells, inputs] -> [batch, ensemble, cells, outputs], both float32."""
        state = known_or_mean((fields.to(self.mean.dtype) - self.mean) / self.stdev)
        forecast = self.forecaster.denormalise(self.forecaster(state)).float()
        places = self.forecaster.lacking
        return put(torch.nan, forecast, places, without_value(fields[:, -1], places))


@dataclass(frozen=True)
class Exported:
    """Attributes: path; nodes of the graph; bytes of the file; about, what is stored with it."""

    path: Path
    nodes: int
    nbytes: int
    about: dict[str, Any]


def export(forecast: Forecast, path: str | os.PathLike[str], overwrite: bool = False) -> Exported:
    """Write the model as a torch.export program; batch and ensemble may have any size in it.

    Args:
      forecast: on one rank, on the CPU: `trainer.load(checkpoint, dataset)`.
      path: of the file, whose name ends in .pt2.
      overwrite: replace a file that is there.
    Raises: PlanError if the model is cut over ranks; OutputError if the file is there or cannot be written.
    """
    target = check_output(path, overwrite)
    ranks = forecast.share.cells.ranks
    if ranks > 1:
        raise PlanError(f"the model is cut over {ranks} ranks, a program has one. Load it on one rank to export it.")
    dataset, model = forecast.dataset, forecast.forecaster
    coordinates = [torch.from_numpy(np.array(axis, np.float64)) for axis in (dataset.latitudes, dataset.longitudes)]
    example = torch.zeros(TRACED, model.input_steps, TRACED, dataset.shape[3], len(model.roles.inputs))
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("ensemble")}
    with torch.no_grad():
        step = Step(model, *coordinates).eval()
        _make_tables(forecast.forecaster.network.graph)
        program = torch.export.export(step, (example,), dynamic_shapes=(sizes,), strict=False)
    program.example_inputs = ((torch.zeros(()).expand_as(example),), {})  # stored as one number
    about = describe(forecast)
    with _in_place_of(target) as partial:
        torch.export.save(program, partial, extra_files={ABOUT: json.dumps(about, indent=2)})
    return Exported(target, len(program.graph.nodes), target.stat().st_size, about)


def _make_tables(graph: ShardedGraph) -> None:
    """Once, of lists that have none: while a program is traced arrays have no numbers."""
    for links in (graph.encoder, graph.processor, graph.decoder):
        for chunk in links.chunks:
            chunk.lists.with_tables()


def describe(forecast: Forecast) -> dict[str, Any]:
    """What one must know to call the program."""
    trained, dataset, roles = forecast.trained, forecast.dataset, forecast.trained.roles
    grid = hashlib.sha256()
    for axis in (dataset.latitudes, dataset.longitudes):
        grid.update(np.ascontiguousarray(axis, "<f8").tobytes())
    return {
        "inputs": list(roles.inputs),
        "outputs": list(roles.outputs),
        "prognostic": list(roles.prognostic),
        "forcings": list(roles.forcings),
        "diagnostics": list(roles.diagnostics),
        "lacking": list(roles.lacking),
        "input_steps": trained.input_steps,
        "step_seconds": trained.step,
        "cells": dataset.shape[3],
        "resolution": dataset.resolution,
        "field_shape": list(dataset.field_shape),
        "grid_sha256": grid.hexdigest(),  # of latitudes, then longitudes, little-endian float64
        "checkpoint": trained.digest,
        "shardio": shardio.__version__,
        "torch": torch.__version__,
    }


def read_program(path: str | os.PathLike[str]) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program that `export` wrote, and what it stored with it; `program.module()` is the step."""
    if not Path(path).is_file():
        raise DatasetError(f"there is no program {path}. Write one: trainer export --output {path}.")
    if not is_zipfile(path):
        raise DatasetError(f"{path} is no program, or not a whole one. Write it again: trainer export --output {path}.")
    files = {ABOUT: ""}
    program = torch.export.load(path, extra_files=files)
    if not files[ABOUT]:
        raise DatasetError(f"{path} is a program of another author: it has no {ABOUT}. Give one of trainer export.")
    return program, json.loads(files[ABOUT])


def compile_program(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Compile an exported program with AOTInductor, into model.aoti.pt2 beside it.

    It runs on processors with the vector instructions of this one (metadata AOTI_CPU_ISA). Its metadata are those of
    the program, as texts, with lists joined by commas: C++ needs no JSON.

    Args:
      path: that `export` wrote.
      overwrite: replace a file that is there.
    Raises: PlanError if there is no compiler; OutputError if the file is there or cannot be written.
    """
    target = check_output(compiled_path(path), overwrite)
    _check_compiler(path)
    program, about = read_program(path)
    (example,), _ = program.example_inputs
    program.example_inputs = ((example.contiguous(),), {})  # compiled code takes fields that lie in memory like this
    metadata = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in about.items()
    }
    with warnings.catch_warnings(), _in_place_of(target) as partial, torch.no_grad():
        # Inductor's own: it imports torch.jit, and copies a tree of torch's.
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
        settings = {"aot_inductor.metadata": metadata}
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=settings)
    return target


def _check_compiler(path: str | os.PathLike[str]) -> None:
    """Before Inductor works for minutes."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise PlanError(
            "AOTInductor needs a C++ compiler, and found none. Install g++ or clang++, or name one in CXX; "
            f"{path} itself needs none."
        ) from error


def compiled_path(path: str | os.PathLike[str]) -> Path:
    """model.pt2 -> model.aoti.pt2."""
    return Path(path).with_suffix(COMPILED)


def check_output(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """OutputError unless a file may be written there."""
    target = Path(path)
    if target.suffix != SUFFIX:
        raise OutputError(f"the program {target} would not be known as one. Give a name that ends in {SUFFIX}.")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} is there already. Give another name, or --overwrite.")
    return target


@contextmanager
def _in_place_of(target: Path) -> Iterator[Path]:
    """A path to write to, which gets the target's name when all went well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as partial:
            yield partial
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}. Give a folder with room.") from error
