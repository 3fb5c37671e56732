"""Time limits: which are refused, which one counts, and that an operation ends on the server when its time is up."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import timedelta
from decimal import Decimal
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.sdk import DAG, Connection
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition, OperationCancelled, OperationTimedOut
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.matview import RefreshMatViewOperator
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.instructions import Deadline, Result, Session, Work
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.operations import Operations
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.timeouts import Timeouts
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

HISTORY: LiteralString = "SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id"
NOT_AT_THE_GATE: LiteralString = f"SELECT NOT ({AT_THE_GATE.removeprefix('SELECT ')})"
#: The gate is a lock, and not one that is to be stepped back from.
PATIENT: dict[str, Any] = {"lock_timeout": 60, "max_wait": 60}
NAMES = [field.name for field in fields(Timeouts)]
#: Shows which of the server's own limits held while the view was built.
CLOCKS = "SELECT current_setting('statement_timeout') AS statement, current_setting('lock_timeout') AS lock"

Refresh = Callable[..., ServiceResponse]


def _blocking(hook: MatViewHook, view: str = "mv", **arguments: Any) -> ServiceResponse:
    return hook.refresh(view, **arguments)


def _in_a_loop(hook: MatViewHook, view: str = "mv", **arguments: Any) -> ServiceResponse:
    return asyncio.run(hook.arefresh(view, **arguments))


@pytest.fixture(params=[_blocking, _in_a_loop], ids=["blocking", "in a loop"])
def refresh(request: pytest.FixtureRequest) -> Refresh:
    """Refreshes ``mv``, by either driver."""
    operation: Refresh = request.param
    return operation


@pytest.fixture
def gated(db: Database) -> Iterator[Database]:
    """A view ``mv`` of one row, whose next refresh stands before the gate in the middle of its query."""
    db.execute(
        "CREATE TABLE source AS SELECT 1 AS id",
        GATE,
        "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM source",
        "INSERT INTO source VALUES (2)",
    )
    hook_on(db).definitions()
    with gate_closed(db):
        yield db


def _require_ended(db: Database, kind: str, message: str) -> None:
    """Require that nothing of a refresh is left on the server, and that its row says how it ended."""
    # The gate is still closed: what does not stand before it any more was stopped by us.
    assert db.value(NOT_AT_THE_GATE)
    assert db.rows("SELECT id FROM mv") == [(1,)]
    run = hook_on(db).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["class"], run.error["sqlstate"]) == ("failed", kind, "57014")
    assert message in run.error["message"]
    assert run.duration_ms is not None


# What is refused


@given(st.sampled_from(NAMES), st.one_of(st.floats(0.001, 1_999_999.0), st.integers(1, 1_999_999)))
def test_numbers_of_seconds_are_limits(name: str, seconds: float) -> None:
    assert Timeouts(**{name: seconds}).said() == {name: seconds}
    assert Timeouts.of({name: seconds}) == Timeouts(**{name: seconds})


_WRONG = st.one_of(
    st.booleans(),
    st.integers(max_value=0),
    st.integers(min_value=2_000_000),
    st.floats(max_value=0.000_999),
    st.floats(min_value=2_000_000),
    st.sampled_from([math.nan, math.inf, -math.inf, 10**400, "1", "", "1s", b"1", [1], {}, 1j]),
    st.sampled_from([Decimal(1), timedelta(seconds=1)]),
    st.text(),
)


@given(st.sampled_from(NAMES), _WRONG)
def test_anything_else_is_refused_by_its_name(name: str, wrong: Any) -> None:
    with pytest.raises(InvalidDefinition, match=f"^{name}="):
        Timeouts(**{name: wrong})
    with pytest.raises(InvalidDefinition, match=f"^{name}="):
        MatViewDefinition(name="mv", sql="SELECT 1", timeouts={name: wrong})


@pytest.mark.parametrize("wrong", [{"lock": 1}, {1: 1}, [("timeout", 1)], "timeout=1", 5, {"timeout": 1, "wait": 2}])
def test_limits_of_other_names_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidDefinition, match="lock_timeout, max_wait, statement_timeout, timeout"):
        MatViewDefinition(name="mv", sql="SELECT 1", timeouts=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_refuses_them_before_it_connects(name: str) -> None:
    nobody = Connection(conn_id="views", conn_type="postgres", host="127.0.0.1", port=1)
    hook = MatViewHook(postgres_conn_id="views", connection=nobody)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS x")
    for operation in (
        lambda wrong: hook.create(definition, **wrong),
        lambda wrong: hook.refresh("mv", **wrong),
        lambda wrong: hook.delete("mv", **wrong),
        lambda wrong: MatViewHook(longest=wrong[name]),
    ):
        with pytest.raises(InvalidDefinition, match="is not a number of seconds"):
            operation({name: 0})


_LIMITS = st.builds(Timeouts, **{name: st.none() | st.floats(0.001, 1000) for name in NAMES})


@given(_LIMITS, _LIMITS, _LIMITS)
def test_what_is_said_goes_before_what_others_say(one: Timeouts, other: Timeouts, third: Timeouts) -> None:
    both = one.over(other)
    for name in NAMES:
        mine, others = getattr(one, name), getattr(other, name)
        assert getattr(both, name) == (others if mine is None else mine)
    assert one.over(Timeouts()) == Timeouts().over(one) == one
    assert one.over(other).over(third) == one.over(other.over(third))


# What ends an operation


def test_timeout_ends_a_refresh_in_mid_query(gated: Database, refresh: Refresh) -> None:
    with pytest.raises(OperationTimedOut) as raised:
        refresh(hook_on(gated), timeout=0.4, **PATIENT)
    assert "timeout" in (raised.value.hint or "")
    assert isinstance(raised.value, psycopg.errors.QueryCanceled)
    _require_ended(gated, "OperationTimedOut", "Timed out after 0.4 s")


def test_the_wait_for_another_operation_counts(gated: Database, refresh: Refresh) -> None:
    with gated.connect() as other, other.transaction():
        key = lock_key(ResolvedName("public", "mv", "mv")).as_string(None)
        other.execute(f"SELECT pg_advisory_xact_lock({key})".encode())
        with pytest.raises(OperationTimedOut):
            refresh(hook_on(gated), timeout=0.3, **PATIENT)
        assert gated.rows(HISTORY) == [], "it had not begun"
    # Also where only a part of the time went into it.
    with gated.connect() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT pg_advisory_xact_lock({key})".encode())

        def let_go() -> None:
            until(
                gated,
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND "
                "state = 'idle' AND query LIKE 'ROLLBACK /* waits%' "
                "AND backend_start < clock_timestamp() - interval '0.3 s' AND application_name = 'matviews')",
            )
            other.execute("COMMIT")

        with beside(let_go), pytest.raises(OperationTimedOut):
            refresh(hook_on(gated), timeout=0.8, **PATIENT)
    _require_ended(gated, "OperationTimedOut", "Timed out after 0.8 s")
    run = hook_on(gated).last_run("mv")
    assert run is not None
    assert run.duration_ms is not None
    assert 800 <= run.duration_ms < 3000


def test_the_wait_for_the_run_tables_counts(gated: Database, refresh: Refresh) -> None:
    """Somebody has locked them, say to VACUUM FULL them."""
    with gated.connect() as other:
        other.execute("BEGIN")
        other.execute("LOCK TABLE matviews.mat_view_runs")
        with (
            beside(lambda: refresh(hook_on(gated), timeout=0.3, **PATIENT), other.close) as refreshing,
        ):
            assert isinstance(refreshing.exception(5), OperationTimedOut)
    assert gated.rows(HISTORY) == []


def test_statement_timeout_is_the_servers_and_its_error_too(gated: Database, refresh: Refresh) -> None:
    with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout") as raised:
        refresh(hook_on(gated), statement_timeout=0.3, **PATIENT)
    assert type(raised.value) is psycopg.errors.QueryCanceled
    assert "statement_timeout ran out" in "".join(raised.value.__notes__)
    _require_ended(gated, "QueryCanceled", "canceling statement due to statement timeout")


@pytest.mark.parametrize(
    ("declared", "kind", "message"),
    [
        ({"timeout": 0.4}, OperationTimedOut, "Timed out after 0.4 s"),
        ({"statement_timeout": 0.3, "timeout": 30}, psycopg.errors.QueryCanceled, "due to statement timeout"),
    ],
    ids=str,
)
def test_what_create_recorded_ends_a_refresh_by_name(
    db: Database, refresh: Refresh, declared: dict[str, float], kind: type[Exception], message: str
) -> None:
    db.execute(GATE, "CREATE TABLE source AS SELECT 1 AS id")
    definition = MatViewDefinition(
        name="mv", sql="SELECT id, gate() FROM source", timeouts={**declared, "lock_timeout": 60}
    )
    hook_on(db).create(definition)
    db.execute("INSERT INTO source VALUES (2)")
    with gate_closed(db):
        with pytest.raises(kind) as raised:
            refresh(hook_on(db))
        assert type(raised.value) is kind
        _require_ended(db, kind.__name__, message)


def test_longest_caps_whatever_else_is_said(gated: Database, refresh: Refresh) -> None:
    with pytest.raises(OperationTimedOut):
        refresh(hook_on(gated, longest=0.4), timeout=60, **PATIENT)
    _require_ended(gated, "OperationTimedOut", "Timed out after 0.4 s")


def test_longest_leaves_a_shorter_limit_alone(gated: Database, refresh: Refresh) -> None:
    with pytest.raises(OperationTimedOut):
        refresh(hook_on(gated, longest=60), timeout=0.4, **PATIENT)
    _require_ended(gated, "OperationTimedOut", "Timed out after 0.4 s")


@pytest.mark.parametrize("operation", ["create", "replace", "delete"])
def test_the_other_operations_end_too(gated: Database, operation: str) -> None:
    hook = hook_on(gated)
    new = MatViewDefinition(name="new", sql="SELECT gate()")
    replaced = MatViewDefinition(name="mv", sql="SELECT id, gate() FROM source")
    deeds: dict[str, Callable[[], ServiceResponse]] = {
        "create": lambda: hook.create(new, timeout=0.3, **PATIENT),
        "replace": lambda: hook.create(replaced, force=True, timeout=0.3, **PATIENT),
        "delete": lambda: hook.delete("mv", force=True, timeout=0.3, **PATIENT),
    }
    with gated.connect() as reader, reader.transaction():
        # It keeps DROP waiting, and nobody else.
        reader.execute("SELECT * FROM mv")
        with pytest.raises(OperationTimedOut):
            deeds[operation]()
    assert gated.value(NOT_AT_THE_GATE)
    assert gated.rows("SELECT relname FROM pg_class WHERE relkind = 'm'") == [("mv",)]
    assert gated.rows(HISTORY) == [("failed", "OperationTimedOut")]


# The server's own clock


@pytest.mark.parametrize(
    ("given", "statement", "lock"),
    [
        ({}, "0", "1s"),
        # A second later than the client, which says why.
        ({"timeout": 59}, "1min", "1s"),
        ({"statement_timeout": 30, "timeout": 59}, "30s", "1s"),
        ({"statement_timeout": 90, "timeout": 59}, "1min", "1s"),
        ({"statement_timeout": 0.75, "lock_timeout": 0.25}, "750ms", "250ms"),
    ],
    ids=str,
)
def test_the_server_has_a_clock_of_its_own(
    db: Database, refresh: Refresh, given: dict[str, float], statement: str, lock: str
) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql=CLOCKS), with_data=False)
    assert refresh(hook_on(db), **given).success
    assert db.rows("SELECT * FROM mv") == [(statement, lock)]


def test_limits_of_the_call_go_before_those_of_the_view(db: Database, refresh: Refresh) -> None:
    declared = {"statement_timeout": 30, "lock_timeout": 0.5}
    hook_on(db).create(MatViewDefinition(name="mv", sql=CLOCKS, timeouts=declared))
    assert db.rows("SELECT * FROM mv") == [("30s", "500ms")]
    refresh(hook_on(db))
    assert db.rows("SELECT * FROM mv") == [("30s", "500ms")]
    refresh(hook_on(db), statement_timeout=40)
    assert db.rows("SELECT * FROM mv") == [("40s", "500ms")]
    refresh(hook_on(db), lock_timeout=3)
    assert db.rows("SELECT * FROM mv") == [("30s", "3s")]
    hook_on(db).create(
        MatViewDefinition(name="mv", sql=CLOCKS, timeouts={"timeout": 59}), force=True, statement_timeout=20
    )
    assert db.rows("SELECT * FROM mv") == [("20s", "1s")]


@pytest.mark.parametrize("given", [{"timeout": 60}, {"longest": 60}], ids=str)
def test_a_limit_of_the_whole_never_lengthens_what_the_server_allows_a_statement(
    db: Database, refresh: Refresh, given: dict[str, float]
) -> None:
    """Somebody has set a statement_timeout for the role, the database or the connection, and means it."""
    hook_on(db).create(MatViewDefinition(name="mv", sql=CLOCKS))
    hook = hook_on(db, longest=given.get("longest"), extra='{"options": "-c statement_timeout=5s"}')
    refresh(hook, timeout=given.get("timeout"))
    assert db.rows("SELECT statement FROM mv") == [("5s",)]


def _limited(**limits: float) -> Work[ServiceResponse]:
    return Operations(Ledger("matviews")).refresh("mv", timeouts=Timeouts(**limits))


def test_nothing_of_a_limit_stays_in_the_session(db: Database) -> None:
    hook_on(db).create(MatViewDefinition(name="mv", sql=CLOCKS))
    sessions: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        sessions.append(db.connect(options="-c statement_timeout=1234s -c lock_timeout=5678s"))
        return sessions[-1]

    with Driver(connect) as driver:
        driver.run(_limited(timeout=30, statement_timeout=20, lock_timeout=2, max_wait=10))
        assert db.rows("SELECT * FROM mv") == [("20s", "2s")]
        assert len(sessions) == 2
        for session in sessions:
            assert session.execute(CLOCKS.encode()).fetchall() == [("1234s", "5678s")]


# When a deadline is nobody's any more


def _slow_pair(db: Database) -> None:
    db.execute(GATE, "CREATE MATERIALIZED VIEW mv AS SELECT gate() WITH NO DATA")
    hook_on(db).definitions()


def _past(db: Database, moment: Any) -> None:
    """Wait at the gate until a moment is past, by the server's clock."""
    until(db, AT_THE_GATE)
    with db.connect() as connection:
        connection.execute("SELECT pg_sleep(greatest(0, extract(epoch FROM %s - clock_timestamp())))", (moment,))


