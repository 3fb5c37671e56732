"""Behind PgBouncer in transaction mode: each transaction in whichever session is free, which others use in turn."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, LiteralString

import psycopg
import pytest

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import MatViewError, OperationTimedOut, ViewLocked
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.services import execute, execute_async
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.operations import Operations
from airflow_provider_matviews.timeouts import Timeouts
from tests.conftest import Database, hook_on
from tests.killing import DEFINITION, VICTIM, Order, gallows
from tests.pgbouncer import PgBouncer, needs_pgbouncer
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

pytestmark = needs_pgbouncer

#: Fewer server connections than the tests have clients.
POOL_SIZE = 3
HISTORY: LiteralString = "SELECT operation, status, error_class FROM matviews.mat_view_run_history ORDER BY id"
NOT_AT_THE_GATE: LiteralString = f"SELECT NOT ({AT_THE_GATE.removeprefix('SELECT ')})"
#: The gate is a lock: by itself the server ends the wait for it no sooner than the tests look.
PATIENT: dict[str, Any] = {"lock_timeout": 60, "max_wait": 60}
BRIEFLY: dict[str, Any] = {"lock_timeout": 0.2, "max_wait": 0.2}
#: Nobody else is there: a lock that is not to be had was left by an operation before.
ALONE: dict[str, Any] = {"if_locked": "fail", **BRIEFLY}
#: All that a session can keep from one transaction to the next.
SESSION: LiteralString = """
    SELECT 'setting', name, setting, source FROM pg_settings WHERE name NOT LIKE 'plpgsql.%' -- known once it is used
    UNION ALL SELECT 'prepared', name, statement, '' FROM pg_prepared_statements
    UNION ALL SELECT 'cursor', name, statement, '' FROM pg_cursors WHERE name <> ''
    UNION ALL SELECT 'lock', locktype, mode, '' FROM pg_locks
        WHERE pid = pg_backend_pid() AND locktype NOT IN ('virtualxid', 'relation')
    UNION ALL SELECT 'channel', pg_listening_channels(), '', ''
    UNION ALL SELECT 'temporary', relname, '', '' FROM pg_class WHERE relnamespace = pg_my_temp_schema()
    UNION ALL SELECT 'role', session_user, current_user, ''
    ORDER BY 1, 2, 3, 4
"""


@pytest.fixture
def pooler(db: Database) -> Iterator[PgBouncer]:
    with PgBouncer(db.server, POOL_SIZE) as started:
        yield started


def pooled(db: Database, pooler: PgBouncer, **arguments: Any) -> MatViewHook:
    """Return a hook that reaches a test's database through the pooler."""
    hook = hook_on(db, **arguments)
    hook.connection.port = pooler.port
    return hook


def sessions(db: Database, pooler: PgBouncer) -> dict[int, list[tuple[str, ...]]]:
    """What each server connection of the pool keeps, by its backend's pid, as another client of it finds it."""
    found: dict[int, list[tuple[str, ...]]] = {}
    with ExitStack() as clients:
        for _ in range(POOL_SIZE):
            client = clients.enter_context(pooler.connect(db.name, application_name="somebody else"))
            # Each transaction stays open until all have begun, so that every one has another server connection.
            client.execute("BEGIN")
            ((pid,),) = client.execute("SELECT pg_backend_pid()").fetchall()
            found[pid] = client.execute(SESSION).fetchall()
    assert len(found) == POOL_SIZE
    return found


def _fail(hook: MatViewHook) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation):
        hook.refresh("failing", **ALONE)


def _be_refused(hook: MatViewHook) -> None:
    with pytest.raises(MatViewError):
        hook.refresh("absent", **ALONE)


def _refresh(strategy: str) -> Callable[[MatViewHook], object]:
    return lambda hook: hook.refresh("mv", refresh_strategy=strategy, row_count_strategy="exact", vacuum=True, **ALONE)


DEEDS: dict[str, Callable[[MatViewHook], object]] = {
    "create": lambda hook: hook.create(MatViewDefinition(name="other", sql="SELECT 1 AS a"), **ALONE),
    "replace": lambda hook: hook.create(DEFINITION, force=True, **ALONE),
    "refresh regular": _refresh("regular"),
    "refresh concurrent": _refresh("concurrent"),
    "refresh swap": _refresh("swap"),
    "refresh auto": _refresh("auto"),
    "refresh with settings": lambda hook: hook.refresh(
        "mv", session_settings={"work_mem": "7MB", "jit": "off"}, **ALONE
    ),
    "fail": _fail,
    "be refused": _be_refused,
    "read": lambda hook: (hook.runs(), hook.definitions(), hook.describe("mv")),
    "delete": lambda hook: hook.delete("mv", **ALONE),
    "delete cascade": lambda hook: hook.delete("mv", cascade=True, **ALONE),
}


