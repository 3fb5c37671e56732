"""When a view's history is worth an alert: pure data. What fires is decided in ``services/alerts.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

from airflow_provider_matviews.checks import as_seconds, check_flag, set_on
from airflow_provider_matviews.exceptions import InvalidDefinition

#: So many runs of a view are looked at, at the most.
LONGEST_WINDOW = 1000


@dataclass(frozen=True, kw_only=True)
class AlertRules:
    """Which of a view's ills are told. None, or False, turns a rule off.

    :param failed: whether its latest create or refresh failed, or its process was lost; skipped runs are no runs here.
    :param unreadable: whether no such view stands any more, though we have not dropped it, or it holds no data: whoever
        reads it gets an error.
    :param consecutive_failures: how many runs in a row have failed, since the last that ended well: so many or more.
    :param max_duration_ratio: how many times the average of the successful refreshes before it the latest one may have
        taken; a run that is under way is measured by it too.
    :param window: how many successful refreshes that average is over, at the most.
    :param min_samples: how many there have to be for any average, of ``window`` at the most: a view with fewer is not
        judged by one.
    :param min_duration: seconds that count as slow at the least, whatever the average.
    :param max_age: seconds, or a timedelta, within which it has to be filled, or to be found unchanged. Of a view that
        never was, since it is on record.
    :param max_running: seconds, or a timedelta, that a run may take that is under way.
    :param max_row_count_ratio: how many times more, or how many times fewer, rows it may have than after the refreshes
        before, on average over the same window.
    :param max_bloat: how many times the room that it took after the last rebuild a row of it may take; only of views
        of more than 8 MiB.
    :raises InvalidDefinition: when one of them is not what it should be.
    """

    failed: bool = True
    unreadable: bool = True
    consecutive_failures: int | None = None
    max_duration_ratio: float | None = 2.0
    window: int = 20
    min_samples: int = 5
    min_duration: float = 1.0
    max_age: float | timedelta | None = None
    max_running: float | timedelta | None = None
    max_row_count_ratio: float | None = None
    max_bloat: float | None = None

    def __post_init__(self) -> None:
        check_flag(self.failed, "failed")
        check_flag(self.unreadable, "unreadable")
        if self.consecutive_failures is not None:
            _check_count(self.consecutive_failures, "consecutive_failures")
        for name in ("window", "min_samples"):
            _check_count(getattr(self, name), name)
        for name in ("max_duration_ratio", "max_row_count_ratio", "max_bloat"):
            _check_ratio(getattr(self, name), name)
        if not _is_number(self.min_duration) or self.min_duration < 0:
            raise InvalidDefinition(f"min_duration={self.min_duration!r} is not a number of seconds.")
        for name in ("max_age", "max_running"):
            set_on(self, name, as_seconds(getattr(self, name), name))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AlertRules:
        """Read rules from plain data.

        :raises InvalidDefinition: when there is no such rule, or a value is not what it should be.
        """
        return cls().with_changes(given)

    def with_changes(self, changes: Mapping[str, Any]) -> AlertRules:
        """Return these rules with others in their place.

        :param changes: argument -> value.
        :raises InvalidDefinition: when there is no such rule, or a value is not what it should be.
        """
        names = [each.name for each in fields(self)]
        if not isinstance(changes, Mapping):
            raise InvalidDefinition(f"Rules are a mapping such as {{'max_age': 3600}}, not {changes!r}.")
        if unknown := sorted(map(str, changes.keys() - set(names))):
            raise InvalidDefinition(f"There is no rule {', '.join(unknown)}. There are {', '.join(names)}.")
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return them as plain data, lengths of time in seconds."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(value: object, argument: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST_WINDOW:
        raise InvalidDefinition(f"{argument}={value!r} is not a whole number from 1 to {LONGEST_WINDOW}.")


def _check_ratio(value: Any, argument: str) -> None:
    if value is not None and (not _is_number(value) or value <= 1):
        raise InvalidDefinition(f"{argument}={value!r} is not a number above 1; None turns the rule off.")
