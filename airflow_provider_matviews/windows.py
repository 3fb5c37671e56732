"""When a view may be refreshed: daily spans of local time, and how long one refresh keeps the next one waiting.

Pure data and logic: knows neither a database nor Airflow, nor what time it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from airflow_provider_matviews.checks import as_tuple, set_on
from airflow_provider_matviews.exceptions import InvalidDefinition

#: In the order of ``date.weekday()``.
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FULL_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)\Z", re.ASCII)
_TEXT = re.compile(
    r"\s*(?:(?P<days>[a-z]+(?:\s*[-,]\s*[a-z]+)*)\s+)?"
    r"(?P<start>\d{1,2}:\d\d)\s*-\s*(?P<end>\d{1,2}:\d\d)(?:\s+(?P<zone>\S+))?\s*\Z",
    re.IGNORECASE | re.ASCII,
)
_EXAMPLES = 'write it as "22:00-06:00" (UTC), "mon-fri 22:00-06:00 Europe/Berlin" or "sat,sun 00:00-24:00 UTC".'
#: How many days ahead an opening is looked for. Where one falls into the hour that a zone leaves out, or on a day that
#: it leaves out, it is the week after.
_DAYS_AHEAD = 22


@dataclass(frozen=True, kw_only=True)
class MaintenanceWindow:
    """A span of the day, on some days of the week or on all.

    Judged by what a clock on the wall of that zone shows. So where clocks go forward, what lies in the hour that is
    left out does not open on that day; where they go back, what lies in the hour that comes twice opens twice.

    :param start: the first minute that belongs to it, ``HH:MM``.
    :param end: the first one that does not, ``HH:MM``, ``24:00`` too. Where it is not after ``start`` the span goes
        past midnight; where both are the same it lasts a whole day.
    :param days: of the week on which it begins, such as ``("mon", "tue")``; none for every day.
    :param timezone: whose clock it is, by its name in the IANA database, such as ``Europe/Berlin``. Without one: UTC.
    :raises InvalidDefinition: when a time, a day or the zone is none.
    """

    start: str
    end: str
    days: Sequence[str] = ()
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        set_on(self, "start", f"{_time(self.start, 'start'):%H:%M}")
        set_on(self, "end", f"{_time('00:00' if self.end == '24:00' else self.end, 'end'):%H:%M}")
        named = {_day(day) for day in as_tuple(self.days, "days of a window", (str,))}
        # Every day is no choice of days: so that what means the same is the same.
        set_on(self, "days", tuple(day for day in DAYS if day in named) if len(named) < len(DAYS) else ())
        _zone(self.timezone)

    @classmethod
    def parse(cls, text: str) -> MaintenanceWindow:
        """Read a window from text: days, span and zone, as in ``mon-fri 22:00-06:00 Europe/Berlin``.

        Days are one by one or from one to another (``sat,sun``, ``mon-wed,fri``); without any it is every day. Without
        a zone it is UTC.

        :raises InvalidDefinition: when it is no such text.
        """
        match = _TEXT.match(text) if isinstance(text, str) else None
        if match is None:
            raise InvalidDefinition(f"{text!r} is no window.", hint=_EXAMPLES)
        days = tuple(_days(match["days"])) if match["days"] else ()
        return cls(start=match["start"], end=match["end"], days=days, timezone=match["zone"] or "UTC")

    def __str__(self) -> str:
        days = f"{_days_text(self.days)} " if self.days else ""
        return f"{days}{self.start}-{self.end} {self.timezone}"

    def contains(self, instant: datetime) -> bool:
        """Whether it is open at an instant.

        :param instant: with its time zone, whichever that is.
        :raises InvalidDefinition: when it has none.
        """
        local = _aware(instant).astimezone(_zone(self.timezone))
        clock = f"{local:%H:%M}"
        if self.start < self.end:
            return self.start <= clock < self.end and self._opens_on(local.date())
        return (clock >= self.start and self._opens_on(local.date())) or (
            clock < self.end and self._opens_on(local.date() - timedelta(days=1))
        )

    def next_opening(self, instant: datetime) -> datetime:
        """Return the first instant, from the given one on, at which it is open, in its own zone.

        :param instant: with its time zone; comes back itself where it is open already.
        :raises InvalidDefinition: when it has none.
        """
        zone = _zone(self.timezone)
        instant = _aware(instant).astimezone(UTC)
        if self.contains(instant):
            return instant.astimezone(zone)
        today = instant.astimezone(zone).date()
        for ahead in range(-1, _DAYS_AHEAD):
            turns = self._turns(today + timedelta(days=ahead))
            if openings := [turn for turn in turns if turn >= instant and self.contains(turn)]:
                return min(openings).astimezone(zone)
        raise AssertionError(f"{self} never opens")

    def _opens_on(self, day: date) -> bool:
        return not self.days or DAYS[day.weekday()] in self.days

    def _turns(self, day: date) -> Iterator[datetime]:
        """Yield every instant of a day at which it could open: at its start, and where the clock is changed."""
        zone = _zone(self.timezone)
        start = datetime.combine(day, time.fromisoformat(self.start), zone)
        yield start.astimezone(UTC)
        yield start.replace(fold=1).astimezone(UTC)
        before = datetime.combine(day, time(), zone).astimezone(UTC)
        after = datetime.combine(day + timedelta(days=1), time(), zone).astimezone(UTC)
        offset = before.astimezone(zone).utcoffset()
        if after.astimezone(zone).utcoffset() == offset:
            return
        while after - before > timedelta(seconds=1):
            middle = before + timedelta(seconds=(after - before) // timedelta(seconds=2))
            if middle.astimezone(zone).utcoffset() == offset:
                before = middle
            else:
                after = middle
        yield after


def as_windows(windows: object, argument: str = "refresh_windows") -> tuple[MaintenanceWindow, ...]:
    """Return windows, of which each may be text, as :meth:`MaintenanceWindow.parse` reads it.

    :raises InvalidDefinition: when it is no list of them.
    """
    given = as_tuple(windows, argument, (str, MaintenanceWindow))
    return tuple(MaintenanceWindow.parse(each) if isinstance(each, str) else each for each in given)


def why_not_now(
    now: datetime,
    last_success: datetime | None,
    windows: Sequence[MaintenanceWindow],
    min_interval: float | None,
) -> str | None:
    """Tell why a view is not to be refreshed now; None where it may be.

    :param now: the instant that is asked about, with its time zone.
    :param last_success: when it was last brought up to date, with its time zone; None for never.
    :param windows: the spans in which it may be refreshed; none for always.
    :param min_interval: seconds that have to pass after ``last_success``; None for none.
    :raises InvalidDefinition: when an instant has no time zone.
    """
    reasons = []
    if windows and not any(window.contains(now) for window in windows):
        opening = min((window.next_opening(now) for window in windows), key=datetime.timestamp)
        reasons.append(
            f"outside its refresh windows ({' and '.join(map(str, windows))}); "
            f"the next one opens at {opening:%Y-%m-%d %H:%M %Z}"
        )
    if min_interval is not None and last_success is not None:
        # A clock that is ahead of ours makes it a moment ago, not a time to come.
        elapsed = max(0.0, (_aware(now) - _aware(last_success)).total_seconds())
        if elapsed < min_interval:
            reasons.append(f"refreshed {_span(elapsed)} ago, and its minimum interval is {_span(min_interval)}")
    return "; ".join(reasons) or None


def _aware(instant: datetime) -> datetime:
    if not isinstance(instant, datetime) or instant.utcoffset() is None:
        raise InvalidDefinition(
            f"{instant!r} is no instant: it lacks a time zone.", hint="for example datetime.now(timezone.utc)."
        )
    return instant


def _time(text: object, argument: str) -> time:
    match = _TIME.match(text) if isinstance(text, str) else None
    if match is None or int(match[1]) > 23:
        raise InvalidDefinition(f"{argument}={text!r} of a window is no time of day.", hint="write it as 22:00.")
    return time(int(match[1]), int(match[2]))


def _day(text: str) -> str:
    word = text.strip().lower()
    for short, full in zip(DAYS, _FULL_DAYS, strict=True):
        if word in (short, full):
            return short
    raise InvalidDefinition(f"{text!r} is no day of the week.", hint=f"there are {', '.join(DAYS)}.")


def _days(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        if "-" in last:
            raise InvalidDefinition(f"{part.strip()!r} is no span of days.", hint=_EXAMPLES)
        begin = DAYS.index(_day(first))
        count = (DAYS.index(_day(last)) - begin) % len(DAYS) if last else 0
        yield from (DAYS[(begin + number) % len(DAYS)] for number in range(count + 1))


def _days_text(days: Sequence[str]) -> str:
    spans: list[list[str]] = []
    for day in days:
        if spans and DAYS.index(spans[-1][-1]) + 1 == DAYS.index(day):
            spans[-1].append(day)
        else:
            spans.append([day])
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 2 else ",".join(span) for span in spans)


def _zone(name: object) -> ZoneInfo:
    try:
        return ZoneInfo(name if isinstance(name, str) else "")
    # A folder of the database, such as Europe, is an error of the file system.
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidDefinition(
            f"timezone={name!r} of a window is none that is known here.",
            hint="give its name in the IANA database, such as UTC or Europe/Berlin; capitals count.",
        ) from None


def _span(seconds: float) -> str:
    """Return a length of time for a person, in its two largest units: ``45 s``, ``1 h 30 min``."""
    whole = int(seconds)
    counts = {"d": whole // 86400, "h": whole // 3600 % 24, "min": whole // 60 % 60, "s": whole % 60}
    said = [f"{count} {unit}" for unit, count in counts.items() if count]
    return " ".join(said[:2]) or "less than 1 s"