@pytest.fixture
def declared(db: Database) -> Database:
    """``mv``, declared, whose row is older than its source's, and ``failing``, whose refresh fails."""
    db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    hook = hook_on(db)
    hook.create(DEFINITION)
    hook.create(MatViewDefinition(name="failing", sql=DEFINITION.sql, unique_index_columns=["value"]))
    db.execute(
        "CREATE VIEW dependent AS SELECT sum(value) AS total FROM mv",
        "UPDATE source SET value = 2",
        "TRUNCATE matviews.mat_view_runs RESTART IDENTITY",
    )
    return db


def test_every_operation_works_and_is_recorded(declared: Database, pooler: PgBouncer) -> None:
    hook = pooled(declared, pooler)
    for value, strategy in enumerate(("regular", "concurrent", "swap", "auto"), start=10):
        with declared.connect() as connection:
            connection.execute("UPDATE source SET value = %s", (value,))
        response = hook.refresh("mv", refresh_strategy=strategy, row_count_strategy="exact", **ALONE)
        assert (response.status, response.response["row_count_after"]) == ("updated", 1)
        assert declared.rows("SELECT * FROM mv") == [(1, value)]
        assert declared.rows("SELECT * FROM dependent") == [(value,)]
    assert hook.delete("mv", cascade=True, **ALONE).status == "deleted"
    assert hook.delete("mv", **ALONE).status == "skipped"
    assert hook.create(DEFINITION, **ALONE).status == "created"
    assert hook.create(DEFINITION, **ALONE).status == "skipped"
    assert hook.create(DEFINITION, force=True, **ALONE).status == "updated"
    assert declared.rows("SELECT * FROM mv") == [(1, 13)]
    assert declared.rows(HISTORY) == [
        *[("refresh", "success", None)] * 4,
        ("drop", "success", None),
        ("drop", "skipped", None),
        ("create", "success", None),
        ("create", "skipped", None),
        ("create", "success", None),
    ]
    assert [(run.operation, run.status) for run in hook.runs("mv", limit=2)] == [
        ("create", "success"),
        ("create", "skipped"),
    ]
    assert hook.describe("mv").definition is not None


def test_the_run_tables_are_made_through_the_pooler(db: Database, pooler: PgBouncer) -> None:
    assert pooled(db, pooler).runs() == []
    assert pooled(db, pooler).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a")).success
    assert db.rows(HISTORY) == [("create", "success", None)]


@pytest.mark.parametrize("deed", DEEDS)
def test_nothing_is_left_in_the_sessions_that_others_go_on_to_use(
    declared: Database, pooler: PgBouncer, deed: str
) -> None:
    hook = pooled(declared, pooler)
    if deed in ("delete", "replace"):
        declared.execute("DROP VIEW dependent")
    if deed == "fail":
        declared.execute("INSERT INTO source VALUES (2, 2)")
    before = sessions(declared, pooler)
    for _ in range(1 if deed == "create" else 6):
        DEEDS[deed](hook)
    # The same backends: nothing was hidden by the pooler's giving one up.
    assert sessions(declared, pooler) == before


def test_what_is_left_in_a_session_would_be_found(db: Database, pooler: PgBouncer) -> None:
    before = sessions(db, pooler)
    with pooler.connect(db.name) as somebody:
        for statement in (
            "SET work_mem = '7MB'",
            "PREPARE left_over AS SELECT 1",
            "SELECT pg_advisory_lock(1)",
            "LISTEN left_over",
            "CREATE TEMPORARY TABLE left_over (a integer)",
        ):
            somebody.execute(statement)
    after = sessions(db, pooler)
    assert before.keys() == after.keys()
    found = {row[0] for pid in before for row in set(after[pid]) - set(before[pid])}
    assert found == {"setting", "prepared", "lock", "channel", "temporary"}


@pytest.fixture
def gated(db: Database) -> Iterator[tuple[Database, Callable[[], None]]]:
    """A view ``mv`` of one row, whose next refresh stands before the gate, and what opens the gate."""
    db.execute(
        "CREATE TABLE source AS SELECT 1 AS id",
        GATE,
        "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM source",
        "INSERT INTO source VALUES (2)",
    )
    hook_on(db).definitions()
    with gate_closed(db) as open_gate:
        yield db, open_gate


