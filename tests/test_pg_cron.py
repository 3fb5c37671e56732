"""Runs of the real pg_cron become part of the record once and as they were, and who schedules twice is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.sdk import DAG
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition, InvalidName, MissingPrivilege, UnsupportedServer
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.pg_cron import ImportCronRunsOperator
from airflow_provider_matviews.services import cron_tables
from airflow_provider_matviews.services.cron_commands import read_command
from airflow_provider_matviews.services.ledger import Run
from demo.postgres_server import PostgresServer
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import INSTALLATIONS, Database, hook_on

#: Debian's package brings pg_cron for its 15.
_WITH_CRON = [bin_dir for bin_dir in INSTALLATIONS.values() if (bin_dir.parent / "lib" / "pg_cron.so").exists()]
needs_pg_cron = pytest.mark.skipif(not _WITH_CRON, reason="no PostgreSQL with pg_cron here")

_schemas = count(1)


@contextmanager
def cron_server(**settings: str) -> Iterator[Database]:
    """Start a server with pg_cron in its database ``home``."""
    server = PostgresServer(
        bin_dir=_WITH_CRON[0],
        settings={
            "shared_preload_libraries": "pg_cron",
            "cron.database_name": "home",
            # Its jobs connect as anybody does, and everybody is trusted there.
            "cron.host": "127.0.0.1",
            "max_worker_processes": "20",
            **settings,
        },
    )
    with server:
        home = Database(server, "home")
        Database(server, "postgres").execute("CREATE DATABASE home", "CREATE DATABASE other")
        home.execute("CREATE EXTENSION pg_cron")
        yield home


def schedule(home: Database, name: str, command: str, database: str = "home", role: str | None = None) -> None:
    """Have a command run whenever the server starts: the one schedule that does not keep a test waiting."""
    home.rows("SELECT cron.schedule_in_database(%s, '@reboot', %s, %s, %s)", (name, command, database, role))


def start_again(home: Database, ended: int) -> None:
    """Restart the server, which starts the jobs, and wait until so many of their runs have ended."""
    home.server.restart("fast")
    wait_for(home, "SELECT count(*) >= %s FROM cron.job_run_details WHERE status IN ('succeeded', 'failed')", (ended,))


def wait_for(home: Database, condition: LiteralString, parameters: Any = None) -> None:
    deadline = time.monotonic() + 30
    while not home.value(condition, parameters):
        assert time.monotonic() < deadline, home.rows("SELECT * FROM cron.job_run_details")
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of these tests ended long ago."""
    monkeypatch.setattr(cron_tables, "SETTLING", 0.0)


def record_on(database: Database, user: str = "postgres") -> MatViewHook:
    """Return a hook with a record of its own."""
    return hook_on(database, user, tracking_schema=f"record_{next(_schemas)}")


@pytest.fixture(scope="module")
def home() -> Iterator[Database]:
    """A server whose jobs have all run once; its tests leave them alone."""
    with cron_server() as home:
        home.execute(
            "CREATE ROLE bob LOGIN",
            "CREATE ROLE gone LOGIN",
            "CREATE ROLE alice LOGIN",
            "CREATE SCHEMA analytics AUTHORIZATION bob",
            "ALTER ROLE bob SET search_path = analytics, public",
            "GRANT USAGE ON SCHEMA cron TO bob, gone",
            "GRANT CREATE ON DATABASE home TO bob, alice",
            "CREATE TABLE t AS SELECT 1 AS id",
            "CREATE MATERIALIZED VIEW mv AS SELECT id FROM t",
            'CREATE MATERIALIZED VIEW analytics."Odd ""View" AS SELECT id FROM t',
            'CREATE UNIQUE INDEX ON analytics."Odd ""View" (id)',
            "CREATE MATERIALIZED VIEW analytics.mv AS SELECT 1 AS x",
            "ALTER MATERIALIZED VIEW analytics.mv OWNER TO bob",
            "CREATE MATERIALIZED VIEW broken AS SELECT 1 / id AS x FROM t",
            "CREATE MATERIALIZED VIEW unseen AS SELECT 1 AS x",
            "CREATE MATERIALIZED VIEW emptied AS SELECT 1 AS x",
            "UPDATE t SET id = 0",
        )
        Database(home.server, "other").execute("CREATE MATERIALIZED VIEW elsewhere AS SELECT 1 AS x")
        schedule(home, "plain", "REFRESH MATERIALIZED VIEW mv")
        schedule(home, "odd", 'refresh materialized view concurrently analytics."Odd ""View" -- by hand;')
        schedule(home, "both", 'REFRESH MATERIALIZED VIEW public.mv; REFRESH MATERIALIZED VIEW analytics."Odd ""View";')
        schedule(home, "broken", "REFRESH MATERIALIZED VIEW broken")
        schedule(home, "of bob", "REFRESH MATERIALIZED VIEW mv", role="bob")
        schedule(home, "of gone", "REFRESH MATERIALIZED VIEW mv", role="gone")
        schedule(home, "away", "REFRESH MATERIALIZED VIEW elsewhere", database="other")
        schedule(home, "undone", "REFRESH MATERIALIZED VIEW unseen; ROLLBACK")
        schedule(home, "path", "SET search_path = analytics; REFRESH MATERIALIZED VIEW mv")
        schedule(home, "emptying", "REFRESH MATERIALIZED VIEW emptied WITH NO DATA")
        schedule(home, "unknown", "REFRESH MATERIALIZED VIEW absent")
        schedule(home, "nothing", "SELECT 'REFRESH MATERIALIZED VIEW mv'")
        home.execute("ALTER ROLE gone NOLOGIN")
        start_again(home, ended=12)
        yield home


