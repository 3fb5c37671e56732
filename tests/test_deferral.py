"""Deferred operations: the trigger, its copies, its end before its time, and operators that do the same either way."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.models.asset import AssetEvent, AssetModel
from airflow.models.trigger import Trigger
from airflow.sdk import DAG, Asset, AssetAlias
from airflow.sdk.exceptions import TaskDeferred
from airflow.sdk.serde import serialize
from airflow.utils.session import create_session
from psycopg import sql
from sqlalchemy import select

from airflow_provider_matviews import exceptions
from airflow_provider_matviews.definition import MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.exceptions import (
    DependentsExist,
    InvalidDefinition,
    MatViewError,
    OperationTimedOut,
    ViewLocked,
    WouldBeLost,
)
from airflow_provider_matviews.operators import matview as operators
from airflow_provider_matviews.operators.matview import CreateMatViewOperator, RefreshMatViewOperator
from airflow_provider_matviews.outcome import pack_error, unpack_error
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.triggers.matview import MatViewTrigger
from tests.airflow_dags import DagRun, run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

HISTORY: LiteralString = "SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id"
NOT_AT_THE_GATE: LiteralString = f"SELECT NOT ({AT_THE_GATE.removeprefix('SELECT ')})"
#: Sessions of operations that asked for a lock and pause before they ask again, or go on elsewhere.
PAUSING: LiteralString = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'
      AND query LIKE 'ROLLBACK /* waits%' AND state_change < clock_timestamp() - interval '0.2 s'
"""
#: What Airflow's triggerer says when somebody acted on the task.
USER_ACTION = "__airflow_user_action__"
#: The gate is a lock, and not one that is to be stepped back from.
PATIENT: dict[str, Any] = {"lock_timeout": 60, "max_wait": 60}


@pytest.fixture(autouse=True)
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db)


def _trigger(**arguments: Any) -> MatViewTrigger:
    """Return a trigger that refreshes ``mv``."""
    usual: dict[str, Any] = {
        "operation": "refresh",
        "subject": "mv",
        "arguments": PATIENT,
        "conn_id": "postgres_default",
        "tracking_schema": "matviews",
        "context": {"dag_id": "d", "task_id": "t", "run_id": "r", "map_index": -1, "try_number": 1},
        "deferral": "one and the same",
        "deadline": time.time() + 60,
        "timeout": 60.0,
    }
    return MatViewTrigger(**{**usual, **arguments})


def _copy(trigger: MatViewTrigger) -> MatViewTrigger:
    """Return what the next triggerer makes of a trigger."""
    _, arguments = trigger.serialize()
    return MatViewTrigger(**json.loads(json.dumps(arguments)))


async def _events(trigger: MatViewTrigger) -> list[Any]:
    return [json.loads(json.dumps(event.payload)) async for event in trigger.run()]


def _fire(trigger: MatViewTrigger) -> dict[str, Any]:
    """Run a trigger to its end and return the payload of its event."""
    (payload,) = asyncio.run(_events(trigger))
    assert isinstance(payload, dict)
    return payload


@pytest.fixture
def built(db: Database) -> Database:
    """A view ``mv`` whose building stands before the gate, where that is closed, and is counted."""
    db.execute(
        GATE,
        "CREATE TABLE source AS SELECT 1 AS id",
        # Counted by a sequence, which forgets nothing that is undone.
        "CREATE SEQUENCE begun",
        "CREATE MATERIALIZED VIEW mv AS SELECT id, nextval('begun') AS n, gate() FROM source WITH NO DATA",
    )
    hook_on(db).definitions()
    return db


def _times_built(db: Database) -> int:
    return int(db.value("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM begun"))


@contextmanager
def _view_locked(db: Database) -> Iterator[None]:
    """Hold the lock of ``mv`` as another operation on it would."""
    with db.connect() as other, other.transaction():
        key = lock_key(ResolvedName("public", "mv", "mv")).as_string(None)
        other.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(sql.SQL(key)))  # type: ignore[arg-type]
        yield


# The trigger as data


_DEFINITION = MatViewDefinition(
    name='reports."Odd Näme"',
    sql="SELECT 1 AS id, '100%' AS share",
    unique_index_columns=["id"],
    comment="it's \\ a view",
    session_settings={"work_mem": "64MB", "enable_sort": False, "jit_above_cost": -1},
    timeouts={"timeout": 30, "lock_timeout": 0.5},
)


