"""The run-tracking document holds on our tables: its SQL as it stands, its columns, its codes and its words.

``sql/keep_last_500.sql`` is the document's, character for character; the other files are what its ActiveRecord
snippets amount to (ActiveRecord 7.1's ``to_sql``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

_SQL = Path(__file__).parent / "sql"


@contextmanager
def _tracking(database: Database) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """Connect as the document's application does: the run tables are on the search path."""
    with psycopg.connect(database.dsn(), options="-c search_path=matviews", row_factory=dict_row) as connection:
        yield connection


def _run(connection: psycopg.Connection[dict[str, Any]], file: str) -> list[dict[str, Any]]:
    cursor = connection.execute((_SQL / file).read_bytes())
    return cursor.fetchall() if cursor.description else []


def _define(database: Database, *names: str) -> tuple[MatViewHook, list[int]]:
    hook = hook_on(database)
    for name in names:
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 AS a", unique_index_columns=["a"]))
    ids = {record.name: record.id for record in hook.definitions()}
    database.execute("DELETE FROM matviews.mat_view_runs")
    return hook, [ids[name] for name in names]


_INSERT = """
INSERT INTO mat_view_runs
    (mat_view_definition_id, status, operation, started_at, finished_at, duration_ms, error, meta, created_at)
SELECT %(definition)s, %(status)s, 1, at, CASE WHEN %(status)s <> 1 THEN at + interval '1 second' END, 100 + n %% 7,
       CASE WHEN %(status)s = 3
            THEN '{"class": "UniqueViolation", "message": "duplicate key", "sqlstate": "23505", "backtrace": ["a"]}'
                 ::jsonb END,
       jsonb_build_object('row_count_before', n - 1, 'row_count_after', n, 'strategy', 'concurrent'), at
FROM generate_series(1, %(runs)s) n, LATERAL (SELECT now() - n * %(every)s::interval AS at) moment
"""


def _insert(
    connection: psycopg.Connection[dict[str, Any]], definition: int, status: int, runs: int, every: str = "11 min"
) -> None:
    connection.execute(_INSERT, {"definition": definition, "status": status, "runs": runs, "every": every})


def test_the_documents_retention_keeps_the_newest_500_successes_of_each_view_and_every_failure(
    each_db: Database,
) -> None:
    _, (often, seldom) = _define(each_db, "mv_user_activity", "mv_seldom")
    with _tracking(each_db) as connection:
        # Interleaved: failures and skipped runs between the successes, many of them older than what goes.
        for definition, status, runs, every in (
            (often, 2, 1200, "11 min"),
            (often, 3, 700, "29 min"),
            (often, 4, 600, "31 min"),
            (often, 1, 1, "1 min"),
            (seldom, 2, 500, "3 hours"),
            (seldom, 3, 3, "300 days"),
        ):
            _insert(connection, definition, status, runs, every)
        expected = connection.execute(
            "SELECT id FROM mat_view_runs WHERE status <> 2 OR mat_view_definition_id = %s "
            "UNION ALL (SELECT id FROM mat_view_runs WHERE status = 2 AND mat_view_definition_id = %s "
            "ORDER BY started_at DESC LIMIT 500)",
            [seldom, often],
        ).fetchall()
        assert len(expected) == 700 + 600 + 1 + 500 + 3 + 500
        _run(connection, "keep_last_500.sql")
        kept = connection.execute("SELECT id FROM mat_view_runs").fetchall()
        assert {row["id"] for row in kept} == {row["id"] for row in expected}
        _run(connection, "keep_last_500.sql")
        assert connection.execute("SELECT count(*) AS n FROM mat_view_runs").fetchone() == {"n": len(expected)}


