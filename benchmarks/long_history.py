"""A long history in the run tables, and the questions of ``docs/history.md``: for the benchmark and for tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "history.md"


def fill(connection: psycopg.Connection[Any], runs: int, views: int) -> None:
    """Put views and their runs on record; the run tables are there. The last run was a moment ago."""
    connection.execute(
        "INSERT INTO matviews.mat_view_definitions (name, schema_name, view_name, sql, created_at) "
        "SELECT 'analytics.' || name, 'analytics', name, 'SELECT 1', clock_timestamp() - interval '400 days' "
        "FROM generate_series(1, %s) g, LATERAL (SELECT CASE g WHEN 1 THEN 'accounts' ELSE 'mv' || g END AS name) n",
        (views,),
    )
    # As time goes by: the views in turn. What is written is about as large as a small run's row.
    connection.execute(
        """
        INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, started_at, finished_at,
                                            duration_ms, error, meta, created_at)
        SELECT d.id, s.status, 1, at, at + interval '2 s', 1000 + (hashint8(g) & 1023),
               CASE WHEN s.status = 3 THEN '{"class": "QueryCanceled", "message": "canceling statement"}'::jsonb END,
               jsonb_build_object('strategy', 'swap', 'row_count_before', g %% 1000, 'row_count_after', g %% 1000 + 10,
                                  'dag_id', 'nightly', 'task_id', 'refresh', 'response',
                                  jsonb_build_object('view', d.name, 'heap_bytes', 81920, 'reason', 'it is small')),
               at
        FROM generate_series(1, %(runs)s) g
        JOIN (SELECT id, name, row_number() OVER (ORDER BY id) - 1 AS n FROM matviews.mat_view_definitions) d
             ON d.n = g %% %(views)s
        CROSS JOIN LATERAL (SELECT clock_timestamp() - (%(runs)s - g) * interval '1 day' / 33333 AS at) t
        CROSS JOIN LATERAL (SELECT CASE WHEN hashint8(g) %% 50 = 0 THEN 3 WHEN hashint8(g) %% 20 = 0 THEN 4 ELSE 2 END
                            AS status) s
        ORDER BY g
        """,
        {"runs": runs, "views": views},
    )
    connection.execute("VACUUM (ANALYZE) matviews.mat_view_runs")


def stand_up(connection: psycopg.Connection[Any]) -> None:
    """Make a small view for each that is on record, a third of them over the one before."""
    connection.execute("CREATE SCHEMA IF NOT EXISTS analytics")
    connection.execute("CREATE TABLE IF NOT EXISTS analytics.source AS SELECT g AS a FROM generate_series(1, 100) g")
    connection.execute(
        """
        DO $$
        DECLARE
            view record;
            before text := 'source';
        BEGIN
            FOR view IN SELECT view_name, id FROM matviews.mat_view_definitions ORDER BY id LOOP
                EXECUTE format('CREATE MATERIALIZED VIEW analytics.%I AS SELECT a FROM analytics.%I', view.view_name,
                               CASE WHEN view.id % 3 = 0 THEN before ELSE 'source' END);
                before := view.view_name;
            END LOOP;
        END $$
        """
    )
    connection.execute("ANALYZE")


def queries() -> dict[str, str]:
    """Return the queries of the document, by the headings that they stand under."""
    blocks = re.findall(r"^### (.+?)\n.*?```sql\n(.+?)```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return dict(blocks)
