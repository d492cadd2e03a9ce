"""The command `trainer predict`: options, ranks, and one line for every forecast."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shardio import Topology, open_dataset
from shardio.errors import PlanError, SelectionError
from trainer.assembly import Place
from trainer.forecast import forecast_partition, load
from trainer.predict import initial_dates, write

DESCRIPTION = """Forecast from one or many dates; every rank writes its own grid-chunks of OUTPUT/<initial date>.zarr.

trainer predict --ckpt_path run/checkpoints/last.ckpt --dataset o32.zarr --start 2020-02-10 --lead-time 120h
trainer predict --config my.yaml --ckpt_path c.ckpt --start 2020-01-01 --end 2020-01-31 --every 24h --lead-time 240h
trainer predict --config my.yaml --ckpt_path c.ckpt --start 2020-01-01 --lead-time 240h --devices 4 \\
    --num_gpus_per_model 4 --evaluate

An interrupted forecast goes on with the same command, on the same or on other ranks.
"""


def build_parser() -> ArgumentParser:
    """The options of `trainer predict`."""
    parser = ArgumentParser(prog="trainer predict", description=DESCRIPTION)
    add = parser.add_argument
    add("--config", type=str | None, default=None, help="Of the training: gives dataset, devices and model group.")
    add("--ckpt_path", type=str, required=True, help="Checkpoint that `trainer fit` wrote, on whatever ranks.")
    add("--dataset", type=str | None, default=None, help="Initial fields and forcings. Default: that of --config.")
    add("--start", type=str, required=True, help="Initial date, or several: 2020-01-01,2020-01-02T12:00.")
    add("--end", type=str | None, default=None, help="Last initial date: all from --start on, as --every says.")
    add("--every", type=str | None, default=None, help="Between initial dates, such as 24h. Default: all dates.")
    add("--lead_time", type=str, default="240h", help="How far each forecast goes.")
    add("--output", type=str, default="forecasts", help="Folder of the forecasts.")
    add("--variables", type=str | None, default=None, help="Names to write: t_850,z_500. Default: all forecast.")
    add("--members", type=int | None, default=None, help="Members of the dataset to start from. Default: all.")
    add("--overwrite", action="store_true", help="Replace forecasts that are there.")
    add("--accelerator", type=str | None, default=None, help="cpu, cuda or auto. Default: that of --config, or cpu.")
    add("--devices", type=int | None, default=None, help="Ranks on this machine. Default: those of --config, or 1.")
    add("--num_nodes", type=int | None, default=None, help="Machines. Default: those of --config, or 1.")
    add("--num_gpus_per_model", type=int | None, default=None, help="Ranks per model. Default: of --config, or all.")
    add("--num_chunks", type=int | None, default=None, help="Parts of encoder and decoder: more parts, less memory.")
    add("--timeout_seconds", type=float, default=600.0, help="After which a rank gives up waiting for another.")
    add("--no_fsync", action="store_true", help="Do not wait for the disk: faster, lost at power loss.")
    add("--json", action="store_true", help="Print the results as JSON.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def main(arguments: list[str]) -> None:
    """Runs in every rank; the first one starts the others."""
    options = build_parser().parse_args([_underscored(argument) for argument in arguments])
    _fill_from_config(options)
    if options.dataset is None:
        raise SelectionError("no dataset is named. Give --dataset PATH, or --config with data.dataset in it.")
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    # What is wrong is said before ranks are started.
    topology = Topology(options.devices * options.num_nodes, 0, options.num_gpus_per_model)
    dataset = open_dataset(options.dataset, **options.chosen)
    dates = initial_dates(dataset, options.start, options.end, options.every)
    cells = forecast_partition(dataset, topology.model_size)
    _check_initial(options)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    strategy = DDPStrategy(timeout=timedelta(seconds=options.timeout_seconds))
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=strategy if topology.world_size > 1 else "auto",
    )
    fabric.launch()
    topology = Topology(topology.world_size, fabric.global_rank, topology.model_size)
    place = Place(cells, topology.model_rank, _model_group(topology), fabric.device)
    network = {"num_chunks": options.num_chunks} if options.num_chunks else {}
    forecast = load(options.ckpt_path, dataset, place, **network)
    names = options.variables.split(",") if options.variables else None
    results: list[dict[str, Any]] = []
    with _Bar(topology.rank == 0) as bar:
        for date in dates[topology.data_rank :: topology.data_size]:
            done = write(
                forecast,
                date,
                options.lead_time,
                Path(options.output),
                names,
                options.members,
                options.overwrite,
                sync=not options.no_fsync,
                command=f"trainer predict {' '.join(arguments)}",
                report=bar.report(str(date)),
            )
            results.append(_told(done.path, done.steps, done.seconds, done.waited))
    if topology.model_rank == 0:
        for result in results:
            print(json.dumps(result) if options.json else _line(result), flush=True)


def _underscored(argument: str) -> str:
    """--lead-time=240h as --lead_time=240h."""
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value


def _fill_from_config(options: Any) -> None:
    """What flags leave open comes from the configuration of the training, else from defaults."""
    import yaml

    about: dict[str, Any] = {}
    if options.config is not None:
        try:
            about = yaml.safe_load(Path(options.config).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SelectionError(f"the configuration {options.config} cannot be read: {error}") from error
    data, run, groups = (about.get(part) or {} for part in ("data", "trainer", "strategy"))
    options.chosen = {name: data[name] for name in ("frequency", "select", "drop") if data.get(name)}
    fallbacks = {
        "dataset": data.get("dataset"),
        "accelerator": run.get("accelerator", "cpu"),
        "devices": run.get("devices", 1),
        "num_nodes": run.get("num_nodes", 1),
    }
    for name, value in fallbacks.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.num_gpus_per_model is None:
        world = options.devices * options.num_nodes
        options.num_gpus_per_model = min(groups.get("num_gpus_per_model", world), world)


def _check_initial(options: Any) -> None:
    if not Path(options.ckpt_path).is_file():
        raise SelectionError(f"there is no checkpoint {options.ckpt_path}. Give one from the checkpoints of a run.")
    if options.variables == "":
        raise PlanError("--variables names nothing. Leave it out to write all variables.")


def _model_group(topology: Topology) -> dist.ProcessGroup | None:
    """Every rank makes all groups, in the same order."""
    size = topology.model_size
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, topology.world_size, size)]
    group: dist.ProcessGroup = groups[topology.rank // size]
    return group


def _told(path: Path, steps: int, seconds: float, waited: float) -> dict[str, Any]:
    return {"path": str(path), "steps": steps, "seconds": seconds, "waited": waited}


def _line(result: dict[str, Any]) -> str:
    per_step = result["seconds"] / result["steps"]
    return (
        f"wrote {result['path']}: {result['steps']} lead times in {result['seconds']:.1f} s ({per_step:.2f} s each, "
        f"{result['waited'] / result['seconds']:.0%} waiting for the disk)"
    )


class _Bar:
    """Progress on stderr, by the first rank."""

    def __init__(self, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(file=sys.stderr), disable=not shown)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, name: str) -> Any:
        """What `write` tells after every lead time."""
        task = self._progress.add_task(name, total=None)
        return lambda done, of: self._progress.update(task, completed=done, total=of)
