"""The run tables come to be once, whole, whoever asks first, and whatever their schema is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidName
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services.migrations import LATEST
from tests.conftest import Database, hook_on
from tests.killing import VICTIM, Gallows, Order, gallows
from tests.racing import until

TABLES = [
    "mat_view_changes",
    "mat_view_cron_imports",
    "mat_view_definitions",
    "mat_view_migrations",
    "mat_view_retention",
    "mat_view_run_history",
    "mat_view_runs",
]
DEFINITION = MatViewDefinition(name="mv", sql="SELECT 1 AS a")


def tables(db: Database, schema: str = "matviews") -> list[str]:
    return [
        name
        for (name,) in db.rows(
            "SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE nspname = %s AND relkind IN ('r', 'v') ORDER BY 1",
            (schema,),
        )
    ]


def objects(db: Database) -> list[tuple[Any, ...]]:
    return db.rows("SELECT oid, relname, relnatts FROM pg_class WHERE oid >= 16384 ORDER BY oid")


def at_once(workers: int, function: Callable[[], object]) -> None:
    """Call a function in many threads at the same moment, and raise what any of them raises."""
    barrier = threading.Barrier(workers)

    def wait_and_call() -> None:
        barrier.wait()
        function()

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(wait_and_call) for _ in range(workers)]:
            future.result()


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_many_who_come_first_at_the_same_time_make_one_set_of_tables(each_db: Database, isolation: str) -> None:
    with each_db.connect() as connection:
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = {}").format(
                sql.Identifier(each_db.name), sql.Literal(isolation)
            )
        )
    at_once(8, lambda: hook_on(each_db).definitions())
    assert tables(each_db) == TABLES
    versions = [(version,) for version in range(1, LATEST + 1)]
    assert each_db.rows("SELECT version FROM matviews.mat_view_migrations ORDER BY 1") == versions


def test_many_first_operations_at_the_same_time_all_succeed(db: Database) -> None:
    numbers = iter(range(100))

    def create() -> None:
        hook_on(db).create(MatViewDefinition(name=f"mv_{next(numbers)}", sql="SELECT 1 AS a"))

    at_once(8, create)
    assert tables(db) == TABLES
    assert db.rows("SELECT status, count(*) FROM matviews.mat_view_runs GROUP BY 1") == [(2, 8)]


def test_a_plain_owner_may_be_among_the_first(db: Database) -> None:
    role = db.role()
    with db.connect() as connection:
        connection.execute(
            sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(sql.Identifier(db.name), sql.Identifier(role))
        )
    at_once(6, lambda: hook_on(db, user=role).definitions())
    assert tables(db) == TABLES


def test_a_second_time_changes_nothing(each_db: Database) -> None:
    hook_on(each_db).definitions()
    before = objects(each_db)
    applied = each_db.rows("SELECT * FROM matviews.mat_view_migrations")
    hook_on(each_db).definitions()
    hook_on(each_db).runs()
    assert objects(each_db) == before
    assert each_db.rows("SELECT * FROM matviews.mat_view_migrations") == applied


@pytest.fixture(scope="module")
def killing() -> Iterator[Gallows]:
    with gallows() as started:
        yield started


def test_a_migration_that_is_killed_leaves_nothing_or_all_and_the_next_one_succeeds(
    db: Database, killing: Gallows
) -> None:
    nothing = objects(db)
    outcomes = set()
    for at in range(1, 100):
        end = killing.run(Order(db.dsn(), "migrate", at=at))
        until(
            db,
            sql.SQL("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = {})").format(
                sql.Literal(VICTIM)
            ),
        )
        left = tables(db)
        outcomes.add(tuple(left))
        if not left:
            assert objects(db) == nothing, f"killed at {end.statement}"
            assert db.rows("SELECT 1 FROM pg_namespace WHERE nspname = 'matviews'") == []
        hook_on(db).definitions()
        assert tables(db) == TABLES
        db.execute("DROP SCHEMA matviews CASCADE")
        if not end.killed:
            break
    assert not end.killed
    assert outcomes == {(), tuple(TABLES)}


def test_a_migration_that_fails_leaves_nothing(db: Database) -> None:
    db.execute("CREATE SCHEMA matviews", "CREATE VIEW matviews.mat_view_run_history AS SELECT 1 AS somebody_elses")
    with pytest.raises(Exception, match='"mat_view_run_history" already exists'):
        hook_on(db).definitions()
    assert tables(db) == ["mat_view_run_history"]
    db.execute("DROP VIEW matviews.mat_view_run_history")
    assert hook_on(db).definitions() == []


ODD_NAMES = [
    "audit",
    "With Spaces",
    'a "quoted" one',
    "dots.in.it",
    "100%",
    "%s %(name)s",
    "{curly}",
    "back\\slash",
    "it's",
    "Ünïcödé ☕",
    "x" * 63,
    "ü" * 31,
    "select",
]


@pytest.mark.parametrize("schema", ODD_NAMES)
def test_the_tracking_schema_may_have_any_name(db: Database, schema: str) -> None:
    hook = hook_on(db, tracking_schema=schema)
    assert hook.create(DEFINITION).status == "created"
    assert hook.create(DEFINITION).status == "skipped"
    assert hook.refresh("mv").status == "updated"
    with db.connect() as blocking:
        blocking.execute("BEGIN")
        blocking.execute("DECLARE c CURSOR FOR SELECT * FROM mv")
        blocking.execute("FETCH c")
        with pytest.raises(Exception, match="lock timeout"):
            hook.refresh("mv", lock_timeout=0.01, max_wait=0.01)
    assert hook.delete("mv").status == "deleted"
    assert [(run.operation, run.status) for run in hook.runs("mv")] == [
        ("drop", "success"),
        ("refresh", "failed"),
        ("refresh", "success"),
        ("create", "skipped"),
        ("create", "success"),
    ]
    assert [run.operation for run in hook.runs(limit=2)] == ["drop", "refresh"]
    assert hook.last_run("mv").operation == "drop"  # type: ignore[union-attr]
    assert [record.name for record in hook.definitions()] == ["mv"]
    assert tables(db, schema) == TABLES
    assert db.rows("SELECT nspname::text FROM pg_namespace WHERE oid >= 16384 AND nspname !~ '^pg_'") == [(schema,)]


@pytest.mark.parametrize("schema", ["", "x" * 64, "ü" * 32, "nul\0", "\ud800", None, 7])
def test_a_name_that_postgresql_could_not_hold_is_refused_before_anything_connects(schema: Any) -> None:
    with pytest.raises(InvalidName, match="tracking_schema"):
        MatViewHook(postgres_conn_id="no_such_connection", tracking_schema=schema)


def test_tables_of_a_newer_version_are_worked_with_and_left_as_they_are(db: Database) -> None:
    """Migrations only add, so a worker that has not been upgraded yet goes on beside one that has."""
    hook = hook_on(db)
    hook.create(DEFINITION)
    db.execute(
        "ALTER TABLE matviews.mat_view_definitions ADD COLUMN team text, ADD COLUMN plan jsonb NOT NULL DEFAULT '{}'",
        "ALTER TABLE matviews.mat_view_runs ADD COLUMN cost numeric NOT NULL DEFAULT 0",
        """
        DO $$BEGIN
            EXECUTE format('CREATE OR REPLACE VIEW matviews.mat_view_run_history AS SELECT h.*, 1 AS more FROM (%s) h',
                           rtrim(pg_get_viewdef('matviews.mat_view_run_history'), ';'));
        END$$
        """,
        "INSERT INTO matviews.mat_view_migrations (version) SELECT max(version) + 1 FROM matviews.mat_view_migrations",
    )
    before = objects(db)
    assert hook.create(DEFINITION).status == "skipped"
    assert hook.create(MatViewDefinition(name="other", sql="SELECT 1 AS a")).status == "created"
    assert hook.refresh("mv", refresh_strategy="regular").status == "updated"
    assert hook.delete("other").status == "deleted"
    assert len(hook.runs()) == 5
    assert [record.name for record in hook.definitions()] == ["mv", "other"]
    assert hook.describe("mv").definition is not None
    assert [row for row in objects(db) if row in before] == before
    assert db.value("SELECT max(version) FROM matviews.mat_view_migrations") == LATEST + 1
