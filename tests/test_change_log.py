"""The change log: every change is in it, nobody waits for it or can misuse it, and nothing that is needed is pruned."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.exceptions import InvalidDefinition, MissingPrivilege, ViewNotFound
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import change_log, watching
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.staleness import Judgement
from airflow_provider_matviews.services.watching import Sight, Truth
from demo.postgres_server import PostgresServer
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on
from tests.driving import connecting
from tests.racing import beside, until

LOGGED: LiteralString = "SELECT DISTINCT relation::regclass::text FROM matviews.mat_view_changes ORDER BY 1"
LATER: LiteralString = "SELECT DISTINCT relation::regclass::text FROM matviews.mat_view_changes " + (
    "WHERE transaction_id >= pg_snapshot_xmax(%s::pg_snapshot) ORDER BY 1"
)
NOW: LiteralString = "SELECT pg_current_snapshot()::text"

#: A table, a partitioned one, one with a child, one that another refers to, and views of them all.
ESTATE: tuple[LiteralString, ...] = (
    "CREATE TABLE plain (id integer PRIMARY KEY, value integer)",
    "INSERT INTO plain VALUES (1, 1)",
    "CREATE TABLE referring (id integer REFERENCES plain ON DELETE CASCADE)",
    "INSERT INTO referring VALUES (1)",
    "CREATE TABLE parted (id integer, value integer) PARTITION BY LIST (id)",
    "CREATE TABLE part PARTITION OF parted FOR VALUES IN (1)",
    "CREATE TABLE parent (id integer, value integer)",
    "CREATE TABLE child () INHERITS (parent)",
    "CREATE VIEW between AS SELECT id FROM plain UNION ALL SELECT id FROM referring UNION ALL SELECT id FROM parted",
    "CREATE VIEW simple AS SELECT id, value FROM plain",
    "CREATE MATERIALIZED VIEW mv AS SELECT id FROM between",
    # It reads the child alone, which those change too who name the parent.
    "CREATE MATERIALIZED VIEW of_child AS SELECT id FROM child",
    "CREATE MATERIALIZED VIEW of_part AS SELECT id FROM part",
)
VIEWS = ("mv", "of_child", "of_part")


@pytest.fixture
def estate(each_db: Database) -> Database:
    each_db.execute(*ESTATE)
    for view in VIEWS:
        hook_on(each_db).refresh(view)
    return each_db


def see(db: Database, *views: str) -> Sight:
    with Driver(connecting(db)) as driver:
        names = [ViewName.parse(view) for view in views]
        return driver.run(watching.see(Ledger("matviews"), names, everything=False, with_log=True))


def judge(db: Database, view: str) -> Judgement:
    sight = see(db, view)
    return sight.judge(sight.names[ViewName.parse(view)], Truth.CHANGE_LOG, None)


def stale_views(db: Database) -> set[str]:
    sight = see(db, *VIEWS)
    return {view.display for view in sight.looks if sight.judge(view, Truth.CHANGE_LOG, None).stale}


#: Statement -> the views that are stale then.
CHANGES: dict[LiteralString, set[str]] = {
    "INSERT INTO plain VALUES (2, 2)": {"mv"},
    "INSERT INTO plain VALUES (1, 3) ON CONFLICT (id) DO UPDATE SET value = 3": {"mv"},
    "UPDATE simple SET value = 5": {"mv"},
    "COPY plain FROM PROGRAM 'echo 7,7' WITH (FORMAT csv)": {"mv"},
    "WITH gone AS (DELETE FROM referring RETURNING id) SELECT count(*) FROM gone": {"mv"},
    "TRUNCATE referring": {"mv"},
    "DO $$BEGIN EXECUTE 'UPDATE plain SET value = 9'; END$$": {"mv"},
    "SET session_replication_role = replica; UPDATE plain SET value = 8": {"mv"},
    "INSERT INTO parted VALUES (1, 1)": {"mv", "of_part"},
    "INSERT INTO part VALUES (1, 1)": {"mv", "of_part"},
    "UPDATE parent SET value = 2": {"of_child"},
    "INSERT INTO child VALUES (1, 1)": {"of_child"},
    # What no trigger sees.
    "DROP VIEW simple; ALTER TABLE plain ALTER value TYPE text": {"mv"},
    # The partition's own columns are written anew: a needless refresh of what reads nothing else.
    "ALTER TABLE parted DETACH PARTITION part": {"mv", "of_part"},
    "CREATE OR REPLACE VIEW between AS SELECT id FROM plain": {"mv"},
}


def test_every_way_to_change_a_source_makes_its_views_stale_at_once(estate: Database) -> None:
    hook = hook_on(estate)
    hook.install_change_log(*VIEWS)
    assert stale_views(estate) == set(VIEWS)
    changes = dict(CHANGES)
    if estate.server.major >= 15:
        changes["MERGE INTO plain p USING (VALUES (1)) v (id) ON v.id = p.id WHEN MATCHED THEN DELETE"] = {"mv"}
    with estate.connect() as connection:
        for statement, stale in changes.items():
            for view in stale_views(estate):
                hook.refresh(view, refresh_strategy="regular")
            assert stale_views(estate) == set(), statement
            connection.execute(statement)
            connection.execute("RESET session_replication_role")
            assert stale_views(estate) == stale, statement


def test_what_a_cascade_deletes_is_logged_and_what_is_rolled_back_is_not(db: Database) -> None:
    db.execute(*ESTATE)
    hook_on(db).install_change_log("mv")
    before = db.value(NOW)
    with db.connect() as connection, connection.transaction(force_rollback=True):
        connection.execute("INSERT INTO plain VALUES (3)")
    assert db.rows(LATER, (before,)) == []
    db.execute("DELETE FROM plain WHERE id = 1")
    assert db.rows(LATER, (before,)) == [("plain",), ("referring",)]


def test_a_transaction_is_logged_once_for_a_table_however_much_it_changes(db: Database) -> None:
    db.execute(*ESTATE)
    hook_on(db).install_change_log("plain")
    before = db.value("SELECT count(*) FROM matviews.mat_view_changes")
    with db.connect() as connection, connection.transaction():
        for number in range(10, 20):
            with connection.transaction(force_rollback=number % 2 == 0):
                connection.execute("INSERT INTO plain VALUES (%s)", (number,))
    assert db.value("SELECT count(*) FROM matviews.mat_view_changes") == before + 1


def test_a_second_installation_mends_what_is_missing_and_leaves_the_rest(estate: Database) -> None:
    hook = hook_on(estate)
    first = hook.install_change_log("mv")
    assert set(first.tables) == {"plain", "referring", "parted", "part"}
    assert first.gaps == {}
    assert hook.install_change_log("mv").statements == ()
    estate.execute(
        "CREATE TABLE part_2 PARTITION OF parted FOR VALUES IN (2)",
        "ALTER TABLE plain DISABLE TRIGGER ALL",
    )
    assert {table.name.display: table.gap is None for table in hook.change_log("mv")} == {
        "plain": False,
        "referring": True,
        "parted": True,
        "part": True,
        "part_2": False,
    }
    assert set(hook.install_change_log("mv").tables) == {"plain", "part_2"}
    assert all(table.gap is None for table in hook.change_log("mv"))
    # Nobody knows what was changed while they were not logged.
    assert judge(estate, "mv").stale


def test_what_is_logged_needs_no_counters_but_its_columns_still_count(db: Database) -> None:
    db.execute(
        "CREATE TABLE source (a integer)",
        "CREATE TABLE empty ()",
        "CREATE MATERIALIZED VIEW below AS SELECT a FROM source",
        "CREATE MATERIALIZED VIEW mv AS SELECT to_jsonb(s) AS s, below.a FROM source s, below, empty",
    )
    hook = hook_on(db)
    hook.install_change_log("mv")
    hook.refresh("mv")
    db.execute("SELECT pg_stat_reset()")
    assert not judge(db, "mv").stale
    db.execute("ALTER TABLE source ADD COLUMN b integer")
    assert judge(db, "mv").reason == "source changed"


def test_a_source_that_is_not_logged_is_judged_by_its_counters(db: Database) -> None:
    db.execute(*ESTATE)
    hook = hook_on(db)
    hook.install_change_log("plain", "referring")
    hook.refresh("mv")
    assert not judge(db, "mv").stale
    sight = see(db, "mv")
    assert set(sight.gaps(sight.names[ViewName("mv")])) == {"part", "parted"}
    db.execute("INSERT INTO parted VALUES (1)")
    assert judge(db, "mv").reason == "part changed"


def test_what_triggers_cannot_see_is_said(db: Database) -> None:
    db.execute(
        "CREATE EXTENSION postgres_fdw",
        "CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw",
        "CREATE FOREIGN TABLE away (id integer) SERVER far",
        "CREATE TABLE here (id integer)",
        "CREATE MATERIALIZED VIEW below AS SELECT id FROM here",
        "CREATE MATERIALIZED VIEW mv AS SELECT id FROM away UNION ALL SELECT id FROM below WITH NO DATA",
    )
    response = hook_on(db).install_change_log("mv")
    assert response.tables == ()
    assert set(response.gaps) == {"away", "below"}


def test_a_dry_run_says_what_would_be_done_and_does_nothing(db: Database) -> None:
    db.execute(*ESTATE)
    hook = hook_on(db)
    hook.definitions()
    triggers: LiteralString = "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
    dry = hook.install_change_log("mv", dry_run=True)
    assert db.rows(triggers) == []
    assert dry == hook.install_change_log("mv")
    removal = hook.remove_change_log(dry_run=True)
    assert len(db.rows(triggers)) == 4
    assert removal == hook.remove_change_log()
    assert db.rows(triggers) == []
    assert db.rows("SELECT FROM pg_proc WHERE proname = 'mat_view_note_change'") == []
    assert db.rows(LOGGED) == []
    db.execute("INSERT INTO plain VALUES (2)")


def test_nobody_queues_behind_an_installation_that_waits_for_a_writer(db: Database) -> None:
    db.execute(*ESTATE)
    hook = hook_on(db)
    hook.definitions()
    with db.connect() as writer, writer.transaction():
        writer.execute("INSERT INTO plain VALUES (2)")
        with beside(lambda: hook.install_change_log("plain", lock_timeout=0.2, max_wait=20)) as installing:
            until(db, "SELECT EXISTS (SELECT FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND NOT granted)")
            with db.connect(options="-c lock_timeout=5s") as other:
                other.execute("INSERT INTO plain VALUES (3)")
            assert not installing.done()
            writer.execute("COMMIT")
            assert installing.result().tables == ("plain",)


def test_a_table_that_is_not_to_be_had_is_left_as_it_was(db: Database) -> None:
    db.execute(*ESTATE)
    hook = hook_on(db)
    with db.connect() as writer, writer.transaction():
        writer.execute("INSERT INTO plain VALUES (2)")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            hook.install_change_log("plain", lock_timeout=0.05, max_wait=0.1)
    assert [table.trigger for table in hook.change_log("plain")] == [None]


def test_writers_need_no_right_on_the_log_and_get_none(db: Database) -> None:
    db.execute("CREATE TABLE source (id integer)")
    hook_on(db).install_change_log("source")
    before = db.value(NOW)
    role = db.role()
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT INSERT ON source TO {}").format(sql.Identifier(role)))
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(role)))
    with db.connect(user=role) as writer:
        # What it puts in the way is not found.
        writer.execute("CREATE TEMP TABLE mat_view_changes (relation oid, transaction_id xid8 PRIMARY KEY)")
        writer.execute("CREATE FUNCTION pg_temp.pg_current_xact_id() RETURNS xid8 LANGUAGE sql AS $$SELECT '1'::xid8$$")
        writer.execute("SET search_path = pg_temp, public")
        writer.execute("INSERT INTO public.source VALUES (1)")
        writer.execute("CREATE TABLE public.own (id integer)")
        for statement in (
            "SELECT * FROM matviews.mat_view_changes",
            "CREATE TRIGGER mine AFTER INSERT ON public.own EXECUTE FUNCTION matviews.mat_view_note_change()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                writer.execute(statement)  # type: ignore[arg-type]
    assert db.rows(LATER, (before,)) == [("source",)]


def test_who_may_not_make_the_trigger_is_told_the_grant(db: Database) -> None:
    db.execute("CREATE TABLE source (id integer)")
    role = db.role()
    with db.connect() as connection:
        connection.execute(
            sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(sql.Identifier(db.name), sql.Identifier(role))
        )
    hook = hook_on(db, user=role)
    with pytest.raises(MissingPrivilege) as refused:
        hook.install_change_log("source")
    assert f'GRANT TRIGGER ON "public"."source" TO "{role}"' in str(refused.value)
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT TRIGGER ON source TO {}").format(sql.Identifier(role)))
    assert hook.install_change_log("source").gaps == {}


@pytest.mark.parametrize(
    ("names", "error"),
    [((), InvalidDefinition), (("nowhere",), ViewNotFound), (("simple",), InvalidDefinition), (("a b",), ValueError)],
)
def test_what_cannot_be_logged_is_refused(db: Database, names: tuple[str, ...], error: type[Exception]) -> None:
    db.execute(*ESTATE)
    with pytest.raises(error):
        hook_on(db).install_change_log(*names)


def test_any_name_will_do(db: Database) -> None:
    schema = 'odd %s "log" $$ näme'
    db.execute('CREATE TABLE "odd %s ""table""" (id integer)')
    db.execute('CREATE MATERIALIZED VIEW "odd %s" AS SELECT id FROM "odd %s ""table"""')
    hook = hook_on(db, tracking_schema=schema)
    hook.install_change_log('"odd %s"')
    # Beside another log on the same table.
    hook_on(db).install_change_log('"odd %s"')
    hook.refresh('"odd %s"')
    db.execute('INSERT INTO "odd %s ""table""" VALUES (1)')
    (table,) = hook.change_log()
    assert (table.name.name, table.views, table.gap) == ('odd %s "table"', ('"odd %s"',), None)
    assert hook.prune_change_log() == 1
    hook.remove_change_log()
    assert [table.gap for table in hook_on(db).change_log('"odd %s"')] == [None]