ODD = 'analytics."Odd ""View"'
ALL = {"mv": 3, ODD: 2, "broken": 1, "analytics.mv": 1}


def by_job(runs: list[Run]) -> dict[tuple[str, str], Run]:
    return {(run.meta["pg_cron"]["jobname"], run.view): run for run in runs}


@needs_pg_cron
def test_runs_of_jobs_are_recorded_as_they_were(home: Database) -> None:
    hook = record_on(home)
    result = hook.import_cron_runs()
    assert (result.imported, result.more) == (ALL, False)
    runs = by_job(hook.runs(limit=100))
    assert {job: (run.operation, run.status, run.meta["strategy"]) for job, run in runs.items()} == {
        ("plain", "mv"): ("refresh", "success", "regular"),
        ("odd", ODD): ("refresh", "success", "concurrent"),
        ("both", "mv"): ("refresh", "success", "regular"),
        ("both", ODD): ("refresh", "success", "regular"),
        ("broken", "broken"): ("refresh", "failed", "regular"),
        ("of bob", "analytics.mv"): ("refresh", "success", "regular"),
        ("of gone", "mv"): ("refresh", "failed", "regular"),
    }
    theirs = {
        name: times
        for name, *times in home.rows(
            "SELECT jobname::text, start_time, end_time FROM cron.job_run_details JOIN cron.job USING (jobid)"
        )
    }
    for (job, _), run in runs.items():
        assert run.meta["imported_from"] == "pg_cron"
        assert "REFRESH" not in str(run.meta).upper()
        assert run.meta["pg_cron"]["database"] == "home"
        assert run.row_count_before is run.row_count_after is None
        start, end = theirs[job]
        assert run.started_at == start
        if job == "of gone":  # It never began, and pg_cron tells no time of it.
            continue
        assert (run.finished_at, run.created_at) == (end, start)
        # How long each of several took cannot be told.
        assert run.duration_ms == (None if job == "both" else round((end - start) / timedelta(milliseconds=1)))
    error = runs["broken", "broken"].error
    assert error is not None
    assert (error["class"], error["message"]) == ("PgCronFailure", "ERROR:  division by zero")
    never = runs["of gone", "mv"]
    assert never.error is not None
    assert never.error["message"] == "connection failed"
    assert never.duration_ms is None
    assert [definition.managed for definition in hook.definitions()] == [False] * len(ALL)


@needs_pg_cron
def test_a_password_that_a_message_repeats_is_struck_out(home: Database) -> None:
    hook = hook_on(home, password="division", tracking_schema=f"record_{next(_schemas)}")
    hook.import_cron_runs()
    run = hook.last_run("broken")
    assert run is not None
    assert run.error is not None
    assert run.error["message"] == "ERROR:  *** by zero"


@needs_pg_cron
def test_a_run_is_imported_once_however_often_and_by_how_many_at_once(home: Database) -> None:
    hook = record_on(home)
    barrier = threading.Barrier(4)

    def run() -> dict[str, int]:
        barrier.wait()
        return hook_on(home, tracking_schema=hook.tracking_schema).import_cron_runs(limit=50).imported

    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(run) for _ in range(4)]]
    assert {view: sum(result.get(view, 0) for result in results) for view in ALL} == ALL
    assert len(hook.runs(limit=100)) == sum(ALL.values())
    assert hook.import_cron_runs().imported == {}


