"""The command `trainer predict`: options, ranks, and one line for every forecast."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from shardio import Dataset, Topology, open_dataset
from shardio.errors import SelectionError
from trainer.cli.bar import Bar
from trainer.cli.flags import Parser, parse, parser_of
from trainer.cli.result import one_object
from trainer.cli.training import read_training
from trainer.comm import Comm, join_group, join_world
from trainer.fit.run_folder import CHECKPOINTS, RUN
from trainer.predict.asked import Asked
from trainer.predict.forecast import assemble
from trainer.predict.netcdf import export, refuse_own_names
from trainer.predict.predict import Task, Written, initial_dates, write
from trainer.predict.trained import read_trained
from trainer.ranks.agree import hear, look
from trainer.ranks.launcher import RankLauncher, started_by_others
from trainer.share import Share

DESCRIPTION = """Forecast from one or many dates; every rank writes its own grid-chunks of OUTPUT/<initial date>.zarr.

  trainer predict --ckpt_path run/checkpoints/last.ckpt --dataset o32.zarr --start 2020-02-10 --lead-time 120h
  trainer predict --config my.yaml --ckpt_path c.ckpt --start 2020-01-01 --end 2020-01-31 --every 24h
  trainer predict --config my.yaml --ckpt_path c.ckpt --start 2020-01-01 --devices 4 --num_gpus_per_model 4
  trainer predict --config my.yaml --ckpt_path c.ckpt --start 2020-01-01 --evaluate --netcdf
  torchrun --nproc_per_node 4 -m trainer.cli predict --ckpt_path c.ckpt --dataset o32.zarr --start 2020-01-01

--config is the YAML of the training; flags win. Ranks: --devices x --num_nodes of them, or as many as torchrun or
SLURM start. Each --num_gpus_per_model together make one forecast, the others make those of other dates; neither has to
be as in the training.