# Pruning


def _rows(db: Database) -> int:
    return int(db.value("SELECT count(*) FROM matviews.mat_view_changes"))


def test_pruning_leaves_the_latest_row_of_each_table(db: Database) -> None:
    db.execute(*ESTATE)
    hook = hook_on(db)
    hook.install_change_log("mv")
    hook.refresh("mv")
    for _ in range(10):
        db.execute("INSERT INTO referring VALUES (NULL)")
    assert hook.prune_change_log() == 10
    assert _rows(db) == 4
    assert judge(db, "mv").stale
    hook.refresh("mv")
    assert not judge(db, "mv").stale
    db.execute("DROP TABLE referring CASCADE")
    hook.prune_change_log()
    assert _rows(db) == 3


def test_pruning_waits_for_refreshes_that_nobody_knows_of_yet(db: Database) -> None:
    db.execute("CREATE TABLE source (id integer)", "CREATE MATERIALIZED VIEW mv AS SELECT count(*) FROM source")
    hook = hook_on(db)
    hook.install_change_log("source")
    with db.connect() as early, db.connect() as refreshing, Driver(connecting(db)) as driver:
        early.execute("BEGIN; INSERT INTO source VALUES (1)")
        # A later transaction commits first; then a refresh takes its picture, and only then the earlier one commits.
        db.execute("INSERT INTO source VALUES (2)")
        refreshing.execute("BEGIN")
        (snapshot,) = refreshing.execute(NOW).fetchone() or ("",)
        early.execute("COMMIT")
        (source,) = db.rows("SELECT 'source'::regclass::oid::integer")[0]
        mark = driver.run(change_log.mark())
        assert driver.run(change_log.prune("matviews", mark)) is None
        refreshing.execute(
            "INSERT INTO matviews.mat_view_definitions (name, schema_name, view_name, source_state) "
            "VALUES ('mv', 'public', 'mv', jsonb_build_object('snapshot', %s::text))",
            (snapshot,),
        )
        refreshing.execute("COMMIT")
        # What was there before goes; what that refresh did not see stays.
        assert driver.run(change_log.prune("matviews", mark)) == 1
        assert driver.run(change_log.unseen("matviews", [(source, snapshot)]))


