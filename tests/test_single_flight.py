"""One operation on a view at a time, by the view's lock; and only a run that nobody runs any more is called lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest

from airflow_provider_matviews.definition import IfLocked, MatViewDefinition
from airflow_provider_matviews.exceptions import ViewLocked
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.create import Creating, create_view
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Command, Instruction, Query, Result, Session, Work
from airflow_provider_matviews.services.ledger import Ledger, Operation
from airflow_provider_matviews.services.response import ServiceResponse
from airflow_provider_matviews.services.run import Prepared, Subject, Terms, record_run
from tests.conftest import Database, hook_on
from tests.killing import work
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

HISTORY: LiteralString = "SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id"
#: True while somebody pauses who asked for a view's lock in vain.
WAITING: LiteralString = """
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'
                   AND query LIKE 'ROLLBACK /* waits%'
                   AND state_change < clock_timestamp() - interval '0.2 s')
"""
#: Who is not kept off by the view's lock is to fail at the next one, and not to hang.
BRIEFLY: dict[str, Any] = {"lock_timeout": 0.2, "max_wait": 0.2}
OVERLAPS: LiteralString = """
    SELECT count(*) FROM (SELECT row_number() OVER () AS n, tstzrange(began, ended) AS span FROM spans) a
    JOIN (SELECT row_number() OVER () AS n, tstzrange(began, ended) AS span FROM spans) b
      ON a.n < b.n AND a.span && b.span