def _through_airflow(path: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    # As the worker sends them, the API server stores them, and the triggerer reads them.
    row = Trigger(classpath=path, kwargs={})
    row.encrypted_kwargs = json.dumps(serialize(arguments))
    return row.classpath, row.kwargs


@pytest.mark.parametrize(
    "given",
    [
        {
            "operation": "create",
            "subject": _DEFINITION.to_dict(),
            "arguments": {"force": True, "with_data": False, "session_settings": {"a.b": "c"}, "timeout": None},
            "cancel_on_kill": False,
        },
        {
            "operation": "refresh",
            "subject": 'reports."Odd Näme"',
            "arguments": {"refresh_strategy": "swap", "max_bloat": 1.25, "analyze": None, "if_locked": "skip"},
            "cancel_on_kill": True,
        },
    ],
    ids=["create", "refresh"],
)
@pytest.mark.parametrize(
    "transported",
    [
        lambda path, arguments: json.loads(json.dumps([path, arguments])),
        _through_airflow,
    ],
    ids=["json", "airflow"],
)
def test_a_trigger_is_made_again_of_what_it_says_of_itself(
    given: dict[str, Any], transported: Callable[[str, dict[str, Any]], tuple[str, dict[str, Any]]]
) -> None:
    whole: dict[str, Any] = {
        **given,
        "conn_id": "second",
        "tracking_schema": "runs %",
        "context": {"dag_id": "d", "map_index": 3},
        "deferral": "token",
        "deadline": 1234567890.125,
        "timeout": 12.5,
        "not_before": 1234567880.5,
    }
    parameters = set(inspect.signature(MatViewTrigger.__init__).parameters) - {"self"}
    assert set(whole) == parameters, "every argument, and none that is equal to its default in both cases"
    path, arguments = transported(*MatViewTrigger(**whole).serialize())
    module, _, name = path.rpartition(".")
    again = getattr(importlib.import_module(module), name)(**arguments)
    assert type(again) is MatViewTrigger
    assert again.serialize() == (path, whole)
    if given["operation"] == "create":
        assert MatViewDefinition.from_dict(again.subject) == _DEFINITION


# Copies of one trigger


def test_a_copy_after_the_first_has_committed_tells_the_same_and_does_nothing(built: Database) -> None:
    trigger = _trigger()
    event = _fire(trigger)
    assert event["summary"]["status"] == "updated"
    for if_locked in ("wait", "skip", "fail"):
        again = _copy(trigger)
        again.arguments = {**again.arguments, "if_locked": if_locked}
        assert _fire(again) == event
    assert built.rows("SELECT id FROM matviews.mat_view_runs") == [(event["summary"]["mat_view_run_id"],)]
    assert _times_built(built) == 1


def test_a_copy_of_a_create_tells_the_same_and_does_nothing(db: Database) -> None:
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS id").to_dict()
    trigger = _trigger(operation="create", subject=definition, arguments={"force": True})
    event = _fire(trigger)
    oid = db.value("SELECT 'mv'::regclass::oid")
    assert _fire(_copy(trigger)) == event
    assert db.value("SELECT 'mv'::regclass::oid") == oid
    # With nothing to do it says so twice, too.
    idle = _trigger(operation="create", subject=definition, arguments={}, deferral="another")
    event = _fire(idle)
    assert event["summary"]["status"] == "skipped"
    assert _fire(_copy(idle)) == event
    assert db.rows(HISTORY) == [("success", None), ("skipped", None)]


@pytest.mark.parametrize("if_locked", ["wait", "skip", "fail"])
def test_a_copy_waits_for_the_first_and_takes_its_result(built: Database, if_locked: str) -> None:
    trigger = _trigger(arguments={**PATIENT, "max_wait": 0.1, "if_locked": if_locked})
    with (
        gate_closed(built) as open_gate,
        beside(lambda: _fire(trigger), open_gate) as first,
    ):
        until(built, AT_THE_GATE)
        with beside(lambda: _fire(_copy(trigger)), open_gate) as second:
            # The first one's session does not pause: its last statement is its REFRESH.
            until(built, sql.SQL("SELECT ({}) = 1").format(sql.SQL(PAUSING)))
            assert not second.done()
            open_gate()
            assert second.result() == first.result()
    assert first.result()["summary"]["status"] == "updated"
    assert built.rows(HISTORY) == [("success", None)]
    assert _times_built(built) == 1


def test_a_copy_waits_also_for_a_first_one_that_has_only_the_lock_yet(built: Database) -> None:
    """Between the view's lock and the run's row there is nothing by which the first one could be known."""
    hook_on(built).create(MatViewDefinition(name="mv", sql="SELECT id, nextval('begun') AS n, gate() FROM source"))
    built.execute("TRUNCATE matviews.mat_view_runs")
    trigger = _trigger(arguments={**PATIENT, "if_locked": "skip"})
    with built.connect() as other:
        other.execute("BEGIN")
        # No run can be inserted, and all can be read.
        other.execute("LOCK TABLE matviews.mat_view_runs IN SHARE MODE")
        with beside(lambda: _fire(trigger), other.close) as first:
            until(
                built,
                "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() "
                "AND state = 'idle in transaction' AND query LIKE '%pg_try_advisory_xact_lock%' "
                "AND state_change < clock_timestamp() - interval '0.2 s'",
            )
            with beside(lambda: _fire(_copy(trigger)), other.close) as second:
                until(built, sql.SQL("SELECT ({}) = 1").format(sql.SQL(PAUSING)))
                other.execute("COMMIT")
                assert second.result() == first.result()
    assert built.rows(HISTORY) == [("success", None)]


@pytest.mark.parametrize("if_locked", ["wait", "skip", "fail"])
def test_copies_that_start_at_the_same_moment_refresh_once(built: Database, if_locked: str) -> None:
    trigger = _trigger(arguments={**PATIENT, "if_locked": if_locked})

    async def at_once() -> list[Any]:
        return await asyncio.gather(*(_events(_copy(trigger)) for _ in range(4)))

    outcomes = asyncio.run(at_once())
    assert outcomes[0][0]["summary"]["status"] == "updated"
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert built.rows(HISTORY) == [("success", None)]
    assert _times_built(built) == 1


def test_a_copy_after_the_first_has_failed_does_it_anew(built: Database) -> None:
    trigger = _trigger()
    with gate_closed(built) as open_gate, beside(lambda: _fire(trigger), open_gate) as first:
        until(built, AT_THE_GATE)
        built.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objid = 4711 AND NOT granted")
        assert first.result()["error"]["class"] == "AdminShutdown"
    event = _fire(_copy(trigger))
    assert event["summary"]["status"] == "updated"
    assert _fire(_copy(trigger)) == event
    assert built.rows(HISTORY) == [("failed", "AdminShutdown"), ("success", None)]


#: What a triggerer does, in a process that can be killed; knows no Airflow, which would take seconds to load.
_DOOMED = """
import sys, psycopg
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.operations import Operations
from airflow_provider_matviews.timeouts import Timeouts
with Driver(lambda: psycopg.connect(sys.argv[1])) as driver:
    patient = Timeouts(lock_timeout=60, max_wait=60)
    driver.run(Operations(Ledger("matviews")).refresh("mv", timeouts=patient, deferral=sys.argv[2]))
"""


def test_a_copy_after_the_first_was_killed_does_it_anew(built: Database) -> None:
    trigger = _trigger()
    with gate_closed(built) as open_gate:
        command = [sys.executable, "-c", _DOOMED, built.dsn(), trigger.deferral]
        with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
            try:
                until(built, AT_THE_GATE)
            finally:
                process.send_signal(signal.SIGKILL)
        assert built.rows(HISTORY) == [("running", None)]
        open_gate()
        # The server then reads on and finds that nobody is there; until it has, the copy waits.
        event = _fire(_copy(trigger))
    assert event["summary"]["status"] == "updated"
    assert _fire(_copy(trigger)) == event
    assert built.rows(HISTORY) == [("failed", "RunLost"), ("success", None)]


def test_another_trigger_is_skipped_as_ever(built: Database) -> None:
    with gate_closed(built) as open_gate, beside(lambda: _fire(_trigger()), open_gate):
        until(built, AT_THE_GATE)
        other = _trigger(deferral="another", arguments={"if_locked": "skip"})
        event = _fire(other)
        assert event["stood_back"]
        assert event["summary"]["status"] == "skipped"
        assert built.rows(HISTORY) == [("running", None), ("skipped", None)]
    assert built.rows(HISTORY) == [("success", None), ("skipped", None)]


def test_a_copy_of_one_that_was_skipped_tells_the_same(built: Database) -> None:
    trigger = _trigger(arguments={"if_locked": "skip"})
    with _view_locked(built):
        event = _fire(trigger)
        again = _fire(_copy(trigger))
    assert event["summary"]["status"] == "skipped"
    assert again == event
    assert built.rows(HISTORY) == [("skipped", None)]


@pytest.mark.parametrize("if_locked", ["fail", "wait"])
def test_a_copy_of_one_that_failed_at_the_lock_does_not_call_that_a_success(built: Database, if_locked: str) -> None:
    trigger = _trigger(arguments={"if_locked": if_locked, "max_wait": 0.05})
    with _view_locked(built):
        assert type(unpack_error(_fire(trigger)["error"])) is ViewLocked
        again = _fire(_copy(trigger))
        assert "error" in again, again
        assert type(unpack_error(again["error"])) is ViewLocked
    assert _fire(_copy(trigger))["summary"]["status"] == "updated"


# A trigger that is stopped before its time


def _stop(
    db: Database, trigger: MatViewTrigger, *messages: str | None, then: Callable[[], None] = lambda: None
) -> None:
    """Run a trigger as the triggerer does, cancel it before the gate, and wait for its end.

    :param messages: with which it is cancelled, one after the other.
    :param then: done in the loop's lifetime, after its end.
    """
    events: list[Any] = []

    async def run() -> None:
        async for event in trigger.run():
            events.append(event)

    async def main() -> None:
        task = asyncio.create_task(run())
        await asyncio.to_thread(until, db, AT_THE_GATE)
        for message in messages:
            task.cancel(message)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
        if len(messages) == 1:
            assert cancelled.value.args == (() if messages[0] is None else messages)
        await asyncio.to_thread(then)

    asyncio.run(main())
    assert events == []


def _last_message(db: Database) -> str:
    run = hook_on(db).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["class"], run.error["sqlstate"]) == ("failed", "OperationCancelled", "57014")
    return str(run.error["message"])


