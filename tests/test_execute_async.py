"""The asynchronous driver: the same services in an event loop, stopped at any moment, hundreds at once."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition, RefreshStrategy
from airflow_provider_matviews.exceptions import OperationCancelled
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.execute_async import AsyncDriver
from airflow_provider_matviews.services.instructions import (
    Alone,
    Command,
    Note,
    Pause,
    Result,
    Session,
    Watch,
    Work,
    fetch_all,
    fetch_one,
    raw,
)
from airflow_provider_matviews.services.locking import Patience, lock_key
from demo.postgres_server import PostgresServer
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on
from tests.driving import refreshing
from tests.killing import DEFINITION, Deed, work
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

HISTORY: LiteralString = "SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id"
#: The gate is a lock: by itself the server ends the wait for it no sooner than the tests look.
PATIENT = Patience(60, 60)
NOT_AT_THE_GATE: LiteralString = f"SELECT NOT ({AT_THE_GATE.removeprefix('SELECT ')})"


DEFINITION_OF_ONE = MatViewDefinition(name="one", sql="SELECT 1 AS a")


def connecting(db: Database) -> Callable[[], Awaitable[psycopg.AsyncConnection[Any]]]:
    return lambda: psycopg.AsyncConnection.connect(db.dsn())


class Lines(logging.Handler):
    """What a driver tells."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.log = logging.Logger("operation", logging.DEBUG)
        self.log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def containing(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


def _gated_view(db: Database) -> None:
    db.execute(
        "CREATE TABLE source AS SELECT 1 AS id",
        GATE,
        "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM source",
        "INSERT INTO source VALUES (2)",
    )
    hook_on(db).definitions()


async def _until(db: Database, condition: LiteralString) -> None:
    await asyncio.to_thread(until, db, condition)


class Disturbed(AsyncDriver):
    """Its task is cancelled, or it is told to cancel, at the n-th statement: before it is sent, or after its answer."""

    def __init__(self, db: Database, at: int, after: bool, from_outside: bool) -> None:
        super().__init__(connecting(db))
        self._at, self._after, self._from_outside = at, after, from_outside
        self.statements = 0

    async def _execute(self, session: Session, statement: Any, parameters: Any) -> Result:
        self.statements += 1
        mine = self.statements == self._at
        if mine and not self._after:
            await self._disturb()
        result = await super()._execute(session, statement, parameters)
        if mine and self._after:
            await self._disturb()
        return result

    async def _disturb(self) -> None:
        if not self._from_outside:
            self.cancel("for a test")
            return
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)


def _set_up(eye: psycopg.Connection[Any], deed: Deed) -> int | None:
    """Make the scene anew, and return what the view serves."""
    eye.execute("DROP MATERIALIZED VIEW IF EXISTS mv CASCADE")
    if deed != "create":
        eye.execute("CREATE MATERIALIZED VIEW mv AS SELECT id, value FROM source")
        eye.execute("CREATE UNIQUE INDEX mv_id_key ON mv (id)")
        eye.execute("COMMENT ON MATERIALIZED VIEW mv IS 'the view'")
    eye.execute("TRUNCATE matviews.mat_view_runs")
    eye.execute("UPDATE source SET value = value + 1")
    return _served(eye)


def _served(eye: psycopg.Connection[Any]) -> int | None:
    try:
        return int(eye.execute("SELECT value FROM mv").fetchall()[0][0])
    except psycopg.errors.UndefinedTable:
        return None


