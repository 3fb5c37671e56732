"""Applying a plan: readers, dependents, privileges and others' changes while it goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from airflow_provider_matviews.definition import Column, Index, IndexKey, MatViewDefinition
from airflow_provider_matviews.exceptions import DependentsExist, InvalidDefinition, StrategyRefused
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.picture import Picture, take_picture
from tests.conftest import Database, hook_on
from tests.racing import AT_THE_GATE, beside, gate_closed, until

#: Passes for an immutable function, so that the building of an index can be held up.
_SLOW_KEY = """
CREATE FUNCTION slow_key(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
$$BEGIN PERFORM pg_advisory_xact_lock_shared(4711); RETURN $1; END$$
"""


def _picture(database: Database, name: LiteralString = "mv") -> Picture:
    with Driver(lambda: psycopg.connect(database.dsn())) as driver:
        picture = driver.run(take_picture(database.value("SELECT %s::regclass::oid::bigint", (name,))))
    assert picture is not None
    return picture


@contextmanager
def _read_all_the_time(database: Database, *statements: LiteralString) -> Iterator[Callable[[], dict[str, int]]]:
    """Run each statement over and over, on a connection of its own; any error of a reader fails the test."""
    stop, reads, errors = threading.Event(), dict.fromkeys(statements, 0), []

    def read(statement: LiteralString) -> None:
        try:
            with database.connect(options="-c statement_timeout=20s") as connection:
                while not stop.is_set():
                    connection.execute(statement).fetchall()
                    reads[statement] += 1
        except psycopg.Error as error:
            errors.append((statement, error))

    threads = [threading.Thread(target=read, args=(statement,)) for statement in statements]
    for thread in threads:
        thread.start()
    try:
        yield lambda: dict(reads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert all(reads.values())


def test_readers_go_on_while_a_changed_query_is_applied(db: Database) -> None:
    hook = hook_on(db)
    db.execute(
        "CREATE TABLE source AS SELECT n AS id, n % 100 AS part, n * 2 AS amount FROM generate_series(1, 20000) n"
    )
    first = MatViewDefinition(
        name="mv", sql="SELECT id, part, amount FROM source", unique_index_columns=["id"], comment="Ours."
    )
    hook.create(first)
    db.execute(
        "CREATE VIEW per_part AS SELECT part, sum(amount) AS total FROM mv GROUP BY part",
        "CREATE VIEW over AS SELECT * FROM per_part WHERE total > 0",
    )
    readers = ("SELECT count(id) FROM mv", "SELECT id, part FROM mv WHERE id = 17", "SELECT sum(total) FROM over")
    with _read_all_the_time(db, *readers) as reads:
        for round_ in range(6):
            changed = MatViewDefinition(
                name="mv",
                sql=f"SELECT id, part, amount, amount + {round_} AS more FROM source WHERE id <> {round_}",
                unique_index_columns=["id"],
                comment=f"Round {round_}.",
                indexes=[Index(columns=["more"])] if round_ % 2 else [],
                exclusive=True,
            )
            before = reads()
            done = hook.create(changed)
            assert (done.status, done.response["row_count_after"]) == ("updated", 20000 - (round_ > 0))
            # And some of them read while it was built.
            assert all(reads()[each] > before[each] for each in readers[:2])
            assert hook.plan(changed).steps == ()
    assert db.value("SELECT sum(total) FROM over") == sum(n * 2 for n in range(1, 20001) if n != 5)


def test_an_index_is_built_while_readers_go_on(db: Database) -> None:
    hook = hook_on(db)
    db.execute(_SLOW_KEY)
    definition = MatViewDefinition(name="mv", sql="SELECT n AS a FROM generate_series(1, 10) n")
    hook.create(definition)
    indexed = MatViewDefinition(
        name="mv", sql=definition.sql, indexes=[Index(columns=[IndexKey(expression="slow_key(a)")], name="slow")]
    )
    with gate_closed(db) as open_gate, beside(lambda: hook.create(indexed), open_gate) as applying:
        until(db, AT_THE_GATE)
        with db.connect(options="-c statement_timeout=5s -c lock_timeout=1s") as reader:
            assert reader.execute("SELECT count(*) FROM mv").fetchone() == (10,)
        assert not applying.done()
        open_gate()
        assert applying.result().status == "updated"
    assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'slow'::regclass") is True


def _make_invalid(database: Database, statement: LiteralString) -> None:
    """Begin to build an index concurrently and cancel it while it waits for an older transaction."""
    with database.connect() as older:
        older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        older.execute("SELECT count(*) FROM mv")
        with (
            database.connect(options="-c statement_timeout=300ms") as builder,
            pytest.raises(psycopg.errors.QueryCanceled),
        ):
            builder.execute(statement)
    assert database.value("SELECT count(*) FROM pg_index WHERE indrelid = 'mv'::regclass AND NOT indisvalid") == 1


def test_an_index_that_is_invalid_is_repaired(each_db: Database) -> None:
    hook = hook_on(each_db)
    bare = MatViewDefinition(name="mv", sql="SELECT n AS id, n AS a FROM generate_series(1, 10) n")
    hook.create(bare)
    _make_invalid(each_db, "CREATE UNIQUE INDEX CONCURRENTLY mv_id_key ON mv (id)")
    each_db.execute("COMMENT ON INDEX mv_id_key IS 'kept'")
    definition = MatViewDefinition(name="mv", sql=bare.sql, unique_index_columns=["id"])
    plan = hook.plan(definition)
    assert [step.kind for step in plan.steps] == ["repair index"]
    assert "INVALID" in plan.steps[0].why
    assert hook.create(definition).status == "updated"
    assert each_db.rows(
        "SELECT i.indisvalid, obj_description(i.indexrelid) FROM pg_index i WHERE indrelid = 'mv'::regclass"
    ) == [(True, "kept")]
    assert hook.refresh(definition, refresh_strategy="concurrent").status == "updated"
    assert hook.plan(definition).steps == ()


def test_an_invalid_index_that_nothing_declares_is_told_and_no_reason_to_lose_it(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT n AS id FROM generate_series(1, 10) n")
    hook.create(definition)
    _make_invalid(db, "CREATE INDEX CONCURRENTLY by_hand ON mv (id)")
    plan = hook.plan(definition)
    assert (plan.steps, plan.left_alone) == ((), ("index by_hand (INVALID)",))
    changed = MatViewDefinition(name="mv", sql="SELECT n + 1 AS id FROM generate_series(1, 10) n")
    with pytest.raises(StrategyRefused, match="its index by_hand is INVALID"):
        hook.create(changed)
    assert hook.create(changed, exclusive=True).status == "updated"
    assert db.value("SELECT count(*) FROM pg_index WHERE indrelid = 'mv'::regclass") == 0


def test_readers_never_queue_for_long_behind_a_change_that_waits_for_one_of_them(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", indexes=[Index(columns=["a"])])
    hook.create(definition)
    fewer = MatViewDefinition(name="mv", sql="SELECT 1 AS a", exclusive=True)
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'mv'::regclass AND NOT granted)"
    with db.connect() as reader:
        reader.execute("BEGIN")
        reader.execute("TABLE mv")
        with beside(lambda: hook.create(fewer, lock_timeout=0.2), reader.close) as applying:
            for _ in range(3):
                until(db, waiting)
                with db.connect(options="-c statement_timeout=5s") as newcomer:
                    assert newcomer.execute("TABLE mv").fetchall() == [(1,)]
            reader.execute("ROLLBACK")
            assert applying.result().status == "updated"
    assert db.value("SELECT count(*) FROM pg_index WHERE indrelid = 'mv'::regclass") == 0


def test_what_others_change_while_an_index_is_built_is_kept(db: Database) -> None:
    hook = hook_on(db)
    db.execute(_SLOW_KEY)
    hook.create(MatViewDefinition(name="mv", sql="SELECT n AS a FROM generate_series(1, 10) n", comment="One."))
    indexed = MatViewDefinition(
        name="mv",
        sql="SELECT n AS a FROM generate_series(1, 10) n",
        comment="Two.",
        indexes=[Index(columns=[IndexKey(expression="slow_key(a)")], name="slow")],
        grants={"public": ["SELECT"]},
    )
    with gate_closed(db) as open_gate, beside(lambda: hook.create(indexed), open_gate) as applying:
        until(db, AT_THE_GATE)
        db.execute("GRANT INSERT ON mv TO PUBLIC")
        open_gate()
        assert applying.result().status == "updated"
    assert db.rows(
        "SELECT has_table_privilege('public', 'mv', 'SELECT'), has_table_privilege('public', 'mv', 'INSERT'), "
        "obj_description('mv'::regclass)"
    ) == [(True, True, "Two.")]
    assert hook.plan(indexed).steps == ()
    # Done again from the beginning, in the one run.
    assert [run.status for run in hook.runs("mv")] == ["success", "success"]


def test_a_change_that_fails_half_way_leaves_everything_as_it_was(db: Database) -> None:
    hook, reader = hook_on(db), db.role()
    hook.create(MatViewDefinition(name="mv", sql="SELECT n % 5 AS a, n AS b FROM generate_series(1, 10) n"))
    before = _picture(db)
    changed = MatViewDefinition(
        name="mv",
        sql="SELECT n % 5 AS a, n AS b FROM generate_series(1, 10) n",
        indexes=[Index(columns=["b"], unique=True), Index(columns=["a"], unique=True)],
        grants={reader: ["SELECT"]},
        comment="Never seen.",
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        hook.create(changed)
    assert _picture(db) == before
    run = hook.last_run("mv")
    assert run is not None
    assert run.status == "failed"
    # What was to be done is on record, too.
    assert [step["kind"] for step in run.meta["response"]["plan"]["steps"]] == [
        "comment",
        "build index",
        "build index",
        "grant",
    ]
    missing = MatViewDefinition(name="mv", sql=changed.sql, comment="Never seen.", grants={"nobody at all": ["SELECT"]})
    with pytest.raises(psycopg.errors.UndefinedObject, match="nobody at all"):
        hook.create(missing)
    assert _picture(db) == before


def test_privileges_become_what_is_declared_each_by_its_grantor(each_db: Database) -> None:
    hook = hook_on(each_db)
    chief, clerk, guest = each_db.role(), each_db.role(), each_db.role()
    text = "SELECT 1 AS a, 2 AS b"
    chain = MatViewDefinition(
        name="mv",
        sql=text,
        grants={chief: ["SELECT WITH GRANT OPTION", "INSERT"], clerk: [f"SELECT GRANTED BY {chief}"]},
        columns=[Column(name="a", grants={guest: ["SELECT", "REFERENCES"]})],
        exclusive=True,
    )
    flat = MatViewDefinition(
        name="mv", sql=text, grants={clerk: ["SELECT"], chief: ["SELECT"], "public": ["TRIGGER"]}, exclusive=True
    )
    for first, second in ((chain, flat), (flat, chain)):
        hook.create(first)
        fresh = _picture(each_db)
        assert hook.create(second).status == "updated"
        assert hook.plan(second).steps == ()
        assert hook.create(first).status == "updated"
        assert _picture(each_db) == fresh
        each_db.execute("DROP MATERIALIZED VIEW mv")
    hook.create(chain)
    assert ("SELECT", chief, clerk) in {
        (each.privilege, each.grantor, each.grantee) for each in _picture(each_db).privileges
    }
    with each_db.connect(guest) as connection:
        assert connection.execute("SELECT a FROM mv").fetchall() == [(1,)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT b FROM mv")


def test_a_view_is_given_to_its_declared_owner_with_all_its_privileges(db: Database) -> None:
    hook, owner, reader = hook_on(db), db.role(), db.role()
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(owner)))
    first = MatViewDefinition(
        name="mv", sql="SELECT 1 AS a", unique_index_columns=["a"], grants={reader: ["SELECT"]}, comment="Ours."
    )
    given = MatViewDefinition(**{**first.to_dict(), "owner": owner, "indexes": []})
    hook.create(first)
    assert [step.kind for step in hook.plan(given).steps] == ["owner"]
    assert hook.create(given).status == "updated"
    assert hook.plan(given).steps == ()
    assert db.rows("SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname LIKE 'mv%'") == [(owner,)] * 2
    in_place = _picture(db)
    db.execute("DROP MATERIALIZED VIEW mv")
    assert hook.create(given).status == "created"
    assert _picture(db) == in_place
    with db.connect(reader) as connection:
        assert connection.execute("TABLE mv").fetchall() == [(1,)]


def test_the_query_of_a_changed_view_runs_with_the_rights_of_its_owner(db: Database) -> None:
    hook, owner = hook_on(db), db.role()
    with db.connect() as connection:
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(owner)))
    db.execute("CREATE TABLE secrets AS SELECT 1 AS a")
    hook.create(MatViewDefinition(name="mv", sql="SELECT current_user::text AS a", owner=owner))
    assert db.rows("TABLE mv") == [(owner,)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table secrets"):
        hook.create(MatViewDefinition(name="mv", sql="SELECT a::text FROM secrets"))
    assert db.rows("TABLE mv") == [(owner,)]


def test_a_renamed_column_keeps_its_rows_and_what_is_built_on_it(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE SEQUENCE ticks")
    hook.create(
        MatViewDefinition(
            name="mv",
            sql="SELECT nextval('ticks') AS id, 'x'::text AS old",
            unique_index_columns=["id"],
            columns=[Column(name="old", comment="Kept.")],
        )
    )
    db.execute(
        "CREATE VIEW over AS SELECT old, id FROM mv",
        "CREATE MATERIALIZED VIEW on_top AS SELECT old FROM mv",
    )
    renamed = MatViewDefinition(
        name="mv",
        sql="SELECT nextval('ticks') AS id, 'x'::text AS new",
        unique_index_columns=["id"],
        indexes=[Index(columns=["new", IndexKey(expression="upper(new)")], where="new IS NOT NULL")],
    )
    assert [step.kind for step in hook.plan(renamed).steps] == ["rename column", "build index"]
    assert hook.create(renamed).status == "updated"
    assert db.rows("SELECT id, new FROM mv") == [(1, "x")]
    assert db.rows("SELECT old, id FROM over") == [("x", 1)]
    assert db.value("SELECT col_description('mv'::regclass, 2)") == "Kept."
    db.execute("REFRESH MATERIALIZED VIEW on_top")
    assert hook.plan(renamed).steps == ()


def test_two_names_that_trade_places_are_another_query(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a, 2 AS b"))
    db.execute("CREATE VIEW over AS SELECT a FROM mv")
    traded = MatViewDefinition(name="mv", sql="SELECT 1 AS b, 2 AS a")
    assert [step.kind for step in hook.plan(traded).steps] == ["change query"]
    hook.create(traded)
    # What reads a column by name goes on with that name.
    assert db.rows("TABLE over") == [(2,)]


def test_a_view_that_holds_no_rows_gets_none_unless_it_is_asked_for(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"), with_data=False)
    changed = MatViewDefinition(name="mv", sql="SELECT 2 AS a", unique_index_columns=["a"])
    assert hook.create(changed, with_data=False).status == "updated"
    assert db.value("SELECT relispopulated FROM pg_class WHERE relname = 'mv'") is False
    again = MatViewDefinition(name="mv", sql="SELECT 3 AS a", unique_index_columns=["a"])
    hook.create(again)
    assert db.rows("TABLE mv") == [(3,)]
    # One that is read is not emptied by a change.
    hook.create(changed, with_data=False)
    assert db.rows("TABLE mv") == [(2,)]


def test_force_builds_a_view_anew_that_is_what_it_should_be(db: Database) -> None:
    hook, reader = hook_on(db), db.role()
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT n AS a FROM generate_series(1, 3) n",
        unique_index_columns=["a"],
        grants={reader: ["SELECT"]},
        comment="Ours.",
    )
    hook.create(definition)
    db.execute("CREATE VIEW over AS TABLE mv", "CREATE INDEX by_hand ON mv (a DESC)")
    before, oid = _picture(db), db.value("SELECT 'mv'::regclass::oid")
    done = hook.create(definition, force=True)
    assert (done.status, [step["kind"] for step in done.response["plan"]["steps"]]) == ("updated", ["rebuild"])
    assert db.value("SELECT 'mv'::regclass::oid") != oid
    assert _picture(db) == before
    assert db.rows("SELECT count(*) FROM over") == [(3,)]


def test_a_view_moves_to_its_declared_tablespace_and_access_method(each_db: Database) -> None:
    hook = hook_on(each_db)
    name = f"moved_{each_db.name}"
    with each_db.connect() as connection:
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute(sql.SQL("CREATE TABLESPACE {} LOCATION ''").format(sql.Identifier(name)))
        connection.execute("CREATE ACCESS METHOD heap2 TYPE TABLE HANDLER heap_tableam_handler")
    try:
        first = MatViewDefinition(name="mv", sql="SELECT 1 AS a", unique_index_columns=["a"], comment="Ours.")
        hook.create(first)
        each_db.execute("CREATE VIEW over AS TABLE mv")
        # A default for what is new moves nothing that stands.
        elsewhere = hook_on(each_db, extra=json.dumps({"options": f"-c default_tablespace={name}"}))
        assert elsewhere.plan(first).steps == ()
        moved = MatViewDefinition(
            name="mv",
            sql="SELECT 1 AS a",
            indexes=[Index(columns=["a"], unique=True, tablespace=name)],
            tablespace=name,
            access_method="heap2",
        )
        assert [step.kind for step in hook.plan(moved).steps] == ["tablespace", "access method", "change index"]
        assert hook.create(moved).status == "updated"
        assert hook.plan(moved).steps == ()
        picture = _picture(each_db)
        assert (picture.tablespace, picture.access_method, picture.indexes[0].tablespace) == (name, "heap2", name)
        assert (picture.comment, each_db.rows("TABLE over")) == ("Ours.", [(1,)])
        assert hook.create(first, exclusive=True).status == "updated"
        assert _picture(each_db).tablespace is None
        assert hook.plan(first, exclusive=True).steps == ()
    finally:
        each_db.execute("DROP MATERIALIZED VIEW IF EXISTS mv CASCADE")
        with each_db.connect() as connection:
            connection.execute(sql.SQL("DROP TABLESPACE {}").format(sql.Identifier(name)))


#: What is built on a view and names its columns by their position.
_BY_POSITION: list[LiteralString] = [
    "CREATE VIEW listed AS SELECT m.x, m.y FROM mv m(x, y)",
    "CREATE VIEW joined AS SELECT j.p, j.q FROM (mv JOIN other ON other.k = mv.a) j(p, q)",
    "CREATE FUNCTION counted() RETURNS bigint BEGIN ATOMIC SELECT sum(m.x) FROM mv m(x, y); END",
    "CREATE TABLE guarded (v integer)",
    "CREATE POLICY seen ON guarded USING (v IN (SELECT m.x FROM mv m(x, y)))",
]


def test_what_names_columns_by_position_never_reads_others_in_silence(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(
        "CREATE TABLE t AS SELECT n AS id, n * 10 AS a, n * 100 AS b FROM generate_series(1, 2) n",
        "CREATE TABLE other AS SELECT 10 AS k",
        "CREATE SEQUENCE ticks",
    )
    hook.create(MatViewDefinition(name="mv", sql="SELECT a, b FROM t"))
    each_db.execute(*_BY_POSITION)
    named = [
        "function public.counted()",
        "policy seen on table public.guarded",
        "view public.joined",
        "view public.listed",
    ]
    for columns in ("nextval('ticks')::integer AS id, a, b", "b, a"):
        changed = MatViewDefinition(name="mv", sql=f"SELECT {columns} FROM t")
        (refusal,) = hook.plan(changed).refusals
        assert all(each in refusal for each in named), refusal
        with pytest.raises(DependentsExist, match="by position") as raised:
            hook.create(changed)
        assert sorted(raised.value.dependents) == named
    # New ones that come last move nothing but what stands behind them in a join.
    last = MatViewDefinition(name="mv", sql="SELECT a, b, id FROM t")
    with pytest.raises(DependentsExist) as raised:
        hook.create(last)
    assert raised.value.dependents == ("view public.joined",)
    assert each_db.value("SELECT is_called FROM ticks") is False
    each_db.execute("DROP VIEW joined")
    assert hook.create(last).status == "updated"
    assert each_db.rows("SELECT x, y FROM listed ORDER BY 1") == [(10, 100), (20, 200)]
    assert each_db.value("SELECT counted()") == 30
    # And another query for the same columns is nobody's matter.
    hook.create(MatViewDefinition(name="mv", sql="SELECT a + 1 AS a, b, id FROM t"))
    assert each_db.rows("SELECT x, y FROM listed ORDER BY 1") == [(11, 100), (21, 200)]


def test_a_join_over_a_renamed_column_never_joins_on_another_one(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE TABLE u AS SELECT * FROM (VALUES (10, 'ten'), (1, 'ONE')) AS v (a, w)")
    hook.create(MatViewDefinition(name="mv", sql="SELECT 10 AS a, 5 AS b"))
    db.execute("CREATE VIEW over AS SELECT a, w FROM mv JOIN u USING (a)")
    hook.create(MatViewDefinition(name="mv", sql="SELECT 10 AS key, 5 AS b"))
    assert db.rows("TABLE over") == [(10, "ten")]
    with pytest.raises(DependentsExist, match="by position"):
        hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS id, 10 AS key, 5 AS b"))
    assert db.rows("TABLE over") == [(10, "ten")]


def test_a_renamed_column_keeps_what_expressions_and_people_say_of_it(each_db: Database) -> None:
    hook, reader = hook_on(each_db), each_db.role()
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS id, 2 AS a, 'x'::varchar AS v"))
    with each_db.connect() as connection:
        connection.execute(
            sql.SQL(
                "CREATE INDEX by_hand ON mv (id, (a + 1)) WHERE a > 1 AND v IN ('x', 'y');"
                "CREATE STATISTICS stats ON id, (a * 2) FROM mv; COMMENT ON COLUMN mv.a IS 'kept';"
                "GRANT SELECT (a) ON mv TO {}"
            ).format(sql.Identifier(reader))
        )
    renamed = MatViewDefinition(
        name="mv",
        sql="SELECT 1 AS id, 2 AS amount, 'x'::varchar AS v",
        indexes=[
            Index(
                name="by_hand",
                columns=["id", IndexKey(expression="amount + 1")],
                where="amount > 1 AND v IN ('x', 'y')",
            )
        ],
    )
    assert [step.kind for step in hook.plan(renamed).steps] == ["rename column"]
    hook.create(renamed)
    assert hook.plan(renamed).steps == ()
    assert each_db.rows(
        "SELECT col_description('mv'::regclass, 2), has_column_privilege(%s, 'mv', 'amount', 'SELECT'), "
        "(SELECT count(*) FROM pg_statistic_ext), (SELECT count(*) FROM pg_indexes WHERE tablename = 'mv')",
        (reader,),
    ) == [("kept", True, 1, 1)]


def test_a_view_is_not_made_of_itself(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS id")
    hook.create(MatViewDefinition(name="mv", sql="SELECT id FROM t"))
    db.execute(
        "CREATE VIEW small AS SELECT id FROM mv WHERE id < 5",
        "CREATE VIEW smaller AS SELECT id FROM small WHERE id < 3",
        "CREATE FUNCTION several() RETURNS SETOF integer BEGIN ATOMIC SELECT id FROM small; END",
    )
    for query in ("TABLE mv", "SELECT id FROM smaller", "SELECT several() AS id", "SELECT (NULL::mv).id"):
        changed = MatViewDefinition(name="mv", sql=query)
        for act in (hook.plan, hook.create):
            with pytest.raises(InvalidDefinition, match="mv would read itself"):
                act(changed)
    assert db.value("SELECT count(*) FROM mv") == 10


def test_what_an_index_had_is_not_pressed_onto_one_of_another_kind(db: Database) -> None:
    hook = hook_on(db)
    text = "SELECT n AS a, ARRAY[n] AS b FROM generate_series(1, 10) n"
    first = MatViewDefinition(
        name="mv",
        sql=text,
        indexes=[Index(name="i", columns=["a"], storage_parameters={"fillfactor": 50}, clustered=True)],
    )
    for other in (
        Index(name="i", columns=["b"], method="gin"),
        Index(name="i", columns=["a"], method="hash"),
        Index(name="i", columns=["a"], where="a > 3"),
    ):
        hook.create(first)
        changed = MatViewDefinition(name="mv", sql=text, indexes=[other])
        assert [step.kind for step in hook.plan(changed).steps] == ["change index"]
        assert hook.create(changed).status == "updated"
        assert hook.plan(changed).steps == ()
        db.execute("DROP MATERIALIZED VIEW mv")


def test_a_change_in_place_that_cannot_be_is_found_before_an_index_is_built(db: Database) -> None:
    hook = hook_on(db)
    db.execute(
        "CREATE SEQUENCE ticks",
        "CREATE FUNCTION counted(integer) RETURNS integer LANGUAGE sql IMMUTABLE AS "
        "$$SELECT nextval('public.ticks')::int$$",
        "CREATE TABLE taken (a integer)",
    )
    text = "SELECT n AS a FROM generate_series(1, 3) n"
    slow = Index(columns=[IndexKey(expression="counted(a)")], name="slow")
    hook.create(MatViewDefinition(name="mv", sql=text, indexes=[Index(name="old", columns=["a"])]))
    for changes in (
        {"grants": {"nobody at all": ["SELECT"]}},
        {"owner": "nobody at all"},
        {"depends_on_extensions": ["nothing"]},
        {"indexes": [slow, Index(name="taken", columns=["a"])]},
    ):
        changed = MatViewDefinition(**{"name": "mv", "sql": text, "indexes": [slow], **changes})
        with pytest.raises(psycopg.Error):
            hook.create(changed)
        assert db.value("SELECT is_called FROM ticks") is False, changes


def test_a_grant_that_somebody_has_not_committed_yet_is_waited_for(db: Database) -> None:
    hook, reader = hook_on(db), db.role()
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    changed = MatViewDefinition(name="mv", sql="SELECT 1 AS a", grants={"public": ["SELECT"]}, comment="Ours.")
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted)"
    with db.connect() as other:
        other.execute("BEGIN")
        other.execute(sql.SQL("GRANT SELECT ON mv TO {}").format(sql.Identifier(reader)))
        with beside(lambda: hook.create(changed, lock_timeout=30), other.close) as applying:
            until(db, waiting)
            other.execute("COMMIT")
            assert applying.result().status == "updated"
    assert hook.plan(changed).steps == ()
    assert db.value("SELECT has_table_privilege(%s, 'mv', 'SELECT')", (reader,)) is True


def test_force_and_leave_it_alone_contradict_each_other(db: Database) -> None:
    for on_drift in ("fail", "report", "ignore"):
        with pytest.raises(InvalidDefinition, match="give one of them"):
            hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"), force=True, on_drift=on_drift)
