"""No rank ever has more rows of any node set than it owns and borrows: every tensor of a step is looked at."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import grid_of
from training import LAYERS, Case, Setup
from watch import NARROW, Watch, living_ids, rows_allowed

from shardio.load.partition import partition
from shardio.load.reading import meet
from trainer.comm import Counting
from trainer.graph.edge_lists import EdgeLists, wants_tables
from trainer.graph.graph import build_graph
from trainer.step import forecast_loss

MODEL = 4
ALIGNED = 16  # numbers; where chunks begin in a buffer
KNOWN = {"alltoall_base_", "allreduce_"}
CASE = Case(ranks=(MODEL, 1, MODEL), grid="watched", precision="float32", rollout=2)
CASES = [
    CASE,
    replace(CASE, checkpointing=True, num_chunks=4),
    replace(CASE, grid="watched-astray", checkpointing=True, channels=8),  # embedded rows are pulled
]


# -------------------------------------------------------------------------------------------- what a rank can be told
def watched_step(rank: int, comm: Any, case: Case, path: str, lie: str = "") -> dict[str, Any]:
    """From the loader to the optimizer: sizes seen, and those that tables of edges, weights and reads explain."""
    before = living_ids()
    comms: list[Counting] = []
    setup = Setup(rank, case, path, lambda comm: comms.append(Counting(comm)) or comms[-1])
    counted = sum(one.messages.total() for one in comms)
    optimizer = torch.optim.AdamW(setup.forecaster.parameters())
    if lie:
        LIES[lie](setup, comm.group)
    watch = Watch()
    with watch:
        batch = next(iter(setup.loader))
        fields = setup.fields(batch)
        watch.see_living(before, "after loading")
        loss = forecast_loss(setup.forecaster, setup.loss, fields, case.rollout)
        watch.see_living(before, "after forward")
        loss.value.backward()
        setup.reduce()
        watch.see_living(before, "after backward")
        optimizer.step()
    randomness = {torch.get_rng_state().numel(): "state of the random numbers, kept by checkpointing"}
    explained = {**_tables(setup), **_weights(setup), **_reads(setup, batch), **randomness}
    setup.loader.close()
    counted = sum(one.messages.total() for one in comms) - counted + batch.reading.exchanges  # the loader's own
    return {"sizes": watch.sizes, "explained": explained, "messages": watch.messages, "counted": counted}


def _tables(setup: Setup) -> dict[int, str]:
    """Lists of edges, and tables of them, in which an eighth of the places may be empty."""
    graph, sizes = setup.forecaster.network.graph, {}
    for links in (graph.encoder, graph.processor, graph.decoder):
        for chunk in links.chunks:
            lists: EdgeLists = chunk.lists
            assert wants_tables(lists.kernel) == bool(lists.incoming and lists.outgoing)
            sizes |= {lists.destinations + 1: "offsets", lists.edges + 1: "places for p, one of them for empty places"}
            for tables in (lists.with_tables().incoming, lists.with_tables().outgoing):
                assert sum(len(table) * table.width for table in tables) <= lists.edges * 1.3
                sizes |= {len(table) * table.width: "places in a table" for table in tables}
                sizes |= {len(table): "nodes with equally many edges" for table in tables}
    return sizes


def _weights(setup: Setup) -> dict[int, str]:
    counts = [parameter.numel() for parameter in setup.forecaster.parameters()]
    return {**dict.fromkeys(counts, "numbers of one weight"), sum(counts): "all weights"}


def _reads(setup: Setup, batch: Any) -> dict[int, str]:
    """Buffers of the chunks of a date; and, where ranks read other cells than they own, the message that follows."""
    reading, own = batch.reading, setup.share.owned
    per_cell, dates = batch.shape[2] * batch.shape[4], batch.indices[0]
    chunks = [reading.cells_of(chunk) for chunk in range(reading.grid_chunks)]
    counts = {part.stop - part.start for part in chunks}  # the last may be shorter
    sizes = {size: "a chunk" for count in counts for size in (count, count * per_cell)}
    sizes[(own.stop - own.start) * len(dates) * per_cell] = "all fields of the rank's own cells"
    for date in dates:
        read = [chunks[chunk] for chunk in reading.chunks_read(date, setup.share.rank)]
        lengths = [(part.stop - part.start) * per_cell for part in read]
        sizes[sum(-(-length // ALIGNED) * ALIGNED for length in lengths)] = "buffer of a date"
        sizes |= dict.fromkeys((sum(lengths), sum(lengths) // per_cell), "cells of a date that the rank reads")
        if reading.exchanges:
            sizes[sum(lengths) * len(dates)] = "all that is read, to be sent"
    if reading.exchanges:
        pieces = [meet(part, reading.wanted(rank)) for part in chunks for rank in range(MODEL)]
        cells = [part.stop - part.start for part in pieces]
        sizes |= {size: "part of a chunk" for count in cells for size in (count, count * per_cell)}
    return sizes


# ------------------------------------------------------------------------------------ designs that gather, to be caught
class _GatherInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        _gather(gradient, ctx.group)
        return gradient, None


def _gather(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """All rows of all ranks, flat: by a sum of zeros and the own."""
    most = torch.tensor([rows.numel()])
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    flat = rows.new_zeros(MODEL, int(most))
    flat[dist.get_rank(group), : rows.numel()] = rows.detach().reshape(-1)
    flat = flat.reshape(-1)
    dist.all_reduce(flat, group=group)
    return flat


def _in_forward(setup: Setup, group: Any) -> None:
    setup.forecaster.network.embed_targets.register_forward_hook(lambda _, __, rows: (_gather(rows, group), rows)[1])


def _in_backward(setup: Setup, group: Any) -> None:
    setup.forecaster.network.decoder.mlp.register_forward_hook(lambda _, __, rows: _GatherInBackward.apply(rows, group))


def _in_recomputation(setup: Setup, group: Any) -> None:
    def hook(_: Any, __: Any, rows: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:
            _gather(rows, group)

    # Recomputation stops when it has what backward wants: the end of a block it never sees.
    setup.forecaster.network.processor[0].query_self.register_forward_hook(hook)


def _in_parts(setup: Setup, group: Any) -> None:
    """No tensor is larger than a rank's own rows, but there is one for each rank."""

    def hook(_: Any, __: Any, rows: torch.Tensor) -> None:
        most = torch.tensor([rows.shape[1]])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        mine = torch.nn.functional.pad(rows.detach(), (0, 0, 0, int(most) - rows.shape[1]))
        dist.all_gather([torch.empty_like(mine) for _ in range(MODEL)], mine, group=group)

    setup.forecaster.network.processor[1].register_forward_hook(hook)