def test_the_latest_run_and_the_last_20_are_those_of_the_view_newest_first(db: Database) -> None:
    _, (view, other) = _define(db, "mv_user_activity", "mv_other")
    with _tracking(db) as connection:
        _insert(connection, view, 2, 30)
        _insert(connection, view, 3, 1, "1 min")
        _insert(connection, other, 2, 30, "10 seconds")
        (latest,) = _run(connection, "latest_run.sql")
        assert (latest["mat_view_definition_id"], latest["status"]) == (view, 3)
        assert latest["error"]["message"] == "duplicate key"
        assert "\n".join(latest["error"]["backtrace"]) == "a"
        runs = _run(connection, "last_20_runs.sql")
        assert runs[0] == latest
        assert [run["mat_view_definition_id"] for run in runs] == [view] * 20
        assert [run["meta"]["row_count_after"] for run in runs[1:]] == list(range(1, 20))


def test_duration_statistics_are_of_each_views_successes(db: Database) -> None:
    _, (view, other) = _define(db, "mv_user_activity", "mv_other")
    with _tracking(db) as connection:
        for duration, status in ((95, 2), (93, 2), (181, 2), (100_000, 3), (0, 4)):
            connection.execute(
                "INSERT INTO mat_view_runs (mat_view_definition_id, status, operation, finished_at, duration_ms, "
                "error) VALUES (%s, %s, 1, now(), %s, %s)",
                [view, status, duration, '{"message": "no"}' if status == 3 else None],
            )
        _insert(connection, other, 3, 3)
        (row,) = _run(connection, "duration_stats.sql")
        assert list(row.values()) == ["mv_user_activity", 123, 93, 181, 3]


def test_failures_are_counted_over_the_last_24_hours(db: Database) -> None:
    _, (view, other) = _define(db, "mv_user_activity", "mv_other")
    with _tracking(db) as connection:
        _insert(connection, view, 3, 30, "1 hour")
        _insert(connection, view, 2, 30, "1 hour")
        _insert(connection, other, 3, 5, "25 hours")
        assert [list(row.values()) for row in _run(connection, "failures_last_24_hours.sql")] == [[24, view]]


def test_the_latest_row_counts_are_those_of_real_runs(each_db: Database) -> None:
    each_db.execute("CREATE TABLE t (id int)", "INSERT INTO t VALUES (1), (2)")
    hook = hook_on(each_db)
    for name in ("mv_user_activity", "mv_other"):
        hook.create(MatViewDefinition(name=name, sql="SELECT id FROM t", unique_index_columns=["id"]))
    each_db.execute("INSERT INTO t VALUES (3)")
    hook.refresh("mv_user_activity", row_count_strategy="exact")
    hook.refresh("mv_other", row_count_strategy="none")
    each_db.execute("INSERT INTO t VALUES (3)")
    with pytest.raises(psycopg.errors.CardinalityViolation):
        hook.refresh("mv_user_activity", row_count_strategy="exact")
    ids = {record.name: record.id for record in hook.definitions()}
    with _tracking(each_db) as connection:
        for file, column, count in (
            ("latest_row_count_before.sql", "row_count_before", "2"),
            ("latest_row_count_after.sql", "row_count_after", "3"),
        ):
            rows = {row["mat_view_definition_id"]: row[column] for row in _run(connection, file)}
            assert rows == {ids["mv_user_activity"]: count, ids["mv_other"]: None}


def test_a_failed_run_answers_what_the_document_asks_of_it(db: Database) -> None:
    hook, _ = _define(db, "mv_user_activity")
    db.execute("CREATE TABLE t (n int)", "INSERT INTO t VALUES (0)")
    hook.delete("mv_user_activity")
    with pytest.raises(psycopg.errors.DivisionByZero):
        hook.create(MatViewDefinition(name="mv_user_activity", sql="SELECT 1 / n AS a FROM t"))
    with _tracking(db) as connection:
        (run,) = _run(connection, "latest_run.sql")
    assert run["status"] == 3
    assert run["error"]["class"] == "DivisionByZero"
    assert "division by zero" in run["error"]["message"]
    assert run["error"]["backtrace"][0] == "Traceback (most recent call last):"
    assert run["meta"]["request"]["force"] is False
    assert run["meta"]["response"]["view"] == "mv_user_activity"
    assert run["started_at"] <= run["finished_at"] <= run["updated_at"]


