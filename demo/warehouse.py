"""The demo's database: the example data, more of them as time goes by, and the record of runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from demo.console import print_table, say
from demo.postgres_server import PostgresServer

DATABASE = "warehouse"
DATA = Path(__file__).with_name("data.sql")

_STEP = re.compile(r"^-- step: ", re.MULTILINE)

_NEW_EVENTS = """
INSERT INTO app.events (user_id, event_type, amount, occurred_at, received_at)
SELECT 1 + floor(40000 * power(random(), 3))::bigint,
       (ARRAY['page_view', 'search', 'purchase'])[1 + floor(3 * random())::int],
       round((500 * random())::numeric, 2),
       timestamptz '2024-12-31 00:00+00' + interval '1 day' * random(),
       timestamptz '2025-01-01 00:00+00'
FROM generate_series(1, 500)
"""

_BY_HAND = """
DROP INDEX analytics.account_retention_first_quarter;
COMMENT ON MATERIALIZED VIEW analytics.daily_events IS 'todo';
REVOKE SELECT ON analytics.account_retention FROM reporting;
"""

_HISTORY = """
SELECT id, view, operation, status, strategy, to_char(started_at, 'HH24:MI:SS') AS started, duration_ms,
       row_count_before, row_count_after, error_message
FROM matviews.mat_view_run_history
WHERE status <> 'running'
ORDER BY id
"""

_COLUMNS = (
    "id",
    "started",
    "operation",
    "view",
    "strategy",
    "status",
    "ms",
    "rows before",
    "rows after",
    "error",
)
_RIGHT = frozenset({"id", "ms", "rows before", "rows after"})


class Warehouse:
    """A connection of its own to the demo's database.

    :param server: a server that runs; the database is created.
    """

    def __init__(self, server: PostgresServer) -> None:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}")
        self._connection = psycopg.connect(server.dsn(DATABASE), autocommit=True, row_factory=dict_row)
        self._told: set[int] = set()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def load(self) -> None:
        """Load `data.sql`, telling of each of its steps."""
        for block in _STEP.split(DATA.read_text(encoding="utf-8"))[1:]:
            title, _, statements = block.partition("\n")
            say(f"data: {title}")
            self._connection.execute(statements.encode())

    def add_events(self) -> None:
        """Insert a few new events, so that the next refresh has something to do."""
        self._connection.execute(_NEW_EVENTS)

    def meddle(self) -> None:
        """Change views by hand, as it happens: an index is gone, a comment is wrong, a grant is taken back."""
        say("by hand: an index dropped, a comment changed, a grant taken back")
        self._connection.execute(_BY_HAND)

    def new_runs(self) -> Iterator[dict[str, Any]]:
        """Yield the runs that ended since the last call."""
        try:
            rows = self._connection.execute(_HISTORY).fetchall()
        except psycopg.errors.UndefinedTable:  # Nothing has been recorded yet.
            return
        for row in rows:
            # Not by the last id: a run that started earlier may end later.
            if row["id"] not in self._told:
                self._told.add(row["id"])
                yield row

    def print_runs(self) -> int:
        """Print the whole record of runs.

        :returns: how many there are.
        """
        rows = self._connection.execute(_HISTORY).fetchall()
        print()
        print_table(_COLUMNS, [_cells(row) for row in rows], right=_RIGHT)
        print()
        return len(rows)


def describe(run: dict[str, Any]) -> str:
    """Put one run into one line."""
    rows = f"{_number(run['row_count_before']) or '?'} -> {_number(run['row_count_after']) or '?'} rows"
    strategy = f" ({run['strategy']})" if run["strategy"] else ""
    error = f": {_first_line(run['error_message'])}" if run["error_message"] else ""
    duration = f"{run['duration_ms']} ms" if run["duration_ms"] is not None else ""
    return f"{run['operation']} {run['view']}{strategy} {run['status']}, {duration}, {rows}{error}"


def _cells(run: dict[str, Any]) -> list[str]:
    return [
        str(run["id"]),
        run["started"] or "",
        run["operation"],
        run["view"],
        run["strategy"] or "",
        run["status"],
        _number(run["duration_ms"]),
        _number(run["row_count_before"]),
        _number(run["row_count_after"]),
        _first_line(run["error_message"]),
    ]


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0][:100]
