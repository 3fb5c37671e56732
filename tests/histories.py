"""Histories for tests: runs as the ledger writes them, at chosen times, in the real tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg.types.json import Jsonb

from airflow_provider_matviews.names import ViewName
from tests.conftest import Database, hook_on

RUNNING, SUCCESS, FAILED, SKIPPED = 1, 2, 3, 4
CREATE, REFRESH, DROP = 0, 1, 2


@dataclass(frozen=True)
class Past:
    """A run that was.

    :ivar ago: seconds between its begin and now.
    :ivar seconds: that it took.
    """

    ago: float
    status: int = SUCCESS
    seconds: float = 10.0
    operation: int = REFRESH
    rows: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, Any] | None:
        if self.status != FAILED:
            return None
        return {"class": "DivisionByZero", "message": "division by zero", "hint": None, "backtrace": ["a line"]}


def define(database: Database, *views: str, age: float = 1e6) -> dict[str, int]:
    """Put views on record and return the ids of their definitions.

    :param age: seconds since when they are.
    """
    hook_on(database).runs()
    with database.connect() as connection:
        ids = {}
        for view in views:
            schema, _, name = view.rpartition(".")
            row = connection.execute(
                "INSERT INTO matviews.mat_view_definitions (name, schema_name, view_name, sql, created_at) "
                "VALUES (%s, %s, %s, 'SELECT 1', clock_timestamp() - %s * interval '1 s') RETURNING id",
                (str(ViewName(name, schema or None)), schema or "public", name, age),
            ).fetchone()
            assert row is not None
            ids[view] = row[0]
        return ids


def live_through(database: Database, definition_id: int, history: Sequence[Past]) -> list[int]:
    """Write runs and return their ids, in the order given."""
    with database.connect() as connection:
        ids = []
        for past in history:
            row = connection.execute(
                "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, started_at, "
                "finished_at, duration_ms, error, meta, created_at) "
                "SELECT %(definition)s, %(status)s, %(operation)s, at, "
                "CASE WHEN %(status)s <> 1 THEN at + %(seconds)s * interval '1 s' END, "
                "CASE WHEN %(status)s <> 1 THEN round(%(seconds)s * 1000)::integer END, %(error)s, %(meta)s, at "
                "FROM (SELECT clock_timestamp() - %(ago)s * interval '1 s') AS begun (at) RETURNING id",
                {
                    "definition": definition_id,
                    "status": past.status,
                    "operation": past.operation,
                    "ago": past.ago,
                    "seconds": past.seconds,
                    "error": Jsonb(past.error) if past.error else None,
                    "meta": Jsonb({"row_count_after": past.rows, "strategy": "swap", "response": {}, **past.meta}),
                },
            ).fetchone()
            assert row is not None
            ids.append(row[0])
        return ids


def steady(count: int = 20, *, every: float = 600.0, until: float = 600.0, **fields: Any) -> list[Past]:
    """So many successful refreshes, the last of them so many seconds ago."""
    return [Past(until + every * number, **fields) for number in reversed(range(count))]