def test_the_codes_are_the_documents_and_the_history_says_them_in_words(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(GATE)
    definition = MatViewDefinition(name="mv", sql="SELECT gate() AS a")
    last = "SELECT status, operation FROM matviews.mat_view_runs ORDER BY id DESC LIMIT 1"
    codes: list[tuple[int, int]] = []
    with (
        gate_closed(each_db) as open_gate,
        beside(lambda: hook.create(definition, lock_timeout=60), open_gate) as creating,
    ):
        until(each_db, AT_THE_GATE)
        codes += each_db.rows(last)
        open_gate()
        creating.result()
    codes += each_db.rows(last)
    hook.create(definition)
    codes += each_db.rows(last)
    with pytest.raises(Exception, match="cannot be refreshed concurrently"):
        hook.refresh("mv", refresh_strategy="concurrent")
    codes += each_db.rows(last)
    hook.refresh("mv")
    codes += each_db.rows(last)
    hook.delete("mv")
    codes += each_db.rows(last)
    assert codes == [(1, 0), (2, 0), (4, 0), (3, 1), (2, 1), (2, 2)]
    assert each_db.rows("SELECT view, operation, status FROM matviews.mat_view_run_history ORDER BY id") == [
        ("mv", "create", "success"),
        ("mv", "create", "skipped"),
        ("mv", "refresh", "failed"),
        ("mv", "refresh", "success"),
        ("mv", "drop", "success"),
    ]


def test_the_tables_are_those_of_the_documents_schema(each_db: Database) -> None:
    _define(each_db, "mv")
    columns = {
        (table, column): kind
        for table, column, kind in each_db.rows(
            "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'matviews'"
        )
    }
    documented = {
        "mat_view_runs": {
            "id": "bigint",
            "mat_view_definition_id": "bigint",
            "status": "integer",
            "operation": "integer",
            "started_at": "timestamp with time zone",
            "finished_at": "timestamp with time zone",
            "duration_ms": "integer",
            "error": "jsonb",
            "meta": "jsonb",
            "created_at": "timestamp with time zone",
            "updated_at": "timestamp with time zone",
        },
        "mat_view_definitions": {
            "id": "bigint",
            "name": "text",
            "sql": "text",
            "refresh_strategy": "integer",
            "unique_index_columns": "jsonb",
        },
    }
    for table, expected in documented.items():
        assert {column: columns[table, column] for column in expected} == expected
    assert each_db.rows(
        "SELECT indexdef FROM pg_indexes WHERE indexname = 'index_mat_view_runs_on_mat_view_definition_id'"
    ) == [
        (
            "CREATE INDEX index_mat_view_runs_on_mat_view_definition_id ON matviews.mat_view_runs "
            "USING btree (mat_view_definition_id)",
        )
    ]
    assert each_db.rows(
        "SELECT conrelid::regclass::text, contype::text, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conrelid IN ('matviews.mat_view_definitions'::regclass, 'matviews.mat_view_runs'::regclass) "
        "AND contype IN ('p', 'f') ORDER BY 1, 2"
    ) == [
        ("matviews.mat_view_definitions", "p", "PRIMARY KEY (id)"),
        (
            "matviews.mat_view_runs",
            "f",
            "FOREIGN KEY (mat_view_definition_id) REFERENCES matviews.mat_view_definitions(id)",
        ),
        ("matviews.mat_view_runs", "p", "PRIMARY KEY (id)"),
    ]
    with pytest.raises(psycopg.errors.NotNullViolation), _tracking(each_db) as connection:
        connection.execute("INSERT INTO mat_view_runs (operation) VALUES (1)")
