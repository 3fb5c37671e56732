"""How long an operation may take, and wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from airflow_provider_matviews.exceptions import InvalidDefinition

#: What a bigint of milliseconds, PostgreSQL's integer settings and Python's waits all hold.
_LONGEST = 2_000_000
#: The longest that may be said.
LONGEST = _LONGEST - 1


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Limits of an operation in seconds; None where nothing is said.

    :param lock_timeout: how long readers may queue behind one attempt to lock. PostgreSQL's ``lock_timeout``.
    :param max_wait: after which waiting for locks, over all attempts, and for another operation on the view ends
        in failure.
    :param statement_timeout: how long one statement may take. PostgreSQL's ``statement_timeout``.
    :param timeout: how long the operation may take in all, waiting included; then it is stopped on the server.
    :raises InvalidDefinition: when one is not a number of seconds from 0.001 to 2,000,000.
    """

    lock_timeout: float | None = None
    max_wait: float | None = None
    statement_timeout: float | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.001 <= value < _LONGEST:
                raise InvalidDefinition(f"{name}={value!r} is not a number of seconds from 0.001 to 2,000,000.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return what the limits are called, here and as arguments of every operation."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, said: object) -> Timeouts:
        """Return the limits that a mapping of their names holds.

        :raises InvalidDefinition: when it is no mapping, or holds another key or what is no number of seconds.
        """
        known = cls.names()
        if not isinstance(said, Mapping) or not set(said) <= set(known):
            raise InvalidDefinition(
                f"timeouts={said!r} is not a mapping of {', '.join(sorted(known))} to seconds.",
                hint='for example timeouts={"timeout": 3600, "statement_timeout": 1800}',
            )
        return cls(**said)

    def over(self, others: Timeouts) -> Timeouts:
        """Return these, with ``others`` where these say nothing."""
        return Timeouts(**{**others.said(), **self.said()})

    def said(self) -> dict[str, Any]:
        """Return what is said, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}