@pytest.mark.parametrize(
    ("message", "told"),
    [(USER_ACTION, "Airflow stopped the deferred task"), (None, "its triggerer was shut down")],
    ids=["by somebody", "shutdown"],
)
def test_a_cancelled_trigger_stops_the_query_and_the_record_says_why(
    built: Database, message: str | None, told: str
) -> None:
    with gate_closed(built):
        # The gate is still closed: what does not stand before it any more was stopped by us.
        _stop(built, _trigger(), message, then=lambda: _require(built, NOT_AT_THE_GATE))
        assert told in _last_message(built)
        assert "s: " in _last_message(built)
    assert _fire(_trigger())["summary"]["status"] == "updated"
    assert built.rows(HISTORY) == [("failed", "OperationCancelled"), ("success", None)]


def _require(db: Database, condition: LiteralString) -> None:
    assert db.value(condition), condition


def test_a_trigger_that_is_cancelled_twice_says_the_first_reason_and_ends(built: Database) -> None:
    with gate_closed(built):
        _stop(built, _trigger(), USER_ACTION, None, then=lambda: until(built, NOT_AT_THE_GATE, seconds=1.5))
        assert "Airflow stopped the deferred task" in _last_message(built)


def test_without_cancel_on_kill_it_runs_to_its_end_when_somebody_stops_the_task(built: Database) -> None:
    done: LiteralString = "SELECT EXISTS (SELECT FROM matviews.mat_view_runs WHERE status = 2)"
    with gate_closed(built) as open_gate:

        def go_on() -> None:
            _require(built, AT_THE_GATE)
            open_gate()
            until(built, done)

        _stop(built, _trigger(cancel_on_kill=False), USER_ACTION, then=go_on)
    assert built.rows(HISTORY) == [("success", None)]
    assert built.value("SELECT count(*) FROM mv") == 1