Run the same command again after an interruption: it goes on at the lead time where it stopped, on as many ranks as you
like, and keeps forecasts that are complete; with --evaluate or --netcdf added it does only that."""

FOREVER = timedelta(days=7)  # how long ranks that are done wait for the others, whose forecasts may take longer


def build_parser() -> Parser:
    """The options of `trainer predict`."""
    parser = parser_of("predict", DESCRIPTION, "--config FILE --ckpt_path FILE --start DATE")
    what = parser.add_argument_group("what").add_argument
    what("--ckpt_path", type=str, required=True, help="Of `trainer fit`, on whatever ranks; last, best: of --config.")
    what("--config", type=str | None, default=None, help="YAML of the training: gives dataset and ranks.")
    what("--dataset", type=str | None, default=None, help="Initial fields and forcings. Default: that of --config.")
    what("--start", type=str, required=True, help="Initial date, or several: 2020-01-01,2020-01-02T12:00.")
    what("--end", type=str | None, default=None, help="Last initial date: all from --start on, as --every says.")
    what("--every", type=str | None, default=None, help="Between initial dates, such as 24h. Default: all dates.")
    what("--lead_time", type=str, default="240h", help="How far each forecast goes.")
    what("--members", type=int | None, default=None, help="Members of the dataset to start from. Default: all.")
    out = parser.add_argument_group("output").add_argument
    out("--output", type=str, default="forecasts", help="Folder of the forecasts.")
    out("--variables", type=str | None, default=None, help="Names to write: t_850,z_500. Default: all forecast.")
    out("--evaluate", action="store_true", help="Score the forecasts: scores.csv, skill.png, maps.png in OUTPUT.")
    out("--netcdf", action="store_true", help="Write each forecast as one CF NetCDF file too, beside it.")
    out("--overwrite", action="store_true", help="Replace forecasts that are there.")
    out("--ahead", type=int, default=2, help="Lead times that may wait in memory for the disk.")
    out("--no_fsync", action="store_true", help="Do not wait for the disk: faster, lost at power loss.")
    out("--json", action="store_true", help="Print the results as JSON.")
    out("--debug", action="store_true", help="Show the traceback of an error.")
    ranks = parser.add_argument_group("ranks").add_argument
    ranks("--accelerator", type=str | None, default=None, help="cpu, cuda or auto. Default: that of --config, or cpu.")
    ranks("--devices", type=int | None, default=None, help="Ranks per machine. Default: those of --config, or 1.")
    ranks("--num_nodes", type=int | None, default=None, help="Machines. Default: those of --config, or 1.")
    ranks("--num_gpus_per_model", type=int | None, default=None, help="Ranks per model. Default: see above, or all.")
    ranks("--precision", type=str | int | None, default=None, help="Such as bf16-mixed. Default: of the training.")
    ranks("--num_chunks", type=int | None, default=None, help="Parts of encoder and decoder: more parts, less memory.")
    ranks("--timeout_seconds", type=float, default=600.0, help="After which a rank gives up waiting for another.")
    return parser


def main(arguments: list[str]) -> None:
    """Runs in every rank; the first one starts the others, once all that can be known to fail has been tried."""
    options = parse(build_parser(), arguments)
    config = read_training(options.config) if options.config else {}
    _fill_from_config(options, config)
    asked = _asked(options, config)
    finding = look(asked.find)
    fabric = _launch(options)
    world = join_world(FOREVER)
    found = hear(finding, world)
    asked.refuse_other_checkpoint(found)
    cells, tasks = asked.plan(found.chunk_cells)
    topology = Topology(options.devices * options.num_nodes, fabric.global_rank, asked.ranks)
    share = Share(cells, join_group(topology.model_size, timedelta(seconds=options.timeout_seconds)), fabric.device)
    say = print if not options.json and topology.rank == 0 else _silent
    with one_object(options.json and topology.rank == 0) as result:
        forecasts: list[dict[str, Any]] = result.setdefault("forecasts", [])
        for number, task in enumerate(tasks if topology.rank == 0 else ()):
            if number not in found.missing:
                forecasts.append({"path": str(task.path), "steps": 0, "kept": True})
                say(f"kept {task.path}: it is complete", flush=True)
        mine = [tasks[number] for number in found.missing[topology.data_rank :: topology.data_size]]
        for done in _write(options, asked, share, mine, topology.rank == 0, arguments):
            if topology.model_rank == 0:
                forecasts.append(_result(done))
                (_silent if options.json else print)(_sentence(done), flush=True)
        every = world.gather(forecasts, "results")  # which waits for all of them
        result["forecasts"] = sorted((one for part in every for one in part), key=lambda one: str(one["path"]))
        paths = [task.path for task in tasks]
        if options.evaluate:
            scores, text = _evaluate(options, config, paths, asked.dataset, share, topology, world)
            result |= scores
            say(text, flush=True)
        if options.netcdf and topology.rank == 0:  # no rank waits for it: there is nothing to do after it
            _export(paths, options.overwrite, result.setdefault("netcdf", []), say)


def _asked(options: Any, config: dict[str, Any]) -> Asked:
    """What the options mean; SelectionError or DatasetError where model or dataset are not there."""
    trained = read_trained(_checkpoint(options.ckpt_path, options.config, config))
    dataset = open_dataset(options.dataset)
    dates = initial_dates(dataset, options.start, options.end, options.every)
    ranks = Topology(options.devices * options.num_nodes, 0, _ranks_per_model(options, config, len(dates))).model_size
    names = [name.strip() for name in options.variables.split(",")] if options.variables is not None else None
    if options.netcdf:
        refuse_own_names(tuple(names or trained.roles.outputs))
    wishes = {"lead_time": options.lead_time, "variables": names, "members": options.members}
    wishes |= {"config": config, "precision": options.precision}
    return Asked(trained, dataset, dates, ranks, Path(options.output), options.overwrite, wishes)


def _write(
    options: Any, asked: Asked, share: Share, tasks: list[Task], shown: bool, arguments: list[str]
) -> Iterator[Written]:
    """One forecast after the other."""
    if not tasks:
        return
    network = {"num_chunks": options.num_chunks} if options.num_chunks else {}
    forecast = assemble(asked.trained, asked.dataset, share, options.precision, **network)
    command, sync = shlex.join(["trainer", "predict", *arguments]), not options.no_fsync
    with Bar(shown) as bar:
        for task in tasks:
            yield write(forecast, task, options.overwrite, options.ahead, sync, command, bar.report(str(task.initial)))


# ---------------------------------------------------------------------------------------------------------- the options
def _checkpoint(given: str, path: str | None, config: dict[str, Any]) -> str:
    """`last` and `best` are those of the run that the configuration describes."""
    if given not in ("last", "best"):
        return given
    if path is None:
        raise SelectionError(
            f"--ckpt_path {given} is that of a run. Give its --config too, or the path of a .ckpt file."
        )
    found = Path(config.get("output") or RUN) / CHECKPOINTS / f"{given}.ckpt"
    if not found.exists():
        raise SelectionError(
            f"there is no {found}, which --ckpt_path {given} means with {path}. Give the path of a .ckpt file."
        )
    return str(found)


def _fill_from_config(options: Any, config: dict[str, Any]) -> None:
    """What flags leave open comes from the configuration of the training, else from defaults."""
    run = config.get("trainer") or {}
    fallbacks = {
        "dataset": (config.get("data") or {}).get("dataset"),
        "accelerator": run.get("accelerator", "cpu"),
        "devices": _count(run.get("devices", 1)),
        "num_nodes": run.get("num_nodes", 1),
    }
    for name, value in fallbacks.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    vars(options).update(started_by_others())
    if options.dataset is None:
        raise SelectionError("no dataset is named. Give --dataset PATH, or --config with data.dataset in it.")
    if options.devices < 1 or options.num_nodes < 1:
        raise SelectionError(f"{options.devices} ranks on {options.num_nodes} machines. Use 1 or more of both.")


def _count(devices: Any) -> int:
    """As Lightning takes them: a number, a list, or auto."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdecimal() else max(torch.cuda.device_count(), 1)


