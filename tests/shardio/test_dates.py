import numpy as np
import pytest

from shardio.dates import (
    between,
    check_increasing,
    format_step,
    frequency,
    parse_end,
    parse_start,
    parse_step,
    spellings,
)
from shardio.errors import DatasetError, SelectionError

DATES = np.datetime64("2020-02-28T00:00:00", "s") + np.arange(12) * np.timedelta64(21600, "s")


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2020", "2020-01-01T00:00:00", "2020-12-31T23:59:59"),
        ("2020-02", "2020-02-01T00:00:00", "2020-02-29T23:59:59"),
        ("2020-02-29", "2020-02-29T00:00:00", "2020-02-29T23:59:59"),
        ("2020-02-29T06", "2020-02-29T06:00:00", "2020-02-29T06:00:00"),
        ("2020-02-29T06:00Z", "2020-02-29T06:00:00", "2020-02-29T06:00:00"),
        (" 2020-02-29T06:00:01 ", "2020-02-29T06:00:01", "2020-02-29T06:00:01"),
    ],
)
def test_a_date_means_all_of_what_it_names(text, first, last):
    assert str(parse_start(text)) == first
    assert str(parse_end(text)) == last


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2020-13", "2020-02-30", "2020/02/01", "NaT", "now", "today", "2020-01-01T00:00+02:00", "1e3"],
)
def test_what_is_not_a_date_is_refused_with_examples(text):
    with pytest.raises(SelectionError, match=r"is not a date .* Write 2020, 2020-03"):
        parse_start(text)


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (None, None, range(12)),
        ("2020-02-29", None, range(4, 12)),
        (None, "2020-02-29", range(8)),
        ("2020-02-28T01", "2020-02-28T13", range(1, 3)),
        ("2019", "2021", range(12)),
    ],
)
def test_both_ends_are_included(start, end, found):
    assert between(DATES, start, end, "here") == found


@pytest.mark.parametrize(("start", "end"), [("2021", None), (None, "2019"), ("2020-03-01", "2020-02-01")])
def test_a_selection_of_nothing_is_refused_with_what_there_is(start, end):
    with pytest.raises(SelectionError, match="2020-02-28T00:00:00 to 2020-03-01T18:00:00"):
        between(DATES, start, end, "here")


def test_dates_that_do_not_increase_are_refused_with_the_first_pair():
    with pytest.raises(DatasetError, match="2020-02-28T06:00:00 is followed by 2020-02-28T06:00:00"):
        check_increasing(DATES[[0, 1, 1, 2]], "here")


def test_frequency_is_the_commonest_step():
    assert frequency(DATES) == "6h"
    assert frequency(DATES[[0, 1, 2, 5, 6]]) == "6h"
    assert frequency(DATES[:1]) is None
    assert [format_step(s) for s in (86400, 172800, 3600, 1800, 45)] == ["1d", "2d", "1h", "30m", "45s"]


def test_a_step_is_found_however_it_is_spelled():
    assert spellings(86400) == ["1d", "24h", "1440m", "86400s"]
    assert spellings(129600) == ["36h", "2160m", "129600s"]
    assert spellings(45) == ["45s"]
    assert {parse_step(text) for text in spellings(129600)} == {129600}
