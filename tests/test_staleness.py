"""Views that are left alone because nothing that they read has changed, and all those that must not be."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.models.asset import AssetEvent, AssetModel
from airflow.sdk import DAG, AssetAlias
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import FleetFailed, InvalidDefinition
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.matview import RefreshMatViewOperator
from demo.postgres_server import PostgresServer
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on
from tests.racing import until

#: Every kind of thing that a query can read.
ESTATE: tuple[LiteralString, ...] = (
    "CREATE TABLE plain (a int)",
    "INSERT INTO plain VALUES (1), (2)",
    "CREATE TABLE parted (a int) PARTITION BY RANGE (a)",
    "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE spare (a int)",
    "CREATE TABLE parent (a int)",
    "CREATE TABLE child () INHERITS (parent)",
    "CREATE TABLE inner_one (a int)",
    "CREATE VIEW v AS SELECT a FROM plain",
    "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM inner_one; END",
    "CREATE MATERIALIZED VIEW below AS SELECT a FROM plain",
    "CREATE MATERIALIZED VIEW mv AS SELECT a, f() AS f FROM v UNION ALL SELECT a, 0 FROM parted "
    "UNION ALL SELECT a, 1 FROM parent UNION ALL SELECT a, 2 FROM below",
)


def _write(database: Database, *statements: LiteralString) -> None:
    """Do something on a connection whose counters have reached everybody when it is done."""
    database.execute(*statements)
    until(database, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")


def _refresh(hook: MatViewHook, view: str = "mv", **arguments: Any) -> tuple[str | None, str]:
    """Refresh it if it has to be; return the status, and why."""
    response = hook.refresh(view, skip_unchanged=True, **arguments)
    return response.status, response.response.get("stale") or response.response["reason"]


@pytest.mark.parametrize("strategy", ["regular", "swap", "concurrent"])
def test_a_view_whose_sources_rest_is_left_alone_and_the_record_says_why(db: Database, strategy: str) -> None:
    _write(db, *ESTATE, "CREATE MATERIALIZED VIEW keyed AS SELECT a FROM v", "CREATE UNIQUE INDEX ON keyed (a)")
    hook = hook_on(db)
    status, why = _refresh(hook, "keyed", refresh_strategy=strategy)
    assert (status, why) == ("updated", "what its sources looked like at its last refresh is not known")
    before = db.value("SELECT xmin::text FROM pg_class WHERE relname = 'keyed'")
    status, why = _refresh(hook, "keyed", refresh_strategy=strategy)
    assert status == "skipped"
    assert "its source has not changed since its refresh at" in why
    assert db.value("SELECT xmin::text FROM pg_class WHERE relname = 'keyed'") == before
    run = hook.last_run("keyed")
    assert run is not None
    assert (run.status, run.meta["response"]["reason"], run.meta["response"]["spared"]) == ("skipped", why, "unchanged")
    # Its last success stays what it was compared with.
    assert _refresh(hook, "keyed")[0] == "skipped"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("INSERT INTO plain VALUES (3)", "plain"),
        ("UPDATE plain SET a = a", "plain"),
        ("DELETE FROM plain WHERE a = 1", "plain"),
        ("TRUNCATE plain", "plain"),
        ("MERGE INTO plain p USING parent s ON false WHEN NOT MATCHED BY SOURCE THEN DELETE", "plain"),
        ("ALTER TABLE plain ALTER a TYPE bigint USING a + 1", None),
        ("INSERT INTO parted VALUES (3)", "parted_1"),
        ("INSERT INTO parted_1 VALUES (3)", "parted_1"),
        ("ALTER TABLE parted ATTACH PARTITION spare FOR VALUES FROM (10) TO (20)", "spare"),
        ("ALTER TABLE parted DETACH PARTITION parted_1", "parted_1"),
        ("INSERT INTO child VALUES (3)", "child"),
        ("CREATE TABLE late () INHERITS (parent)", "late"),
        ("INSERT INTO inner_one VALUES (3)", "inner_one"),
        ("REFRESH MATERIALIZED VIEW below", "below"),
        ("CREATE OR REPLACE VIEW v AS SELECT -a AS a FROM plain", "a view, a function or a type"),
        (
            "CREATE OR REPLACE FUNCTION f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT 1::bigint; END",
            "a view, a function or a type",
        ),
        ("SELECT pg_stat_reset()", "counted anew"),
        ("SELECT pg_stat_reset_single_table_counters('plain'::regclass)", None),
    ],
)
def test_every_change_of_what_it_reads_is_seen(each_db: Database, changes: LiteralString, named: str | None) -> None:
    if changes.startswith("MERGE") and each_db.server.major < 17:
        pytest.skip("NOT MATCHED BY SOURCE is from PostgreSQL 17 on")
    _write(each_db, *ESTATE)
    hook = hook_on(each_db)
    hook.refresh("mv")
    assert _refresh(hook)[0] == "skipped"
    if named is None and changes.startswith("ALTER"):
        # A column that views read has to be changed beside them.
        _write(each_db, "DROP VIEW v CASCADE", "DROP MATERIALIZED VIEW below", changes, *ESTATE[-4:-3], *ESTATE[-2:])
    else:
        _write(each_db, changes)
    status, why = _refresh(hook)
    assert status == "updated"
    assert (named or "") in why
    assert _refresh(hook)[0] == "skipped"


#: Queries whose result may move though no row of a table does, and how that is told.
MOVING: tuple[tuple[LiteralString, str], ...] = (
    ("SELECT now() AS a", "calls now()"),
    ("SELECT CURRENT_DATE AS a", "asks for the time"),
    ("SELECT LOCALTIMESTAMP AS a", "asks for the time"),
    ("SELECT age(t) AS a FROM stamped", "calls age(timestamp with time zone)"),
    ("SELECT random() AS a", "calls random()"),
    ("SELECT a FROM plain TABLESAMPLE system (50)", "TABLESAMPLE"),
    ("SELECT gen_random_uuid() AS a", "calls gen_random_uuid()"),
    ("SELECT 'today'::text::date AS a", "reads a constant anew each time"),
    ("SELECT current_setting('x.y', true) AS a", "calls current_setting(text,boolean)"),
    ("SELECT nextval('numbers') AS a", "calls nextval(regclass)"),
    ("SELECT last_value AS a FROM numbers", "reads the sequence numbers"),
    ("SELECT count(*) AS a FROM pg_class", "reads the system catalog pg_class"),
    ("SELECT count(*) AS a FROM information_schema.tables", "reads the system catalog information_schema.tables"),
    ("SELECT opaque() AS a", "calls opaque(), which cannot be seen into"),
    ("SELECT summed(a) AS a FROM plain", "calls add_up(bigint,integer), which cannot be seen into"),
    ("SELECT seen() AS a", "calls now()"),
    ("SELECT a FROM moving", "calls clock_timestamp()"),
    ("SELECT a FROM guarded", "row security decides what it sees of guarded"),
    ("SELECT @+ a AS a FROM plain", "calls opaque_of(integer), which cannot be seen into"),
    ("SELECT a FROM far_away", "reads the foreign table far_away"),
    ("SELECT a::regclass::text AS a FROM (SELECT tableoid::regclass AS a FROM plain) p", "shows the name of an object"),
    ("SELECT ('{today}'::text[]::timestamptz[])[1] AS a", "reads a constant anew each time"),
    ("SELECT v::timestamptz AS a FROM (VALUES ('now'::text)) x (v)", "reads a constant anew each time"),
    ("SELECT t::timetz AS a FROM (SELECT '12:00'::time AS t FROM plain) p", "calls timetz(time without time zone)"),
)


def test_what_moves_by_itself_is_refreshed_unless_it_is_young_enough(each_db: Database) -> None:
    _write(
        each_db,
        "CREATE TABLE plain (a int)",
        "CREATE TABLE stamped (t timestamptz)",
        "CREATE SEQUENCE numbers",
        "CREATE FUNCTION opaque() RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN 1; END'",
        "CREATE FUNCTION opaque_of(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1'",
        "CREATE OPERATOR @+ (rightarg = int, function = opaque_of)",
        "CREATE FUNCTION add_up(bigint, int) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT $1 + $2'",
        "CREATE AGGREGATE summed (int) (sfunc = add_up, stype = bigint, initcond = '0')",
        "CREATE FUNCTION seen() RETURNS date LANGUAGE sql BEGIN ATOMIC SELECT now()::date; END",
        "CREATE VIEW moving AS SELECT clock_timestamp() AS a FROM plain",
        "CREATE TABLE guarded (a int)",
        "ALTER TABLE guarded ENABLE ROW LEVEL SECURITY",
        "CREATE FOREIGN DATA WRAPPER nowhere",
        "CREATE SERVER there FOREIGN DATA WRAPPER nowhere",
        "CREATE FOREIGN TABLE far_away (a int) SERVER there",
    )
    with each_db.connect() as connection:
        for number, (query, _) in enumerate(MOVING):
            connection.execute(f"CREATE MATERIALIZED VIEW mv{number} AS {query} WITH NO DATA")
    hook = hook_on(each_db)
    # Nothing answers for the foreign table.
    with pytest.raises(FleetFailed) as failed:
        hook.refresh_many(["mv*"], at_once=2)
    (far_away,) = failed.value.failed
    judged = {judgement.view.display: judgement for judgement in hook.judge()}
    for number, (query, told) in enumerate(MOVING):
        moving = judged[f"mv{number}"].moving
        assert [told in reason for reason in moving].count(True) == 1, (query, moving)
        assert judged[f"mv{number}"].stale, query
    again = {"exclude": [far_away], "skip_unchanged": True, "at_once": 2}
    rest = len(MOVING) - 1
    assert hook.refresh_many(["mv*"], **again).count("updated") == rest
    assert hook.refresh_many(["mv*"], max_staleness=3600, **again).count("skipped") == rest
    assert hook.refresh_many(["mv*"], max_staleness=0, **again).count("updated") == rest


#: What depends on rows and on settings alone, though PostgreSQL calls much of it no more than STABLE.
RESTING: tuple[LiteralString, ...] = (
    "date_trunc('day', t)",
    "extract(year FROM t)",
    "to_char(t, 'YYYY')",
    "t::date",
    "t + interval '1 day' > date '2020-01-01'",
    "jsonb_build_object('t', t)::text",
    "'2020-01-01'::timestamptz",
    "concat(t, x) || format('%s', x)",
    "x::timestamptz",
    "to_tsvector(x)",
    "age(t, t)",
    "row_number() OVER (ORDER BY t)",
    "(SELECT string_agg(x, ',' ORDER BY t) FROM s)",
    "date_part('day', t) = ANY (ARRAY[1, 2])",
    "to_jsonb(s)",
    "abs(n) + round(n::numeric, 2)",
    "lower(x) LIKE 'a%' AND x ~* 'b'",
    "CASE x WHEN 'known' THEN 'unknown' WHEN 'nowhere' THEN 'todays' END",
    "t AT TIME ZONE 'Asia/Tokyo'",
    "timezone('UTC', t)",
)


def test_what_only_depends_on_rows_and_settings_does_not_move(each_db: Database) -> None:
    _write(each_db, "CREATE TABLE s (t timestamptz, x text, n int)")
    with each_db.connect() as connection:
        for number, expression in enumerate(RESTING):
            connection.execute(f"CREATE MATERIALIZED VIEW mv{number} AS SELECT {expression} AS a FROM s")
    hook = hook_on(each_db)
    hook.refresh_many(["mv*"], at_once=2)
    moving = {RESTING[int(each.view.name[2:])]: each.moving for each in hook.judge() if each.moving}
    assert moving == {}
    assert not any(each.stale for each in hook.judge())


def test_what_somebody_else_does_to_the_view_is_noticed(db: Database) -> None:
    _write(db, *ESTATE)
    hook = hook_on(db)
    hook.refresh("mv")
    # Autovacuum may have been at work just then, anywhere on the server.
    for _ in range(100):
        if any(record.source_state and not record.source_state["open"] for record in hook.definitions()):
            break
        time.sleep(0.1)
        assert _refresh(hook)[0] == "skipped"
    _write(db, "REFRESH MATERIALIZED VIEW mv")
    status, why = _refresh(hook)
    assert (status, "somebody else has refreshed or altered it since" in why) == ("skipped", True)
    _write(db, "REFRESH MATERIALIZED VIEW mv WITH NO DATA")
    assert _refresh(hook) == ("updated", "it has never been filled")
    _write(db, "DROP MATERIALIZED VIEW mv", ESTATE[-1])
    assert _refresh(hook)[0] == "updated"


def test_somebody_elses_refresh_may_bring_older_rows_back_and_is_not_believed(db: Database) -> None:
    """A transaction that began before our refresh sees what was before it, and may refresh the view after it."""
    _write(db, *ESTATE)
    hook = hook_on(db)
    with db.connect() as older:
        older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        older.execute("SELECT FROM plain")
        _write_beside(db, "INSERT INTO plain VALUES (3)")
        hook.refresh("below")
        hook.refresh("mv")
        assert db.value("SELECT count(*) FROM mv WHERE a = 3") == 2
        older.execute("REFRESH MATERIALIZED VIEW mv")
        older.execute("COMMIT")
    assert db.value("SELECT count(*) FROM mv WHERE a = 3") == 1
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    status, why = _refresh(hook)
    assert (status, "perhaps from an older picture" in why) == ("updated", True)
    assert db.value("SELECT count(*) FROM mv WHERE a = 3") == 2


def _write_beside(database: Database, statement: LiteralString) -> None:
    with database.connect() as connection:
        connection.execute(statement)
        if database.server.major >= 15:
            connection.execute("SELECT pg_stat_force_next_flush()")


def test_once_older_transactions_have_ended_what_others_do_is_no_reason(db: Database) -> None:
    _write(db, *ESTATE)
    hook = hook_on(db)
    with db.connect() as older:
        older.execute("BEGIN")
        older.execute("SELECT FROM plain")
        hook.refresh("mv")
        (definition,) = hook.definitions()
        assert definition.source_state is not None
        assert definition.source_state["open"]
        assert _refresh(hook)[0] == "skipped"
    until(db, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    # One of these sees that it has ended; autovacuum may be at work meanwhile.
    for _ in range(100):
        assert _refresh(hook)[0] == "skipped"
        if not (hook.definitions()[0].source_state or {"open": ["?"]})["open"]:
            break
        time.sleep(0.1)
    _write(db, "GRANT SELECT ON mv TO pg_monitor")
    assert _refresh(hook)[0] == "skipped"


def test_a_source_that_somebody_is_writing_to_is_not_believed_to_rest(db: Database) -> None:
    """A session that goes from COMMIT straight into its next transaction has what it committed counted after that."""
    _write(db, *ESTATE)
    hook = hook_on(db)
    hook.refresh("mv")
    with db.connect() as writer:
        # Sent just now, the next counters would wait; and then there is a transaction.
        writer.execute("INSERT INTO plain VALUES (3)")
        writer.execute("SELECT pg_stat_force_next_flush()")
        until(db, "SELECT pg_stat_get_tuples_inserted('plain'::regclass) = 3")
        hook.refresh("mv")
        writer.execute("INSERT INTO plain VALUES (4); COMMIT; BEGIN; INSERT INTO plain VALUES (5)")
        status, why = _refresh(hook)
        assert (status, "somebody is writing to plain" in why) == ("updated", True)
        assert db.value("SELECT count(*) FROM mv WHERE a = 4") == 1


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TYPE mood RENAME VALUE 'good' TO 'fine'",
        "ALTER TYPE mood ADD VALUE 'bad'",
        "ALTER TYPE place RENAME ATTRIBUTE street TO road",
        "ALTER TEXT SEARCH CONFIGURATION mine ALTER MAPPING FOR asciiword WITH english_stem",
    ],
)
def test_a_type_that_is_changed_shows_in_what_reads_it(db: Database, change: LiteralString) -> None:
    _write(
        db,
        "CREATE TYPE mood AS ENUM ('good')",
        "CREATE TYPE place AS (street text)",
        "CREATE TEXT SEARCH CONFIGURATION mine (COPY = simple)",
        "CREATE TABLE t AS SELECT 'good'::mood AS m, ROW('x')::place AS p, 'running' AS x",
        "CREATE MATERIALIZED VIEW mv AS SELECT m::text, to_jsonb(p) AS p, to_tsvector('mine', x) AS v, "
        "enum_range(NULL::mood)::text AS moods FROM t",
    )
    hook = hook_on(db)
    hook.refresh("mv")
    assert _refresh(hook)[0] == "skipped"
    _write(db, change)
    status, why = _refresh(hook)
    assert (status, "or a type that it reads through" in why) == ("updated", True)


def test_other_settings_are_another_result(db: Database) -> None:
    _write(db, "CREATE TABLE t AS SELECT '2026-01-01 20:00+00'::timestamptz AS a")
    tokyo = {"timezone": "Asia/Tokyo"}
    definition = MatViewDefinition(name="mv", sql="SELECT a::date AS d FROM t", session_settings={"TimeZone": "UTC"})
    hook = hook_on(db)
    hook.create(definition)
    hook.refresh("mv")
    assert _refresh(hook)[0] == "skipped"
    assert _refresh(hook, session_settings={"work_mem": "5MB"})[0] == "skipped"
    status, why = _refresh(hook, session_settings=tokyo)
    assert (status, "other settings" in why) == ("updated", True)
    assert hook.refresh_many(["mv"], skip_unchanged=True, session_settings=tokyo).count("skipped") == 1
    assert hook.refresh_many(["mv"], skip_unchanged=True).count("updated") == 1
    # Somebody else's refresh knows nothing of them.
    _write(db, "SET timezone = 'Asia/Tokyo'; REFRESH MATERIALIZED VIEW mv")
    status, why = _refresh(hook)
    assert (status, "under other settings" in why) == ("updated", True)
    assert str(db.value("SELECT d FROM mv")) == "2026-01-01"
    # How the session of the connection shows times is nothing to what the server has counted.
    assert "counted anew" not in _refresh(hook_on(db, extra='{"options": "-c timezone=Asia/Tokyo"}'))[1]


def test_an_unchanged_view_needs_no_lock_on_what_it_reads(db: Database) -> None:
    _write(db, *ESTATE)
    hook = hook_on(db)
    hook.refresh("mv")
    with db.connect() as holder:
        holder.execute("BEGIN")
        holder.execute("LOCK TABLE plain")
        assert _refresh(hook, max_wait=0.2, lock_timeout=0.1)[0] == "skipped"


def test_what_an_earlier_version_kept_is_not_compared(db: Database) -> None:
    _write(db, *ESTATE)
    hook = hook_on(db)
    hook.refresh("mv")
    db.execute("UPDATE matviews.mat_view_definitions SET source_state = source_state - 'settings'")
    assert _refresh(hook) == ("updated", "what its sources looked like at its last refresh is not known")
    assert _refresh(hook)[0] == "skipped"


def test_to_judge_views_makes_nothing(db: Database) -> None:
    _write(db, *ESTATE)
    assert {judgement.reason for judgement in hook_on(db).judge()} == {
        "what its sources looked like at its last refresh is not known"
    }
    assert db.value("SELECT to_regnamespace('matviews')") is None


def test_a_server_that_does_not_count_is_not_believed(db: Database) -> None:
    _write(db, *ESTATE)
    hook = hook_on(db)
    hook.refresh("mv")
    _write(db, "DO $$BEGIN EXECUTE format('ALTER DATABASE %I SET track_counts = off', current_database()); END$$")
    assert _refresh(hook) == ("updated", "the server does not count rows (track_counts is off)")


@pytest.mark.parametrize("end", ["fast", "immediate", "a process killed"])
def test_what_was_counted_before_a_restart_or_a_crash_is_not_compared(end: Any) -> None:
    with PostgresServer(INSTALLATIONS[NEWEST], None) as server:
        db = Database(server, "postgres")
        _write(db, *ESTATE)
        hook = hook_on(db)
        hook.refresh("mv")
        if end == "a process killed":
            # All others are ended with it, and the server starts anew under the same start time.
            with db.connect() as victim, db.connect() as witness:
                os.kill(victim.info.backend_pid, signal.SIGKILL)
                # Until the server has noticed it still takes connections, which it ends then.
                with pytest.raises(psycopg.OperationalError):
                    witness.execute("SELECT pg_sleep(60)")
            _wait_for(db)
        else:
            server.restart(end)
        status, why = _refresh(hook)
        assert (status, "counted anew" in why) == ("updated", True)
        assert _refresh(hook)[0] == "skipped"


def _wait_for(database: Database) -> None:
    for _ in range(300):
        with suppress(psycopg.OperationalError), database.connect():
            return
        time.sleep(0.1)


def test_a_dry_run_says_whether_it_would_be_left_alone_and_writes_nothing(db: Database) -> None:
    _write(db, *ESTATE)
    hook = hook_on(db)
    assert hook.refresh("mv", skip_unchanged=True, dry_run=True).status == "updated"
    hook.refresh("mv")
    state = hook.definitions()
    assert hook.refresh("mv", skip_unchanged=True, dry_run=True).status == "skipped"
    assert hook.definitions() == state
    assert len(hook.runs()) == 1


@pytest.fixture
def windowed(db: Database) -> Iterator[tuple[Database, MatViewHook, MatViewDefinition]]:
    """A view that may be refreshed only in a window that is shut now."""
    now = datetime.now(UTC)
    shut = f"{now + timedelta(hours=2):%H:%M}-{now + timedelta(hours=3):%H:%M}"
    db.execute("CREATE TABLE t AS SELECT 1 AS a")
    definition = MatViewDefinition(name="mv", sql="SELECT a FROM t", refresh_windows=[shut])
    hook = hook_on(db)
    hook.create(definition, with_data=False)
    return db, hook, definition


def test_outside_of_its_windows_a_view_is_left_alone_once_it_holds_data(
    windowed: tuple[Database, MatViewHook, MatViewDefinition],
) -> None:
    _, hook, definition = windowed
    assert hook.refresh("mv").status == "updated", "it had never been filled"
    response = hook.refresh(definition)
    assert (response.status, response.response["spared"]) == ("skipped", "window")
    assert "outside its refresh windows" in response.response["reason"]
    assert hook.refresh("mv", ignore_windows=True).status == "updated"
    assert [run.status for run in hook.runs()] == ["success", "skipped", "success", "success"]


def test_a_view_is_not_refreshed_sooner_than_its_minimum_interval(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a", min_interval=3600))
    response = hook.refresh("mv")
    assert (response.status, "minimum interval" in response.response["reason"]) == ("skipped", True)
    db.execute("UPDATE matviews.mat_view_runs SET finished_at = finished_at - interval '61 min' WHERE status = 2")
    assert hook.refresh("mv").status == "updated"
    assert hook.refresh("mv").status == "skipped"


@pytest.mark.parametrize(
    "arguments",
    [
        {"skip_unchanged": "yes"},
        {"max_staleness": 5},
        {"skip_unchanged": True, "max_staleness": -1},
        {"skip_unchanged": True, "max_staleness": float("nan")},
        {"skip_unchanged": True, "max_staleness": "1h"},
        {"ignore_windows": 1},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_touched(db: Database, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidDefinition):
        hook_on(db).refresh("mv", **arguments)


def test_what_an_earlier_try_of_the_task_refreshed_is_the_tasks_own_doing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies after COMMIT has told nobody: its retry must not find that there was nothing to do."""
    _write(db, *ESTATE)
    set_connection(monkeypatch, db)
    conclude, failed = RefreshMatViewOperator._conclude, []

    def once(self: Any, *arguments: Any) -> Any:
        if self.task_id not in failed:
            failed.append(self.task_id)
            raise RuntimeError("the worker is gone")
        return conclude(self, *arguments)

    monkeypatch.setattr(RefreshMatViewOperator, "_conclude", once)
    with DAG("tried_twice", schedule=None) as dag:
        RefreshMatViewOperator(
            task_id="refresh", view="mv", skip_unchanged=True, retries=1, retry_delay=timedelta(0)
        ) >> RefreshMatViewOperator(task_id="after", view="below")
    run = run_dag(dag)
    assert failed == ["refresh", "after"] or run.states["refresh"] == "success"
    assert run.xcom("refresh")["status"] == "updated"
    assert "an earlier try of this task has refreshed it" in run.xcom("refresh")["reason"]
    assert [each.status for each in hook_on(db).runs("mv")] == ["skipped", "success"]


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_task_that_has_nothing_to_do_is_skipped_and_tells_nobody_of_the_view(
    db: Database, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    _write(db, *ESTATE)
    set_connection(monkeypatch, db)
    alias = f"left_alone_{deferrable}"
    with DAG(alias, schedule=None) as dag:
        first = RefreshMatViewOperator(task_id="first", view="mv", outlets=[AssetAlias(alias)])
        first >> RefreshMatViewOperator(
            task_id="second", view="mv", skip_unchanged=True, deferrable=deferrable, outlets=[AssetAlias(alias)]
        )
    run = run_dag(dag)
    assert run.states == {"first": "success", "second": "skipped"}
    assert "its sources changed" not in run.log
    assert "none of its" in run.log
    with create_session() as session:
        events = session.scalars(
            select(AssetEvent)
            .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
            .where(AssetModel.uri.endswith(f"{db.name}/public/mv"))
        ).all()
    assert [(event.extra["status"], event.extra["strategy"]) for event in events] == [("updated", "swap")]