@pytest.mark.parametrize("rounds", [15, pytest.param(150, marks=pytest.mark.e2e)])
def test_no_change_is_ever_missed_while_all_go_on_at_once(db: Database, rounds: int) -> None:
    """Writers whose transactions overlap, refreshes and prunes at random: what counts as fresh equals its query."""
    db.execute("CREATE TABLE source (id integer)", "CREATE MATERIALIZED VIEW mv AS SELECT count(*) AS rows FROM source")
    hook_on(db).install_change_log("source")
    pace, ended = random.Random(7), threading.Event()

    def write() -> None:
        with db.connect() as connection:
            while not ended.is_set():
                with connection.transaction():
                    connection.execute("INSERT INTO source VALUES (1)")
                    ended.wait(pace.uniform(0, 0.01))
                ended.wait(pace.uniform(0, 0.03))

    def prune() -> None:
        while not ended.wait(0.01):
            hook_on(db).prune_change_log(max_wait=1)

    missed = fresh = 0
    with ThreadPoolExecutor(4) as pool:
        beside_it = [pool.submit(write), pool.submit(write), pool.submit(prune)]
        try:
            hook = hook_on(db)
            for _ in range(rounds):
                hook.refresh("mv", refresh_strategy="regular")
                # One transaction, so that all of it is about the same moment.
                with db.connect() as connection:
                    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                    same = connection.execute("SELECT rows = (SELECT count(*) FROM source) FROM mv").fetchone()
                    stale = connection.execute(
                        "SELECT EXISTS (SELECT FROM matviews.mat_view_changes c, matviews.mat_view_definitions d "
                        "WHERE NOT pg_visible_in_snapshot(transaction_id, (source_state->>'snapshot')::pg_snapshot))"
                    ).fetchone()
                assert same is not None
                assert stale is not None
                fresh += not stale[0]
                missed += not stale[0] and not same[0]
        finally:
            ended.set()
        for each in beside_it:
            each.result()
        assert missed == 0
        # A few may all have met a writer.
        assert fresh or rounds < 100
    if judge(db, "mv").stale:
        hook_on(db).refresh("mv")
    assert db.value("SELECT rows = (SELECT count(*) FROM source) FROM mv")


