"""Orphans: runs that nobody ended are found and marked, and only those."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.exceptions import MissingPrivilege
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Instruction, Query, Result, Session
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.reap import reap_runs
from airflow_provider_matviews.services.response import ServiceResponse
from tests.conftest import Database, hook_on
from tests.driving import InterruptedDriver, refreshing
from tests.killing import Gallows, Order, gallows
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

HISTORY: LiteralString = "SELECT id, status, error_class FROM matviews.mat_view_run_history ORDER BY id"
MATVIEWS: LiteralString = "SELECT relname FROM pg_class WHERE relkind = 'm' ORDER BY 1"
NAMES = ["mv", "reports.mv", '"Odd Näme"', '"a.b".c', 'a."b.c"', '"100%s %(x)s"', '"it\'s"', '"say ""hi"""']


def _declare(db: Database, *names: str) -> None:
    """Make views that have been created and nothing since, and no run of theirs on record."""
    db.execute("CREATE SCHEMA reports", "CREATE SCHEMA a", 'CREATE SCHEMA "a.b"')
    hook = hook_on(db)
    hook.definitions()
    for name in names:
        hook.create(MatViewDefinition(name=name, sql="SELECT 1 AS id, 1 AS value"))
    db.execute("TRUNCATE matviews.mat_view_runs RESTART IDENTITY")


def _orphan(db: Database, view: str) -> int:
    """Record a refresh as the process leaves it that is killed in the middle of it."""
    return int(
        db.value(
            "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, started_at, meta) "
            "SELECT id, 1, 1, clock_timestamp(), '{}' FROM matviews.mat_view_definitions WHERE name = %s RETURNING id",
            (view,),
        )
    )


@contextmanager
def _locked(db: Database, schema: str, name: str) -> Iterator[None]:
    """Hold a view's lock as an operation on it does."""
    with db.connect() as other, other.transaction():
        key = lock_key(ResolvedName(schema, name, name)).as_string(None)
        other.execute(f"SELECT pg_advisory_xact_lock({key})".encode())
        yield


@contextmanager
def _refreshing(db: Database, view: str) -> Iterator[tuple[Future[ServiceResponse], Callable[[], None]]]:
    """Yield a refresh that is under way, of a view with ``gate()`` in it, and what lets it go on."""
    with (
        gate_closed(db) as open_gate,
        beside(lambda: hook_on(db).refresh(view, lock_timeout=60), open_gate) as running,
    ):
        until(db, AT_THE_GATE)
        yield running, open_gate


@pytest.fixture(scope="module")
def killing() -> Iterator[Gallows]:
    with gallows() as started:
        yield started


def test_a_killed_process_leaves_an_orphan_that_is_found(each_db: Database, killing: Gallows) -> None:
    _declare(each_db, "mv")
    each_db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    for at in range(1, 60):
        end = killing.run(Order(each_db.dsn(), "refresh", at))
        if not end.killed or end.statement.partition(": ")[2].startswith("REFRESH"):
            break
    assert end.killed, "it died in the middle of its refresh"
    until(
        each_db,
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'victim' "
        "AND datname = current_database())",
    )
    ((run_id, *_),) = [row for row in each_db.rows(HISTORY) if row[1] == "running"]
    assert hook_on(each_db).reap() == [run_id]
    run = hook_on(each_db).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.id, run.status, run.error["class"], run.duration_ms) == (run_id, "failed", "RunLost", None)
    assert run.finished_at is not None
    assert "ended without a word" in run.error["message"]
    assert {"message", "class", "sqlstate", "backtrace"} <= set(run.error)