"""


@contextmanager
def refreshing(db: Database) -> Iterator[tuple[Future[ServiceResponse], Callable[[], None]]]:
    """Yield a refresh of ``mv`` that is under way, and what lets it go on."""
    db.execute(
        "CREATE TABLE source AS SELECT 1 AS id",
        GATE,
        "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM source WITH NO DATA",
    )
    with (
        gate_closed(db) as let_go_on,
        # The gate is a lock, and not one that is to be stepped back from.
        beside(lambda: hook_on(db).refresh("mv", lock_timeout=60), let_go_on) as running,
    ):
        until(db, AT_THE_GATE)
        yield running, let_go_on


def test_wait_runs_after_the_other_operation(each_db: Database) -> None:
    with refreshing(each_db) as (first, let_go_on), beside(lambda: hook_on(each_db).refresh("mv"), let_go_on) as second:
        until(each_db, WAITING)
        assert each_db.rows(HISTORY) == [("running", None)]
        let_go_on()
        assert first.result().success
        assert second.result().success
    assert each_db.rows(HISTORY) == [("success", None), ("success", None)]
    assert each_db.value(
        "SELECT max(finished_at) FILTER (WHERE id = 1) <= max(started_at) FILTER (WHERE id = 2) "
        "FROM matviews.mat_view_runs"
    )


def test_skip_is_recorded_as_skipped_with_the_reason_and_touches_nothing(db: Database) -> None:
    with refreshing(db) as (first, let_go_on):
        response = hook_on(db).refresh("mv", if_locked="skip", **BRIEFLY)
        assert db.rows(HISTORY) == [("running", None), ("skipped", None)]
        assert not first.done()
        let_go_on()
        assert first.result().success
    assert response.status == "skipped"
    assert response.success
    assert response.response["reason"] == "another operation on the view is running"
    run, other = hook_on(db).runs("mv")
    assert (run.id, run.status, run.error) == (response.run_id, "skipped", None)
    assert run.duration_ms is not None
    assert run.started_at is not None
    assert run.finished_at is not None
    assert run.finished_at - run.started_at == timedelta(milliseconds=run.duration_ms)
    assert run.meta["response"]["reason"] == response.response["reason"]
    assert db.value("SELECT status FROM matviews.mat_view_runs WHERE id = %s", (run.id,)) == 4
    assert other.status == "success"


def test_fail_raises_and_is_recorded_as_skipped_not_failed(db: Database) -> None:
    with refreshing(db), pytest.raises(ViewLocked, match="mv is being worked on by another operation") as raised:
        hook_on(db).refresh("mv", if_locked="fail", **BRIEFLY)
    assert raised.value.response is not None
    assert raised.value.response.run_id == 2
    assert not raised.value.response.success
    assert db.rows(HISTORY) == [("success", None), ("skipped", None)]


def test_a_wait_that_is_over_raises_and_is_recorded_as_skipped_not_failed(db: Database) -> None:
    with refreshing(db), pytest.raises(ViewLocked, match=r"longer than max_wait=0\.2 s"):
        hook_on(db).refresh("mv", if_locked="wait", **BRIEFLY)
    assert db.rows(HISTORY) == [("success", None), ("skipped", None)]


@pytest.mark.parametrize(("operation", "word"), [("create", "create"), ("refresh", "refresh"), ("delete", "drop")])
def test_every_operation_stands_back(db: Database, operation: str, word: str) -> None:
    subject: Any = MatViewDefinition(name="mv", sql="SELECT 1 AS a") if operation == "create" else "mv"
    hook = hook_on(db)
    with refreshing(db):
        with pytest.raises(ViewLocked):
            getattr(hook, operation)(subject, if_locked="fail", **BRIEFLY)
        assert getattr(hook, operation)(subject, if_locked="skip", **BRIEFLY).status == "skipped"
    assert [(run.operation, run.status) for run in hook.runs("mv")] == [
        (word, "skipped"),
        (word, "skipped"),
        ("refresh", "success"),
    ]


def test_one_view_by_two_names_is_one_view(db: Database) -> None:
    with refreshing(db), pytest.raises(ViewLocked):
        hook_on(db).refresh(' "public" . MV', if_locked="fail", **BRIEFLY)


@pytest.mark.parametrize(("one", "other"), [("mv", "mw"), ("a.mv", "b.mv"), ("mv", '"MV"'), ('"a.b".c', 'a."b.c"')])
def test_operations_on_different_views_do_not_meet(db: Database, one: str, other: str) -> None:
    db.execute("CREATE SCHEMA a", "CREATE SCHEMA b", 'CREATE SCHEMA "a.b"', GATE)
    hook = hook_on(db)
    hook.create(MatViewDefinition(name=one, sql="SELECT gate()"), with_data=False)
    hook.create(MatViewDefinition(name=other, sql="SELECT 1 AS a"))
    with gate_closed(db) as let_go_on, beside(lambda: hook_on(db).refresh(one, lock_timeout=60), let_go_on):
        until(db, AT_THE_GATE)
        assert hook.refresh(other, if_locked="fail", **BRIEFLY).success


def test_many_at_once_run_one_after_the_other(db: Database) -> None:
    workers = 6
    db.execute(
        "CREATE TABLE spans (began timestamptz, ended timestamptz)",
        """
        CREATE FUNCTION logged() RETURNS integer LANGUAGE plpgsql AS $$
        DECLARE began timestamptz = clock_timestamp();
        BEGIN
            PERFORM pg_sleep(0.01);
            INSERT INTO public.spans VALUES (began, clock_timestamp());
            RETURN 1;
        END$$
        """,
        "CREATE MATERIALIZED VIEW mv AS SELECT logged() WITH NO DATA",
    )
    barrier = threading.Barrier(workers)

    def refresh() -> str | None:
        hook = hook_on(db)
        hook.definitions()
        barrier.wait()
        return hook.refresh("mv").status

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(refresh) for _ in range(workers)]
    assert [future.result() for future in futures] == ["updated"] * workers
    assert db.rows("SELECT count(*) FROM spans") == [(workers,)]
    assert db.rows(OVERLAPS) == [(0,)]
    assert db.rows("SELECT status, count(*) FROM matviews.mat_view_runs GROUP BY 1") == [(2, workers)]
    # Nor does the record say that they overlapped.
    db.execute("TRUNCATE spans", "INSERT INTO spans SELECT started_at, finished_at FROM matviews.mat_view_runs")
    assert db.rows(OVERLAPS) == [(0,)]


@pytest.mark.parametrize("if_locked", ["skip", "fail", "wait"])
def test_a_live_run_is_never_called_lost(db: Database, if_locked: str) -> None:
    with refreshing(db) as (first, let_go_on):
        with ThreadPoolExecutor(1) as pool:
            # ViewLocked or not: what matters is what it says of the other one.
            pool.submit(lambda: hook_on(db).refresh("mv", if_locked=if_locked, **BRIEFLY)).exception()
        assert db.rows(HISTORY) == [("running", None), ("skipped", None)]
        let_go_on()
        assert first.result().success
    assert db.rows(HISTORY) == [("success", None), ("skipped", None)]


@pytest.mark.parametrize("operation", ["create", "refresh", "delete"])
def test_whoever_next_holds_the_lock_finds_every_orphan_of_the_view_and_no_other(
    db: Database, operation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a")
    hook.create(definition)
    hook.create(MatViewDefinition(name="other", sql="SELECT 1 AS a"))
    db.execute(
        "UPDATE matviews.mat_view_runs SET status = 1, finished_at = NULL, duration_ms = NULL",
        "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation) VALUES (1, 1, 1), (1, 1, 2)",
    )
    subject: Any = definition if operation == "create" else "mv"
    getattr(hook, operation)(subject)
    log = capsys.readouterr().out
    newest, *lost = hook.runs("mv")
    assert newest.status in ("success", "skipped")
    assert len(lost) == 3
    for run in lost:
        assert (run.status, run.duration_ms) == ("failed", None)
        assert run.finished_at is not None
        assert run.error is not None
        assert run.error["class"] == "RunLost"
        assert "ended without a word" in run.error["message"]
        assert {"message", "class", "sqlstate", "backtrace"} <= set(run.error)
        assert f"Run {run.id} of mv had ended without a word" in log
    assert [run.status for run in hook.runs("other")] == ["running"]


class Meddled(Driver):
    """Lets something happen once, before a statement with a certain word in it."""

    def __init__(self, db: Database, word: str, meddle: Callable[[Driver], None]) -> None:
        super().__init__(db.connect)
        self._word, self._meddle = word, meddle
        self.meddled = False

    def _perform(self, instruction: Instruction) -> Result:
        if not self.meddled and isinstance(instruction, Query) and self._word in instruction.statement.as_string(None):
            self.meddled = True
            self._meddle(self)
        return super()._perform(instruction)


def test_a_run_whose_process_speaks_late_keeps_its_own_error(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS id, 1 AS value"))
    db.execute("TRUNCATE matviews.mat_view_runs RESTART IDENTITY")

    def lose_connection(driver: Driver) -> None:
        pid = driver._connections[Session.WORK].info.backend_pid
        assert db.value("SELECT pg_terminate_backend(%s, 10000)", (pid,))

    def be_found_by_the_next(driver: Driver) -> None:
        assert hook.refresh("mv", if_locked="fail", **BRIEFLY).success
        assert db.rows(HISTORY) == [("failed", "RunLost"), ("success", None)]

    class LosingItsConnection(Meddled):
        def _perform(self, instruction: Instruction) -> Result:
            if isinstance(instruction, Command) and instruction.text.startswith("REFRESH"):
                lose_connection(self)
            return super()._perform(instruction)

    with (
        LosingItsConnection(db, "ended AS", be_found_by_the_next) as driver,
        pytest.raises(psycopg.errors.AdminShutdown),
    ):
        driver.run(work("refresh"))
    assert driver.meddled
    assert db.rows(HISTORY) == [("failed", "AdminShutdown"), ("success", None)]
    assert db.value("SELECT duration_ms IS NOT NULL FROM matviews.mat_view_runs WHERE id = 1")


def test_a_run_that_fails_keeps_the_lock_until_its_failure_is_on_record(db: Database) -> None:
    """Otherwise the next one would call it lost, and alarm somebody for nothing."""
    db.execute("CREATE TABLE source AS SELECT 1 AS id")
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 / id AS one FROM source"))
    db.execute("UPDATE source SET id = 0", "TRUNCATE matviews.mat_view_runs")

    def come_next(driver: Driver) -> None:
        with pytest.raises(ViewLocked):
            hook.refresh("mv", if_locked="fail", **BRIEFLY)
        assert db.rows(HISTORY) == [("running", None), ("skipped", None)]

    with Meddled(db, "ended AS", come_next) as driver, pytest.raises(psycopg.errors.DivisionByZero):
        driver.run(work("refresh"))
    assert driver.meddled
    assert db.rows(HISTORY) == [("failed", "DivisionByZero"), ("skipped", None)]


def test_who_stands_back_does_not_overwrite_what_is_being_declared(db: Database) -> None:
    """The loser of the lock looks for the definition's row before the winner writes it, and writes after it."""
    hook_on(db).definitions()
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", comment="declared")
    loser_looked, winner_declared = threading.Event(), threading.Event()

    def create(prepared: Prepared) -> Work[ServiceResponse]:
        return create_view(Creating(prepared.view, prepared.view, definition, prepared.server, prepared.report))

    def creating(terms: Terms) -> Work[ServiceResponse]:
        subject = Subject(ViewName("mv"), definition)
        return record_run(Operation.CREATE, subject, Ledger("matviews"), terms, create)

    def loser_goes_on_later(driver: Driver) -> None:
        loser_looked.set()
        assert winner_declared.wait(20)

    def lose() -> str | None:
        with Meddled(db, "INSERT INTO", loser_goes_on_later) as driver:
            return driver.run(creating(Terms(IfLocked.SKIP))).status

    with ThreadPoolExecutor(1) as pool:
        losing: list[Future[str | None]] = []

        def loser_comes_in_between(driver: Driver) -> None:
            losing.append(pool.submit(lose))
            assert loser_looked.wait(20)

        try:
            with Meddled(db, "INSERT INTO", loser_comes_in_between) as driver:
                assert driver.run(creating(Terms())).status == "created"
        finally:
            winner_declared.set()
        assert losing[0].result() == "skipped"
    (record,) = hook_on(db).definitions()
    assert record.managed
    assert record.sql == definition.sql
    assert record.declaration == definition.to_dict()