@pytest.mark.parametrize(
    ("deed", "from_outside"),
    [
        pytest.param("create", False, marks=pytest.mark.e2e),
        pytest.param("replace", True, marks=pytest.mark.e2e),
        ("refresh", True),
        ("refresh", False),
        ("refresh concurrently", True),
    ],
)
def test_wherever_an_operation_is_stopped_the_record_and_the_view_say_the_same(
    db: Database, deed: Deed, from_outside: bool
) -> None:
    db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    hook_on(db).create(DEFINITION)
    stopped_as = asyncio.CancelledError if from_outside else OperationCancelled
    heard = set()

    async def stop_everywhere(eye: psycopg.Connection[Any]) -> None:
        for after in (False, True):
            for at in range(1, 100):
                old = _set_up(eye, deed)
                raised = None
                driver = Disturbed(db, at, after, from_outside)
                async with driver:
                    try:
                        await asyncio.create_task(driver.run(work(deed)))
                    except (OperationCancelled, asyncio.CancelledError) as error:
                        raised = type(error)
                assert raised in (None, stopped_as)
                new = eye.execute("SELECT value FROM source").fetchall()[0][0]
                runs = eye.execute(HISTORY).fetchall()
                story = (at, "after" if after else "before", runs, raised)
                assert _served(eye) == (new if runs == [("success", None)] else old), story
                if runs != [("success", None)]:
                    assert raised is stopped_as, story
                    # Stopped before the run's number was known, its row is one for the next operation to find.
                    assert runs in ([], [("running", None)], [("failed", "OperationCancelled")]), story
                heard.add((tuple(runs), raised is not None))
                if driver.statements < at:
                    break

    with db.connect() as eye:
        asyncio.run(stop_everywhere(eye))
    assert {((("failed", "OperationCancelled"),), True), ((), True), ((("success", None),), False)} <= heard