def test_orphans_of_all_views_are_found_whatever_they_are_called(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    _declare(db, *NAMES)
    ids = [_orphan(db, name) for name in NAMES for _ in range(2)]
    assert len(set(ids)) == 2 * len(NAMES)
    assert sorted(hook_on(db).reap()) == ids
    assert db.rows(HISTORY) == [(run_id, "failed", "RunLost") for run_id in ids]
    log = capsys.readouterr().out
    assert all(f"Run {run_id} of " in log for run_id in ids)
    assert hook_on(db).reap() == [], "each is found once"
    assert len(db.rows(MATVIEWS)) == len(NAMES)


def test_the_lock_that_is_tested_is_that_of_the_view(db: Database) -> None:
    """Each name of the same lock, and none of another one's: held, its orphan stays, and all others go."""
    _declare(db, *NAMES)
    for name, schema, relation in db.rows("SELECT name, schema_name, view_name FROM matviews.mat_view_definitions"):
        db.execute("TRUNCATE matviews.mat_view_runs")
        ids = {each: _orphan(db, each) for each in NAMES}
        with _locked(db, schema, relation):
            assert sorted(hook_on(db).reap()) == sorted(set(ids.values()) - {ids[name]})
        assert hook_on(db).reap() == [ids[name]]


def test_an_orphan_of_a_view_that_was_dropped_is_found(db: Database) -> None:
    _declare(db, "mv", "reports.mv")
    ids = [_orphan(db, "mv"), _orphan(db, "reports.mv")]
    db.execute("DROP MATERIALIZED VIEW mv", "DROP SCHEMA reports CASCADE")
    assert hook_on(db).reap() == ids


def test_only_what_says_running_is_touched(db: Database) -> None:
    _declare(db, "mv")
    hook = hook_on(db)
    hook.refresh("mv")
    with _locked(db, "public", "mv"):
        hook.refresh("mv", if_locked="skip")
    with pytest.raises(psycopg.Error):
        hook.refresh("mv", session_settings={"work_mem": "64kB"}, statement_timeout=0.001)
    before = db.rows("SELECT r::text FROM matviews.mat_view_runs r ORDER BY id")
    lost = _orphan(db, "mv")
    assert hook.reap() == [lost]
    assert db.rows(f"SELECT r::text FROM matviews.mat_view_runs r WHERE id <> {int(lost)} ORDER BY id") == before  # type: ignore[arg-type]


def test_without_tables_there_are_no_orphans(db: Database) -> None:
    assert hook_on(db).reap() == []
    assert hook_on(db, tracking_schema='odd % "schema"').reap() == []


def test_a_role_without_the_right_is_told_which_one(db: Database) -> None:
    _declare(db, "mv")
    _orphan(db, "mv")
    role = db.role()
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA matviews TO {}").format(sql.Identifier(role)))
    with pytest.raises(MissingPrivilege) as refused:
        hook_on(db, user=role).reap()
    assert "GRANT" in (refused.value.hint or "")
    assert db.rows(HISTORY) == [(1, "running", None)]


@pytest.mark.parametrize("blind", [False, True], ids=["superuser", "blind role"])
def test_a_live_run_is_never_taken_for_a_lost_one(db: Database, blind: bool) -> None:
    """Nor by a role that may not see what others do."""
    _declare(db, "other")
    db.execute(GATE, "CREATE MATERIALIZED VIEW mv AS SELECT gate() AS id WITH NO DATA")
    lost = _orphan(db, "other")
    reaper = hook_on(db)
    if blind:
        role = db.role()
        with db.connect() as connection:
            for grant in (
                "GRANT USAGE ON SCHEMA matviews TO {}",
                "GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA matviews TO {}",
            ):
                connection.execute(sql.SQL(grant).format(sql.Identifier(role)))  # type: ignore[arg-type]
        reaper = hook_on(db, user=role)
    with _refreshing(db, "mv") as (running, open_gate):
        assert reaper.reap() == [lost]
        assert reaper.reap() == []
        assert not running.done()
        open_gate()
        assert running.result().success
    assert [status for _, status, _ in db.rows(HISTORY)] == ["failed", "success"]


def test_a_run_beside_its_own_orphan_is_left_alone_with_it(db: Database) -> None:
    """While the lock is held nothing is proved; whoever holds it marks the orphan."""
    _declare(db, "mv")
    lost = _orphan(db, "mv")
    with _locked(db, "public", "mv"):
        assert hook_on(db).reap() == []
        assert db.rows(HISTORY) == [(lost, "running", None)]
    assert hook_on(db).reap() == [lost]


def _marks(instruction: Instruction) -> bool:
    return isinstance(instruction, Query) and instruction.statement.as_string(None).startswith("UPDATE")


class _Between(Driver):
    """Does something once, between the look for runs and the first test of a lock."""

    def __init__(self, db: Database, deed: Callable[[], None]) -> None:
        super().__init__(db.connect)
        self._deed = deed
        self.done = False

    def _perform(self, instruction: Instruction) -> Result:
        if not self.done and _marks(instruction):
            self.done = True
            self._deed()
        return super()._perform(instruction)


def test_a_run_that_begins_while_orphans_are_looked_for_is_left_alone(db: Database) -> None:
    db.execute(GATE)
    _declare(db)
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT gate() AS id"))
    db.execute("TRUNCATE matviews.mat_view_runs RESTART IDENTITY")
    lost = _orphan(db, "mv")
    with ThreadPoolExecutor(1) as pool, gate_closed(db) as open_gate:
        refreshes: list[Future[ServiceResponse]] = []

        def begin() -> None:
            refreshes.append(pool.submit(lambda: hook_on(db).refresh("mv", lock_timeout=60)))
            until(db, AT_THE_GATE)

        try:
            with _Between(db, begin) as driver:
                assert driver.run(reap_runs(Ledger("matviews"))) == []
            # Its own beginning has marked the orphan.
            assert db.rows(HISTORY) == [(lost, "failed", "RunLost"), (lost + 1, "running", None)]
        finally:
            open_gate()
        assert refreshes[0].result().success


def test_a_run_that_ends_while_orphans_are_looked_for_keeps_its_end(db: Database) -> None:
    db.execute(GATE)
    _declare(db)
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT gate() AS id"))
    db.execute("TRUNCATE matviews.mat_view_runs RESTART IDENTITY")
    with _refreshing(db, "mv") as (running, open_gate):

        def end() -> None:
            open_gate()
            assert running.result().success

        with _Between(db, end) as driver:
            assert driver.run(reap_runs(Ledger("matviews"))) == []
            assert driver.done, "it was among those that said running"
    assert db.rows(HISTORY) == [(1, "success", None)]


def test_nobody_stands_back_before_who_looks_for_orphans(db: Database) -> None:
    _declare(db, "mv")
    lost = _orphan(db, "mv")

    def refresh() -> None:
        assert hook_on(db).refresh("mv", if_locked="fail").status == "updated"

    with _Between(db, refresh) as driver:
        assert driver.run(reap_runs(Ledger("matviews"))) == []
    assert db.rows(HISTORY) == [(lost, "failed", "RunLost"), (lost + 1, "success", None)]


def test_several_that_look_at_once_find_each_orphan_once(db: Database) -> None:
    _declare(db, *NAMES)
    ids = [_orphan(db, name) for name in NAMES]
    workers = 4
    barrier = threading.Barrier(workers)

    def reap() -> list[int]:
        hook = hook_on(db)
        barrier.wait()
        return hook.reap()

    with ThreadPoolExecutor(workers) as pool:
        found = [future.result() for future in [pool.submit(reap) for _ in range(workers)]]
    assert sorted(run_id for each in found for run_id in each) == ids


def test_what_was_found_before_the_end_stays_found(db: Database) -> None:
    _declare(db, "mv", "reports.mv")
    ids = [_orphan(db, "mv"), _orphan(db, "reports.mv")]
    marked = 0

    class Interrupted(Driver):
        def _perform(self, instruction: Instruction) -> Result:
            nonlocal marked
            marked += _marks(instruction)
            if marked == 2:
                raise KeyboardInterrupt
            return super()._perform(instruction)

    with Interrupted(db.connect) as driver, pytest.raises(KeyboardInterrupt):
        driver.run(reap_runs(Ledger("matviews")))
    assert db.rows(HISTORY) == [(ids[0], "failed", "RunLost"), (ids[1], "running", None)]
    assert hook_on(db).reap() == ids[1:]


def test_it_leaves_no_lock_and_no_transaction_behind(db: Database) -> None:
    _declare(db, "mv")
    _orphan(db, "mv")
    with Driver(db.connect) as driver:
        driver.run(reap_runs(Ledger("matviews")))
        assert db.rows("SELECT locktype FROM pg_locks WHERE locktype = 'advisory'") == []
        assert driver._connections
        for connection in driver._connections.values():
            assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE


def test_who_is_called_lost_and_lives_says_itself_how_it_ended(db: Database) -> None:
    """Its connection is gone, and with it the lock; the process has not yet said so when others look."""
    _declare(db, "mv")
    seen: list[Any] = []

    def lose_connection(text: str) -> None:
        if text.startswith("REFRESH"):
            pid = driver._connections[Session.WORK].info.backend_pid
            assert db.value("SELECT pg_terminate_backend(%s, 10000)", (pid,))
        elif text.startswith("BEGIN") and db.rows(HISTORY) == [(1, "running", None)]:
            # It is about to record its failure.
            seen.append(hook_on(db).reap())
            seen.append(db.rows(HISTORY))

    with (
        InterruptedDriver(db.connect, before=lose_connection) as driver,
        pytest.raises(psycopg.errors.AdminShutdown),
    ):
        driver.run(refreshing("mv", RefreshStrategy.REGULAR))
    assert seen == [[1], [(1, "failed", "RunLost")]]
    assert db.rows(HISTORY) == [(1, "failed", "AdminShutdown")]
    assert db.value("SELECT duration_ms IS NOT NULL FROM matviews.mat_view_runs")


def test_a_run_of_another_record_under_way_keeps_the_orphan_for_later(db: Database) -> None:
    """Two records share a view's lock: a held one proves nothing about either, and the marks stay apart."""
    _declare(db, "mv")
    lost = _orphan(db, "mv")
    other = hook_on(db, tracking_schema="other")
    other.refresh("mv")
    db.execute("UPDATE other.mat_view_runs SET status = 1, finished_at = NULL")
    with _locked(db, "public", "mv"):
        assert hook_on(db).reap() == other.reap() == []
    assert other.reap() == [1]
    assert db.rows(HISTORY) == [(lost, "running", None)]
    assert hook_on(db).reap() == [lost]
