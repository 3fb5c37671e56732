"""Cancelled, interrupted, timed out: the server stops, the record says so, and the session is as it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, LiteralString

import psycopg
import pytest

from airflow_provider_matviews.definition import IfLocked, MatViewDefinition
from airflow_provider_matviews.exceptions import OperationCancelled, ViewLocked
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import (
    Command,
    Note,
    Pause,
    Result,
    Session,
    Work,
    fetch_all,
    raw,
)
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.run import Subject, Terms, record_run
from tests.conftest import Database, hook_on
from tests.killing import DEFINITION, Deed, work
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

HISTORY: LiteralString = "SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id"
NOT_AT_THE_GATE: LiteralString = f"SELECT NOT ({AT_THE_GATE.removeprefix('SELECT ')})"
#: The gate is a lock: by itself the server ends the wait for it no sooner than the tests look.
PATIENT: dict[str, Any] = {"lock_timeout": 60, "max_wait": 60}
DEEDS: list[Deed] = ["create", "replace", "refresh", "refresh concurrently", "delete", "delete cascade"]


class Interrupted(BaseException):
    """As Airflow's task timeout is: no Exception."""


@pytest.fixture
def gated(each_db: Database) -> Iterator[Database]:
    """A view ``mv`` of one row, whose next refresh stands before the gate in the middle of its query."""
    each_db.execute(
        "CREATE TABLE source AS SELECT 1 AS id",
        GATE,
        "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM source",
        "INSERT INTO source VALUES (2)",
    )
    hook_on(each_db).definitions()
    with gate_closed(each_db):
        yield each_db


def _require_stopped(db: Database) -> None:
    # The gate is still closed: what no longer stands before it was stopped by us. The server by itself looks only
    # every two seconds whether the client is gone.
    until(db, NOT_AT_THE_GATE, seconds=1)
    until(
        db,
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'matviews')",
    )
    assert db.rows("SELECT id FROM mv") == [(1,)]


def test_cancel_from_another_thread_stops_the_refresh_on_the_server(gated: Database) -> None:
    hook = hook_on(gated)
    with beside(lambda: hook.refresh("mv", **PATIENT)) as running:
        until(gated, AT_THE_GATE)
        hook.cancel()
        assert isinstance(running.exception(), psycopg.errors.QueryCanceled)
    _require_stopped(gated)
    run = hook.last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["class"], run.error["sqlstate"]) == ("failed", "OperationCancelled", "57014")
    assert run.error["message"].endswith("s: cancel() was called.")
    assert run.duration_ms is not None


def test_cancel_with_nothing_to_cancel_does_nothing(db: Database) -> None:
    hook = hook_on(db)
    hook.cancel()
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    hook.cancel()
    assert hook.refresh("mv").success


@contextmanager
def locked_view(db: Database) -> Iterator[None]:
    """Hold the lock of ``mv`` as another operation on it would."""
    with db.connect() as other, other.transaction():
        key = lock_key(ResolvedName("public", "mv", "mv"))
        other.execute(raw("SELECT pg_advisory_xact_lock({})").format(key))
        yield