def test_without_cancel_on_kill_it_ends_with_its_triggerer_all_the_same(built: Database) -> None:
    with gate_closed(built):
        _stop(built, _trigger(cancel_on_kill=False), None, then=lambda: _require(built, NOT_AT_THE_GATE))
        assert "its triggerer was shut down" in _last_message(built)


@pytest.mark.parametrize("stopped_before", [False, True], ids=["running", "let run"])
def test_the_end_of_the_loop_is_the_end_of_the_operation_and_on_record(
    built: Database, caplog: pytest.LogCaptureFixture, stopped_before: bool
) -> None:
    """A triggerer's loop ends by cancelling every task in it."""

    async def main() -> None:
        task = asyncio.create_task(_events(_trigger(cancel_on_kill=False)))
        await asyncio.to_thread(until, built, AT_THE_GATE)
        if stopped_before:
            task.cancel(USER_ACTION)
            await asyncio.wait([task])

    with gate_closed(built):
        asyncio.run(main())
        until(built, NOT_AT_THE_GATE, seconds=1.5)
        assert _last_message(built).endswith(
            ("its triggerer was shut down, and the next one begins anew.", "its process was told to end.")
        )
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_trigger_may_be_cancelled_at_its_very_beginning(built: Database) -> None:
    async def cancelled_after(steps: int, message: str | None) -> None:
        task = asyncio.create_task(_events(_trigger(deferral=f"{steps} {message}")))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel(message)
        with pytest.raises(asyncio.CancelledError):
            await task

    for steps in range(6):
        for message in (None, USER_ACTION):
            asyncio.run(cancelled_after(steps, message))
    assert built.rows("SELECT status FROM matviews.mat_view_runs WHERE status IN (1, 2)") == []
    assert _times_built(built) == 0