def _two_owners(setup: Setup, group: Any) -> None:
    """Not the full grid, but the cells of a neighbour too."""
    setup.forecaster.network.register_forward_hook(lambda _, __, rows: (torch.cat([rows, rows], 1), rows)[1])


def _kept_aside(setup: Setup, group: Any) -> None:
    """Made before the step, used in none of its operations."""
    setup.aside = torch.from_numpy(np.zeros(grid_of(setup.case.grid).latitudes.size))


LIES = {
    "gather in forward": _in_forward,
    "gather in backward": _in_backward,
    "gather in recomputation": _in_recomputation,
    "gather in parts": _in_parts,
    "cells of two owners": _two_owners,
    "all cells kept aside": _kept_aside,
}


# ---------------------------------------------------------------------------------------------------------- the tests
Watched = Callable[..., list[tuple[dict[str, Any], dict[int, str]]]]


@pytest.fixture(scope="module")
def watched(run: Callable[..., list[Any]], dataset_of: Callable[[str, int], str]) -> Watched:
    """`watched(case, lie)`: of every rank what it reports, and the sizes that nothing allows."""

    def watched(case: Case, lie: str = "") -> list[tuple[dict[str, Any], dict[int, str]]]:
        grid = grid_of(case.grid)
        cells = partition(grid.latitudes.size, MODEL, grid.chunk_cells)
        options = replace(grid.graph, processor_layers=LAYERS)
        graphs = [build_graph(grid.latitudes, grid.longitudes, cells, rank, options) for rank in range(MODEL)]
        path = dataset_of(case.grid, case.ensemble)
        results = run(watched_step, [{"case": case, "path": path, "lie": lie}] * MODEL)
        found = []
        for rank, result in enumerate(results):
            allowed = rows_allowed(graphs, rank, case.num_chunks)
            whole = {graphs[0].cells.bounds[-1], graphs[0].hidden_bounds[-1]}
            whole |= {sum(getattr(graph, part).source.size for graph in graphs) for part in ("encoder", "processor")}
            assert not whole & set(allowed), "another grid is needed: sizes cannot be told apart"
            nodes = [size for size, name in allowed.items() if "edges" not in name]
            assert max(nodes) < min(whole)
            assert sum(size >= NARROW for size in nodes) > 5
            unknown = {size: where for size, where in result["sizes"].items() if size not in allowed}
            result["whole"] = whole
            found.append((result, {size: at for size, at in unknown.items() if size not in result["explained"]}))
        return found

    return watched


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_tensor_of_a_step_has_more_rows_than_a_rank_owns_and_borrows(watched: Watched, case: Case) -> None:
    for result, unknown in watched(case):
        assert not unknown
        assert not result["whole"] & set(result["explained"]), "another grid is needed: sizes cannot be told apart"
        assert set(result["messages"]) == KNOWN
        assert result["counted"] == len(result["messages"]), "a message went past the communicators"


@pytest.mark.parametrize("lie", LIES)
def test_a_step_that_gathers_is_caught_on_every_rank(watched: Watched, lie: str) -> None:
    for result, unknown in watched(CASES[1], lie):
        assert unknown or not set(result["messages"]) <= KNOWN


@pytest.mark.parametrize("knob", [{"keep_batch_sharded": False}, {"shard_strategy": "heads"}], ids=str)
def test_what_is_whole_by_design_is_seen_as_whole(watched: Watched, knob: dict[str, Any]) -> None:
    whole = 1600 if "keep_batch_sharded" in knob else 1008
    for result, _ in watched(replace(CASE, **knob)):
        assert whole in result["sizes"]