@needs_pg_cron
def test_a_limit_leaves_the_rest_for_next_time(home: Database) -> None:
    hook = record_on(home)
    found: dict[str, int] = {}
    for _ in range(100):
        result = hook.import_cron_runs(limit=2)
        assert sum(result.imported.values()) <= 4
        for view, runs in result.imported.items():
            found[view] = found.get(view, 0) + runs
        if not result.more:
            break
    assert found == ALL


@needs_pg_cron
def test_what_was_pruned_does_not_come_back_and_nothing_is_read_twice(home: Database) -> None:
    hook = record_on(home)
    hook.import_cron_runs()
    with home.connect() as connection:
        connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(hook.tracking_schema, "mat_view_runs")))
    assert hook.import_cron_runs().imported == {}


@needs_pg_cron
def test_refreshes_and_reaping_go_on_beside_imported_runs(home: Database) -> None:
    hook = record_on(home)
    hook.import_cron_runs()
    assert hook.reap() == []
    assert hook.refresh("mv").status == "updated"
    assert hook.refresh(ODD).status == "updated"
    newest = hook.last_run("mv")
    assert newest is not None
    # By their own times: what has just run is newer than all that were imported before it.
    assert (newest.status, "imported_from" in newest.meta) == ("success", False)


@needs_pg_cron
def test_views_that_are_scheduled_twice_are_named_with_what_to_do(
    home: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = record_on(home)
    warnings = hook.import_cron_runs().warnings
    ids = dict(home.rows("SELECT jobname::text, jobid FROM cron.job"))
    plain, both, odd, gone = (ids[name] for name in ("plain", "both", "odd", "of gone"))
    assert warnings[2:] == (
        f"mv is refreshed by 3 jobs: job {plain} of pg_cron ('plain', '@reboot', role postgres) and "
        f"job {both} of pg_cron ('both', '@reboot', role postgres) and "
        f"job {gone} of pg_cron ('of gone', '@reboot', role gone). To leave it to one, run in database home: "
        f"SELECT cron.unschedule({plain}); or SELECT cron.unschedule({both}); or SELECT cron.unschedule({gone});",
        f"{ODD} is refreshed by 2 jobs: job {odd} of pg_cron ('odd', '@reboot', role postgres) and "
        f"job {both} of pg_cron ('both', '@reboot', role postgres). To leave it to one, run in database home: "
        f"SELECT cron.unschedule({odd}); or SELECT cron.unschedule({both});",
    )
    assert "'undone', '@reboot', role postgres) are not imported: its command ends transactions" in warnings[0]
    assert "'path', '@reboot', role postgres) are not imported for mv: its command changes the search" in warnings[1]
    whose = {"dag_id": "nightly", "task_id": "refresh"}
    with pytest.raises(psycopg.errors.DivisionByZero):
        hook_on(home, tracking_schema=hook.tracking_schema, context=whose).refresh("broken")
    hook.create(MatViewDefinition(name="analytics.mv", sql="SELECT 1 AS x"))
    capsys.readouterr()
    more = hook.import_cron_runs().warnings
    assert (
        f"broken is refreshed twice: by job {ids['broken']} of pg_cron ('broken', '@reboot', role postgres), and by "
        f"Airflow (DAG nightly, task refresh). To leave it to Airflow, run in database home: "
        f"SELECT cron.unschedule({ids['broken']});"
    ) in more
    assert any(
        text.startswith("analytics.mv is refreshed twice: by job") and "Airflow (where it is declared)" in text
        for text in more
    )
    told = capsys.readouterr().out
    assert [text for text in more if text not in told] == []


@needs_pg_cron
def test_a_role_imports_what_pg_cron_lets_it_see(home: Database, capsys: pytest.CaptureFixture[str]) -> None:
    hook = record_on(home, "bob")
    assert hook.import_cron_runs().imported == {"analytics.mv": 1}
    assert "pg_cron shows each role its own jobs: those of bob alone are imported" in capsys.readouterr().out
    # Who sees more imports the rest.
    everybody = hook_on(home, tracking_schema=hook.tracking_schema).import_cron_runs().imported
    assert everybody == {view: runs for view, runs in ALL.items() if view != "analytics.mv"}


@needs_pg_cron
def test_views_of_another_database_than_that_of_pg_cron(home: Database) -> None:
    other = Database(home.server, "other")
    hook = record_on(other)
    with pytest.raises(UnsupportedServer) as raised:
        hook.import_cron_runs()
    assert "not installed in database other" in str(raised.value)
    assert "give cron_database='home'" in (raised.value.hint or "")
    assert hook.import_cron_runs(cron_database="home").imported == {"elsewhere": 1}
    assert hook.import_cron_runs(cron_database="home").imported == {}
    assert [run.view for run in hook.runs()] == ["elsewhere"]


@needs_pg_cron
def test_missing_rights_are_named_with_the_grant(home: Database) -> None:
    with pytest.raises(MissingPrivilege) as raised:
        record_on(home, "alice").import_cron_runs()
    assert "GRANT USAGE ON SCHEMA cron TO alice" in (raised.value.hint or "")


def test_without_pg_cron_the_hint_says_how_to_get_it(db: Database) -> None:
    with pytest.raises(UnsupportedServer) as raised:
        hook_on(db).import_cron_runs()
    assert "CREATE EXTENSION pg_cron" in (raised.value.hint or "")


@pytest.mark.parametrize("limit", [0, -1, True, "5"])
def test_a_limit_is_a_positive_number(db: Database, limit: Any) -> None:
    with pytest.raises(InvalidDefinition, match="is not a positive number of runs"):
        hook_on(db).import_cron_runs(limit=limit)
    with pytest.raises(InvalidName):
        hook_on(db).import_cron_runs(cron_database="")


@needs_pg_cron
@pytest.mark.e2e
def test_what_still_runs_is_left_until_it_has_ended_whatever_pg_cron_says_of_it() -> None:
    with cron_server(max_prepared_transactions="1") as home:
        home.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS x")
        # The end of its first statement is sent with the long answer of the second, and pg_cron takes it for the end.
        schedule(home, "long", "SELECT 1; SELECT repeat('x', 100000); TABLE gate; REFRESH MATERIALIZED VIEW mv")
        # A prepared transaction holds the gate over the restart.
        home.execute("CREATE TABLE gate (id int)", "BEGIN", "LOCK gate", "PREPARE TRANSACTION 'gate'")
        home.server.restart("fast")
        wait_for(home, "SELECT count(*) = 1 FROM cron.job_run_details WHERE status = 'succeeded'")
        assert home.value("SELECT count(*) FROM pg_locks WHERE NOT granted") == 1
        hook = record_on(home)
        assert hook.import_cron_runs().imported == {}
        home.rows("SELECT pg_terminate_backend(job_pid) FROM cron.job_run_details")
        wait_for(home, "SELECT count(*) = 1 FROM cron.job_run_details WHERE status = 'failed'")
        wait_for(home, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity JOIN cron.job_run_details ON pid = job_pid)")
        assert hook.import_cron_runs().imported == {"mv": 1}
        run = hook.last_run("mv")
        assert run is not None
        assert run.status == "failed"
        assert run.error is not None
        assert "server closed the connection unexpectedly" in run.error["message"]


@needs_pg_cron
@pytest.mark.e2e
def test_a_run_that_a_crash_ended_is_a_failure_and_counting_anew_is_noticed() -> None:
    with cron_server(**{"cron.use_background_workers": "on"}) as home:
        home.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS x")
        schedule(home, "long", "SELECT pg_sleep(600); REFRESH MATERIALIZED VIEW mv")
        home.server.restart("fast")
        wait_for(home, "SELECT count(*) = 1 FROM cron.job_run_details WHERE status = 'running' AND start_time < now()")
        hook = record_on(home)
        assert hook.import_cron_runs().imported == {}
        home.rows("SELECT cron.unschedule('long')")
        home.server.restart("immediate")
        wait_for(home, "SELECT count(*) = 1 FROM cron.job_run_details WHERE return_message = 'server restarted'")
        assert hook.import_cron_runs().imported == {"mv": 1}
        run = hook.last_run("mv")
        assert run is not None
        assert (run.status, run.duration_ms) == ("failed", None)
        assert run.finished_at == run.started_at
        home.execute("DROP EXTENSION pg_cron", "CREATE EXTENSION pg_cron")
        schedule(home, "again", "REFRESH MATERIALIZED VIEW mv")
        start_again(home, ended=1)
        assert home.value("SELECT min(runid) FROM cron.job_run_details") == 1
        assert hook.import_cron_runs().imported == {"mv": 1}
        run = hook.last_run("mv")
        assert run is not None
        # With workers of its own this version does not say when a run ended.
        assert (run.status, run.duration_ms) == ("success", None)


@needs_pg_cron
@pytest.mark.e2e
def test_the_operator_imports_tells_and_returns_a_small_summary(
    home: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_connection(monkeypatch, home)
    set_connection(monkeypatch, Database(home.server, "other"), conn_id="other")
    schema = f"record_{next(_schemas)}"
    with DAG("cron", schedule=None, params={"schema": schema}) as dag:
        ImportCronRunsOperator(task_id="import", tracking_schema="{{ params.schema }}")
        ImportCronRunsOperator(task_id="away", conn_id="other", tracking_schema=schema, cron_database="home")
        ImportCronRunsOperator(task_id="absent", conn_id="other", tracking_schema=schema)
    run = run_dag(dag)
    assert run.states == {"import": "success", "away": "success", "absent": "failed"}
    summary = run.xcom("import")
    assert summary.pop("warnings")
    assert summary == {"runs": 7, "imported": ALL, "more": False}
    assert run.xcom("away")["imported"] == {"elsewhere": 1}
    assert "Imported 7 runs of pg_cron." in run.log
    assert "To mend it: pg_cron of this server is at home in another: give cron_database='home'" in run.log


@pytest.mark.parametrize(
    ("text", "refreshed"),
    [
        ("REFRESH MATERIALIZED VIEW mv", ["mv"]),
        ('refresh /* a /* ; */ ; */ materialized -- ;\n view "V;""" . Mv with data ;', ['"V;""".mv']),
        ("refresh materialized view concurrently a.b; refresh materialized view c", ["a.b CONCURRENTLY", "c"]),
        ("refresh materialized view a; refresh materialized view concurrently a", ["a CONCURRENTLY"]),
        ("refresh materialized view home.a.b", ["a.b in home"]),
        ("select 'it''s; '; refresh materialized view a; select E'\\'; refresh materialized view b'", ["a"]),
        ("select $x$; refresh materialized view a; $$ $x$, $1 || $$;$$; refresh materialized view b", ["b"]),
        ("do $$ begin refresh materialized view a; end $$", []),
        ("explain refresh materialized view a", []),
        ("refresh materialized view a with no data", []),
        ("refresh materialized view a with no data; refresh materialized view a", ["a"]),
        ("refresh materialized view a; refresh materialized view a with no data", []),
        ('refresh materialized view U&"a"', []),
        ("refresh materialized view a b", []),
        ("refresh materialized view a.", []),
        ("refresh materialized view a.b.c.d", []),
        ("refresh materialized view", []),
        ("refresh materialized view a; select 'no end", []),
        ("refresh materialized view a; /* no end", ["a"]),
        ("refresh materialized view " + "a" * 70, ["a" * 63]),
        ("; ;", []),
    ],
)
def test_what_a_command_refreshes_is_read_from_its_text(text: str, refreshed: list[str]) -> None:
    def word(concurrently: bool, database: str | None) -> str:
        return (" CONCURRENTLY" if concurrently else "") + (f" in {database}" if database else "")

    assert [
        f"{each.view}{word(each.concurrently, each.database)}" for each in read_command(text).refreshed
    ] == refreshed


@pytest.mark.parametrize(
    ("text", "alone", "sets_path", "own_transactions"),
    [
        ("refresh materialized view a;", True, False, False),
        ("begin; refresh materialized view a; commit", True, False, False),
        ("start transaction; refresh materialized view a; analyze a; end;", False, False, False),
        ("refresh materialized view a; analyze a", False, False, False),
        ("refresh materialized view a; commit; select 1", False, False, True),
        ("begin; refresh materialized view a; rollback", False, False, True),
        ("begin; refresh materialized view a", False, False, True),
        ("begin; savepoint s; refresh materialized view a; rollback to s; commit", False, False, True),
        ("set statement_timeout = 0; refresh materialized view a", False, False, False),
        ("set search_path to b; refresh materialized view a", False, True, False),
        ("select set_config('search_path', 'b', false); refresh materialized view a", False, True, False),
        ("set local schema 'b'; refresh materialized view a", False, True, False),
        ("set role b; refresh materialized view a", False, True, False),
    ],
)
def test_what_hides_the_fate_of_a_refresh_is_seen(
    text: str, alone: bool, sets_path: bool, own_transactions: bool
) -> None:
    command = read_command(text)
    assert (command.alone, command.sets_path, command.own_transactions) == (alone, sets_path, own_transactions)
