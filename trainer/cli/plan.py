"""The command `trainer plan`: what a training needs of each rank, as a table, before GPUs are booked."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from shardio import octahedral, open_dataset
from shardio.errors import DatasetError, PlanError, SelectionError
from shardio.units import size
from trainer.cli.flags import Parser, configurations, parse, parser_of
from trainer.cli.training import read_training
from trainer.fit.data import ForecastDataModule
from trainer.fit.module import ForecastModule, RolloutOptions
from trainer.fit.optimizer import OptimizerOptions
from trainer.graph.graph import PARTS, GraphOptions
from trainer.model.forecaster import Roles
from trainer.model.loss import LossOptions, variable_weights
from trainer.model.model import ModelOptions
from trainer.model.precision import Precision
from trainer.plan.footprint import Job
from trainer.plan.planner import RESERVE, Field, Planner, Recommendation, Row

DESCRIPTION = """What each rank needs to train: rows, bytes and messages of the largest one, for several sizes of the
model group. Nothing is trained, and no data is read.

  trainer plan --config my.yaml --gpus-per-model 1,2,4,8,16
  trainer plan --config o96 --grid o1280 --variables 100 --gpus-per-model 16,64 --gpu-memory 80GiB
  trainer plan --config my.yaml --model.network.num_chunks 8 --trainer.precision bf16-mixed --json

Flags of the training, --model.* and --data.*, win over the configuration, as in `trainer fit`."""
CELLS_OF_A_NODE = 500  # beyond which a hidden mesh is called coarse
WIDEST = 2**14  # characters of a line in a file or a pipe, where none is broken
HOW = {
    "graph": "counted on the real graph, cut as in training",
    "rank": "counted on the real part of the rank in the middle; hidden nodes are cut by their number, not by work",
    "formulas": "by formulas, for bands of latitude: the rank is too large to build its part here",
}


def build_parser() -> Parser:
    """The options of `trainer plan`."""
    parser = parser_of("plan", DESCRIPTION, "--config FILE")
    add = parser.add_argument
    add("--config", type=str | None, default=None, help="Of the training.")
    add("--gpus_per_model", type=str, default="1,2,4,8,16", help="Sizes of the model group, M, to plan for.")
    add("--grid", type=str | None, default=None, help="An octahedral grid, such as o1280, instead of the dataset's.")
    add("--grid_chunks", type=int | None, default=None, help="Of a date. Default: the dataset's; with --grid, M.")
    add("--variables", type=int | None, default=None, help="Number of variables, where there is no dataset yet.")
    add("--gpu_memory", type=str, default="80GiB", help="Of one GPU.")
    add("--rollout", type=int | None, default=None, help="Steps the loss looks ahead. Default: model.rollout.maximum.")
    add("--trainer.precision", type=str | int, default="32-true", help="Of Lightning, such as bf16-mixed.")
    add("--trainer.accelerator", type=str, default="cpu", help="cpu, or cuda; auto means cuda.")
    add("--strategy.read_group_size", type=int | None, default=None, help="Ranks that read one sample together.")
    add("--ema_decay", type=float | None, default=None, help="If given, averaged weights are kept too.")
    parser.add_class_arguments(ForecastModule, "model")
    parser.add_class_arguments(ForecastDataModule, "data")
    add("--json", action="store_true", help="Print the plan as JSON.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def main(arguments: list[str]) -> None:
    """Plan, and print it."""
    options = options_of(arguments)
    groups = sorted({_count(word) for word in options.gpus_per_model.split(",")})
    memory = parse_size(options.gpu_memory)
    planner = plan_of(options)
    rows = [planner.row(ranks) for ranks in groups]
    advice = planner.recommend(rows, memory)
    if options.json:
        plan = {"grid": planner.field.name, "gpu_memory": memory, "rows": [row.as_json() for row in rows]}
        print(json.dumps(plan | {"recommendation": asdict(advice)}, indent=1))
    else:
        show(planner, rows, advice, memory)


def options_of(arguments: list[str]) -> Namespace:
    """What of the configuration matters here comes first; flags win."""
    training = (flag for path in configurations(arguments) for flag in _flags(read_training(path)))
    return parse(build_parser(), arguments, ["--data.dataset=", *training])


def _flags(about: dict[str, Any]) -> Iterator[str]:
    """Model and data as they are; of Lightning's trainer and the strategy only what decides memory."""
    for part in ("model", "data"):
        if about.get(part):
            yield f"--{part}={json.dumps(about[part])}"
    for part, name in (("trainer", "precision"), ("trainer", "accelerator"), ("strategy", "read_group_size")):
        value = (about.get(part) or {}).get(name)
        if value is not None:
            yield f"--{part}.{name}={value}"
    if about.get("ema_decay") is not None:
        yield f"--ema_decay={about['ema_decay']}"