def test_a_trigger_that_is_cancelled_while_it_connects_does_not_begin(
    built: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_connection(monkeypatch, built, port=silent.getsockname()[1])

        async def main() -> None:
            task = asyncio.create_task(_events(_trigger()))
            client, _ = await asyncio.to_thread(silent.accept)
            task.cancel(USER_ACTION)
            await asyncio.sleep(0)
            client.close()
            silent.close()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
    assert built.rows(HISTORY) == []


def test_a_deadline_that_is_past_is_an_error_and_nothing_begins(built: Database) -> None:
    event = _fire(_trigger(deadline=time.time() - 1, timeout=7.5))
    error = unpack_error(event["error"])
    assert type(error) is OperationTimedOut
    assert "Timed out after 7.5 s, before a triggerer took it up." in str(error)
    assert "triggerer" in (error.hint or "")
    assert built.rows(HISTORY) == []


def test_a_deadline_ends_the_query_and_the_record_and_the_event_say_the_same(built: Database) -> None:
    with gate_closed(built):
        error = unpack_error(_fire(_trigger(deadline=time.time() + 0.5))["error"])
        _require(built, NOT_AT_THE_GATE)
    assert type(error) is OperationTimedOut
    run = hook_on(built).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["class"], run.error["message"]) == ("failed", "OperationTimedOut", error.message)


def test_the_story_of_a_deferred_timeout_names_the_time_that_was_given(built: Database) -> None:
    """And not what was left of it when a triggerer took it up."""
    trigger = _trigger(arguments={**PATIENT, "timeout": 1}, timeout=1.0, deadline=time.time() + 0.6)
    with gate_closed(built):
        error = unpack_error(_fire(trigger)["error"])
    assert type(error) is OperationTimedOut
    assert error.message.startswith("Timed out after 1 s")


# Errors as events


_OURS = [
    kind
    for kind in vars(exceptions).values()
    if isinstance(kind, type) and issubclass(kind, MatViewError) and kind.__module__ == exceptions.__name__
]
_MORE: dict[type[MatViewError], dict[str, Any]] = {
    DependentsExist: {"dependents": ["view a", "view b"]},
    WouldBeLost: {"attachments": ["its comment"]},
}


def _transported(error: BaseException) -> Exception:
    return unpack_error(json.loads(json.dumps(pack_error(error))))


@pytest.mark.parametrize("hint", [None, 'run: DROP VIEW "ä"; -- 100%'])
@pytest.mark.parametrize("kind", _OURS, ids=lambda kind: kind.__name__)
def test_our_own_errors_arrive_as_they_left(kind: type[MatViewError], hint: str | None) -> None:
    assert len(_OURS) > 10
    error = kind("mv: what happened,\nand why", hint=hint, **_MORE.get(kind, {}))
    error.add_note("a note")
    error.add_note("another")
    again = _transported(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert isinstance(again, MatViewError)
    assert (again.message, again.hint, again.args) == (error.message, hint, error.args)
    assert again.__notes__ == ["a note", "another"]
    assert getattr(again, "sqlstate", None) == getattr(error, "sqlstate", None)
    assert again.response is None


@pytest.mark.parametrize("kind", _MORE, ids=lambda kind: kind.__name__)
def test_what_an_error_of_ours_has_more_arrives_too(kind: type[MatViewError]) -> None:
    again = _transported(kind("what happened", **_MORE[kind]))
    for name, value in _MORE[kind].items():
        assert getattr(again, name) == tuple(value)


@pytest.mark.parametrize(
    "kind",
    [
        psycopg.OperationalError,
        psycopg.InterfaceError,
        psycopg.errors.DivisionByZero,
        psycopg.errors.UniqueViolation,
        psycopg.errors.QueryCanceled,
        psycopg.errors.AdminShutdown,
        psycopg.errors.ConnectionTimeout,
        psycopg.errors.RaiseException,
    ],
    ids=lambda kind: kind.__name__,
)
def test_errors_of_psycopg_arrive_as_they_left(kind: type[psycopg.Error]) -> None:
    error = kind("what happened\nDETAIL:  why")
    error.add_note("a note")
    again = _transported(error)
    assert type(again) is kind
    assert isinstance(again, psycopg.Error)
    assert (str(again), again.sqlstate, again.__notes__) == (str(error), error.sqlstate, ["a note"])


class _Strange(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [_Strange(1, 2), OSError(2, "No such file"), KeyError("x")], ids=repr)
def test_an_error_of_somebody_else_is_named_with_its_text(error: Exception) -> None:
    error.add_note("a note")
    again = _transported(error)
    assert type(again) is RuntimeError
    assert str(again) == f"{type(error).__name__}: {error}"
    assert again.__notes__ == ["a note"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("airflow_provider_matviews.exceptions", "OfTomorrow"),
        ("airflow_provider_matviews.gone", "OfYesterday"),
        ("airflow_provider_matviews.exceptions", "Sequence"),
        ("psycopg.errors", "lookup"),
        ("os", "system"),
    ],
)
def test_a_class_that_this_version_does_not_have_is_named_with_its_text(module: str, name: str) -> None:
    """Triggerer and worker may be of two versions while they are being upgraded."""
    packed = {"module": module, "class": name, "message": "what happened", "hint": None, "notes": []}
    again = unpack_error(packed)
    assert (type(again), str(again)) == (RuntimeError, f"{name}: what happened")


