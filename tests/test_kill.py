"""One operation, one transaction: a client that is killed, or loses its connection, costs the view nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Command, Instruction, Note, Result, Session
from tests.conftest import Database, hook_on
from tests.killing import CHANGES, DEFINITION, VICTIM, Deed, Gallows, Order, gallows, work
from tests.proxy import Cut, Filter, hook_through
from tests.racing import beside, until

MAKE_VIEW = (
    "CREATE MATERIALIZED VIEW mv AS SELECT id, value FROM source",
    "CREATE UNIQUE INDEX mv_id_key ON mv (id)",
    "COMMENT ON MATERIALIZED VIEW mv IS 'the view'",
)
MAKE_DEPENDENT = "CREATE VIEW dependent AS SELECT sum(value) AS total FROM mv"
RELATIONS: LiteralString = """
    SELECT n.nspname || '.' || regexp_replace(c.relname, '[0-9]{3,}', 'N')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY 1
"""
VICTIM_GONE = sql.SQL("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = {})").format(
    sql.Literal(VICTIM)
)
BUILDS: tuple[Deed, ...] = ("create", "replace", "refresh", "refresh concurrently")
DROPS: tuple[Deed, ...] = ("delete", "delete cascade")


@pytest.fixture(scope="module")
def killing() -> Iterator[Gallows]:
    with gallows() as started:
        yield started


class Scene:
    """The view ``mv`` of one row over ``source``, declared, and all that can be seen of it from outside."""

    def __init__(self, database: Database) -> None:
        self.hook = hook_on(database)
        self.eye = database.connect()
        self.value = 1
        self.eye.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value")
        self.hook.create(DEFINITION)

    def set_up(self, deed: Deed) -> None:
        """Make the view as it is to be before a deed, its row older than the source's."""
        self.eye.execute("DROP MATERIALIZED VIEW IF EXISTS mv CASCADE")
        if deed != "create":
            for statement in MAKE_VIEW:
                self.eye.execute(statement)
        if deed == "delete cascade":
            self.eye.execute(MAKE_DEPENDENT)
        self.eye.execute("TRUNCATE matviews.mat_view_runs")
        self.renew_source()

    def renew_source(self) -> None:
        self.value += 1
        self.eye.execute("UPDATE source SET value = %s", (self.value,))

    def served(self) -> int | None:
        """What a reader gets; None where there is no view."""
        try:
            return int(self.eye.execute("SELECT value FROM mv").fetchall()[0][0])
        except psycopg.errors.UndefinedTable:
            return None

    def relations(self) -> list[str]:
        return [name for (name,) in self.eye.execute(RELATIONS)]

    def runs(self) -> list[tuple[str, str | None]]:
        return self.eye.execute("SELECT status, error_class FROM matviews.mat_view_run_history ORDER BY id").fetchall()


@pytest.mark.parametrize(
    "deed",
    # To create and to replace take many statements.
    [
        pytest.param(deed, marks=pytest.mark.e2e) if deed in ("create", "replace") else deed
        for deed in (*BUILDS, *DROPS)
    ],
)
def test_a_kill_at_any_statement_leaves_all_of_the_operation_or_nothing(
    db: Database, killing: Gallows, deed: Deed
) -> None:
    scene = Scene(db)
    scene.set_up(deed)
    before = scene.relations()
    assert not killing.run(Order(db.dsn(), deed)).killed
    after = scene.relations()
    outcomes = set()
    for at in range(1, 100):
        scene.set_up(deed)
        old, new = scene.served(), None if deed in DROPS else scene.value
        end = killing.run(Order(db.dsn(), deed, at=at, looking_too=False))
        until(db, VICTIM_GONE)
        runs, story = scene.runs(), f"killed at {at}: {end.statement}"
        if runs == [("success", None)]:
            assert (scene.served(), scene.relations()) == (new, after), story
        else:
            assert (scene.served(), scene.relations()) == (old, before), story
            assert runs in ([], [("running", None)]), story
        outcomes.add(tuple(runs))
        _require_that_the_next_one_goes_on(scene, deed, runs, story)
        if not end.killed:
            break
    assert not end.killed, "it has more statements than were tried"
    assert outcomes == {(), (("running", None),), (("success", None),)}


#: All that a change of a view could leave half done.
STATE: LiteralString = """
    SELECT c.oid::regclass::text, c.relkind::text, c.relacl::text, obj_description(c.oid),
           pg_get_viewdef(c.oid), i.indisvalid
    FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
    WHERE c.relnamespace = 'public'::regnamespace ORDER BY 1
"""