def plan_of(options: Namespace) -> Planner:
    """From options to a planner."""
    model, data = options.model, options.data
    field, names, ensemble = _field(options)
    roles = Roles(names, *(tuple(given or ()) for given in (model.forcings, model.diagnostics, model.allow_nan)))
    loss = LossOptions(**model.loss.as_dict())
    variable_weights(roles.outputs, loss, dict.fromkeys(roles.outputs, 1.0))
    job = Job(
        roles,
        data.input_steps,
        options.rollout or RolloutOptions(**model.rollout.as_dict()).maximum,
        data.batch_size,
        ensemble,
        ModelOptions(**model.network.as_dict()),
        loss,
        OptimizerOptions(**model.optimizer.as_dict()),
        Precision(options.trainer.precision),
        "cpu" if options.trainer.accelerator == "cpu" else "cuda",
        options.ema_decay is not None,
    )
    graph, groups = GraphOptions(**model.graph.as_dict()), options.strategy.read_group_size
    return Planner(field, job, graph, data.prefetch, groups, data.keep_batch_sharded)


def _field(options: Namespace) -> tuple[Field, tuple[str, ...], int]:
    """The grid, the variables that the model uses, and the members: of the dataset, or as the options say."""
    data, dataset = options.data, None
    if data.dataset and (options.variables is None or options.grid is None):
        try:
            dataset = open_dataset(data.dataset, select=data.select, drop=data.drop)
        except (DatasetError, SelectionError) as error:
            if options.grid is None:
                raise
            if data.select is None and options.variables is None:
                raise SelectionError(f"{error} To plan without it, give --variables, how many there are.") from error
    if dataset is None and options.grid is None:
        raise SelectionError("no grid is named. Give --data.dataset PATH, or --grid o1280 and --variables 100.")
    names = tuple(dataset.variables) if dataset else _names(options)
    ensemble = dataset.shape[2] if dataset else 1
    if options.grid is None:
        assert dataset is not None
        chunk_cells = dataset.chunk_cells
        places, name = (dataset.latitudes, dataset.longitudes), str(data.dataset)
        stored = dataset.stored_variables
    else:
        places, name, chunk_cells, stored = octahedral(options.grid)[:2], options.grid, None, len(names)
    if options.grid_chunks is not None:
        chunk_cells = math.ceil(places[0].size / options.grid_chunks)
    return Field(name, *places, chunk_cells, stored), names, ensemble


def _names(options: Namespace) -> tuple[str, ...]:
    """Names that the configuration knows, and as many more as it takes."""
    model, data = options.model, options.data
    named = (data.select, model.forcings, model.diagnostics, model.loss.variable_weights, model.allow_nan)
    known = list(dict.fromkeys(name for names in named for name in names or ()))
    wanted = len(known) if options.variables is None else options.variables
    if wanted < len(known):
        raise SelectionError(f"--variables is {wanted}, but the configuration names {len(known)}. Give all of them.")
    return tuple(known + [f"variable{number}" for number in range(wanted - len(known))])


def _count(word: str) -> int:
    if not word.strip().isdigit() or int(word) < 1:
        raise PlanError(f"{word!r} is no number of GPUs. Write --gpus-per-model 1,2,4,8.")
    return int(word)