def test_a_deadline_does_not_reach_beyond_its_operation(db: Database) -> None:
    _slow_pair(db)
    moment = db.value("SELECT clock_timestamp() + interval '1.3 s'")
    with Driver(db.connect) as driver:
        assert driver.run(_limited(timeout=1.2, lock_timeout=60)).success
        with gate_closed(db) as open_gate, beside(lambda: driver.run(_limited(lock_timeout=60)), open_gate) as second:
            _past(db, moment)
            assert not second.done()
            open_gate()
            assert second.result().success
    assert db.rows(HISTORY) == [("success", None), ("success", None)]


def test_a_deadline_does_not_reach_beyond_its_operation_in_a_loop(db: Database) -> None:
    _slow_pair(db)
    moment = db.value("SELECT clock_timestamp() + interval '1.3 s'")

    async def both() -> None:
        async with AsyncDriver(lambda: psycopg.AsyncConnection.connect(db.dsn())) as driver:
            assert (await driver.run(_limited(timeout=1.2, lock_timeout=60))).success
            with gate_closed(db) as open_gate:
                second = asyncio.create_task(driver.run(_limited(lock_timeout=60)))
                await asyncio.to_thread(_past, db, moment)
                assert not second.done()
                open_gate()
                assert (await second).success

    asyncio.run(both())
    assert db.rows(HISTORY) == [("success", None), ("success", None)]