def test_a_cancelled_task_stops_the_statement_on_the_server_and_says_that_its_process_ended(each_db: Database) -> None:
    _gated_view(each_db)

    async def cancel_in_mid_query() -> None:
        task = asyncio.create_task(hook_on(each_db).arefresh("mv", lock_timeout=60))
        await _until(each_db, AT_THE_GATE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with gate_closed(each_db):
        asyncio.run(cancel_in_mid_query())
        until(each_db, NOT_AT_THE_GATE, seconds=1)
    assert each_db.rows("SELECT id FROM mv") == [(1,)]
    run = hook_on(each_db).last_run("mv")
    assert run is not None
    assert run.error is not None
    assert (run.status, run.error["class"], run.error["sqlstate"]) == ("failed", "OperationCancelled", "57014")
    assert run.error["message"].endswith("s: its process was told to end.")


def test_cancel_stops_the_statement_on_the_server_and_gives_its_reason(db: Database) -> None:
    _gated_view(db)
    hook = hook_on(db)

    async def cancel_in_mid_query() -> None:
        task = asyncio.create_task(hook.arefresh("mv", lock_timeout=60))
        await _until(db, AT_THE_GATE)
        assert hook.cancel("the boss said so")
        with pytest.raises(OperationCancelled, match="the boss said so"):
            await task

    with gate_closed(db):
        asyncio.run(cancel_in_mid_query())
        until(db, NOT_AT_THE_GATE, seconds=1)
    assert not hook.cancel(), "there is nothing to cancel any more"
    assert db.rows("SELECT id FROM mv") == [(1,)]
    assert db.rows(HISTORY) == [("failed", "OperationCancelled")]


def test_cancel_ends_a_pause(db: Database) -> None:
    async def pause_and_cancel() -> None:
        def pausing() -> Work[None]:
            yield Pause(30)

        async with AsyncDriver(connecting(db)) as driver:
            task = asyncio.create_task(driver.run(pausing()))
            await asyncio.sleep(0)
            driver.cancel()
            with pytest.raises(OperationCancelled):
                await asyncio.wait_for(task, 5)

    asyncio.run(pause_and_cancel())


def test_a_pause_in_the_clean_up_is_a_pause(db: Database) -> None:
    """What was told once does not end every wait after it, in both drivers."""

    def tidying() -> Work[float]:
        try:
            yield Pause(30)
        except OperationCancelled:
            begun = time.monotonic()
            yield Pause(0.05)
            return time.monotonic() - begun
        raise AssertionError

    async def tidy() -> float:
        async with AsyncDriver(connecting(db)) as driver:
            driver.cancel()
            return await driver.run(tidying())

    assert asyncio.run(tidy()) >= 0.05
    with Driver(db.connect) as driver:
        driver.cancel()
        assert driver.run(tidying()) >= 0.05


def test_a_service_hears_of_an_error_where_it_asked_and_may_go_on(db: Database) -> None:
    def trying() -> Work[int]:
        try:
            yield Command(raw("SELECT 1 / 0"))
        except psycopg.errors.DivisionByZero:
            rows = yield from fetch_all(raw("SELECT 7 AS n"), session=Session.RECORD)
            return int(rows[0]["n"])
        raise AssertionError

    async def run() -> int:
        async with AsyncDriver(connecting(db)) as driver:
            return await driver.run(trying())

    assert asyncio.run(run()) == 7


def test_one_command_is_one_statement_and_nothing_is_prepared(db: Database) -> None:
    db.execute("CREATE TABLE precious (a integer)")

    def smuggling() -> Work[None]:
        yield Command(raw("SELECT 1; DROP TABLE precious"))

    def asking_often() -> Work[list[Any]]:
        for _ in range(12):
            yield Command(raw("SELECT 1"))
        return (yield from fetch_all(raw("SELECT name FROM pg_prepared_statements")))

    async def run() -> None:
        async with AsyncDriver(connecting(db)) as driver:
            with pytest.raises(psycopg.errors.SyntaxError, match="multiple commands"):
                await driver.run(smuggling())
            assert await driver.run(asking_often()) == []

    asyncio.run(run())
    assert db.rows("SELECT * FROM precious") == []


@pytest.fixture
def roomy() -> Iterator[Database]:
    """A server with room for hundreds of connections."""
    with PostgresServer(INSTALLATIONS[NEWEST], settings={"max_connections": "450"}) as server:
        yield Database(server, "postgres")


@pytest.mark.e2e
def test_hundreds_of_refreshes_run_at_once_without_a_thread_each_and_with_one_connection_each(roomy: Database) -> None:
    views = 200
    roomy.execute(GATE)
    hook_on(roomy).definitions()
    with roomy.connect() as connection, connection.transaction():
        for number in range(views):
            name = sql.Identifier(f"mv_{number}")
            connection.execute(sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT gate() WITH NO DATA").format(name))
    waiting = "SELECT count(*) = 200 FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
    threads = threading.active_count()
    seen = {}

    async def refresh(number: int) -> Any:
        driver = AsyncDriver(connecting(roomy), pace=(0.5,))
        async with driver:
            return await driver.run(refreshing(f"mv_{number}", RefreshStrategy.REGULAR, PATIENT))

    async def refresh_all(let_go_on: Callable[[], None]) -> list[Any]:
        tasks = [asyncio.create_task(refresh(number)) for number in range(views)]
        await _until(roomy, waiting)
        seen["threads"] = threading.active_count() - threads
        # The record's connection is given back while the work takes long.
        mine = "SELECT count(*) <= 200 + 20 FROM pg_stat_activity WHERE backend_type = 'client backend'"
        await _until(roomy, mine)
        let_go_on()
        return await asyncio.gather(*tasks)

    with gate_closed(roomy) as let_go_on:
        responses = asyncio.run(refresh_all(let_go_on))
    assert [response.status for response in responses] == ["updated"] * views
    assert roomy.rows("SELECT status, count(*) FROM matviews.mat_view_runs GROUP BY 1") == [(2, views)]
    # Only asyncio's own few for what asks the test's questions.
    assert seen["threads"] <= 5


@pytest.mark.parametrize("if_locked", ["wait", "skip"])
def test_fifty_at_once_refresh_a_view_one_at_a_time_and_nobody_fails(db: Database, if_locked: str) -> None:
    """Half of them in an event loop, half in threads."""
    db.execute(
        "CREATE TABLE inside (n integer)",
        # Fails when two are in the query at once: the lock of the one who came first keeps the other from its own.
        """
        CREATE FUNCTION alone() RETURNS integer LANGUAGE plpgsql AS $$
        BEGIN
            ASSERT pg_try_advisory_xact_lock(815), 'two refreshes at once';
            RETURN 1;
        END$$
        """,
        "CREATE MATERIALIZED VIEW mv AS SELECT alone() AS n WITH NO DATA",
    )
    hook_on(db).definitions()

    async def in_a_loop() -> list[str | None]:
        at_once = [hook_on(db).arefresh("mv", if_locked=if_locked, refresh_strategy="regular") for _ in range(25)]
        return [response.status for response in await asyncio.gather(*at_once)]

    def in_a_thread(_: int) -> str | None:
        return hook_on(db).refresh("mv", if_locked=if_locked, refresh_strategy="regular").status

    with ThreadPoolExecutor(25) as pool, beside(lambda: asyncio.run(in_a_loop())) as loop:
        statuses = [*pool.map(in_a_thread, range(25)), *loop.result()]
    expected = {"updated"} if if_locked == "wait" else {"updated", "skipped"}
    assert set(statuses) <= expected
    assert "updated" in statuses
    runs = db.rows("SELECT status, count(*)::integer FROM matviews.mat_view_run_history GROUP BY 1")
    assert dict(runs) == {
        word: count
        for word, count in (("success", statuses.count("updated")), ("skipped", statuses.count("skipped")))
        if count
    }


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_who_waits_for_another_operation_keeps_one_connection(db: Database, asynchronous: bool) -> None:
    hook = hook_on(db)
    hook.create(DEFINITION_OF_ONE)
    key = lock_key(ResolvedName("public", "one", "one"))

    def refresh() -> Any:
        return asyncio.run(hook.arefresh("one")) if asynchronous else hook.refresh("one")

    with db.connect() as other:
        other.execute(raw("SELECT pg_advisory_lock({})").format(key))
        with beside(refresh, other.close) as running:
            until(db, "SELECT count(*) = 2 FROM pg_stat_activity WHERE application_name = 'matviews'")
            until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'matviews'")
            other.close()
            assert running.result().status == "updated"
    assert db.rows(HISTORY) == [("success", None)] * 2


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_an_operation_that_takes_long_is_told_of_now_and_then(db: Database, asynchronous: bool) -> None:
    _gated_view(db)
    told = Lines()

    def run() -> Any:
        operation = refreshing("mv", RefreshStrategy.REGULAR, PATIENT)
        if not asynchronous:
            with Driver(db.connect, told.log, pace=(0.05,)) as driver:
                return driver.run(operation)

        async def run_async() -> Any:
            async with AsyncDriver(connecting(db), told.log, pace=(0.05,)) as driver:
                return await driver.run(operation)

        return asyncio.run(run_async())

    with gate_closed(db) as let_go_on, beside(run, let_go_on) as running:
        while len(told.containing("Refreshing mv for ")) < 3:
            assert not running.done()
        let_go_on()
        assert running.result().status == "updated"
    told.lines.clear()
    until(
        db,
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
        "pg_backend_pid())",
    )
    assert told.lines == [], "nothing is told of what has ended"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
@pytest.mark.parametrize("trouble", ["no connection", "statement", "code"])
def test_whatever_goes_wrong_with_a_look_is_nothing_to_the_operation(
    db: Database, trouble: str, asynchronous: bool
) -> None:
    role = db.role("LOGIN CONNECTION LIMIT 1" if trouble == "no connection" else "LOGIN")
    db.execute(GATE)
    looked = threading.Event()

    def look() -> Work[str | None]:
        looked.set()
        if trouble == "code":
            raise RuntimeError("no look today")
        yield from fetch_one(raw("SELECT 1 / 0 AS n"))
        return "never told"

    def operation() -> Work[int]:
        yield Watch(look)
        rows = yield from fetch_all(raw("SELECT gate() AS n"))
        return int(rows[0]["n"])

    told = Lines()

    def run() -> int:
        if not asynchronous:
            with Driver(lambda: db.connect(role), told.log, pace=(0.02,)) as driver:
                return driver.run(operation())

        async def run_async() -> int:
            connect = lambda: psycopg.AsyncConnection.connect(db.dsn(role))  # noqa: E731
            async with AsyncDriver(connect, told.log, pace=(0.02,)) as driver:
                return await driver.run(operation())

        return asyncio.run(run_async())

    with gate_closed(db) as let_go_on, beside(run, let_go_on) as running:
        while len(told.containing("No look at the operation")) < 2:
            assert not running.done()
        let_go_on()
        assert running.result() == 1
    assert looked.is_set() == (trouble != "no connection")
    assert "never told" not in told.lines


def test_a_log_that_fails_is_nothing_to_the_operation(db: Database) -> None:
    class Broken(logging.Logger):
        def info(self, *args: Any, **kwargs: Any) -> None:
            raise BrokenPipeError

    def telling() -> Work[str]:
        yield Note("nobody hears this")
        return "done"

    async def run() -> str:
        async with AsyncDriver(connecting(db), Broken("broken")) as driver:
            return await driver.run(telling())

    assert asyncio.run(run()) == "done"
    with Driver(db.connect, Broken("broken")) as driver:
        assert driver.run(telling()) == "done"


def test_a_create_in_a_loop_is_a_create(db: Database) -> None:
    db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
    hook = hook_on(db)
    assert asyncio.run(hook.acreate(DEFINITION)).status == "created"
    assert asyncio.run(hook.acreate(DEFINITION)).status == "skipped"
    assert asyncio.run(hook.acreate(MatViewDefinition(name="other", sql="SELECT 1 AS a"))).status == "created"
    assert db.rows("SELECT id, value FROM mv") == [(1, 1)]
    assert [run.status for run in hook.runs()] == ["success", "skipped", "success"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_the_server_notices_by_itself_when_nobody_is_there_any_more(each_db: Database, asynchronous: bool) -> None:
    """A killed process by its closed connection, a vanished machine by its silence."""
    names = (
        "client_connection_check_interval",
        "tcp_keepalives_idle",
        "tcp_keepalives_interval",
        "tcp_keepalives_count",
    )
    shown = ", ".join(f"current_setting('{name}') AS {name}" for name in names)
    definition = MatViewDefinition(name="settings", sql=f"SELECT {shown}")
    hook = hook_on(each_db)
    if asynchronous:
        asyncio.run(hook.acreate(definition))
    else:
        hook.create(definition)
    assert each_db.rows(raw(f"SELECT {', '.join(names)} FROM settings")) == [("2s", "30", "10", "3")]


BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])


def _refresh(hook: Any, view: str, asynchronous: bool, **arguments: Any) -> Any:
    return asyncio.run(hook.arefresh(view, **arguments)) if asynchronous else hook.refresh(view, **arguments)


@BOTH
def test_who_waits_for_another_operation_outlives_its_idle_connection(db: Database, asynchronous: bool) -> None:
    """It holds nothing while it waits: whoever ends idle connections takes nothing from it."""
    hook_on(db).create(DEFINITION_OF_ONE)
    key = lock_key(ResolvedName("public", "one", "one"))
    waiting = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'ROLLBACK /* waits%'"
    with db.connect() as other:
        other.execute(raw("SELECT pg_advisory_lock({})").format(key))
        with beside(lambda: _refresh(hook_on(db), "one", asynchronous), other.close) as running:
            until(db, raw(f"SELECT EXISTS (SELECT {waiting} AND state = 'idle')"))
            until(db, raw(f"SELECT bool_or(pg_terminate_backend(pid, 5000)) {waiting} AND state = 'idle'"))
            other.close()
            assert running.result().status == "updated"
    assert db.rows(HISTORY) == [("success", None)] * 2


@BOTH
def test_a_hook_that_was_told_to_refuse_begins_nothing(db: Database, asynchronous: bool) -> None:
    """A signal may come before there is a connection on which to cancel anything."""
    hook = hook_on(db)
    hook.create(DEFINITION_OF_ONE)
    hook.refuse("the task was stopped")
    with pytest.raises(OperationCancelled, match="the task was stopped"):
        _refresh(hook, "one", asynchronous)
    assert db.rows(HISTORY) == [("success", None)]


def test_cancel_ends_all_that_a_hook_runs(db: Database) -> None:
    _gated_view(db)
    db.execute("CREATE MATERIALIZED VIEW other AS SELECT gate() AS n WITH NO DATA")
    hook = hook_on(db)

    async def cancel_both() -> None:
        tasks = [asyncio.create_task(hook.arefresh(view, lock_timeout=60)) for view in ("mv", "other")]
        await _until(db, "SELECT count(*) = 2 FROM pg_locks WHERE objid = 4711 AND NOT granted")
        assert hook.cancel()
        assert [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)] == [OperationCancelled] * 2

    with gate_closed(db):
        asyncio.run(cancel_both())
    assert db.rows(HISTORY) == [("failed", "OperationCancelled")] * 2