def test_cancel_ends_the_wait_for_another_operation(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    with locked_view(db), beside(lambda: hook.refresh("mv", max_wait=60), hook.cancel) as refresh:
        until(
            db,
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() "
            "AND state = 'idle' AND query LIKE 'ROLLBACK /* waits%' "
            "AND application_name = 'matviews')",
        )
        hook.cancel()
        assert isinstance(refresh.exception(), psycopg.errors.QueryCanceled)
    assert db.rows(HISTORY) == [("success", None)], "it had not begun"


def test_cancel_ends_a_pause(db: Database) -> None:
    def pausing() -> Work[None]:
        yield Pause(8)

    with Driver(db.connect) as driver, beside(lambda: driver.run(pausing())) as running:
        driver.cancel()
        assert isinstance(running.exception(5), psycopg.errors.QueryCanceled)


def test_cancel_may_come_at_any_moment_of_a_pause(db: Database) -> None:
    """A signal handler runs between any two steps of the thread that it interrupts, so it must wait for nothing."""

    steps = 0
    outcomes = set()

    def pausing() -> Work[None]:
        yield Pause(0.01)

    def pause_and_cancel_at(step: int) -> None:
        nonlocal steps
        driver, steps = Driver(db.connect), 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal steps
            frame.f_trace_opcodes = True
            steps += 1
            if steps == step:
                driver.cancel()
            return trace

        sys.settrace(trace)
        try:
            driver.run(pausing())
            outcomes.add("too late")
        except psycopg.errors.QueryCanceled:
            outcomes.add("cancelled")
        finally:
            sys.settrace(None)

    for step in range(1, 5000):
        thread = threading.Thread(target=pause_and_cancel_at, args=(step,), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive(), f"cancel() at step {step} hangs"
        if steps < step:
            break
    assert steps < step
    assert outcomes == {"cancelled", "too late"}


class Disturbed(Driver):
    """Something happens at the n-th statement: before it is sent, or after its answer has come."""

    def __init__(self, db: Database, at: int, after: bool, disturb: Callable[[Driver], None]) -> None:
        super().__init__(db.connect)
        self._at, self._after, self._disturb = at, after, disturb
        self.statements = 0

    def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
        self.statements += 1
        mine = self.statements == self._at
        if mine and not self._after:
            self._disturb(self)
        result = super()._execute(session, statement, parameters)
        if mine and self._after:
            self._disturb(self)
        return result


def _interrupt(driver: Driver) -> None:
    raise Interrupted


def _cancel(driver: Driver) -> None:
    driver.cancel()


def _set_up(eye: psycopg.Connection[Any], deed: Deed) -> None:
    eye.execute("DROP MATERIALIZED VIEW IF EXISTS mv CASCADE")
    if deed != "create":
        eye.execute("CREATE MATERIALIZED VIEW mv AS SELECT id, value FROM source")
        eye.execute("CREATE UNIQUE INDEX mv_id_key ON mv (id)")
        eye.execute("COMMENT ON MATERIALIZED VIEW mv IS 'the view'")
    if deed == "delete cascade":
        eye.execute("CREATE VIEW dependent AS SELECT sum(value) AS total FROM mv")
    eye.execute("TRUNCATE matviews.mat_view_runs")
    eye.execute("UPDATE source SET value = value + 1")


def _served(eye: psycopg.Connection[Any]) -> int | None:
    try:
        return int(eye.execute("SELECT value FROM mv").fetchall()[0][0])
    except psycopg.errors.UndefinedTable:
        return None


@pytest.mark.parametrize(
    "deed",
    # To create and to replace take many statements.
    [pytest.param(deed, marks=pytest.mark.e2e) if deed in ("create", "replace") else deed for deed in DEEDS],
)
@pytest.mark.parametrize(
    ("disturb", "error"),
    [(_interrupt, Interrupted), (_cancel, OperationCancelled)],
    ids=["interrupted", "cancelled"],
)
def test_wherever_an_operation_is_stopped_the_record_the_view_and_the_caller_hear_the_same(
    db: Database, deed: Deed, disturb: Callable[[Driver], None], error: type[BaseException]
) -> None:
    db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    hook_on(db).create(DEFINITION)
    heard = set()
    with db.connect() as eye:
        for after in (False, True):
            for at in range(1, 100):
                _set_up(eye, deed)
                old = _served(eye)
                with Disturbed(db, at, after, disturb) as driver:
                    raised: BaseException | None = None
                    try:
                        driver.run(work(deed))
                    except (Interrupted, psycopg.errors.QueryCanceled) as stopped:
                        raised = stopped
                assert raised is None or type(raised) is error
                new = None if deed.startswith("delete") else eye.execute("SELECT value FROM source").fetchall()[0][0]
                runs = eye.execute(HISTORY).fetchall()
                story = (at, "after" if after else "before", runs, raised)
                if runs == [("success", None)]:
                    assert _served(eye) == new, story
                else:
                    assert _served(eye) == old, story
                    assert raised is not None, story
                    # Stopped before the run's number was known, its row is one for the next operation to find.
                    assert runs in ([], [("running", None)], [("failed", error.__name__)]), story
                heard.add((tuple(runs), raised is not None))
                if driver.statements < at:
                    break
    assert {((("failed", error.__name__),), True), ((), True), ((("success", None),), False)} <= heard
    # What came after COMMIT comes through as it was meant: a timeout is one, a cancellation came too late.
    assert (((("success", None),), True) in heard) == (error is Interrupted)


@contextmanager
def signalled(db: Database, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal as soon as a query stands before the gate."""

    def send() -> None:
        until(db, AT_THE_GATE)
        os.kill(os.getpid(), number)

    with beside(send) as sent:
        yield
        sent.result()


@contextmanager
def raising(number: signal.Signals) -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_an_interruption_that_is_no_exception_stops_the_refresh_on_the_server(gated: Database) -> None:
    with raising(signal.SIGALRM), signalled(gated, signal.SIGALRM), pytest.raises(Interrupted):
        hook_on(gated).refresh("mv", **PATIENT)
    _require_stopped(gated)
    run = hook_on(gated).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["class"], run.error["sqlstate"]) == ("failed", "Interrupted", None)


def test_ctrl_c_stops_the_refresh_on_the_server(gated: Database) -> None:
    with signalled(gated, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        hook_on(gated).refresh("mv", **PATIENT)
    _require_stopped(gated)
    assert gated.rows(HISTORY) == [("failed", "KeyboardInterrupt")]


def test_an_interruption_of_the_create_of_a_view_leaves_nothing(db: Database) -> None:
    db.execute(GATE)
    with (
        gate_closed(db),
        raising(signal.SIGALRM),
        signalled(db, signal.SIGALRM),
        pytest.raises(Interrupted),
    ):
        hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT gate()"), **PATIENT)
    until(db, NOT_AT_THE_GATE, seconds=1)
    assert db.rows("SELECT 1 FROM pg_class WHERE relname LIKE 'mv%'") == []
    assert db.rows(HISTORY) == [("failed", "Interrupted")]


def test_a_statement_timeout_of_the_connection_is_an_ordinary_failure(gated: Database) -> None:
    hook = hook_on(gated, extra='{"options": "-c statement_timeout=200ms"}')
    with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
        hook.refresh("mv", **PATIENT)
    _require_stopped(gated)
    assert gated.rows(HISTORY) == [("failed", "QueryCanceled")]


SESSION: LiteralString = """
    SELECT 'setting', name, setting FROM pg_settings
    UNION ALL SELECT 'prepared', name, statement FROM pg_prepared_statements
    UNION ALL SELECT 'cursor', name, statement FROM pg_cursors WHERE name <> ''
    UNION ALL SELECT 'lock', locktype, mode FROM pg_locks WHERE pid = pg_backend_pid()
        AND locktype NOT IN ('virtualxid', 'relation')
    UNION ALL SELECT 'channel', pg_listening_channels(), ''
    UNION ALL SELECT 'temporary', relname, '' FROM pg_class WHERE relpersistence = 't' AND pg_table_is_visible(oid)
    UNION ALL SELECT 'role', session_user, current_user
    ORDER BY 1, 2, 3
"""


@pytest.mark.parametrize("deed", [*DEEDS, "failing", "locked out"])
def test_an_operation_leaves_the_session_as_it_found_it(each_db: Database, deed: Any) -> None:
    """Behind a transaction pooler somebody else works on in the same session."""
    each_db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    hook_on(each_db).create(DEFINITION)
    before: dict[psycopg.Connection[Any], list[Any]] = {}

    def connect() -> psycopg.Connection[Any]:
        connection = each_db.connect()
        # Asked in the way in which the answer is asked for later.
        before[connection] = connection.execute(SESSION).fetchall()
        return connection

    with each_db.connect() as eye:
        _set_up(eye, deed)
        if deed == "failing":
            eye.execute("INSERT INTO source SELECT * FROM source")
    with Driver(connect) as driver:
        match deed:
            case "failing":
                with pytest.raises(psycopg.errors.UniqueViolation):
                    driver.run(work("refresh"))
            case "locked out":
                with locked_view(each_db), pytest.raises(ViewLocked):
                    driver.run(_refresh_if_free())
            case _:
                driver.run(work(deed))
        assert len(before) == 2
        for connection, session in before.items():
            assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
            assert connection.execute(SESSION).fetchall() == session


def _refresh_if_free() -> Work[Any]:
    def never(prepared: Any) -> Any:
        raise AssertionError

    return record_run(Operation.REFRESH, Subject(ViewName("mv")), Ledger("matviews"), Terms(IfLocked.FAIL), never)


def test_nothing_is_prepared_on_the_server_however_often_it_runs(db: Database) -> None:
    db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    hook_on(db).create(DEFINITION)
    with Driver(db.connect) as driver:
        for _ in range(12):
            driver.run(work("refresh"))
        for session in Session:
            rows = driver.run(fetch_all(raw("SELECT name FROM pg_prepared_statements"), session=session))
            assert rows == []


def test_a_driver_connects_when_it_has_to_and_closes_what_it_opened(db: Database) -> None:
    opened: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        opened.append(db.connect())
        return opened[-1]

    def telling() -> Work[None]:
        yield Note("nothing to ask the server")

    def failing() -> Work[None]:
        yield Command(raw("SELECT 1"))
        yield Command(raw("SELECT 1"), Session.RECORD)
        yield Command(raw("SELECT 1 / 0"))

    with Driver(connect) as driver:
        driver.run(telling())
        assert opened == []
        with pytest.raises(psycopg.errors.DivisionByZero):
            driver.run(failing())
        assert len(opened) == 2
    assert all(connection.closed for connection in opened)


def test_a_service_hears_of_an_error_where_it_asked_and_may_go_on(db: Database) -> None:
    def trying() -> Work[int]:
        try:
            yield Command(raw("SELECT 1 / 0"))
        except psycopg.errors.DivisionByZero:
            rows = yield from fetch_all(raw("SELECT 7 AS n"))
            return int(rows[0]["n"])
        raise AssertionError

    with Driver(db.connect) as driver:
        assert driver.run(trying()) == 7


def test_one_command_is_one_statement(db: Database) -> None:
    db.execute("CREATE TABLE precious (a integer)")

    def smuggling() -> Work[None]:
        yield Command(raw("SELECT 1; DROP TABLE precious"))

    with Driver(db.connect) as driver, pytest.raises(psycopg.errors.SyntaxError, match="multiple commands"):
        driver.run(smuggling())
    assert db.rows("SELECT * FROM precious") == []