def parse_size(text: str) -> int:
    """80GiB or 40GB; not a bare number, which might be meant in either."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i?)B?|B)\s*", text, re.IGNORECASE)
    if match is None:
        number = text.strip() if text.strip().replace(".", "", 1).isdecimal() else "80"
        raise PlanError(f"{text!r} is not a size with a unit. Write {number}GiB or {number}GB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))


# -------------------------------------------------------------------------------------------------------------- output
def show(planner: Planner, rows: list[Row], advice: Recommendation, memory: int) -> None:
    """As tables on stdout."""
    width = None if sys.stdout.isatty() else WIDEST
    job, console = planner.job, Console(highlight=False, width=width)
    console.print(
        f"[bold]{planner.field.name}[/]: {planner.field.cells:,} cells, hidden mesh {planner.options.hidden}; "
        f"batch {job.batch}, rollout {job.rollout}, {job.precision.name} on {job.accelerator}; num_chunks "
        f"{job.network.num_chunks}, checkpointing {'on' if job.network.checkpointing else 'off'}; the largest rank of M"
    )
    table = Table("M", *(str(row.ranks) for row in rows), box=None)
    for name, cells in _lines(rows):
        table.add_row(name, *cells)
    console.print(table)
    for how in dict.fromkeys(row.counts.how for row in rows):
        which = ", ".join(str(row.ranks) for row in rows if row.counts.how == how)
        console.print(f"M {which}: {HOW[how]}.")
    _advise(console, advice, memory)
    _remark(console, planner, rows)


def _lines(rows: list[Row]) -> list[tuple[str, list[str]]]:
    lines = [
        ("cells", [f"{row.counts.owned_cells:,}" for row in rows]),
        ("hidden nodes", [f"{row.counts.owned_hidden:,}" for row in rows]),
    ]
    for part in PARTS:
        lines.append((f"{part}: edges", [f"{row.counts.parts[part].ends.edges:,}" for row in rows]))
        lines.append(("  halo rows", [f"{row.counts.parts[part].halo:,}" for row in rows]))
        lines.append(("  were cells compact, about", [f"{row.compact[part]:,}" for row in rows]))
    held_by = ("batch", "inputs", "graph", "weights", "averaged weights", "gradients", "optimizer")
    names = (*held_by, *PARTS, "loss", "backward")
    lines.append(("[bold]peak", [f"[bold]{size(row.step.peak)}" for row in rows]))
    held = [(f"  of it {name}", [row.step.at_peak[name] for row in rows]) for name in names]
    held += [(f"kept for backward: {part}", [row.step.kept[part] for row in rows]) for part in PARTS]
    lines += [(name, [size(count) for count in counts]) for name, counts in held if any(counts)]
    lines.append(("[bold]sent in a step", [f"[bold]{size(row.step.sent.total())}" for row in rows]))
    for name in dict.fromkeys(name for row in rows for name in row.step.sent):
        pairs = [(row.step.sent[name], row.step.gathered[name]) for row in rows]
        lines.append((f"  {name}", [size(sent) for sent, _ in pairs]))
        if name not in ("loss", "gradients"):
            lines.append(("    by all-gather", [size(gathered) for _, gathered in pairs]))
    lines.append(("[bold]read for a sample", [f"[bold]{size(row.reads.bytes_read)}" for row in rows]))
    lines.append(("  read amplification", [f"{row.reads.amplification:.3f}" for row in rows]))
    lines.append(("  read ahead, on the host", [size(row.reads.bytes_ahead) for row in rows]))
    return lines


def _advise(console: Console, advice: Recommendation, memory: int) -> None:
    room = f"{size(memory)} ({RESERVE:.0%} of it left free)"
    if advice.smallest is None:
        console.print(f"As it is, no M of these fits {room}.")
    else:
        console.print(f"The smallest M of these that fits {room}: {advice.smallest}.")
    verdict = f"peak {size(advice.peak)}" + ("" if advice.fits else ", still too much")
    console.print(
        f"Recommended: num_gpus_per_model {advice.gpus_per_model}, num_chunks {advice.num_chunks} ({verdict}); "
        + (f"shardio rechunk --grid-chunks {advice.grid_chunks}." if advice.rechunk else "the dataset as it is.")
    )
    if not advice.fits:
        console.print("Try checkpointing, bf16-mixed, fewer rollout steps, a coarser hidden mesh, or a larger M.")


def _remark(console: Console, planner: Planner, rows: list[Row]) -> None:
    """What works, but not well: grid-chunks that do not fit the ranks, and a hidden mesh that hardly sees the cells."""
    uneven = [str(row.ranks) for row in rows if not row.reads.aligned]
    if uneven and planner.field.chunk_cells is not None:
        console.print(
            f"The {rows[0].reads.grid_chunks} grid-chunks of the dataset are no whole number for each rank of M "
            f"{', '.join(uneven)}: borders run through chunks, which are then read more than once."
        )
    cells, nodes = rows[0].counts.owned_cells, rows[0].counts.owned_hidden
    if nodes * CELLS_OF_A_NODE < cells:
        console.print(
            f"The hidden mesh {planner.options.hidden} is coarse for this grid: {cells / nodes:,.0f} cells to a hidden "
            f"node, where 10 to 100 are usual. Take a finer --model.graph.hidden."
        )
