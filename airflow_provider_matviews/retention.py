"""Retention: how much of a view's history is kept. Pure data; what it means in SQL is ``services/retention.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

from airflow_provider_matviews.checks import as_seconds, set_on
from airflow_provider_matviews.exceptions import InvalidDefinition

#: What a prune means unless it is told which views: every one that is on record.
EVERY_VIEW = ("*.*",)
#: More than any history has, and what every integer of the server holds.
_MOST = 1_000_000_000
#: Dates before year 4713 BC are none to PostgreSQL (https://www.postgresql.org/docs/current/datatype-datetime.html).
_LONGEST_AGE = timedelta(days=366 * 100).total_seconds()


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """Which runs of a view are kept. Counted apart for each operation (create, refresh, drop).

    Whatever it says, these always stay: the last success, the last failure and the last skipped run of each operation,
    and every run that says ``running``. Else a run stays if both its number and its age let it: ``keep_failures=None``
    with ``max_age`` keeps all failures that are not older than that, and the last one.

    :param keep_successes: how many of the last successes; None for all.
    :param keep_failures: how many of the last failures; None for all.
    :param keep_skipped: how many of the last skipped runs; None for as many as successes.
    :param max_age: seconds, or a timedelta, after which a run goes, counted from when it was recorded (``created_at``)
        by the server's clock; None for never.
    :raises InvalidDefinition: when a value is none of these, or nothing of it limits anything.
    """

    keep_successes: int | None = None
    keep_failures: int | None = None
    keep_skipped: int | None = None
    max_age: float | timedelta | None = None

    def __post_init__(self) -> None:
        for name in ("keep_successes", "keep_failures", "keep_skipped"):
            _check_count(getattr(self, name), name)
        set_on(self, "max_age", as_seconds(self.max_age, "max_age"))
        if self.max_age_seconds is not None and self.max_age_seconds > _LONGEST_AGE:
            raise InvalidDefinition(
                f"max_age={self.max_age!r} is more than a hundred years, in seconds.",
                hint="leave it out to keep runs whatever their age.",
            )
        if not self.said():
            raise InvalidDefinition(
                "A retention policy without any limit keeps everything.",
                hint="give keep_successes, keep_failures, keep_skipped or max_age; or declare none.",
            )

    @property
    def max_age_seconds(self) -> float | None:
        """The age in seconds; None for none."""
        return None if self.max_age is None else as_seconds(self.max_age, "max_age")

    @property
    def skipped_kept(self) -> int | None:
        """How many skipped runs are kept; None for all."""
        return self.keep_successes if self.keep_skipped is None else self.keep_skipped

    def said(self) -> dict[str, float]:
        """Return the limits that it sets, as plain data; :meth:`of` reads it."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def __str__(self) -> str:
        def so_many(count: int | None) -> str:
            return "all" if count is None else f"the last {count:,}"

        told = (
            f"{so_many(self.keep_successes)} successes, {so_many(self.keep_failures)} failures and "
            f"{so_many(self.skipped_kept)} skipped runs of each operation"
        )
        seconds = self.max_age_seconds
        return told if seconds is None else f"{told}, none older than {_span(seconds)}"

    @classmethod
    def of(cls, policy: object) -> RetentionPolicy:
        """Return a policy that is given as such, or as a mapping of its arguments.

        :raises InvalidDefinition: when it is neither, or has an argument that there is not.
        """
        if isinstance(policy, cls):
            return policy
        if not isinstance(policy, Mapping):
            raise InvalidDefinition(
                f"retention is a RetentionPolicy or a table of its arguments, not {policy!r}.",
                hint="RetentionPolicy(keep_successes=500), or retention = { keep_successes = 500 } in a file's header.",
            )
        known = [each.name for each in fields(cls)]
        if unknown := sorted(map(str, set(policy) - set(known))):
            raise InvalidDefinition(
                f"{', '.join(map(repr, unknown))} is no argument of a retention policy. There are: {', '.join(known)}."
            )
        arguments: dict[str, Any] = dict(policy)
        return cls(**arguments)


def _check_count(count: object, argument: str) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST:
        raise InvalidDefinition(
            f"{argument}={count!r} is not a whole number of runs from 1 to {_MOST:,}.",
            hint="the last run of each kind always stays, so 1 is the least; leave it out for all.",
        )


def _span(seconds: float) -> str:
    days = seconds / timedelta(days=1).total_seconds()
    return f"{days:g} d" if days >= 1 else f"{seconds:g} s"
