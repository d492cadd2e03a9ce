"""Scores are those of the definition on the full grid, whoever computes them; maps come from binned cells."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from ahead import chained
from datasets import FORCINGS, MASKED, VARIABLES
from ranks import comm_of
from runs import Run

from shardio import open_dataset
from shardio.errors import DatasetError, SelectionError
from shardio.load.partition import partition
from shardio.source.synthetic import RossbyWaves, octahedral
from trainer.comm import Alone
from trainer.graph.grid import cell_areas
from trainer.predict.evaluate import METHODS, REFERENCES, Scores, evaluate
from trainer.predict.pictures import Bins, coarsen, draw_maps, draw_skill

LEADS = 4
STARTS = ("2021-03-02T00:00:00", "2021-03-03T06:00:00", "2021-03-11T12:00:00")  # two leads of the last: after the end


@pytest.fixture(scope="module")
def forecasts(tmp_path_factory: pytest.TempPathFactory, path: str) -> list[str]:
    """Of three dates: random numbers, as forecasts of `trainer predict` hold them.

    Where the initial field has no value the first member has none, as of what is prognostic; the second has one, as of
    a diagnostic.
    """
    from shardio import Description, ShardedWriter

    folder, truth, random = tmp_path_factory.mktemp("forecasts"), open_dataset(path), np.random.default_rng(0)
    names = tuple(name for name in VARIABLES if name not in FORCINGS)
    places = [VARIABLES.index(name) for name in names]
    paths = []
    for start in STARTS:
        first = np.datetime64(start, "s")
        about = Description(
            first + np.arange(1, LEADS + 1) * np.timedelta64(21600, "s"),
            names,
            truth.latitudes,
            truth.longitudes,
            2,
            42,
            {name: values[places] for name, values in truth.statistics.items()},
            {"forecast": {"initial_date": start}},
        )
        initial = truth[int(np.searchsorted(truth.dates, first)), places]
        initial[:, 1] = np.nan_to_num(initial[:, 1], nan=280.0)
        paths.append(str(folder / f"{start.replace(':', '')}.zarr"))
        with ShardedWriter(paths[-1], about, {}, range(5), sync=False) as writer:
            for lead in range(LEADS):
                noise = random.standard_normal(initial.shape) * truth.statistics["stdev"][places][:, None, None]
                writer.put(lead, (initial + 0.3 * noise).astype(np.float32))
    return paths


def by_definition(forecasts: list[str], path: str) -> dict[str, np.ndarray]:
    """rmse, bias and acc [method, lead, variable], with loops over the full grid."""
    truth, first = open_dataset(path), open_dataset(forecasts[0])
    areas = cell_areas(truth.latitudes, truth.longitudes)
    places = [VARIABLES.index(name) for name in first.variables]
    before = int(np.searchsorted(truth.dates, np.datetime64(STARTS[0])))
    earlier = truth[:before, places].astype(np.float64)
    with np.errstate(invalid="ignore"):  # where there is never a value
        climatology = np.nansum(earlier, axis=(0, 2)) / np.isfinite(earlier).sum(axis=(0, 2))  # [variables, cells]
    found = {name: np.full((2, LEADS, len(places)), np.nan) for name in ("rmse", "bias", "acc")}
    for m, method in enumerate(METHODS):
        for lead in range(LEADS):
            for v, place in enumerate(places):
                ours, theirs, usual, weights = [], [], [], []
                for one, start in zip(forecasts, STARTS, strict=True):
                    dataset = open_dataset(one)
                    at = int(np.searchsorted(truth.dates, dataset.dates[lead]))
                    if at == len(truth):
                        continue
                    initial = truth[int(np.searchsorted(truth.dates, np.datetime64(start))), place]
                    for member in range(2):
                        ours.append(dataset[lead, v, member] if method == "forecast" else initial[member])
                        theirs.append(truth[at, place, member])
                        usual.append(climatology[v])
                        weights.append(areas)
                f, t, c, w = (np.concatenate(parts).astype(np.float64) for parts in (ours, theirs, usual, weights))
                known = np.isfinite(t) & np.isfinite(f)
                error = (f - t)[known]
                found["rmse"][m, lead, v] = np.sqrt(np.average(error**2, weights=w[known]))
                found["bias"][m, lead, v] = np.average(error, weights=w[known])
                both = known & np.isfinite(c)
                a, b, w = (f - c)[both], (t - c)[both], w[both]
                found["acc"][m, lead, v] = (w * a * b).sum() / np.sqrt((w * a**2).sum() * (w * b**2).sum())
    return found


@pytest.fixture(scope="module")
def scores(forecasts: list[str], path: str) -> Scores:
    return evaluate(forecasts, open_dataset(path))


def test_scores_are_those_of_the_definition_on_the_full_grid(scores: Scores, forecasts: list[str], path: str) -> None:
    expected = by_definition(forecasts, path)
    for name, values in expected.items():
        assert np.isfinite(values).all()
        assert np.abs(getattr(scores, name)[:, 0] - values).max() < 1e-12 * np.abs(values).max()
    assert scores.climatology == ("2021-03-01T00:00:00", "2021-03-01T18:00:00", 4)
    assert scores.hours == (6.0, 12.0, 18.0, 24.0)
    assert np.isnan(scores.rmse[:, 1]).all(), "no exact solution is known"


def test_a_forecast_that_loses_a_value_has_no_score(forecasts: list[str], path: str, tmp_path: Path) -> None:
    """It is not taken for a cell that never had one."""
    import zarr

    shutil.copytree(forecasts[0], tmp_path / "f.zarr")
    data = zarr.open_group(tmp_path / "f.zarr", mode="r+")["data"]
    truth = open_dataset(path)[4:6, VARIABLES.index(MASKED), 0]
    cell = int(np.isfinite(truth).all(axis=0).argmax())
    before = evaluate([tmp_path / "f.zarr"], open_dataset(path)).rmse[0, 0]
    data[0, 1, 0, cell] = np.nan
    after = evaluate([tmp_path / "f.zarr"], open_dataset(path)).rmse[0, 0]
    assert np.isfinite(before).all()
    assert np.argwhere(np.isnan(after)).tolist() == [[0, 1]]
    assert np.array_equal(after[1:], before[1:])


def test_a_forecast_beyond_the_truth_is_scored_as_far_as_that_reaches(
    forecasts: list[str], path: str, tmp_path: Path
) -> None:
    """Of the last forecast two lead times of four lie after the end."""
    truth = open_dataset(path)
    scores = evaluate(forecasts[2:], truth)
    assert str(scores).startswith("1 forecast, 12 h;")
    assert "nan" not in str(scores).split("climatology")[1]
    for lead in (None, 0, 1):
        draw_maps(tmp_path / f"{lead}.png", forecasts[2], truth, lead=lead)
    drawn = {lead: (tmp_path / f"{lead}.png").read_bytes() for lead in (None, 0, 1)}
    assert drawn[None] == drawn[1] != drawn[0]
    with pytest.raises(SelectionError, match=r"no truth is known for 2021-03-12T12:00:00\. Draw an earlier"):
        draw_maps(tmp_path / "maps.png", forecasts[2], truth, lead=3)
    with pytest.raises(SelectionError, match=r"no truth to compare with: .* ends 2021-03-02T00:00:00, and has none"):
        evaluate(forecasts[:1], open_dataset(path, end="2021-03-02T00"))


def evaluate_on(
    rank: int, _: Any, topology: tuple[int, int], forecasts: list[str], path: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In a rank of M x D."""
    model, data = topology
    truth = open_dataset(path)
    cells = partition(208, model, 42).cells(rank % model)
    found = evaluate(forecasts, truth, cells, comm_of(range(model * data)), mine=slice(rank // model, None, data))
    return found.rmse, found.bias, found.acc


@pytest.mark.parametrize("topology", [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)], ids=str)
def test_scores_do_not_depend_on_the_ranks(
    run: Callable[..., list[Any]], scores: Scores, forecasts: list[str], path: str, topology: tuple[int, int]
) -> None:
    more = {"topology": topology, "forecasts": forecasts, "path": path}
    expected = scores.rmse, scores.bias, scores.acc
    for found in run(evaluate_on, [more] * (topology[0] * topology[1])):
        for ours, theirs in zip(found, expected, strict=True):
            assert np.array_equal(np.isnan(ours), np.isnan(theirs))
            assert np.nanmax(np.abs(ours - theirs)) < 1e-12 * np.nanmax(np.abs(theirs))


def test_a_perfect_forecast_has_no_error_and_correlates_with_the_exact_solution(tmp_path: Path) -> None:
    """Beyond the end of the dataset only the exact solution is known."""
    from shardio import Description, ShardedWriter

    truth_path = tmp_path / "waves.zarr"
    synth(truth_path, "--dates", "8")
    truth = open_dataset(truth_path)
    waves, names = RossbyWaves(truth.latitudes, truth.longitudes, 0), ("u", "lsm")
    start, epoch = truth.dates[5], np.datetime64("2000-01-01", "s")
    dates = start + np.arange(1, 5) * np.timedelta64(21600, "s")
    statistics = {name: values[:2] for name, values in truth.statistics.items()}
    about = Description(
        *(dates, names, truth.latitudes, truth.longitudes, 1, len(truth.latitudes), statistics),
        {"forecast": {"initial_date": str(start)}},
    )
    with ShardedWriter(tmp_path / "f.zarr", about, {}, range(1)) as writer:
        for lead, date in enumerate(dates):
            out = np.empty((7, len(truth.latitudes)), np.float32)
            waves.fields(float((date - epoch).astype(int)), slice(0, len(truth.latitudes)), out)
            writer.put(lead, out[[2, 5]][:, None])
    scores = evaluate([tmp_path / "f.zarr"], truth)
    forecast, persistence = METHODS.index("forecast"), METHODS.index("persistence")
    known, exact = REFERENCES.index("truth"), REFERENCES.index("exact")
    assert (scores.rmse[forecast, known, :2, 0] == 0.0).all()
    assert np.isnan(scores.rmse[forecast, known, 2:, 0]).all()
    assert (scores.rmse[forecast, exact, :, 0] < 1e-5).all()
    assert (scores.acc[forecast, exact, :, 0] > 1 - 1e-9).all()
    assert (np.diff(scores.rmse[persistence, exact, :, 0]) > 0.0).all()
    assert np.isnan(scores.acc[forecast, known, 0, 1]), "anomalies of a constant are zero"
    assert {row["variable"]: row["units"] for row in scores.rows()} == {"u": "m s-1", "lsm": "1"}
    draw_maps(tmp_path / "maps.png", tmp_path / "f.zarr", truth)
    draw_skill(tmp_path / "skill.png", scores)
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    assert (tmp_path / "skill.png").stat().st_size > 10_000


def synth(path: Path, *more: str) -> None:
    words = [sys.executable, "-m", "shardio.cli", "synth", str(path), "--grid", "o8", *more]
    subprocess.run(words, check=True, capture_output=True)


@pytest.mark.parametrize("grid", ["octahedral", "regular", "limited-area", "irregular", "watched"])
def test_a_binned_field_is_the_field_where_it_is_smooth(grid: str) -> None:
    """A plane comes back as itself, but for the width of a bin; no bin of a whole grid is far from all cells."""
    from datasets import grid_of

    places = grid_of(grid)
    latitudes, longitudes = places.latitudes, places.longitudes
    bins = Bins.over(latitudes, longitudes)
    areas = cell_areas(latitudes, longitudes)
    plane = np.stack([latitudes, np.ones_like(latitudes)])
    coarse = coarsen(plane, latitudes, longitudes, areas, bins, Alone())
    image = bins.image(coarse[0])
    assert image.shape[0] == bins.rows
    middle = bins.south + (np.arange(bins.rows) + 0.5) * (bins.north - bins.south) / bins.rows
    off = np.abs(image - middle[:, None])
    assert np.nanmax(off) <= (bins.north - bins.south) / bins.rows / 2 + 1e-9
    holes = np.isnan(image).mean()
    assert holes < (0.25 if grid == "irregular" else 0.02)


def test_ranks_bin_the_same_map(run: Callable[..., list[Any]]) -> None:
    alone = binned(0, Alone(), 1)
    for ranks in (2, 3, 4):
        for found in run(binned, [{"ranks": ranks}] * ranks):
            assert np.nanmax(np.abs(found - alone)) < 1e-12


def binned(rank: int, comm: Any, ranks: int) -> np.ndarray:
    latitudes, longitudes, _ = octahedral("o16")
    cells = partition(latitudes.size, ranks, 100).cells(rank)
    field = (np.sin(np.radians(latitudes)) + np.cos(np.radians(longitudes)))[None, cells]
    areas = cell_areas(latitudes, longitudes)[cells]
    return coarsen(field, latitudes[cells], longitudes[cells], areas, Bins.over(latitudes, longitudes), comm)


def test_predict_evaluates_and_exports_what_is_there(tmp_path: Path, checkpoint: Path, path: str) -> None:
    given = (f"--ckpt_path={checkpoint}", f"--dataset={path}", "--start=2021-03-02,2021-03-03", "--lead-time=24h")
    process = Run(tmp_path, "predict", *given, "--evaluate", "--netcdf", "--num_gpus_per_model=2", ranks=2)
    assert process.wait() == [0, 0], process.errors
    assert process.printed.count("wrote ") == 4
    folder = tmp_path / "forecasts"
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 4 * 2  # variables, lead times, forecast and persistence
    assert {row["against"] for row in rows} == {"truth"}
    scores = evaluate(sorted(folder.glob("*.zarr")), open_dataset(path))
    (row,) = [
        one for one in rows if (one["variable"], one["lead_hours"], one["method"]) == ("t_850", "24.0", "forecast")
    ]
    assert float(row["rmse"]) == pytest.approx(scores.rmse[0, 0, 3, 0], rel=1e-12)
    with xarray.open_dataset(folder / "2021-03-02T0000.nc") as found:
        stored = open_dataset(folder / "2021-03-02T0000.zarr")
        for name in stored.variables:
            values = stored[:, stored.name_to_index[name]]
            assert np.isnan(values).any() == (name == MASKED)
            assert np.array_equal(found[name].values, values, equal_nan=True)
    names = {file.name for file in folder.iterdir()}
    assert names >= {"scores.csv", "skill.png", "maps.png", "2021-03-02T0000.nc", "2021-03-03T0000.nc"}
    process = Run(tmp_path, "predict", *given, "--evaluate", "--json")
    assert process.wait() == [0], process.errors
    told = json.loads(process.printed)
    assert [one["kept"] for one in told["forecasts"]] == [True, True]
    assert len(told["scores"]) == len(rows)
    process = Run(
        tmp_path, "predict", *given, "--netcdf", "--json", "--output=again", "--num_gpus_per_model=1", ranks=2
    )
    assert process.wait() == [0, 0], process.errors
    told = json.loads(process.printed)  # of both ranks
    assert [one["path"] for one in told["forecasts"]] == [f"again/2021-03-0{day}T0000.zarr" for day in (2, 3)]
    assert told["netcdf"] == [f"again/2021-03-0{day}T0000.nc" for day in (2, 3)]


def test_what_cannot_be_compared_is_refused(forecasts: list[str], path: str, dataset_of: Callable[..., str]) -> None:
    with pytest.raises(DatasetError, match="is no forecast of `trainer predict`"):
        evaluate([path], open_dataset(path))
    with pytest.raises(SelectionError, match="on different grids"):
        evaluate(forecasts, open_dataset(dataset_of("regular", 2)))
    with pytest.raises(SelectionError, match="the truth lacks t_850"):
        evaluate(forecasts, open_dataset(path, drop="t_850"))
    with pytest.raises(SelectionError, match="the truth lacks 2021-03-02T00:00:00, an initial date"):
        evaluate(forecasts, open_dataset(path, start="2021-03-03"))


def test_the_next_fields_are_read_while_others_are_compared(forecasts: list[str], scores: Scores, path: str) -> None:
    before = int(np.searchsorted(open_dataset(path).dates, np.datetime64(STARTS[0])))
    truth, reader = chained(path, before - 1, len(open_dataset(path)) - 1)  # the climatology is complete, or all is
    found = evaluate(forecasts, truth)
    assert len(reader.rows) > before + 2 * LEADS
    assert np.array_equal(found.rmse, scores.rmse, equal_nan=True)
    assert np.array_equal(found.acc, scores.acc, equal_nan=True)
