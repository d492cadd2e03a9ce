"""Validation scores against numpy: over uneven shards, padding, data groups and missing values."""

import json

import numpy as np
import pytest
import torch
from runs import Run, fit, tiny, waves

from shardio import open_dataset
from shardio.load.partition import partition
from trainer.fit.metrics import ErrorSums, Scores
from trainer.graph.grid import cell_areas

START = "2020-01-06T12"  # 6 dates: 4 windows of 1 + 2, which 3 samples of one step do not divide
VALIDATION = [f"--data.val_start={START}", "--model.validation_steps=2", "--data.batch_size=3"]


def test_sums_over_uneven_shards_are_the_error_of_the_whole():
    rng = np.random.default_rng(0)
    areas, errors = rng.random(7), rng.normal(size=(3, 2, 7, 4))
    known = rng.random(errors.shape) < 0.7
    errors[~known] = np.nan
    squares = weights = 0.0
    for cells in (slice(0, 1), slice(1, 5), slice(5, 7)):
        sums = ErrorSums(torch.from_numpy(areas[cells]), (2, 4))
        sums.add(1, torch.from_numpy(errors[:, :, cells]), torch.from_numpy(known[:, :, cells]))
        squares, weights = squares + sums.squares, weights + sums.weights
    weight = known * areas[:, None]
    expected = np.sqrt((np.nan_to_num(errors) ** 2 * weight).sum((0, 1, 2)) / weight.sum((0, 1, 2)))
    assert np.allclose((squares / weights).sqrt()[1], expected, rtol=1e-14)
    assert bool((weights[0] == 0.0).all())


def test_an_error_that_is_known_and_not_finite_is_not_hidden():
    sums = ErrorSums(torch.ones(2), (1, 1))
    sums.add(0, torch.tensor([1.0, float("nan")]).view(1, 1, 2, 1), torch.ones(1, 1, 2, 1, dtype=torch.bool))
    assert bool(torch.isnan(sums.root_mean_square()).all())


def test_scores_nobody_could_count_are_null_in_json():
    scores = Scores(("6h",), ("t",), ("K",), np.array([[np.nan]]), np.array([[0.0]]))
    assert json.dumps(scores.nested()) == '{"t": {"6h": {"rmse": null, "persistence": 0.0, "ratio": null}}}'


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("trained"), *tiny("--trainer.max_steps=3"))


def validate(trained, *arguments, ranks=1):
    words = [*tiny(*VALIDATION), "--ckpt_path=last", "--json", "--trainer.precision=64-true"]
    run = Run(trained.folder, "validate", *words, *arguments, ranks=ranks)
    assert run.wait() == [0] * ranks, run.errors
    return json.loads(run.printed)["scores"]


@pytest.fixture(scope="module")
def of_one_rank(trained):
    return validate(trained)


def test_persistence_is_that_of_numpy(of_one_rank):
    dataset = open_dataset(waves(), start=START)
    fields = dataset[:].astype(np.float64)[:, :, 0]  # [date, variable, cell]
    areas = cell_areas(dataset.latitudes, dataset.longitudes)
    for lead, name in ((1, "6h"), (2, "12h")):
        errors = np.stack([fields[start + lead] - fields[start] for start in range(4)])
        expected = np.sqrt((errors**2 * areas).sum((0, 2)) / (4 * areas.sum()))
        for variable, scores in of_one_rank.items():
            at = dataset.variables.index(variable)
            assert scores[name]["persistence"] == pytest.approx(expected[at], rel=1e-6)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (3, ["--strategy.num_gpus_per_model=3"]),  # 4 grid-chunks on 3 ranks
        (2, ["--data.batch_size=3"]),  # two data groups, 6 places for 4 samples
        (1, ["--data.batch_size=1"]),
    ],
)
def test_scores_do_not_depend_on_how_samples_and_cells_are_cut(trained, of_one_rank, ranks, arguments):
    cut = validate(trained, *arguments, ranks=ranks)
    for variable, leads in of_one_rank.items():
        for lead, scores in leads.items():
            for name, value in scores.items():
                assert cut[variable][lead][name] == pytest.approx(value, rel=1e-10)


def test_the_cut_that_was_tested_is_uneven():
    dataset = open_dataset(waves())
    sizes = np.diff(partition(dataset.shape[3], 3, dataset.chunk_cells).bounds)
    assert len(set(sizes.tolist())) > 1