@pytest.mark.e2e
@pytest.mark.parametrize("deed", ["alter", "apply", "rename"])
def test_a_kill_at_any_statement_of_a_change_leaves_all_of_it_or_nothing(
    db: Database, killing: Gallows, deed: Deed
) -> None:
    scene = Scene(db)
    name = CHANGES[deed].name

    def set_up() -> None:
        scene.eye.execute("DROP MATERIALIZED VIEW IF EXISTS renamed CASCADE")
        scene.eye.execute("DELETE FROM matviews.mat_view_runs")
        scene.eye.execute("DELETE FROM matviews.mat_view_definitions")
        scene.set_up(deed)
        scene.eye.execute(MAKE_DEPENDENT)
        scene.eye.execute("CREATE INDEX by_hand ON mv (value DESC)")
        scene.hook.create(DEFINITION)

    def state() -> tuple[Any, ...]:
        definitions = scene.eye.execute("SELECT name, declaration FROM matviews.mat_view_definitions").fetchall()
        return scene.eye.execute(STATE).fetchall(), definitions

    set_up()
    before = state()
    assert not killing.run(Order(db.dsn(), deed)).killed
    after = state()
    assert after != before
    outcomes = set()
    for at in range(1, 150):
        set_up()
        end = killing.run(Order(db.dsn(), deed, at=at, looking_too=False))
        until(db, VICTIM_GONE)
        first, *runs = scene.runs()
        story = f"killed at {at}: {end.statement}"
        assert first == ("skipped", None)
        assert runs in ([], [("running", None)], [("success", None)]), story
        assert state() == (after if runs == [("success", None)] else before), story
        outcomes.add(tuple(runs))
        scene.hook.create(CHANGES[deed], if_locked="fail", max_wait=0.1)
        assert state() == after, story
        assert scene.hook.plan(CHANGES[deed]).steps == ()
        if runs == [("running", None)]:
            lost = scene.hook.runs(name)[1]
            assert (lost.status, lost.error and lost.error["class"]) == ("failed", "RunLost"), story
        if not end.killed:
            break
    assert not end.killed, "it has more statements than were tried"
    assert outcomes == {(), (("running", None),), (("success", None),)}


def _require_that_the_next_one_goes_on(
    scene: Scene, deed: Deed, earlier: list[tuple[str, str | None]], story: str
) -> None:
    # Nothing is left that it would have to wait for.
    at_once: dict[str, Any] = {"if_locked": "fail", "max_wait": 0.1}
    match deed:
        case "create":
            scene.hook.create(DEFINITION, **at_once)
        case "replace" | "refresh" | "refresh concurrently":
            scene.hook.refresh("mv", **at_once)
        case _:
            scene.hook.delete("mv", cascade=deed == "delete cascade", **at_once)
    assert scene.served() == (None if deed in DROPS else scene.value), story
    found = [("failed", "RunLost") if run == ("running", None) else run for run in earlier]
    *ended, (status, error) = scene.runs()
    assert ended == found, story
    for run in scene.hook.runs("mv"):
        if run.error is not None:
            # Who was it? A process of some machine, as its row has said all along.
            assert f": {run.meta['process']}. " in run.error["message"], story
    # Where it was done already there was nothing left to create or to drop.
    assert (status, error) in (("success", None), ("skipped", None)), story


def test_the_server_soon_ends_the_refresh_of_a_client_killed_in_the_middle_of_it(
    each_db: Database, killing: Gallows
) -> None:
    each_db.execute("CREATE TABLE source AS SELECT 1 AS id, 1 AS value", *MAKE_VIEW)
    # Longer than the test may take: without help the server would go on for minutes, and then commit.
    each_db.execute(
        """
        CREATE FUNCTION slow(integer) RETURNS integer LANGUAGE plpgsql AS
        $$BEGIN IF $1 > 1 THEN FOR i IN 1..20000 LOOP PERFORM pg_sleep(0.01); END LOOP; END IF; RETURN $1; END$$
        """,
        "DROP MATERIALIZED VIEW mv",
        "CREATE MATERIALIZED VIEW mv AS SELECT id, slow(value) AS value FROM source",
        "UPDATE source SET value = 2",
    )
    pid = killing.start(Order(each_db.dsn(), "refresh"))
    until(
        each_db,
        sql.SQL(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = {} AND state = 'active' "
            "AND query LIKE 'REFRESH%' AND wait_event = 'PgSleep')"
        ).format(sql.Literal(VICTIM)),
    )
    os.kill(pid, signal.SIGKILL)
    assert killing.end().killed
    until(each_db, VICTIM_GONE, seconds=6)
    assert each_db.rows("SELECT * FROM mv") == [(1, 1)]
    assert each_db.rows("SELECT status FROM matviews.mat_view_runs") == [(1,)]
    each_db.execute("UPDATE source SET value = 1")
    assert hook_on(each_db).refresh("mv", if_locked="fail").success
    assert each_db.rows("SELECT status, error->>'class' FROM matviews.mat_view_runs ORDER BY id") == [
        (3, "RunLost"),
        (2, None),
    ]


class Stepping(Driver):
    """Shows another connection's view of things before each statement."""

    def __init__(self, database: Database, look: Any) -> None:
        super().__init__(database.connect)
        self._look = look

    def _perform(self, instruction: Instruction) -> Result:
        if not isinstance(instruction, Note):
            self._look(self, instruction)
        return super()._perform(instruction)


