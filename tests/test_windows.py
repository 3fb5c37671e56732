"""Refresh windows are judged by the clock on the wall and say when they open next; so does a minimum interval."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_matviews.exceptions import InvalidDefinition
from airflow_provider_matviews.windows import DAYS, MaintenanceWindow, as_windows, why_not_now
from tests.conftest import examples

BERLIN = ZoneInfo("Europe/Berlin")
#: Its clocks go from 02:00 to 03:00 on 2026-03-29, and from 03:00 to 02:00 on 2026-10-25, both Sundays.
SPRING, AUTUMN = datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)
#: Berlin; half an hour of summer time; changes at midnight; left out a Friday; not by whole hours; never changes.
_ZONES = {
    "Europe/Berlin": [SPRING, AUTUMN],
    "Australia/Lord_Howe": [datetime(2026, 4, 4, 15, tzinfo=UTC), datetime(2026, 10, 3, 15, tzinfo=UTC)],
    "America/Havana": [datetime(2026, 3, 8, 5, tzinfo=UTC), datetime(2026, 11, 1, 5, tzinfo=UTC)],
    "Pacific/Apia": [datetime(2011, 12, 30, 10, tzinfo=UTC)],
    "Asia/Kathmandu": [datetime(2026, 1, 1, tzinfo=UTC)],
    "UTC": [datetime(2026, 1, 1, tzinfo=UTC)],
}


def at(text: str, zone: str = "Europe/Berlin", *, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold)


def open_minutes(window: MaintenanceWindow) -> set[int]:
    """The same by another road: every minute of the week at which it is open, as a person reads a calendar."""
    start, end = (int(text[:2]) * 60 + int(text[3:]) for text in (window.start, window.end))
    return {
        (day * 1440 + start + minute) % 10080
        for day in range(7)
        if not window.days or DAYS[day] in window.days
        for minute in range((end - start) % 1440 or 1440)
    }


def minute_of_week(instant: datetime, zone: ZoneInfo) -> int:
    local = instant.astimezone(zone)
    return local.weekday() * 1440 + local.hour * 60 + local.minute


_CLOCK = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.sampled_from([0, 1, 15, 30, 59]))
_WINDOWS = st.builds(
    MaintenanceWindow,
    start=_CLOCK,
    end=_CLOCK,
    days=st.lists(st.sampled_from(DAYS), max_size=3),
    timezone=st.sampled_from(list(_ZONES)),
)


@st.composite
def _windows_and_instants(draw: st.DrawFn) -> tuple[MaintenanceWindow, datetime]:
    window = draw(_WINDOWS)
    minutes = draw(st.integers(-2000, 2000))
    return window, draw(st.sampled_from(_ZONES[window.timezone])) + timedelta(minutes=minutes)


@given(_windows_and_instants(), st.sampled_from([0, 0.5, 59]))
@settings(max_examples=examples(50), deadline=None)
def test_a_window_is_open_and_opens_next_as_a_clock_on_the_wall_says(
    drawn: tuple[MaintenanceWindow, datetime], seconds: float
) -> None:
    window, minute = drawn
    zone, instant, minutes = ZoneInfo(window.timezone), minute + timedelta(seconds=seconds), open_minutes(window)
    assert window.contains(instant) == (minute_of_week(instant, zone) in minutes)
    opening = window.next_opening(instant)
    assert opening.tzinfo == zone
    naive = minute
    while minute_of_week(naive, zone) not in minutes:
        naive += timedelta(minutes=1)
    assert opening.astimezone(UTC) == (naive if naive > minute else instant)


@given(_WINDOWS)
@settings(deadline=None)
def test_a_window_survives_its_text_pickle_and_copying(window: MaintenanceWindow) -> None:
    assert MaintenanceWindow.parse(str(window)) == window
    assert pickle.loads(pickle.dumps(window)) == window
    assert copy.deepcopy(window) == window
    assert hash(copy.deepcopy(window)) == hash(window)


@pytest.mark.parametrize(
    ("text", "window", "again"),
    [
        ("01:00-05:00", {"start": "01:00", "end": "05:00"}, "01:00-05:00 UTC"),
        (
            "mon-fri 22:00-06:00 Europe/Berlin",
            {"start": "22:00", "end": "06:00", "days": DAYS[:5], "timezone": "Europe/Berlin"},
            "mon-fri 22:00-06:00 Europe/Berlin",
        ),
        (
            " Sat , SUN  9:30 - 24:00 ",
            {"start": "09:30", "end": "00:00", "days": ("sat", "sun")},
            "sat,sun 09:30-00:00 UTC",
        ),
        (
            "fri-mon 00:00-24:00",
            {"start": "00:00", "end": "00:00", "days": ("mon", "fri", "sat", "sun")},
            "mon,fri-sun 00:00-00:00 UTC",
        ),
        (
            "monday-wednesday,Friday 01:00-02:00",
            {"start": "01:00", "end": "02:00", "days": ("mon", "tue", "wed", "fri")},
            "mon-wed,fri 01:00-02:00 UTC",
        ),
        ("mon-sun 01:00-02:00 UTC", {"start": "01:00", "end": "02:00"}, "01:00-02:00 UTC"),
    ],
)
def test_a_window_is_read_from_text(text: str, window: dict[str, Any], again: str) -> None:
    assert MaintenanceWindow.parse(text) == MaintenanceWindow(**window)
    assert str(MaintenanceWindow.parse(text)) == again


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("", "'' is no window"),
        ("22:00", "is no window"),
        ("at night", "is no window"),
        ("22:00-06:00 Europe/Berlin tonight", "is no window"),
        ("24:00-06:00", "start='24:00' of a window is no time of day"),
        ("22:00-25:00", "end='25:00' of a window is no time of day"),
        ("22:60-23:00", "start='22:60' of a window is no time of day"),
        ("1:٣0-2:00", "is no window"),
        ("someday 22:00-06:00", "'someday' is no day of the week"),
        ("mon-wed-fri 22:00-06:00", "'mon-wed-fri' is no span of days"),
        ("22:00-06:00 Berlin", "timezone='Berlin' of a window is none"),
        ("22:00-06:00 Europe", "timezone='Europe' of a window is none"),
        ("22:00-06:00 ../etc/passwd", "of a window is none"),
        ("22:00-06:00 /etc/localtime", "of a window is none"),
        (None, "None is no window"),
    ],
)
def test_what_is_no_window_is_refused(text: Any, explanation: str) -> None:
    with pytest.raises(InvalidDefinition) as raised:
        MaintenanceWindow.parse(text)
    assert explanation in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize(
    "arguments", [{"days": "mon"}, {"days": [1]}, {"timezone": None}, {"timezone": ""}, {"start": 22}, {"end": None}]
)
def test_arguments_that_make_no_window_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidDefinition):
        MaintenanceWindow(**{"start": "22:00", "end": "06:00", **arguments})


@pytest.mark.parametrize("wrong", ["01:00-02:00", [1], None])
def test_windows_are_a_list(wrong: Any) -> None:
    with pytest.raises(InvalidDefinition, match="refresh_windows"):
        as_windows(wrong)


def test_the_hour_that_is_left_out_does_not_open_and_the_one_that_comes_twice_opens_twice() -> None:
    night = MaintenanceWindow.parse("02:15-02:45 Europe/Berlin")
    # 29 March 2026 knows no such time: it opens the day after.
    assert night.next_opening(at("2026-03-28T03:00")) == at("2026-03-30T02:15")
    first, second = at("2026-10-25T02:15"), at("2026-10-25T02:15", fold=1)
    assert night.next_opening(at("2026-10-25T01:00")).timestamp() == first.timestamp()
    assert night.contains(first)
    assert night.contains(second)
    assert not night.contains(at("2026-10-25T02:50"))
    assert night.next_opening(at("2026-10-25T02:50")).timestamp() == second.timestamp()
    # What only begins in the hour that is left out opens when that is over; what is cut by the one that comes twice
    # closes and opens again.
    assert MaintenanceWindow.parse("02:30-04:00 Europe/Berlin").next_opening(SPRING) == at("2026-03-29T03:00")
    early = MaintenanceWindow.parse("01:00-02:10 Europe/Berlin")
    assert early.next_opening(at("2026-10-25T02:30")).timestamp() == at("2026-10-25T02:00", fold=1).timestamp()


def test_a_night_belongs_to_the_day_on_which_it_begins() -> None:
    window = MaintenanceWindow(start="22:00", end="06:00", days=["fri"], timezone="Europe/Berlin")
    assert not window.contains(at("2026-11-20T05:59"))  # Friday morning
    assert window.contains(at("2026-11-20T22:00"))
    assert window.contains(at("2026-11-21T05:59"))
    assert not window.contains(at("2026-11-21T06:00"))
    assert not window.contains(at("2026-11-21T22:00"))


NOW = datetime(2026, 11, 21, 18, 30, tzinfo=UTC)  # a Saturday, 19:30 in Berlin
NIGHTS = MaintenanceWindow.parse("22:00-06:00 Europe/Berlin")
MONDAYS = MaintenanceWindow.parse("mon 01:00-02:00")


@pytest.mark.parametrize(
    ("ago", "windows", "min_interval", "reason"),
    [
        (None, (), None, None),
        (1, (), None, None),
        (None, (), 900, None),
        (900, (), 900, None),
        (240, (), 900, "refreshed 4 min ago, and its minimum interval is 15 min"),
        (899.9, (), 900, "refreshed 14 min 59 s ago, and its minimum interval is 15 min"),
        (90061, (), 7 * 86400, "refreshed 1 d 1 h ago, and its minimum interval is 7 d"),
        (0.2, (), 1.5, "refreshed less than 1 s ago, and its minimum interval is 1 s"),
        # Another clock is ahead.
        (-30, (), 60, "refreshed less than 1 s ago, and its minimum interval is 1 min"),
        (None, (NIGHTS, MaintenanceWindow.parse("sat 18:00-19:00")), None, None),
        (
            None,
            (NIGHTS,),
            None,
            "outside its refresh windows (22:00-06:00 Europe/Berlin); the next one opens at 2026-11-21 22:00 CET",
        ),
        (
            7200,
            (MONDAYS, NIGHTS),
            3600,
            "outside its refresh windows (mon 01:00-02:00 UTC and 22:00-06:00 Europe/Berlin); "
            "the next one opens at 2026-11-21 22:00 CET",
        ),
        (
            60,
            (MONDAYS,),
            3600,
            "outside its refresh windows (mon 01:00-02:00 UTC); the next one opens at 2026-11-23 01:00 UTC; "
            "refreshed 1 min ago, and its minimum interval is 1 h",
        ),
    ],
)
def test_a_refresh_may_run_or_is_told_why_not(
    ago: float | None, windows: tuple[MaintenanceWindow, ...], min_interval: float | None, reason: str | None
) -> None:
    last = None if ago is None else (NOW - timedelta(seconds=ago)).astimezone(timezone(timedelta(hours=-5)))
    assert why_not_now(NOW.astimezone(BERLIN), last, windows, min_interval) == reason


def test_an_instant_without_a_time_zone_is_refused() -> None:
    naive = NOW.replace(tzinfo=None)
    for ask in (
        lambda: NIGHTS.contains(naive),
        lambda: NIGHTS.next_opening(naive),
        lambda: why_not_now(naive, None, (NIGHTS,), None),
        lambda: why_not_now(NOW, naive, (), 60),
    ):
        with pytest.raises(InvalidDefinition, match="lacks a time zone"):
            ask()