def test_hooks_with_two_records_share_the_lock_and_nothing_else(db: Database) -> None:
    other = hook_on(db, tracking_schema="other")
    with refreshing(db) as (first, let_go_on):
        assert other.refresh("mv", if_locked="skip", **BRIEFLY).status == "skipped"
        assert [run.status for run in other.runs()] == ["skipped"]
        assert [run.status for run in hook_on(db).runs()] == ["running"]
        let_go_on()
        assert first.result().success
    db.execute(
        "UPDATE matviews.mat_view_runs SET status = 1, finished_at = NULL",
        "UPDATE other.mat_view_runs SET status = 1, finished_at = NULL",
    )
    assert other.refresh("mv").success
    assert [run.status for run in other.runs()] == ["success", "failed"]
    assert [run.status for run in hook_on(db).runs()] == ["running"]
    assert hook_on(db).refresh("mv").success
    assert [run.status for run in hook_on(db).runs()] == ["success", "failed"]


def test_somebody_elses_bare_refresh_is_waited_for_too(db: Database) -> None:
    """The view was never declared, so its query is read for the record, which needs a lock as well."""
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    hook_on(db).definitions()
    blocked: LiteralString = "EXISTS (SELECT FROM pg_locks WHERE relation = 'mv'::regclass AND NOT granted)"
    with db.connect() as somebody:
        somebody.execute("BEGIN")
        somebody.execute("REFRESH MATERIALIZED VIEW mv")
        with beside(lambda: hook_on(db).refresh("mv", lock_timeout=0.05), somebody.close) as refresh:
            until(db, f"SELECT {blocked}")
            until(db, f"SELECT NOT {blocked}")
            somebody.execute("COMMIT")
            assert refresh.result().success
    assert db.rows(HISTORY) == [("success", None)]