def test_a_deadline_that_passes_after_commit_changes_nothing(db: Database) -> None:
    """Nor does the maintenance that then may go on for a while."""
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS x"))
    db.execute("TRUNCATE matviews.mat_view_runs")

    class Late(Driver):
        def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
            result = super()._execute(session, statement, parameters)
            if session is Session.WORK and statement.as_string(None) == "COMMIT":
                self.time_out(Deadline(time.monotonic(), 60))
            return result

    with Late(db.connect) as driver:
        work = Operations(Ledger("matviews")).refresh("mv", vacuum=True, timeouts=Timeouts(timeout=60))
        assert driver.run(work).success
    assert db.rows(HISTORY) == [("success", None)]


class _AskedInBetween(Driver):
    """Is told to stop after it has looked whether it should, and before the server has its statement."""

    def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
        if statement.as_string(None).startswith("REFRESH"):
            self.cancel("for a test")
        return super()._execute(session, statement, parameters)


def test_a_cancellation_just_before_a_statement_is_sent_stops_it_all_the_same(gated: Database) -> None:
    """A signal, or another thread, comes when it comes."""
    work = Operations(Ledger("matviews")).refresh(
        "mv", refresh_strategy="regular", timeouts=Timeouts(lock_timeout=30, max_wait=30)
    )
    release = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objid = 4711 AND NOT granted"
    with (
        _AskedInBetween(gated.connect) as driver,
        beside(lambda: driver.run(work), lambda: gated.execute(release)) as running,
    ):
        until(gated, "SELECT EXISTS (SELECT FROM matviews.mat_view_runs)")
        assert isinstance(running.exception(5), OperationCancelled)
    _require_ended(gated, "OperationCancelled", "for a test")


