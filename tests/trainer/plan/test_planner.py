"""`trainer plan` against real ranks: peak bytes, bytes sent, bytes read; and its estimates against real graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from datasets import VARIABLES, grid_of
from runs import waves

from shardio import ShardedDataLoader, Topology, open_dataset
from shardio.format.reader import NativeReader
from shardio.load.partition import partition
from shardio.source.synthetic import octahedral
from tools.check_plan import compare, measure, predict
from tools.trainer_step import Sizes
from trainer.cli import plan as plan_cli
from trainer.comm import Alone
from trainer.graph.counts import CutGraph
from trainer.graph.graph import PARTS, GraphOptions, build_graph
from trainer.model.forecaster import Roles
from trainer.model.kernels import cpp as attention_kernel
from trainer.model.kernels import gather
from trainer.model.model import ModelOptions
from trainer.model.precision import Precision
from trainer.plan.estimates import Densities, estimated_counts, rank_counts
from trainer.plan.footprint import Job, footprint
from trainer.plan.planner import Field, Planner

SIZES = Sizes("o32", "ico2", channels=32, layers=2, heads=4, variables=8, checkpointing=False)
LARGER = replace(SIZES, grid="o64", hidden="ico3", layers=1, checkpointing=True)
CASES: list[tuple[int, Sizes, str]] = [
    (1, SIZES, "32-true"),
    (2, SIZES, "32-true"),
    (4, SIZES, "32-true"),
    (1, replace(SIZES, checkpointing=True, num_chunks=4), "32-true"),
    (2, replace(SIZES, batch=3, rollout=2), "32-true"),
    (4, replace(SIZES, batch=2, rollout=3, checkpointing=True, num_chunks=2), "32-true"),
    (2, replace(SIZES, rollout=3, lacking=2, checkpointing=True), "32-true"),
    (4, replace(SIZES, shard_strategy="heads"), "32-true"),
    (2, replace(SIZES, dtype="float64"), "64-true"),
    (2, replace(LARGER, hidden="o24"), "bf16-mixed"),
    (1, replace(LARGER, checkpointing=False), "bf16-mixed"),
    (4, replace(LARGER, num_chunks=8, channels=8), "32-true"),  # embedded rows are pulled, not raw ones
    (2, replace(LARGER, grid="o48", rollout=2), "32-true"),
    (4, replace(LARGER, grid="o96", hidden="ico4", num_chunks=4), "32-true"),
    (1, replace(LARGER, grid="o160", hidden="o48", num_chunks=16), "32-true"),
]
WORDS = [
    "--variables=9",
    "--model.network.num_layers=1",
    "--model.forcings=[a,b]",
    "--model.graph.hidden=ico1",
    "--model.network.channels=16",
]


def real_step(rank: int, comm: Any, sizes: Sizes, precision: str, averages: bool = False) -> dict[str, Any]:
    return measure(comm, sizes, precision, averages)


@pytest.mark.parametrize(("ranks", "sizes", "precision"), CASES, ids=str)
def test_predicted_peak_is_the_measured_one_to_a_hundredth_and_messages_to_the_byte(
    run: Callable[..., list[Any]], ranks: int, sizes: Sizes, precision: str
) -> None:
    with_group = run(real_step, [{"sizes": sizes, "precision": precision}] * ranks) if ranks > 1 else None
    row = compare(predict(sizes, precision, ranks), with_group or [measure(Alone(), sizes, precision)])
    assert abs(row["error"]) < 0.01, row
    assert row["sent_equal"]
    assert (row["sent"] > 0) == (ranks > 1)


def test_averaged_weights_are_planned_to_the_byte(run: Callable[..., list[Any]]) -> None:
    """Of a model whose weights are most of what it holds: without them the plan would fall short by a twentieth."""
    sizes, ranks = replace(SIZES, grid="o16", hidden="ico1", channels=64), 2
    arguments = [{"sizes": sizes, "precision": "32-true", "averages": True}] * ranks
    row = compare(predict(sizes, "32-true", ranks, averages=True), run(real_step, arguments))
    assert abs(row["error"]) < 0.01, row
    (without,) = predict(sizes, "32-true", ranks).values()
    (found,) = predict(sizes, "32-true", ranks, averages=True).values()
    weights = found.at_peak["averaged weights"]
    assert found.peak - without.peak == weights > 0.05 * found.peak


def test_averages_are_planned_where_the_training_keeps_them(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("ema_decay: 0.999\n")
    given = [*WORDS, "--grid=o16"]
    assert plan_cli.plan_of(plan_cli.options_of([*given, f"--config={config}"])).job.averages
    assert plan_cli.plan_of(plan_cli.options_of([*given, "--ema_decay=0.9"])).job.averages
    assert not plan_cli.plan_of(plan_cli.options_of(given)).job.averages


def test_every_rank_is_predicted_not_only_the_largest(run: Callable[..., list[Any]]) -> None:
    sizes = replace(SIZES, layers=1, num_chunks=3, checkpointing=True)
    measured = run(real_step, [{"sizes": sizes, "precision": "32-true"}] * 4)
    predicted = predict(sizes, "32-true", 4, every=True)
    assert compare(predicted, measured)["sent_equal"]
    for rank, one in predicted.items():
        assert one.peak == pytest.approx(measured[rank]["peak"], rel=0.01)
    assert max(measured, key=lambda one: one["peak"])["peak"] == pytest.approx(
        next(iter(predicted.values())).peak, 0.01
    )


def test_attention_without_the_compiled_kernel_is_predicted_from_a_few_of_its_blocks() -> None:
    sizes = replace(SIZES, checkpointing=True)
    with patch.object(attention_kernel, "load", lambda: (None, "left out")), patch.dict(gather.BLOCK, {"cpu": 2**14}):
        row = compare(predict(sizes, "32-true", 1), [measure(Alone(), sizes, "32-true")])
    assert 0.0 <= row["error"] < 0.1, row


def test_the_parts_of_the_peak_are_the_peak() -> None:
    (found,) = predict(replace(SIZES, checkpointing=True), "32-true", 2).values()
    assert sum(found.at_peak.values()) == found.peak
    assert all(found.kept[part] > 0 for part in PARTS)
    for part in ("weights", "optimizer", "graph", "batch"):
        assert found.at_peak[part] == found.kept[part] > 0
    assert found.at_peak["optimizer"] == pytest.approx(2 * found.at_peak["weights"], rel=0.01)


# --------------------------------------------------------------------------------------------------------------- reads
def reads_of(rank: int, comm: Any, path: str, topology: Topology) -> tuple[list[int], int]:
    """Dates of the first sample, and bytes of the chunks read for it, decoded."""
    loader = ShardedDataLoader(
        open_dataset(path), topology, input_steps=2, target_steps=2, seed=1, prefetch=1, group=comm.group, threads=1
    )
    decoded = []
    stored = NativeReader.stored

    def counted(self: Any, *chunk: Any) -> Any:
        decoded.append(self.layout.chunk_bytes)
        return stored(self, *chunk)

    with patch.object(NativeReader, "stored", counted):
        batch = next(iter(loader))
        batch.wait()
    loader.close()
    return batch.indices[0], sum(decoded)


@pytest.mark.parametrize(
    ("grid", "ranks", "read_group"),
    [("octahedral", 1, 1), ("octahedral", 2, 2), ("regular", 3, 3), ("irregular", 4, 2), ("limited-area", 4, 1)],
)
def test_bytes_read_are_those_that_the_loader_decodes(
    run: Callable[..., list[Any]], dataset_of: Callable[[str, int], str], grid: str, ranks: int, read_group: int
) -> None:
    path, places = dataset_of(grid, 2), grid_of(grid)
    field = Field(grid, places.latitudes, places.longitudes, places.chunk_cells, len(VARIABLES))
    planner = Planner(field, Job(Roles(VARIABLES), 2, 2, ensemble=2), GraphOptions(), read_group_size=read_group)
    topologies = [Topology(ranks, rank, ranks, read_group) for rank in range(ranks)]
    arguments = [{"path": path, "topology": topology} for topology in topologies]
    found = run(reads_of, arguments) if ranks > 1 else [reads_of(0, Alone(), path, topologies[0])]
    for rank, (dates, decoded) in enumerate(found):
        reading = planner.reading(ranks, rank)
        assert decoded == sum(planner.bytes_read(reading, date) for date in dates)
        if not reading.exchanges:
            assert decoded == planner.reads(ranks, rank).bytes_read


# -------------------------------------------------------------------------------------------------------- large grids
def test_the_part_of_one_rank_is_counted_as_in_the_whole_graph() -> None:
    latitudes, longitudes, _ = octahedral("o96")
    options = GraphOptions("o32")
    graph = build_graph(latitudes, longitudes, partition(latitudes.size, 1, latitudes.size), 0, options)
    cells = partition(latitudes.size, 16, latitudes.size // 32)
    whole = CutGraph(graph, cells, 16).rank(8)
    near, guess = (count(*args) for count, args in _estimates(latitudes, longitudes, cells, options))
    assert near.owned_cells == whole.owned_cells == guess.owned_cells
    assert near.owned_hidden == pytest.approx(whole.owned_hidden, rel=0.03)
    for part in PARTS:
        real, counted, guessed = (getattr(counts, part) for counts in (whole, near, guess))
        assert counted.ends.edges == pytest.approx(real.ends.edges, rel=0.03)
        assert guessed.ends.edges == pytest.approx(real.ends.edges, rel=0.2)
        both = [sum(one.lent) + one.halo for one in (real, counted, guessed)]
        assert both[1] == pytest.approx(both[0], rel=0.15)
        assert both[2] == pytest.approx(both[0], rel=0.5)


def _estimates(latitudes: Any, longitudes: Any, cells: Any, options: GraphOptions) -> list[Any]:
    return [(rank_counts, (latitudes, longitudes, cells, 8, options)), (estimated_counts, (cells, 8, options))]


def test_halos_of_bands_are_the_same_for_all_ranks_those_of_compact_cells_fall_with_their_number() -> None:
    """Of the formulas, and of real graphs, there on cells in an order made by cutting the globe in halves."""
    latitudes, longitudes, _ = octahedral("o96")
    options, halos = GraphOptions("o32"), {}
    for compact, order in ((False, np.arange(latitudes.size)), (True, _compact(latitudes, longitudes))):
        whole = partition(latitudes.size, 1, latitudes.size)
        graph = build_graph(latitudes[order], longitudes[order], whole, 0, options)
        for ranks in (4, 16, 64):
            cut = CutGraph(graph, partition(latitudes.size, ranks, latitudes.size // 64), 16)
            halos[compact, ranks] = np.mean([cut.rank(rank).processor.halo for rank in range(ranks)])
            known = Densities(latitudes.size, 5248, options).halos(ranks, compact)
            assert halos[compact, ranks] == pytest.approx(known["processor"], rel=0.5)
    bands = [halos[False, ranks] for ranks in (4, 16, 64)]
    assert max(bands) < 1.5 * min(bands)
    assert halos[True, 4] > 1.3 * halos[True, 16]
    assert halos[True, 16] > 1.7 * halos[True, 64]


def _compact(latitudes: np.ndarray, longitudes: np.ndarray) -> np.ndarray:
    """Order of the cells by recursive bisection along the longest axis."""
    latitude, longitude = np.radians(latitudes), np.radians(longitudes)
    position = np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], 1
    )
    parts = [np.arange(latitudes.size)]
    for _ in range(6):
        halves = []
        for part in parts:
            axis = np.ptp(position[part], axis=0).argmax()
            along = part[np.argsort(position[part, axis], kind="stable")]
            halves += [along[: part.size // 2], along[part.size // 2 :]]
        parts = halves
    return np.concatenate(parts)


def test_activations_fall_as_one_over_the_ranks() -> None:
    latitudes = octahedral("o96")[0]
    cells = {ranks: partition(latitudes.size, ranks, latitudes.size // 64) for ranks in (4, 16)}
    network = ModelOptions(32, 2, 4, checkpointing=True)
    job = Job(Roles(tuple("abcdef")), network=network, precision=Precision("bf16-mixed"), accelerator="cuda")
    steps = {
        ranks: footprint(job, estimated_counts(cut, ranks // 2, GraphOptions("o32"))) for ranks, cut in cells.items()
    }
    whole = {
        ranks: sum(count for name, count in one.at_peak.items() if name in ("batch", "decoder"))
        for ranks, one in steps.items()
    }
    assert whole[4] == pytest.approx(4 * whole[16], rel=0.1)
    assert steps[4].at_peak["weights"] == steps[16].at_peak["weights"]


# --------------------------------------------------------------------------------------------------------- the command
def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    plan_cli.main([*WORDS, *words, "--json"])
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_variables_that_may_lack_values_are_planned_as_such() -> None:
    options = plan_cli.options_of([*WORDS, "--grid=o16", "--model.allow_nan=[sst,a]"])
    roles = plan_cli.plan_of(options).job.roles
    assert (len(roles.variables), roles.allow_nan, roles.lacking) == (9, ("sst", "a"), ("sst",))


def test_the_smallest_group_that_fits_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--grid", "o16", "--gpus-per-model", "4,1,2")
    peaks = {row["gpus_per_model"]: row["peak_bytes"] for row in plan["rows"]}
    assert list(peaks) == [1, 2, 4]
    assert peaks[1] > peaks[2] > peaks[4]
    assert plan["recommendation"]["smallest"] == 1
    between = int((peaks[1] + peaks[2]) / 2 / 0.9)
    fitting = planned(capsys, "--grid", "o16", "--gpus-per-model", "1,2,4", "--gpu-memory", f"{between}B")
    assert fitting["recommendation"]["smallest"] == 2
    nothing = planned(capsys, "--grid", "o16", "--gpus-per-model", "1,2", "--gpu-memory", "10KiB")
    assert nothing["recommendation"]["smallest"] is None
    assert not nothing["recommendation"]["fits"]


def test_chunks_are_recommended_where_they_save_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--grid", "o16", "--gpus-per-model", "1,2", "--model.network.checkpointing=true"]
    one, two = (row["peak_bytes"] for row in planned(capsys, *words)["rows"])
    advice = planned(capsys, *words, "--gpu-memory", f"{int((one + two) / 2 / 0.9)}B")["recommendation"]
    assert (advice["smallest"], advice["gpus_per_model"]) == (2, 1)
    assert advice["num_chunks"] > 1
    assert advice["fits"]


def test_a_configuration_and_a_dataset_are_planned_as_they_are(
    capsys: pytest.CaptureFixture[str], dataset_of: Callable[[str, int], str], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "seed_everything: 0\ndata: {dataset: none.zarr, train_end: 2021-03-05, input_steps: 2}\n"
        "model: {graph: {hidden: o2, neighbours: 5}, network: {channels: 8, num_heads: 2, num_layers: 1}}\n"
        "trainer: {precision: bf16-mixed, max_epochs: 3}\n"
    )
    plan_cli.main(["--config", str(path), "--data.dataset", dataset_of("octahedral", 2), "--gpus-per-model", "1,2"])
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())
    for word in (
        "208 cells, hidden mesh o2",
        "bf16-mixed on cpu",
        "peak",
        "sent in a step",
        "by all-gather",
        "read amplification",
        "counted on the real graph",
    ):
        assert word in shown


def test_in_a_pipe_no_line_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    plan_cli.main([*WORDS, f"--data.dataset={waves()}", "--model.forcings=[]", "--gpus-per-model=8"])
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("Recommended: ") and line.endswith("; shardio rechunk --grid-chunks 8.") for line in lines
    )
    assert lines[0].endswith("the largest rank of M")
    assert lines[-1].endswith(".")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    plan_cli.main([*WORDS, *words])
    return " ".join(capsys.readouterr().out.split())


def test_a_dataset_is_cut_anew_only_where_its_chunks_do_not_serve(capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"--data.dataset={waves()}", "--model.forcings=[]")
    assert "; the dataset as it is." in shown(capsys, *words, "--gpus-per-model=1,2,4")
    uneven = shown(capsys, *words, "--gpus-per-model=8")
    assert "; shardio rechunk --grid-chunks 8." in uneven
    assert "The 4 grid-chunks of the dataset are no whole number for each rank of M 8:" in uneven


def test_the_recommended_group_alone_decides_whether_the_dataset_serves(capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"--data.dataset={waves()}", "--model.forcings=[]")
    several = shown(capsys, *words, "--gpus-per-model=1,2,3,8")
    assert "Recommended: num_gpus_per_model 1," in several
    assert "; the dataset as it is." in several
    assert "no whole number for each rank of M 3, 8:" in several
    between = shown(capsys, *words, "--gpus-per-model=3,8")  # 8 grid-chunks would not serve 3 ranks
    assert "Recommended: num_gpus_per_model 3," in between
    assert "; shardio rechunk --grid-chunks 3." in between


def test_a_coarse_hidden_mesh_is_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--grid=o64", "--gpus-per-model=1")
    assert "cells to a hidden node, where 10 to 100 are usual" in shown(capsys, *words, "--model.graph.hidden=ico0")
    assert "where 10 to 100 are usual" not in shown(capsys, *words, "--model.graph.hidden=ico3")


def test_what_takes_no_memory_is_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "--grid=o16", "--gpus-per-model=1,2")
    assert "of it weights" in found
    assert "of it backward" not in found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus-per-model", "2"], "no grid is named"),
        (["--grid", "o16", "--gpus-per-model", "0"], "no number of GPUs"),
        (["--grid", "o16", "--gpu-memory", "much"], "is not a size"),
        (["--grid", "o16", "--gpu-memory", "24"], "'24' is not a size with a unit. Write 24GiB or 24GB."),
        (["--grid", "o16", "--trainer.precision", "8"], "precision '8' is unknown"),
        (["--grid", "o16", "--variables", "1"], "--variables is 1, but the configuration names 2"),
        (["--grid", "o16", "--config", "nowhere.yaml"], "the configuration nowhere.yaml cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_planned_is_said_with_a_remedy(words: list[str], told: str) -> None:
    from shardio.errors import ShardioError

    with pytest.raises(ShardioError, match=told):
        plan_cli.main([*WORDS, *words])
