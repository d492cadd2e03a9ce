"""The performance gate: a part of its counters, and that it notices when one of them grows."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tools
sys.path.insert(0, str(Path(__file__).parent))  # as in the ranks
from perf_regressions import count_twice

from tools.perf import __main__ as command
from tools.perf import gate, history, report
from tools.perf.grids import NAMES, Site
from tools.perf.matrix import RANKS, WORKS, Found, combine, measure_rank
from tools.trainer_step import on_ranks
from trainer.comm import Alone

Counters = dict[str, dict[str, int]]
CASE = "octahedral/2/train"


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counters, Counters]:
    """Of one and two ranks on the octahedral grid; and of two that exchange every halo twice."""
    site = Site("octahedral", tmp_path_factory.mktemp("perf"))
    site.make()
    alone = measure_rank(Alone(), site, 0, ("rechunk", "load"))
    together, doubled = zip(*on_ranks(count_twice, 2, site), strict=True)
    good, bad = ({case: combine([one[case] for one in found]) for case in found[0]} for found in (together, doubled))
    return _counters(alone | good), _counters(bad)


def _counters(found: Found) -> Counters:
    return {case: one["counters"] for case, one in found.items()}


@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    return gate.read(gate.BASELINE)


def test_counters_are_those_of_the_baseline(counted: tuple[Counters, Counters], baseline: dict[str, Any]) -> None:
    assert set(counted[0]) == {"octahedral/1/rechunk", "octahedral/1/load", "octahedral/2/load", CASE}
    good, words = gate.verdict(gate.compare(baseline, counted[0], gate.made_with()))
    assert good, words


def test_an_exchange_done_twice_is_caught(counted: tuple[Counters, Counters], baseline: dict[str, Any]) -> None:
    changes = gate.compare(baseline, counted[1], gate.made_with())
    good, words = gate.verdict(changes)
    assert not good
    assert {"bytes_sent", "messages"} <= {change.counter for change in changes if not change.is_better}
    was = baseline["counters"][CASE]["bytes_sent"]
    assert f"{CASE}: bytes_sent was {was:,}, is {counted[1][CASE]['bytes_sent']:,}" in words
    assert "make perf-accept" in words


def test_all_cases_have_a_baseline(baseline: dict[str, Any]) -> None:
    assert set(baseline["counters"]) == {f"{one}/{ranks}/{work}" for one in NAMES for ranks in RANKS for work in WORKS}


@pytest.mark.parametrize("counter", ["bytes_read", "bytes_sent", "messages", "peak_bytes", "opens", "rows", "flops"])
def test_growth_of_two_percent_fails_and_less_than_one_passes(baseline: dict[str, Any], counter: str) -> None:
    now = {CASE: dict(baseline["counters"][CASE])}
    lower, little = deepcopy(baseline), deepcopy(baseline)
    lower["counters"][CASE][counter] /= 1.02
    little["counters"][CASE][counter] /= 1.009
    same = baseline["made with"]
    assert [change.counter for change in gate.compare(lower, now, same)] == [counter]
    assert not gate.verdict(gate.compare(lower, now, same))[0]
    assert gate.compare(little, now, same) == []


def test_better_counters_pass_and_are_told() -> None:
    good, words = gate.verdict(gate.compare(*_one(was=200, now=100)))
    assert good
    assert "a/1/load: bytes_read was 200, is 100 (-50.0 %)" in words


@pytest.mark.parametrize(("was", "now"), [(200, 0), (0, 1), (200, None), (None, 200)])
def test_what_is_no_longer_counted_or_was_never_accepted_fails(was: int | None, now: int | None) -> None:
    assert not gate.verdict(gate.compare(*_one(was, now)))[0]


def test_tensors_are_not_compared_with_those_of_another_torch() -> None:
    baseline, now, _ = _one(100, 300, "peak_bytes")
    assert gate.compare(baseline, now, {"torch": "1"}) != []
    assert gate.compare(baseline, now, {"torch": "2"}) == []


def _one(was: int | None, now: int | None, counter: str = "bytes_read") -> tuple[dict[str, Any], Counters, dict]:
    before, after = ({} if number is None else {counter: number} for number in (was, now))
    return {"made with": {"torch": "1"}, "counters": {"a/1/load": before}}, {"a/1/load": after}, {}


def test_accepting_makes_the_last_run_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "baseline.json"
    path.write_text('{"made with": {}, "counters": {"a/1/load": {"opens": 5}, "b/1/load": {"opens": 7}}}')
    (tmp_path / "last.json").write_text('{"a/1/load": {"opens": 6}}')
    assert command.accept(tmp_path, path) == 0
    assert "opens was 5, is 6" in capsys.readouterr().out
    assert gate.read(path)["counters"] == {"a/1/load": {"opens": 6}, "b/1/load": {"opens": 7}}


def _run(*ratios: float, machine: str = "here") -> dict[str, Any]:
    result = {"ratios": list(ratios), "seconds": list(ratios), "split": {"all": 1.0}, "counters": {"opens": 3}}
    result |= {"units": 4, "resident_bytes": 10**8}
    about = {"date": "2026-01-01T00:00:00Z", "commit": "abc", "changed": False, "load": 1.0}
    return about | {"machine": machine, "calibration": {"copy": 0.01}, "cases": {"octahedral/1/load": result}}


def test_a_slow_down_is_flagged_only_beyond_the_noise_of_its_run() -> None:
    before = [_run(9.9, 10.0, 10.1)] * 3
    assert [one.case for one in history.slow_downs([*before, _run(11.9, 12.0, 12.1)])] == ["octahedral/1/load"]
    assert history.slow_downs([*before, _run(9.0, 12.0, 15.0)]) == []
    assert history.slow_downs([*before, _run(9.9, 10.0, 10.1)]) == []


def test_times_of_another_machine_are_not_compared() -> None:
    assert history.slow_downs([_run(1.0, 1.0, 1.0, machine="there"), _run(2.0, 2.0, 2.0)]) == []


def test_report_shows_trends_times_counters_and_what_changed(tmp_path: Path) -> None:
    runs = [_run(9.9, 10.0, 10.1), _run(10.0, 10.1, 10.3), _run(11.9, 12.0, 12.1)]
    change = gate.Change("octahedral/1/load", "opens", 2, 3)
    page = report.write(tmp_path, runs, [change], history.slow_downs(runs)).read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for text in ("opens was 2, is 3 (+50.0 %)", "1.19 x the 10.1 kernels", "data:image/png;base64,", "dates/s"):
        assert text in page