# Logical replication


@pytest.fixture
def replicating() -> Iterator[PostgresServer]:
    with PostgresServer(bin_dir=INSTALLATIONS[NEWEST], settings={"wal_level": "logical"}) as server:
        yield server


@pytest.mark.e2e
def test_what_logical_replication_brings_is_logged(replicating: PostgresServer) -> None:
    databases = [Database(replicating, name) for name in ("here", "there")]
    with psycopg.connect(replicating.dsn(), autocommit=True) as connection:
        for database in databases:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database.name)))
    here, there = databases
    for database in databases:
        database.execute("CREATE TABLE source (id integer PRIMARY KEY)")
    there.execute("CREATE MATERIALIZED VIEW mv AS SELECT count(*) AS rows FROM source")
    hook = hook_on(there)
    hook.install_change_log("mv")
    here.execute(
        "CREATE PUBLICATION sources FOR ALL TABLES",
        "SELECT pg_create_logical_replication_slot('sources', 'pgoutput')",
    )
    with there.connect() as connection:
        connection.execute(
            sql.SQL(
                "CREATE SUBSCRIPTION sources CONNECTION {} PUBLICATION sources "
                "WITH (create_slot = false, slot_name = 'sources', copy_data = false)"
            ).format(sql.Literal(here.dsn()))
        )
    try:
        assert [table.gap is None for table in hook.change_log("mv")] == [False]
        assert hook.install_change_log("mv").gaps == {}
        for rows, statement in (
            (1, "INSERT INTO source VALUES (1)"),
            (0, "DELETE FROM source"),
            (1, "INSERT INTO source VALUES (2)"),
            (0, "TRUNCATE source"),
        ):
            hook.refresh("mv")
            assert not judge(there, "mv").stale
            here.execute(statement)  # type: ignore[arg-type]
            until(there, sql.SQL("SELECT count(*) = {} FROM source").format(sql.Literal(rows)))
            assert judge(there, "mv").stale, statement
            before = there.value(NOW)
        # Other writers do not fire it for each row.
        there.execute("INSERT INTO source SELECT generate_series(10, 20)")
        assert there.rows(LATER, (before,)) == [("source",)]
    finally:
        there.execute(
            "ALTER SUBSCRIPTION sources DISABLE",
            "ALTER SUBSCRIPTION sources SET (slot_name = NONE)",
            "DROP SUBSCRIPTION sources",
        )
        with here.connect() as connection:
            until(here, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'sources'")
            connection.execute("SELECT pg_drop_replication_slot('sources')")