def test_finished_work_waits_for_a_connection_to_its_record(db: Database) -> None:
    """The record's connection is given back while the work takes long; others may have taken its place."""
    _gated_view(db)
    role = db.role("LOGIN IN ROLE postgres")
    limit = sql.SQL("ALTER ROLE {} CONNECTION LIMIT {}")

    def set_limit(number: int) -> None:
        with db.connect() as connection:
            connection.execute(limit.format(sql.Identifier(role), sql.Literal(number)))

    async def refresh() -> Any:
        refused = asyncio.Event()

        async def connect() -> psycopg.AsyncConnection[Any]:
            try:
                return await psycopg.AsyncConnection.connect(db.dsn(role))
            except psycopg.OperationalError:
                refused.set()
                raise

        async with AsyncDriver(connect, pace=(0.05,)) as driver:
            task = asyncio.create_task(driver.run(refreshing("mv", RefreshStrategy.SWAP, PATIENT)))
            await _until(db, AT_THE_GATE)
            while Session.RECORD in driver._connections:
                await asyncio.sleep(0)
            await asyncio.to_thread(set_limit, 1)
            refused.clear()
            let_go_on()
            await refused.wait()
            await asyncio.to_thread(set_limit, -1)
            return await task

    with gate_closed(db) as let_go_on:
        assert asyncio.run(refresh()).status == "updated"
    assert db.rows("SELECT id FROM mv ORDER BY 1") == [(1,), (2,)]