def test_an_error_of_the_server_arrives_with_its_class_text_and_advice(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS n", "CREATE MATERIALIZED VIEW mv AS SELECT 1 / n AS x FROM t")
    db.execute("UPDATE t SET n = 0")
    error = unpack_error(_fire(_trigger())["error"])
    assert type(error) is psycopg.errors.DivisionByZero
    assert str(error).startswith("division by zero")
    role = db.role()
    db.execute("CREATE MATERIALIZED VIEW other AS SELECT 1 AS x")
    with db.connect() as connection:
        connection.execute(sql.SQL("ALTER MATERIALIZED VIEW other OWNER TO {}").format(sql.Identifier(role)))
    refused = _trigger(operation="create", subject=MatViewDefinition(name="o", sql="SELEC").to_dict(), arguments={})
    assert issubclass(type(unpack_error(_fire(refused)["error"])), (MatViewError, psycopg.Error))
    with pytest.raises(psycopg.errors.DivisionByZero) as direct:
        hook_on(db).refresh("mv")
    assert getattr(error, "__notes__", []) == getattr(direct.value, "__notes__", [])
    assert str(error) == str(direct.value)


def test_a_connection_that_does_not_exist_is_an_event_too(db: Database) -> None:
    error = unpack_error(_fire(_trigger(conn_id="nowhere"))["error"])
    assert "nowhere" in str(error)


@pytest.mark.parametrize("password", ["hunter2-secret", "it's quoted", "back\\slash", "with space/and:signs@"])
def test_the_password_is_in_no_event(db: Database, monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    set_connection(monkeypatch, db, password=password)
    db.execute("CREATE TABLE words (word text)", "CREATE MATERIALIZED VIEW mv AS SELECT word::integer FROM words")
    with db.connect() as connection:
        connection.execute("INSERT INTO words VALUES (%s)", [f"password={password}"])
    literal = sql.Literal(f"password={password}").as_string(None)
    wrong = MatViewDefinition(name="other", sql=f"SELECT {literal}::integer AS a").to_dict()
    far = MatViewDefinition(name="other", sql=f"SELECT {literal}{' ' * 40}, nothing").to_dict()
    for trigger in (
        _trigger(),
        _trigger(deferral="2", operation="create", subject=wrong, arguments={}),
        _trigger(deferral="3", operation="create", subject=far, arguments={}),
    ):
        told = _fire(trigger)["error"]
        assert "***" in told["message"]
        for text in (told["message"], told["hint"] or "", *told["notes"]):
            for form in (password, sql.Literal(password).as_string(None).strip(" E'")):
                assert form not in text


def test_the_password_is_not_in_the_event_of_a_success_either(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a swap was not possible is told in the words of the server, which may repeat a view's query."""
    set_connection(monkeypatch, db, password="hunter2-secret")
    db.execute(
        "CREATE MATERIALIZED VIEW mv AS SELECT 'password=hunter2-secret'::text AS x",
        """
        CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'not allowed: %', regexp_replace(current_query(), '\\s+', ' ', 'g'); END$$
        """,
        "CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('CREATE MATERIALIZED VIEW') "
        "EXECUTE FUNCTION refuse()",
    )
    event = _fire(_trigger())
    assert "not allowed" in event["summary"]["reason"]
    assert "hunter2" not in json.dumps(event)
    assert "hunter2" not in str(db.rows("SELECT r::text FROM matviews.mat_view_runs r"))


# Operators


MODES = (False, True)


def _both(
    make: Callable[[bool], None], between: Callable[[], None] = lambda: None, name: str = "modes"
) -> list[DagRun]:
    """Run a DAG in both modes and return how it went in each.

    :param make: puts the tasks into the DAG, deferrable or not.
    :param between: makes the scene for the second one what it was for the first.
    """
    runs = []
    for deferrable in MODES:
        if deferrable:
            between()
        with DAG(f"{name}_{'deferred' if deferrable else 'plain'}", schedule=None) as dag:
            make(deferrable)
        run = run_dag(dag)
        assert ("Deferred: the triggerer carries out the" in run.log) is deferrable, (
            "it was really deferred, or really was not"
        )
        runs.append(run)
    return runs


def _lasting(value: Any) -> Any:
    """Return plain data without what differs between any two runs."""
    passing = {"mat_view_run_id", "duration_ms", "steps", "run_id", "dag_id", "deferral", "backtrace", "waited_ms"}
    passing |= {"server_wal_bytes"}
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in passing}
    if isinstance(value, list):
        return [_lasting(item) for item in value]
    # A name made up for once.
    return re.sub(r"_mv_[0-9a-f]{8}", "_mv_", value) if isinstance(value, str) else value


def _asset_events(run: DagRun) -> list[tuple[str, str, Any]]:
    with create_session() as session:
        query = (
            select(AssetEvent.source_task_id, AssetModel.uri, AssetEvent.extra)
            .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
            .where(AssetEvent.source_run_id == run.run_id)
        )
        found = [(task, uri, _lasting(extra)) for task, uri, extra in session.execute(query)]
    return sorted(found, key=lambda event: event[:2])


def _require_same(db: Database, runs: list[DagRun], tasks: list[str]) -> None:
    """Require that both modes left the same: states, XCom, asset events and the record."""
    plain, deferred = runs
    assert deferred.states == plain.states
    for task in tasks:
        assert _lasting(deferred.xcom(task)) == _lasting(plain.xcom(task))
    assert _asset_events(deferred) == _asset_events(plain)
    recorded: list[list[Any]] = [
        [
            (run.view, run.operation, run.status, _lasting(run.error), _lasting(run.meta))
            for run in sorted(hook_on(db).runs(limit=100), key=lambda run: str(run.meta["task_id"]))
            if run.meta["run_id"] == each.run_id
        ]
        for each in runs
    ]
    assert recorded[0], "there is something to compare"
    assert recorded[1] == recorded[0]
    assert {run.meta["dag_id"].rpartition("_")[2]: "deferral" in run.meta for run in hook_on(db).runs(limit=100)} == {
        "plain": False,
        "deferred": True,
    }


@pytest.mark.e2e
def test_create_and_refresh_leave_the_same_in_both_modes(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT generate_series(1, 3) AS id")
    declared = MatViewDefinition(
        name="declared", sql="SELECT id FROM t", unique_index_columns=["id"], timeouts={"timeout": 50}
    )

    def make(deferrable: bool) -> None:
        both: dict[str, Any] = {"deferrable": deferrable, "row_count_strategy": "exact"}
        (
            CreateMatViewOperator(
                task_id="from_sql",
                view="mv",
                sql="SELECT id FROM t WHERE id <> {{ 1 + 1 }}",
                unique_index_columns=["id"],
                outlets=[Asset("views://mv"), AssetAlias("made")],
                **both,
            )
            >> CreateMatViewOperator(task_id="again", view="mv", sql="SELECT id FROM t WHERE id <> 2", **both)
            >> CreateMatViewOperator(
                task_id="from_definition", definition=declared, outlets=[AssetAlias("made")], **both
            )
            >> RefreshMatViewOperator(
                task_id="refresh",
                view="mv",
                refresh_strategy=RefreshStrategy.SWAP,
                session_settings={"work_mem": "8MB"},
                outlets=[Asset("views://mv"), AssetAlias("renewed")],
                execution_timeout=timedelta(minutes=5),
                **both,
            )
            >> RefreshMatViewOperator(
                task_id="refresh_definition", definition=declared.to_dict(), timeout=30, vacuum=True, **both
            )
        )

    def again() -> None:
        db.execute("DROP MATERIALIZED VIEW mv", "DROP MATERIALIZED VIEW declared")

    runs = _both(make, again)
    assert set(runs[0].states.values()) == {"success"}
    assert len(_asset_events(runs[0])) == 6
    assert runs[0].xcom("refresh")["row_count_after"] == 2
    _require_same(db, runs, list(runs[0].states))


def test_a_failure_leaves_the_same_in_both_modes(db: Database) -> None:
    db.execute("CREATE TABLE t AS SELECT 1 AS n", "CREATE MATERIALIZED VIEW mv AS SELECT 1 / n AS x FROM t")
    db.execute("UPDATE t SET n = 0")
    raised: list[tuple[type[BaseException], str, list[str]]] = []

    def note(context: Any) -> None:
        error = context["exception"]
        raised.append((type(error), str(error), getattr(error, "__notes__", [])))

    def make(deferrable: bool) -> None:
        for task_id, more in (
            ("server", {"refresh_strategy": "regular"}),
            ("ours", {"refresh_strategy": "concurrent"}),
            ("misuse", {"refresh_strategy": "fast"}),
        ):
            RefreshMatViewOperator(
                task_id=task_id,
                view="mv",
                deferrable=deferrable,
                outlets=[AssetAlias("never")],
                on_failure_callback=note,
                **more,
            )

    runs = _both(make, name="failing")
    assert runs[0].states == {"server": "failed", "ours": "failed", "misuse": "failed"}
    assert len(raised) == 6
    assert sorted(raised[3:], key=str) == sorted(raised[:3], key=str)
    assert {kind for kind, _, _ in raised} == {
        psycopg.errors.DivisionByZero,
        exceptions.ConcurrentRefreshRefused,
        InvalidDefinition,
    }
    _require_same(db, runs, [])


def test_standing_back_leaves_the_same_in_both_modes(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS x")

    def make(deferrable: bool) -> None:
        RefreshMatViewOperator(
            task_id="skip", view="mv", if_locked="skip", outlets=[AssetAlias("never")], deferrable=deferrable
        )
        RefreshMatViewOperator(task_id="fail", view="mv", if_locked="fail", deferrable=deferrable)

    with _view_locked(db):
        runs = _both(make, name="locked")
    assert runs[0].states == {"skip": "skipped", "fail": "failed"}
    assert _asset_events(runs[0]) == []
    _require_same(db, runs, [])


def test_airflows_setting_says_whether_operators_are_deferrable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not RefreshMatViewOperator(task_id="t", view="mv").deferrable
    monkeypatch.setenv("AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE", "True")
    # Read when the modules load: they are loaded a second time, beside those that other tests use.
    for name in ("base", "fleet", "matview"):
        module = f"{operators.__package__}.{name}"
        # What is put aside comes back when the test ends, as what the package says of it.
        monkeypatch.setattr(module, sys.modules[module])
        monkeypatch.delitem(sys.modules, module)
    again = importlib.import_module(operators.__name__)
    assert again is not operators
    assert again.RefreshMatViewOperator(task_id="t", view="mv").deferrable
    assert again.CreateMatViewOperator(task_id="t", view="mv").deferrable
    assert again.RefreshMatViewsOperator(task_id="t", views=["mv"]).deferrable
    assert not again.RefreshMatViewOperator(task_id="t", view="mv", deferrable=False).deferrable


def _deferred(operator: Any) -> TaskDeferred:
    whose = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute({"ti": whose})
    return deferred.value


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, 86400),
        ({"timeout": 30}, 30),
        ({"timeout": 0.5}, 0.5),
        # A little less, so that the server is stopped in time.
        ({"execution_timeout": timedelta(seconds=10)}, 9),
        ({"execution_timeout": timedelta(seconds=600)}, 595),
        ({"execution_timeout": timedelta(seconds=600), "timeout": 30}, 30),
        ({"execution_timeout": timedelta(seconds=10), "timeout": 30}, 9),
        ({"statement_timeout": 30, "max_wait": 20, "lock_timeout": 10}, 86400),
    ],
    ids=str,
)
def test_a_deferral_always_ends(given: dict[str, Any], seconds: float) -> None:
    """Airflow itself applies no execution_timeout to a deferred task."""
    for operator in (
        RefreshMatViewOperator(task_id="t", view="mv", deferrable=True, **given),
        CreateMatViewOperator(task_id="t", view="mv", sql="SELECT 1 AS x", deferrable=True, **given),
    ):
        before = time.time()
        deferred = _deferred(operator)
        assert deferred.timeout == timedelta(seconds=seconds + 60)
        assert deferred.method_name == "execute_complete"
        assert deferred.trigger.timeout == seconds
        assert before + seconds <= deferred.trigger.deadline <= time.time() + seconds


def test_a_limit_that_the_definition_sets_is_one_for_the_deferral_too() -> None:
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS x", timeouts={"timeout": 2 * 86400})
    operator = RefreshMatViewOperator(task_id="t", definition=definition, deferrable=True)
    assert _deferred(operator).timeout == timedelta(days=2, seconds=60)


def test_each_deferral_has_a_token_of_its_own() -> None:
    operator = RefreshMatViewOperator(task_id="t", view="mv", deferrable=True)
    assert _deferred(operator).trigger.deferral != _deferred(operator).trigger.deferral


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"max_wait": -1}, {"lock_timeout": True}], ids=str)
def test_impossible_limits_are_refused_before_the_deferral(wrong: dict[str, Any]) -> None:
    operator = RefreshMatViewOperator(task_id="t", view="mv", deferrable=True, **wrong)
    whose = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1)
    with pytest.raises(InvalidDefinition, match=next(iter(wrong))):
        operator.execute({"ti": whose})


def test_a_trigger_fires_no_sooner_than_it_may_and_the_work_does_not_wait_for_that(built: Database) -> None:
    async def fire() -> None:
        trigger = _trigger(not_before=time.time() + 1)
        firing = asyncio.ensure_future(anext(trigger.run()))
        await asyncio.to_thread(until, built, "SELECT count(*) = 1 FROM matviews.mat_view_runs WHERE status = 2")
        assert not firing.done()
        assert (await firing).payload["summary"]["status"] == "updated"
        assert time.time() >= trigger.not_before

    asyncio.run(fire())


def test_an_operator_gives_the_scheduler_time_to_note_the_deferral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_matviews.operators.base.SETTLING", 3.0)
    before = time.time()
    with pytest.raises(TaskDeferred) as deferred:
        RefreshMatViewOperator(task_id="t", view="mv", deferrable=True).execute({"ti": _TaskInstance()})
    assert deferred.value.trigger.serialize()[1]["not_before"] == pytest.approx(before + 3, abs=1)


class _TaskInstance:
    dag_id, task_id, run_id, map_index, try_number = "d", "t", "r", -1, 1
