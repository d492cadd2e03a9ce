"""Forecasts are the model's, whatever the number of ranks, and go on exactly from what is known."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from ahead import chained
from datasets import DIAGNOSTICS, FORCINGS, MASKED, VARIABLES, values_of
from forecasting import START, forecast, relative, same_bits, trained

import trainer
from shardio import open_dataset
from shardio.errors import DatasetError, PlanError, SelectionError
from trainer.model.forecaster import Roles
from trainer.predict.forecast import forecast_partition, load

STEPS = 20
LEAD_TIME = "120h"
FIRST = 4  # START is the fifth date
OUTPUTS = Roles(VARIABLES, FORCINGS, DIAGNOSTICS).outputs
AXES = (0, 1, 2)  # all but the variables


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory, path: str) -> Path:
    return trained(tmp_path_factory, path, "--trainer.precision=64-true")


def on(run: Callable[..., list[Any]], ranks: int, checkpoint: Path, path: str) -> np.ndarray:
    more = {"ranks": ranks, "checkpoint": checkpoint, "path": path, "lead_time": LEAD_TIME}
    return np.concatenate(run(forecast, [more] * ranks), axis=2)


def absent() -> torch.Tensor:
    """[ensemble, cells], where MASKED has no value at START."""
    return torch.from_numpy(values_of(208, 2)[FIRST, VARIABLES.index(MASKED)]).isnan()


def test_forecasts_of_1_to_4_ranks_agree_after_20_steps(
    run: Callable[..., list[Any]], checkpoint: Path, path: str
) -> None:
    alone = on(run, 1, checkpoint, path)
    assert alone.shape == (STEPS, 2, 208, len(OUTPUTS))
    there = ~np.isnan(alone[0])
    assert np.array_equal(there[..., OUTPUTS.index(MASKED)], ~absent().numpy())
    assert alone.std(axis=0)[there].min() > 0.0, "something does not change with time"
    for ranks in (2, 3, 4):
        assert relative(on(run, ranks, checkpoint, path), alone, AXES) < 1e-5


def test_forecasts_in_double_precision_agree_to_rounding_of_what_is_stored(
    run: Callable[..., list[Any]], precise: Path, path: str
) -> None:
    alone = on(run, 1, precise, path)
    assert relative(on(run, 3, precise, path), alone, AXES) < 3e-7


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, path: str) -> Path:
    return trained(tmp_path_factory, path, "--trainer.precision=bf16-mixed")


def test_a_forecast_is_computed_as_precisely_as_the_training_unless_asked_otherwise(
    rounded: Path, checkpoint: Path, precise: Path, path: str
) -> None:
    """The first bit that is lost shows; and what was rounded in training need not be here."""

    def first(of: Path, precision: str | None = None) -> torch.Tensor:
        model = load(of, path, precision=precision)
        seen: list[torch.Tensor] = []
        model.forecaster.network.embed_cells.register_forward_hook(lambda *given: seen.append(given[2]))
        lead = next(model.run(START, "6h"))
        assert lead.fields.dtype == torch.float32
        kinds.append((seen[0].dtype, model.forecaster.mean.dtype))
        return lead.fields

    kinds: list[tuple[torch.dtype, torch.dtype]] = []
    asked = ((rounded, None), (rounded, "bf16-mixed"), (rounded, "32-true"), (checkpoint, None), (checkpoint, "bf16"))
    fields = [first(*one) for one in (*asked, (precise, None), (precise, "32"))]
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    expected = [(half, single)] * 2 + [(single, single)] * 2 + [(half, single), (double, double), (single, single)]
    assert kinds == expected
    assert same_bits(fields[0], fields[1])
    assert not same_bits(fields[0], fields[2])
    for one, other in ((0, 2), (3, 4), (5, 6)):
        assert relative(fields[one].numpy(), fields[other].numpy(), (0, 1)) < 1e-2


@pytest.mark.parametrize(("asked", "why"), [("bf16-true", "temperatures rounded to 2 K"), ("32-tru", "is unknown")])
def test_a_precision_that_cannot_be_is_refused(checkpoint: Path, path: str, asked: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        load(checkpoint, path, precision=asked)


def test_a_forecast_is_the_steps_of_the_model_one_after_the_other(checkpoint: Path, path: str) -> None:
    """But that training keeps the normalised state, and a forecast the stored one, differing in the last digit (6e-8).

    And a cell without a value is the mean there, and NaN here.
    """
    steps, model = 8, trainer.load(checkpoint, path)
    found = torch.stack([lead.fields for lead in model.run(START, "48h")])
    forecaster, values = model.forecaster, torch.from_numpy(values_of(208, 2))
    fields = forecaster.normalise(values[FIRST - 1 : FIRST + steps + 1].permute(0, 2, 3, 1)[None])
    with torch.no_grad():
        rolled = torch.stack([forecaster.denormalise(one[0]) for one, _ in forecaster.rollout(fields, steps)])
    masked = rolled[..., OUTPUTS.index(MASKED)]
    assert (masked[:, absent()] == forecaster.mean[VARIABLES.index(MASKED)]).all()
    masked[:, absent()] = torch.nan
    assert relative(found.numpy(), rolled.numpy(), AXES) < 1e-5


def test_a_cell_without_an_initial_value_never_gets_one_whatever_the_network_says(checkpoint: Path, path: str) -> None:
    """No other value of 20 lead times depends on its answer there; and in every state it is the mean."""
    model, place, states = load(checkpoint, path), OUTPUTS.index(MASKED), []
    expected = [lead.fields for lead in model.run(START, LEAD_TIME)]
    for fields in expected:
        assert torch.equal(fields[..., place].isnan(), absent())
        assert torch.isfinite(fields[..., [p for p in range(len(OUTPUTS)) if p != place]]).all()

    def more(_: Any, __: Any, answer: torch.Tensor) -> torch.Tensor:
        answer[..., place][absent()] += 1e30 if len(states) % 2 else torch.inf
        return answer

    model.forecaster.network.register_forward_hook(more)
    model.forecaster.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for lead in model.run(START, LEAD_TIME):
        assert same_bits(lead.fields, expected[lead.number - 1])
    assert len(states) == STEPS
    for state in states:
        assert (state[0, -1, ..., place][absent()] == 0.0).all()


def test_what_is_not_finite_elsewhere_is_still_refused(checkpoint: Path, path: str) -> None:
    """Of a variable that other cells lack."""
    model, place = load(checkpoint, path), OUTPUTS.index(MASKED)

    def more(_: Any, __: Any, answer: torch.Tensor) -> torch.Tensor:
        answer[..., place] += torch.nan
        return answer

    model.forecaster.network.register_forward_hook(more)
    wrong = int((~absent()).sum())
    with pytest.raises(PlanError, match=f"forecast of sst for 2021-03-02T06.*not finite in {wrong} of the 208 cells"):
        next(model.run(START, LEAD_TIME))


@pytest.mark.parametrize(("name", "date"), [("q_500", FIRST - 1), ("sun", FIRST + 1)])
def test_values_that_are_lacking_where_the_training_had_them_are_refused(
    checkpoint: Path, path: str, tmp_path: Path, name: str, date: int
) -> None:
    other = tmp_path / "other.zarr"
    shutil.copytree(path, other)
    zarr.open_group(other, mode="r+")["data"][date, VARIABLES.index(name), :, 17:20] = np.nan
    with pytest.raises(DatasetError, match=rf"{name} of 2021-03-0.T.* is not finite in 6 of the 208.*model.allow_nan"):
        list(load(checkpoint, str(other)).run(START, "24h"))


def test_an_older_checkpoint_does_not_say_which_variables_lack_values(
    checkpoint: Path, path: str, tmp_path: Path
) -> None:
    """Then all may; a cell without a value stays without one."""
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["shardio"].pop("allow_nan") == [MASKED]
    torch.save(saved, tmp_path / "older.ckpt")
    ours, theirs = (load(one, path).run(START, "24h") for one in (checkpoint, tmp_path / "older.ckpt"))
    assert all(same_bits(a.fields, b.fields) for a, b in zip(ours, theirs, strict=True))


def test_lead_times_have_their_dates_and_cells(checkpoint: Path, path: str) -> None:
    leads = list(load(checkpoint, path).run(START, "18h", members=1))
    assert [lead.number for lead in leads] == [1, 2, 3]
    assert [str(lead.date) for lead in leads] == [
        *("2021-03-02T06:00:00", "2021-03-02T12:00:00", "2021-03-02T18:00:00"),
    ]
    assert leads[0].cells == slice(0, 208)
    assert leads[0].fields.shape == (1, 208, len(OUTPUTS))


@pytest.mark.parametrize("after", [1, 2, 7, 19])
def test_going_on_from_known_fields_gives_the_same_bits(checkpoint: Path, path: str, after: int) -> None:
    model, prognostic = load(checkpoint, path), len(OUTPUTS) - len(DIAGNOSTICS)
    whole = [lead.fields for lead in model.run(START, LEAD_TIME)]
    rest = model.run(START, LEAD_TIME, after=after, known=lambda number: whole[number - 1][..., :prognostic])
    for lead in rest:
        assert same_bits(lead.fields, whole[lead.number - 1])
        after += 1
    assert after == STEPS


def test_forcings_are_read_at_the_valid_time(checkpoint: Path, path: str, tmp_path: Path) -> None:
    """The same forecast from a dataset whose forcing `sun` is another from the seventh date on."""
    other = tmp_path / "other.zarr"
    shutil.copytree(path, other)
    data = zarr.open_group(other, mode="r+")["data"]
    data[FIRST + 2 :, VARIABLES.index("sun")] += 500.0
    ours, theirs = ([lead.fields for lead in load(checkpoint, one).run(START, "24h")] for one in (path, str(other)))
    equal = [same_bits(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert equal == [True, True, False, False]


def test_variables_may_be_in_another_order_among_others(checkpoint: Path, path: str) -> None:
    turned = open_dataset(path, select=list(reversed(VARIABLES)))
    ours, theirs = (next(load(checkpoint, one).run(START, "6h")).fields for one in (path, turned))
    assert same_bits(ours, theirs)


def test_a_dataset_of_finer_steps_is_read_at_the_models(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    """Trained on every second date, started from all of them."""
    coarse = trained(tmp_path_factory, path, "--data.frequency=12h")
    ours, theirs = (
        [lead.fields for lead in load(coarse, dataset).run(START, "48h")]
        for dataset in (path, open_dataset(path, frequency="12h"))
    )
    assert len(ours) == 4
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("start", "lead_time", "said"),
    [
        ("2021-03-01", "6h", "2021-02-28T18:00:00 is not in the dataset, which has 2021-03-01T00:00:00 to"),
        ("2022-01-01", "6h", "a forecast from 2022-01-01T00:00:00 needs it"),
        (START, "241h", "a lead time of 241h is no multiple of the model's step, 6h"),
        (START, "0h", "'0h' is not a step in time"),
        (START, "300h", "needs its lsm, sun; give a dataset that reaches further, or a shorter lead time"),
        ("yesterday", "6h", "'yesterday' is not a date"),
    ],
)
def test_dates_that_cannot_be_forecast_are_refused_before_anything_is_computed(
    checkpoint: Path, path: str, start: str, lead_time: str, said: str
) -> None:
    with pytest.raises(SelectionError, match=said):
        load(checkpoint, path).run(start, lead_time)


def test_a_dataset_without_a_variable_of_the_training_is_refused(checkpoint: Path, path: str) -> None:
    with pytest.raises(DatasetError, match="trained on t_850 too, which the dataset lacks: it has lsm, sst"):
        load(checkpoint, open_dataset(path, drop="t_850"))


def test_a_forecast_that_diverges_stops_with_variable_and_date(checkpoint: Path, path: str) -> None:
    model = load(checkpoint, path)
    with torch.no_grad():
        model.forecaster.network.output[1].weight *= 1e38
    with pytest.raises(PlanError, match=r"the forecast of t_850 for 2021-03-02T.*not finite.*the model diverged"):
        list(model.run(START, LEAD_TIME))


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("chunk_cells", [None, 42])
def test_ranks_own_whole_chunks_that_cover_all_cells(path: str, ranks: int, chunk_cells: int | None) -> None:
    dataset = open_dataset(path)
    if chunk_cells and ranks > 5:
        with pytest.raises(PlanError, match=f"make 5 chunks: too few for {ranks} ranks"):
            forecast_partition(dataset, ranks, chunk_cells)
        return
    cut = forecast_partition(dataset, ranks, chunk_cells)
    owned = [cut.chunks(rank) for rank in range(ranks)]
    assert [chunk for chunks in owned for chunk in chunks] == list(range(-(-208 // cut.chunk_cells)))
    assert cut.chunk_cells == chunk_cells or chunk_cells is None
    assert all(bound % cut.chunk_cells == 0 for bound in cut.bounds[:-1])
    assert cut.bounds[-1] == 208


def test_no_step_is_computed_before_the_next_forcings_are_being_read(checkpoint: Path, path: str) -> None:
    """What a step needs is read only once the next read has begun."""
    dataset, reader = chained(path, FIRST + 3)
    model = load(checkpoint, dataset)
    found = [lead.fields for lead in model.run(START, "24h")]
    assert reader.rows == [FIRST - 1, FIRST, FIRST + 1, FIRST + 2, FIRST + 3]
    expected = [lead.fields for lead in load(checkpoint, open_dataset(path)).run(START, "24h")]
    assert all(same_bits(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