@BOTH
def test_nobody_waits_for_a_connection_to_the_record_of_work_that_is_lost(db: Database, asynchronous: bool) -> None:
    attempts = 0

    def dsn() -> str:
        nonlocal attempts
        attempts += 1
        if attempts > 2:
            raise psycopg.OperationalError("no way to the server")
        return db.dsn()

    async def connect() -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(dsn())

    def operation() -> Work[None]:
        yield Command(raw("BEGIN"))
        yield from fetch_all(raw("SELECT 1"), session=Session.RECORD)
        db.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with pytest.raises(psycopg.OperationalError):
            yield from fetch_all(raw("SELECT 1"), session=Session.RECORD)
        with pytest.raises(psycopg.OperationalError, match="no way"):
            yield Command(raw("BEGIN"), Session.RECORD)

    if asynchronous:

        async def run() -> None:
            async with AsyncDriver(connect) as driver:
                await driver.run(operation())

        asyncio.run(run())
    else:
        with Driver(lambda: psycopg.connect(dsn())) as driver:
            driver.run(operation())
    # One that is tried again after the first, and neither again.
    assert attempts <= 4


@BOTH
def test_a_command_outside_of_transactions_has_settings_of_its_own(db: Database, asynchronous: bool) -> None:
    def vacuuming() -> Work[None]:
        shown = raw("CREATE TABLE shown AS SELECT current_setting('client_connection_check_interval') AS value")
        yield Alone(Command(shown), raw("set_config('client_connection_check_interval', '2s', false)"))

    if asynchronous:

        async def run() -> None:
            async with AsyncDriver(connecting(db)) as driver:
                await driver.run(vacuuming())

        asyncio.run(run())
    else:
        with Driver(db.connect) as driver:
            driver.run(vacuuming())
    assert db.rows("SELECT value FROM shown") == [("2s",)]


def test_what_a_call_says_of_statements_goes_before_the_settings_of_the_definition(db: Database) -> None:
    query = "SELECT current_setting('statement_timeout') AS value"
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql=query, session_settings={"statement_timeout": "1h"}))
    assert db.value("SELECT value FROM mv") == "1h"
    hook.refresh("mv", statement_timeout=7)
    assert db.value("SELECT value FROM mv") == "7s"


def test_a_refused_connection_says_where_to_look(db: Database) -> None:
    role = db.role("LOGIN CONNECTION LIMIT 0")
    with pytest.raises(psycopg.OperationalError) as refused:
        hook_on(db, role).refresh("mv")
    (note,) = refused.value.__notes__
    assert "CONNECTION LIMIT" in note