# Tasks


@pytest.mark.parametrize("deferrable", [False, True], ids=["plain", "deferred"])
def test_an_execution_timeout_ends_the_operation_before_airflow_ends_the_task(
    gated: Database, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    set_connection(monkeypatch, gated)
    raised: list[BaseException] = []
    with DAG(f"limited_{deferrable}", schedule=None) as dag:
        RefreshMatViewOperator(
            task_id="refresh",
            view="mv",
            deferrable=deferrable,
            execution_timeout=timedelta(seconds=2),
            on_failure_callback=lambda context: raised.append(context["exception"]),
            **PATIENT,
        )
    run = run_dag(dag)
    assert run.states == {"refresh": "failed"}
    _require_ended(gated, "OperationTimedOut", "Timed out after ")
    assert [type(error) for error in raised] == [OperationTimedOut]


@pytest.mark.parametrize("deferrable", [False, True], ids=["plain", "deferred"])
def test_timeout_ends_the_task(gated: Database, monkeypatch: pytest.MonkeyPatch, deferrable: bool) -> None:
    set_connection(monkeypatch, gated)
    with DAG(f"timed_{deferrable}", schedule=None) as dag:
        RefreshMatViewOperator(task_id="refresh", view="mv", deferrable=deferrable, timeout=0.5, **PATIENT)
    assert run_dag(dag).states == {"refresh": "failed"}
    _require_ended(gated, "OperationTimedOut", "Timed out after ")


@pytest.mark.parametrize("deferrable", [False, True], ids=["plain", "deferred"])
def test_an_execution_timeout_may_be_longer_than_the_longest_limit(
    db: Database, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    set_connection(monkeypatch, db)
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS x")
    with DAG(f"patient_{deferrable}", schedule=None) as dag:
        RefreshMatViewOperator(
            task_id="refresh", view="mv", deferrable=deferrable, execution_timeout=timedelta(days=30)
        )
    assert run_dag(dag).states == {"refresh": "success"}


def test_a_task_that_airflow_stops_is_recorded_as_that(gated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, gated)
    with DAG("stopped", schedule=None) as dag:
        RefreshMatViewOperator(task_id="refresh", view="mv", **PATIENT)

    def stop() -> None:
        until(gated, AT_THE_GATE)
        # As the supervisor of a task does when the task was marked or cleared.
        os.kill(os.getpid(), signal.SIGTERM)

    with beside(stop) as stopped:
        run = run_dag(dag)
        stopped.result()
    assert run.states == {"refresh": "failed"}
    _require_ended(gated, "OperationCancelled", "Airflow stopped the task (it was marked or cleared")