def _ranks_per_model(options: Any, config: dict[str, Any], dates: int) -> int:
    """As in the training if that leaves no rank without a date; else all ranks together."""
    world: int = options.devices * options.num_nodes
    if options.num_gpus_per_model is not None:
        return int(options.num_gpus_per_model)
    trained = int((config.get("strategy") or {}).get("num_gpus_per_model", world))
    return trained if world % trained == 0 and world // trained <= dates else world


# ------------------------------------------------------------------------------------------------------------ the ranks
def _launch(options: Any) -> Any:
    """Start the other ranks, or find those that torchrun or SLURM started."""
    several = options.devices * options.num_nodes > 1
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    class Ranks(DDPStrategy):
        def _configure_launcher(self) -> None:
            assert self.cluster_environment is not None
            self._launcher = RankLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes, command="predict"
            )

    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=Ranks(timeout=timedelta(seconds=options.timeout_seconds)) if several else "auto",
    )
    fabric.launch()
    return fabric


# ----------------------------------------------------------------------------------------------------------- the result
def _evaluate(
    options: Any,
    config: dict[str, Any],
    paths: list[Path],
    dataset: Dataset,
    share: Share,
    topology: Topology,
    world: Comm,
) -> tuple[dict[str, Any], str]:
    """Scores of all forecasts on all ranks, and a table of them; each model group reads those of its dates."""
    from trainer.predict.evaluate import evaluate
    from trainer.predict.pictures import draw_maps, draw_skill

    data, folder, first = config.get("data") or {}, Path(options.output), topology.rank == 0
    period = (data.get("train_start"), data.get("train_end")) if data.get("train_end") else None
    mine = slice(topology.data_rank, None, topology.data_size)
    scores = evaluate(paths, dataset, share.owned, world, period, mine)
    if first:
        scores.write(folder / "scores.csv")
        draw_skill(folder / "skill.png", scores)
    if topology.data_rank == 0:
        draw_maps(folder / "maps.png", paths[0], dataset, share.owned, share.comm, shown=first)
    files = [str(folder / name) for name in ("scores.csv", "skill.png", "maps.png")]
    return {"scores": list(scores.rows()), "climatology": scores.climatology, "files": files}, str(scores)


def _export(paths: list[Path], overwrite: bool, files: list[str], say: Any) -> None:
    """Each forecast as one file; those that are written are added to `files` one by one."""
    for path in paths:
        export(path, path.with_suffix(".nc"), overwrite)
        files.append(str(path.with_suffix(".nc")))
        say(f"wrote {path.with_suffix('.nc')}", flush=True)


def _result(done: Written) -> dict[str, Any]:
    seconds, waited = round(done.seconds, 3), round(done.waited, 3)
    return {"path": str(done.path), "steps": done.steps, "seconds": seconds, "waited": waited, "kept": False}


def _sentence(done: Written) -> str:
    share = done.waited / max(done.seconds, 1e-9)
    times = "lead time" if done.steps == 1 else "lead times"
    return f"wrote {done.path}: {done.steps} {times} in {done.seconds:.1f} s ({share:.0%} waiting for the disk)"


def _silent(*_: Any, **__: Any) -> None:
    """With --json all is said at the end, in one object."""
