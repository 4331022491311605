"""Calendar arithmetic against Python's own, and its behaviour outside the calendar."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.devices.calendar import SECONDS_PER_DAY, Format, calendar_day, day_number, next_match

FORMATS = [Format(binary=binary, hours24=hours24) for binary in (False, True) for hours24 in (False, True)]


@given(st.dates())
def test_days_are_python_s_ordinals(date: dt.date) -> None:
    assert day_number(date.year, date.month, date.day) == date.toordinal()
    assert calendar_day(date.toordinal()) == (date.year, date.month, date.day)


@pytest.mark.parametrize(
    ("fields", "date"),
    [
        ((2007, 2, 31), (2007, 3, 3)),
        ((2008, 2, 30), (2008, 3, 1)),
        ((2006, 13, 1), (2007, 1, 1)),
        ((2006, 0, 0), (2005, 11, 30)),
        ((2006, 165, 165), (2020, 2, 12)),
        ((0, 1, 1), (0, 1, 1)),
        ((0, 0, 1), (-1, 12, 1)),
        ((9999, 12, 32), (10000, 1, 1)),
    ],
)
def test_what_is_no_date_is_carried_over(fields: tuple[int, int, int], date: tuple[int, int, int]) -> None:
    assert calendar_day(day_number(*fields)) == date


@given(st.integers(-(10**7), 10**7))
def test_every_day_number_is_a_day(number: int) -> None:
    assert day_number(*calendar_day(number)) == number


@pytest.mark.parametrize("form", FORMATS)
def test_fields_round_trip(form: Format) -> None:
    assert [form.decode(form.encode(value)) for value in range(100)] == list(range(100))
    assert [form.decode_hour(form.encode_hour(hour)) for hour in range(24)] == list(range(24))
    assert form.alarm_hours(form.encode_hour(13)) == [13]
    assert form.alarm(form.encode(59), 60) == [59]


@pytest.mark.parametrize(
    ("form", "hours"),
    [
        (Format(binary=False, hours24=False), {0: 0x12, 1: 0x01, 11: 0x11, 12: 0x92, 13: 0x81, 23: 0x91}),
        (Format(binary=True, hours24=False), {0: 12, 11: 11, 12: 0x8C, 23: 0x8B}),
        (Format(binary=False, hours24=True), {0: 0, 10: 0x10, 23: 0x23}),
    ],
)
def test_hours_as_the_data_sheet_has_them(form: Format, hours: dict[int, int]) -> None:
    assert {hour: form.encode_hour(hour) for hour in hours} == hours


@pytest.mark.parametrize("byte", [0x60, 0x99, 0x1A, 0xBF])
def test_an_alarm_that_no_time_has_never_matches(byte: int) -> None:
    assert Format(binary=False, hours24=True).alarm(byte, 60) == []


def matches(second: int, hours: list[int], minutes: list[int], seconds: list[int]) -> bool:
    second %= SECONDS_PER_DAY
    return second // 3600 in hours and second // 60 % 60 in minutes and second % 60 in seconds


ALL = st.one_of(st.just(-1), st.integers(0, 23))


@given(st.integers(0, 10 * SECONDS_PER_DAY), ALL, st.one_of(st.just(-1), st.integers(0, 59)), st.integers(-1, 59))
def test_the_next_alarm_is_the_first_second_that_matches(after: int, hour: int, minute: int, second: int) -> None:
    hours = list(range(24)) if hour < 0 else [hour]
    minutes = list(range(60)) if minute < 0 else [minute]
    seconds = list(range(60)) if second < 0 else [second]
    found = next_match(after, hours, minutes, seconds)
    assert found is not None
    assert after < found <= after + SECONDS_PER_DAY
    assert matches(found, hours, minutes, seconds)
    # Nothing between them matches; an hour back is enough, as each time of day comes once a day.
    for candidate in range(max(after + 1, found - 3700), found):
        assert not matches(candidate, hours, minutes, seconds)


HOURS, MINUTES, SECONDS = list(range(24)), list(range(60)), list(range(60))


@pytest.mark.parametrize(
    ("after", "hours", "minutes", "seconds", "found"),
    [
        (0, HOURS, MINUTES, SECONDS, 1),
        (58, HOURS, MINUTES, [59], 59),
        (59, HOURS, MINUTES, [59], 119),
        (119, HOURS, [2], [0], 120),
        (120, HOURS, [2], [0], 3720),
        (3599, [1], MINUTES, SECONDS, 3600),
        (3600, [1], [0], [0], 3600 + 86_400),
        (7199, [1], MINUTES, SECONDS, 3600 + 86_400),
        (86_399, [0], [0], [0], 86_400),
        (2 * 86_400 - 1, [23], [59], [59], 3 * 86_400 - 1),
    ],
)
def test_the_next_alarm_at_the_edges(
    after: int, hours: list[int], minutes: list[int], seconds: list[int], found: int
) -> None:
    assert next_match(after, hours, minutes, seconds) == found


def test_hours_that_no_day_has_never_match() -> None:
    assert Format(binary=True, hours24=True).alarm_hours(24) == []


def test_no_alarm_without_candidates() -> None:
    assert next_match(0, [], [1], [1]) is None