def test_of_two_clients_one_runs_at_a_time(gated: tuple[Database, Callable[[], None]], pooler: PgBouncer) -> None:
    db, open_gate = gated
    with beside(lambda: pooled(db, pooler).refresh("mv", **PATIENT), open_gate) as first:
        until(db, AT_THE_GATE)
        with pytest.raises(ViewLocked):
            pooled(db, pooler).refresh("mv", if_locked="fail", **BRIEFLY)
        assert pooled(db, pooler).refresh("mv", if_locked="skip", **BRIEFLY).status == "skipped"
        with beside(lambda: pooled(db, pooler).refresh("mv", **PATIENT), open_gate) as second:
            until(
                db,
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() "
                "AND state = 'idle' AND query LIKE 'ROLLBACK /* waits%'",
            )
            open_gate()
            assert first.result().success
            assert second.result().success
    assert db.rows(HISTORY) == [
        ("refresh", "success", None),
        ("refresh", "skipped", None),
        ("refresh", "skipped", None),
        ("refresh", "success", None),
    ]


def test_cancel_from_another_thread_stops_the_query_on_the_server(
    gated: tuple[Database, Callable[[], None]], pooler: PgBouncer
) -> None:
    db, _ = gated
    before = sessions(db, pooler)
    hook = pooled(db, pooler)
    with beside(lambda: hook.refresh("mv", **PATIENT), hook.cancel) as running:
        until(db, AT_THE_GATE)
        hook.cancel()
        # The gate is still closed: whoever no longer stands before it was stopped.
        until(db, NOT_AT_THE_GATE, seconds=1)
        assert isinstance(running.exception(), psycopg.errors.QueryCanceled)
    assert db.rows("SELECT id FROM mv") == [(1,)]
    assert db.rows(HISTORY) == [("refresh", "failed", "OperationCancelled")]
    assert sessions(db, pooler) == before


def test_looks_at_a_long_refresh_leave_nothing_either(
    gated: tuple[Database, Callable[[], None]], pooler: PgBouncer, caplog: pytest.LogCaptureFixture
) -> None:
    db, open_gate = gated
    before = sessions(db, pooler)
    lines = logging.getLogger("tests.pooler")
    caplog.set_level(logging.INFO, lines.name)

    def refresh() -> None:
        with Driver(lambda: pooler.connect(db.name), lines, pace=(0.01,)) as driver:
            driver.run(Operations(Ledger("matviews")).refresh("mv", timeouts=Timeouts(**PATIENT)))

    with beside(refresh, open_gate) as running:
        until(db, AT_THE_GATE)
        deadline = time.monotonic() + 20
        while not any(line.startswith("Refreshing mv") for line in caplog.messages):
            assert time.monotonic() < deadline, f"nobody looked: {caplog.messages}"
            time.sleep(0.01)
        open_gate()
        running.result()
    assert sessions(db, pooler) == before


async def _connect(db: Database, pooler: PgBouncer) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(pooler.dsn(db.name), application_name="matviews", autocommit=True)


def test_more_deferred_operations_than_there_are_server_connections_take_turns(
    declared: Database, pooler: PgBouncer
) -> None:
    before = sessions(declared, pooler)
    operations = Operations(Ledger("matviews"))

    async def run(strategy: str) -> str | None:
        async with AsyncDriver(lambda: _connect(declared, pooler)) as driver:
            return (await driver.run(operations.refresh("mv", refresh_strategy=strategy))).status

    async def run_all() -> list[str | None]:
        # Two hold a server connection each, one at work and one waiting for the view; the third is for the record.
        turns = asyncio.Semaphore(POOL_SIZE - 1)

        async def run_in_turn(strategy: str) -> str | None:
            async with turns:
                return await run(strategy)

        return await asyncio.gather(*map(run_in_turn, ["regular", "concurrent", "swap", "auto"] * 2))

    assert asyncio.run(run_all()) == ["updated"] * 8
    assert declared.rows(HISTORY) == [("refresh", "success", None)] * 8
    assert sessions(declared, pooler) == before