@pytest.mark.parametrize("deed", [*BUILDS, *DROPS])
def test_at_no_statement_has_anybody_seen_success_without_the_data_or_the_data_without_success(
    db: Database, deed: Deed
) -> None:
    scene = Scene(db)
    scene.set_up(deed)
    old, new = scene.served(), None if deed in DROPS else scene.value
    scene.eye.execute("SET lock_timeout = '20ms'")
    seen = set()

    def look(driver: Driver, instruction: Instruction) -> None:
        # The record first: success must not come before the data do.
        runs = scene.runs()
        # Locked out, nobody sees any data.
        with suppress(psycopg.errors.LockNotAvailable):
            assert scene.served() == old
        assert runs in ([], [("running", None)])
        seen.add(tuple(runs))

    with Stepping(db, look) as driver:
        driver.run(work(deed))
    assert seen == {(), (("running", None),)}
    assert (scene.served(), scene.runs()) == (new, [("success", None)])


def test_no_reader_at_any_moment_sees_success_without_the_data_or_the_data_without_success(db: Database) -> None:
    scene = Scene(db)
    scene.set_up("refresh")
    first, refreshes = scene.value, 40
    ended = threading.Event()
    # One statement, so one moment. Each refresh makes both sides one more.
    statement: LiteralString = """
        SELECT (SELECT count(*) FROM matviews.mat_view_runs WHERE status = 2), value FROM mv
    """

    def read() -> set[tuple[int, int]]:
        seen: set[tuple[int, int]] = set()
        with db.connect() as connection:
            while not ended.is_set():
                seen.update(connection.execute(statement))
        return seen

    with beside(read, ended.set) as reading:
        for _ in range(refreshes // 2):
            for strategy in ("regular", "concurrent"):
                scene.hook.refresh("mv", refresh_strategy=strategy)
                scene.renew_source()
    seen = reading.result()
    assert {value - successes for successes, value in seen if successes} == {first - 1}
    assert len(seen) > refreshes / 2


def cut_at_commit(*, passed_on: bool) -> Filter:
    """Cut the line of who is the first to say COMMIT."""
    first = threading.Lock()

    def to_server(said: bytes) -> bytes:
        if b"COMMIT\0" in said and first.acquire(blocking=False):
            raise Cut(said) if passed_on else Cut
        return said

    return to_server


def test_a_commit_whose_answer_is_lost_is_a_success_and_said_to_be_one(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(db)
    scene.set_up("refresh")
    with hook_through(db, cut_at_commit(passed_on=True)) as hook:
        response = hook.refresh("mv")
    assert response.status == "updated"
    assert scene.served() == scene.value
    assert scene.runs() == [("success", None)]
    assert [run.id for run in scene.hook.runs()] == [response.run_id]
    assert "The answer to COMMIT was lost, but the server did commit." in capsys.readouterr().out


def test_a_commit_that_never_arrives_is_a_failure_and_said_to_be_one(db: Database) -> None:
    scene = Scene(db)
    scene.set_up("refresh")
    with (
        hook_through(db, cut_at_commit(passed_on=False)) as hook,
        pytest.raises(psycopg.OperationalError, match="server closed the connection") as raised,
    ):
        hook.refresh("mv")
    assert scene.served() == scene.value - 1
    assert scene.runs() == [("failed", "OperationalError")]
    assert raised.value.response.success is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("deed", [*BUILDS, *DROPS])
def test_a_backend_that_is_terminated_before_commit_undoes_everything_and_the_record_says_why(
    db: Database, deed: Deed
) -> None:
    scene = Scene(db)
    scene.set_up(deed)
    before = (scene.served(), scene.relations())

    def terminate(driver: Stepping, instruction: Instruction) -> None:
        if isinstance(instruction, Command) and (instruction.text, instruction.session) == ("COMMIT", Session.WORK):
            pid = driver._connections[Session.WORK].info.backend_pid
            scene.eye.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))

    with Stepping(db, terminate) as driver, pytest.raises(psycopg.errors.AdminShutdown):
        driver.run(work(deed))
    assert (scene.served(), scene.relations()) == before
    assert scene.runs() == [("failed", "AdminShutdown")]


def test_a_lost_record_connection_does_not_keep_a_failure_from_being_recorded(db: Database) -> None:
    scene = Scene(db)
    scene.set_up("refresh")
    # As idle_session_timeout or a load balancer does to the connection that has nothing to say for an hour.
    db.execute(
        """
        CREATE FUNCTION failing() RETURNS integer LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'matviews' AND pid <> pg_backend_pid();
            RETURN 1 / 0;
        END$$
        """,
        "DROP MATERIALIZED VIEW mv",
        "CREATE MATERIALIZED VIEW mv AS SELECT failing() AS value WITH NO DATA",
    )
    with pytest.raises(psycopg.errors.DivisionByZero):
        scene.hook.refresh("mv")
    assert scene.runs() == [("failed", "DivisionByZero")]