def test_a_deferred_operation_that_is_cancelled_stops_on_the_server(
    gated: tuple[Database, Callable[[], None]], pooler: PgBouncer
) -> None:
    db, _ = gated
    before = sessions(db, pooler)

    async def refresh_and_cancel() -> None:
        async with AsyncDriver(lambda: _connect(db, pooler)) as driver:
            work = Operations(Ledger("matviews")).refresh("mv", timeouts=Timeouts(**PATIENT))
            task = asyncio.create_task(driver.run(work))
            await asyncio.to_thread(until, db, AT_THE_GATE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        # The gate is still closed.
        until(db, NOT_AT_THE_GATE, seconds=1)

    asyncio.run(refresh_and_cancel())
    assert db.rows("SELECT id FROM mv") == [(1,)]
    assert db.rows(HISTORY) == [("refresh", "failed", "OperationCancelled")]
    assert sessions(db, pooler) == before


def test_the_query_of_a_client_that_is_killed_behind_the_pooler_soon_ends(db: Database, pooler: PgBouncer) -> None:
    db.execute(
        "CREATE TABLE source AS SELECT 1 AS id, 1 AS value",
        # Longer than the test may take: by itself the server would go on for minutes, and then commit.
        """
        CREATE FUNCTION slow(integer) RETURNS integer LANGUAGE plpgsql AS
        $$BEGIN IF $1 > 1 THEN FOR i IN 1..20000 LOOP PERFORM pg_sleep(0.01); END LOOP; END IF; RETURN $1; END$$
        """,
        "CREATE MATERIALIZED VIEW mv AS SELECT id, slow(value) AS value FROM source",
        "UPDATE source SET value = 2",
    )
    active: LiteralString = f"""
        SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = '{VICTIM}'
        AND state <> 'idle'
    """
    with gallows() as killing:
        pid = killing.start(Order(pooler.dsn(db.name), "refresh"))
        until(db, f"SELECT EXISTS ({active} AND wait_event = 'PgSleep')")
        os.kill(pid, signal.SIGKILL)
        assert killing.end().killed
        until(db, f"SELECT NOT EXISTS ({active})", seconds=6)
    assert db.rows("SELECT * FROM mv") == [(1, 1)]
    assert db.rows(HISTORY) == [("refresh", "running", None)]
    db.execute("UPDATE source SET value = 1")
    assert pooled(db, pooler).refresh("mv", if_locked="fail").success
    assert db.rows(HISTORY) == [("refresh", "failed", "RunLost"), ("refresh", "success", None)]


def test_a_restart_of_the_pooler_fails_what_was_running_and_the_retry_works(
    gated: tuple[Database, Callable[[], None]], pooler: PgBouncer
) -> None:
    db, open_gate = gated
    hook = pooled(db, pooler)
    with beside(lambda: hook.refresh("mv", **PATIENT), open_gate) as running:
        until(db, AT_THE_GATE)
        pooler.restart()
        assert isinstance(running.exception(), psycopg.OperationalError)
    # The server looks every two seconds whether its client is gone; the gate is still closed.
    until(db, NOT_AT_THE_GATE, seconds=6)
    assert db.rows("SELECT id FROM mv") == [(1,)]
    open_gate()
    assert hook.refresh("mv", if_locked="wait", max_wait=20).success
    assert db.rows("SELECT id FROM mv ORDER BY id") == [(1,), (2,)]
    (_, lost, error), retried = db.rows(HISTORY)
    assert lost == "failed"
    # Whether the process itself could still say so depends on how soon the pooler was back.
    assert error in ("RunLost", "OperationalError", "ProtocolViolation")
    assert retried == ("refresh", "success", None)


def test_a_pool_of_one_server_connection_is_an_error_and_leaves_nothing(declared: Database) -> None:
    """An operation needs two at once: its transaction, and the record beside it."""
    with PgBouncer(declared.server, 1, query_wait_timeout="1") as pooler:
        hook = pooled(declared, pooler)
        with pytest.raises(psycopg.OperationalError, match="query_wait_timeout"):
            hook.refresh("mv")
    assert declared.rows("SELECT * FROM mv") == [(1, 1)]
    assert declared.rows(HISTORY) == []
    assert hook_on(declared).refresh("mv", if_locked="fail").success


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_who_waits_for_the_pooler_itself_ends_in_time_too(
    declared: Database, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens there to a request to cancel: its connection is cut after some seconds."""
    for driver in (execute, execute_async):
        monkeypatch.setattr(driver, "CUT_AFTER", 1.0)
    with PgBouncer(declared.server, 1) as pooler, pooler.connect(declared.name) as other:
        other.execute("BEGIN")
        other.execute("SELECT 1")
        hook = pooled(declared, pooler)
        begun = time.monotonic()

        def refresh() -> object:
            return asyncio.run(hook.arefresh("mv", timeout=0.5)) if asynchronous else hook.refresh("mv", timeout=0.5)

        with pytest.raises(OperationTimedOut):
            refresh()
        # Far less than PgBouncer's own query_wait_timeout of 120 s.
        assert time.monotonic() - begun < 30
        other.execute("ROLLBACK")
