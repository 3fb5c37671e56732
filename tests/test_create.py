"""Create: what a definition says is what stands, what is no view is refused, and nothing is lost or half-made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from psycopg import sql

from airflow_provider_matviews.definition import Index, IndexKey, MatViewDefinition
from airflow_provider_matviews.exceptions import (
    DependentsExist,
    InvalidDefinition,
    NotAMaterializedView,
    StrategyRefused,
    ViewNotManaged,
)
from airflow_provider_matviews.names import ViewName
from tests.conftest import Database, examples, hook_on
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

_NAMES = [
    "mv",
    "MixedCase",
    '"MixedCase"',
    '"odd name"',
    '"dot.in.it"',
    '"quote""in it"',
    '"select"',
    '"100 %s %(name)s {0}"',
    '"back\\slash"',
    '"single\'quote"',
    '"; drop table t; --"',
    '"line\nbreak"',
    '"ünïcode 漢字 😀"',
    "m" * 63,
    f'"{"é" * 31}x"',
    'public."in public"',
    "other.mv",
    'other."Odd.Name"',
    '"Other Schema"."mv"',
    '"a.b"."c.d"',
]

_TABLE = ("CREATE TABLE t (a int, v varchar(10))", "INSERT INTO t VALUES (1, 'one'), (2, NULL)")

#: Query -> its rows.
_QUERIES: dict[str, list[tuple[Any, ...]]] = {
    "SELECT a FROM t": [(1,), (2,)],
    "TABLE t": [(1, "one"), (2, None)],
    "VALUES (1, 'x'), (2, 'y')": [(1, "x"), (2, "y")],
    "WITH w AS (SELECT a FROM t) SELECT * FROM w": [(1,), (2,)],
    "WITH RECURSIVE r (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM r WHERE n < 3) TABLE r": [(1,), (2,), (3,)],
    "(SELECT 1 AS n) UNION ALL (SELECT 2) ORDER BY n DESC LIMIT 1": [(2,)],
    "SELECT 1 AS n;": [(1,)],
    "SELECT 1 AS n ; ; \n;": [(1,)],
    "SELECT 1 AS n -- the end": [(1,)],
    "SELECT 1 AS n; -- the end": [(1,)],
    "SELECT 1 AS n -- the end;\n": [(1,)],
    "SELECT 1 AS n /* the end */": [(1,)],
    "SELECT 1 AS n /* a ; /* nested */ ; */ ;": [(1,)],
    "-- a beginning\n/* another; */ SELECT 1 AS n": [(1,)],
    "SELECT '%' AS j, '%s' AS k, '%(a)s' AS l, 7 % 4 AS m": [("%", "%s", "%(a)s", 3)],
    "SELECT a FROM t WHERE v LIKE 'o%'": [(1,)],
    "SELECT $$ it's; -- $$ AS n": [(" it's; -- ",)],
    "SELECT $q$;/* $$ $q$ AS n": [(";/* $$ ",)],
    "SELECT E'\\'; DROP TABLE t; --' AS n": [("'; DROP TABLE t; --",)],
    "SELECT '{\"a\": 1}'::jsonb ? 'a' AS n": [(True,)],
    "SELECT 'ünïcode 漢字 😀' AS \"Spalte ü;\"": [("ünïcode 漢字 😀",)],
    "SELECT v FROM t WHERE v IN ('one', 'two')": [("one",)],
    "SELECT a FROM t WHERE v NOT IN ('two', 'three') AND v || 'x' <> 'y'": [(1,)],
    "SELECT count(*) FILTER (WHERE a > 1) AS n, max(a) OVER () AS m FROM t GROUP BY a": [(0, 2), (1, 2)],
    "SELECT x.* FROM t CROSS JOIN LATERAL (SELECT t.a * 2 AS double) x": [(2,), (4,)],
}

_NO_VIEWS = [
    "SELECT nextval('ticks'); SELECT 2",
    "SELECT nextval('ticks'); DROP TABLE t",
    "SELECT 1; DROP TABLE t; --",
    "SELECT 1); DROP TABLE t; --",
    "SELECT 1) ; drop table t; --",
    "; DROP TABLE t",
    "SELECT 1 AS a WITH NO DATA; DROP TABLE t",
    "SELECT 1 AS a WITH NO DATA",
    "SELECT * FROM t WITH CHECK OPTION",
    "INSERT INTO t VALUES (3, 'three')",
    "INSERT INTO t VALUES (3, 'three') RETURNING a",
    "UPDATE t SET a = 0",
    "DELETE FROM t RETURNING *",
    "TRUNCATE t",
    "DROP TABLE t",
    "SELECT * INTO made FROM t",
    "WITH w AS (DELETE FROM t RETURNING *) SELECT * FROM w",
    "WITH w AS (SELECT nextval('ticks')) INSERT INTO t SELECT 3, 'three'",
    "CREATE TABLE made (a int)",
    "CREATE TEMP TABLE made AS SELECT 1 AS a",
    "COPY t TO STDOUT",
    "DO $$BEGIN DELETE FROM t; END$$",
    "CALL nothing()",
    "EXPLAIN ANALYZE DELETE FROM t",
    "SET search_path TO other",
    "COMMIT",
    "ROLLBACK; DROP TABLE t",
    "SELECT $1::integer",
    "SELECT a FROM t WHERE a = $1",
    "SELECT 1 /* never ends",
    "SELECT 'never ends",
    'SELECT 1 AS "never ends',
    "SELECT $q$never ends",
    "-- nothing but a comment",
    "/* nothing but a comment */",
    ";",
]


def _relations(database: Database) -> list[tuple[str, str]]:
    return database.rows(
        "SELECT relname, relkind FROM pg_class WHERE relnamespace NOT IN (SELECT oid FROM pg_namespace WHERE nspname "
        "IN ('pg_catalog', 'pg_toast', 'information_schema', 'matviews')) ORDER BY 1"
    )


def _rows(database: Database, view: str) -> list[tuple[Any, ...]]:
    name = ViewName.parse(view)
    identifier = sql.Identifier(name.schema or "public", name.name)
    with database.connect() as connection:
        return sorted(connection.execute(sql.SQL("TABLE {}").format(identifier)).fetchall(), key=repr)


@pytest.mark.e2e
def test_any_legal_name_is_created_refreshed_recorded_and_dropped(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute("CREATE SCHEMA other", 'CREATE SCHEMA "Other Schema"', 'CREATE SCHEMA "a.b"')
    for name in _NAMES:
        definition = MatViewDefinition(
            name=name, sql="SELECT 1 AS id, 'b' AS \"B b\"", unique_index_columns=["id", "B b"], comment="Ours."
        )
        assert hook.create(definition).status == "created"
        assert _rows(each_db, name) == [(1, "b")]
        assert hook.refresh(name).response["strategy"] == "concurrent"
        assert hook.create(definition, force=True).status == "updated"
        assert hook.delete(name).status == "deleted"
    assert _relations(each_db) == []
    recorded = {record.id: (record.schema_name, record.view_name) for record in hook.definitions()}
    parsed = [ViewName.parse(name) for name in _NAMES]
    assert sorted(recorded.values()) == sorted((name.schema or "public", name.name) for name in parsed)
    assert {(run.operation, run.status) for run in hook.runs(limit=100)} == {
        ("create", "success"),
        ("refresh", "success"),
        ("drop", "success"),
    }
    assert len(hook.runs(limit=100)) == 4 * len(_NAMES)


def test_views_of_one_name_in_two_schemas_are_two_views(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE SCHEMA one", "CREATE SCHEMA two")
    for number, name in enumerate(("one.mv", "two.mv", "mv"), 1):
        hook.create(MatViewDefinition(name=name, sql=f"SELECT {number} AS n", unique_index_columns=["n"]))
    assert [_rows(db, name) for name in ("one.mv", "two.mv", "mv")] == [[(1,)], [(2,)], [(3,)]]
    hook.refresh("two.mv")
    hook.delete("one.mv")
    assert [len(hook.runs(name)) for name in ("one.mv", "two.mv", "mv")] == [2, 2, 1]
    assert _rows(db, "two.mv") == [(2,)]
    assert sorted(record.name for record in hook.definitions()) == ["mv", "one.mv", "two.mv"]


def test_a_name_without_schema_is_made_where_the_search_path_says(db: Database) -> None:
    db.execute("CREATE SCHEMA analytics", "CREATE SCHEMA later", "CREATE MATERIALIZED VIEW later.mv AS SELECT 9 AS a")
    hook = hook_on(db, extra='{"options": "-c search_path=missing,analytics,later,public"}')
    response = hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    assert response.response["view"] == "analytics.mv"
    assert _rows(db, "analytics.mv") == [(1,)]
    assert _rows(db, "later.mv") == [(9,)]


def test_any_query_is_created_as_it_stands_and_recognised_again(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(*_TABLE)
    for text, expected in _QUERIES.items():
        definition = MatViewDefinition(name="mv", sql=text)
        created = hook.create(definition, row_count_strategy="exact")
        assert (created.status, created.response["row_count_after"]) == ("created", len(expected)), text
        assert _rows(each_db, "mv") == expected, text
        again = hook.create(definition)
        assert (again.status, again.response["drift"]) == ("skipped", False), text
        each_db.execute("DROP MATERIALIZED VIEW mv")


def test_a_view_made_by_hand_from_the_same_query_is_no_drift(db: Database) -> None:
    db.execute(*_TABLE, "CREATE MATERIALIZED VIEW mv AS SELECT v FROM t WHERE v IN ('one', 'two')")
    response = hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT v FROM t WHERE v IN ('one', 'two')"))
    assert response.response["drift"] is False


def test_what_is_not_one_query_is_refused_and_nothing_of_it_runs(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(*_TABLE, "CREATE SEQUENCE ticks", "CREATE SCHEMA other")
    before = _relations(each_db)
    for text in _NO_VIEWS:
        with pytest.raises(InvalidDefinition, match="SQL of mv cannot be a materialized view") as raised:
            hook.create(MatViewDefinition(name="mv", sql=text))
        assert "exactly one SELECT, WITH, VALUES or TABLE" in str(raised.value)
        assert _relations(each_db) == before, text
        assert each_db.rows("TABLE t") == [(1, "one"), (2, None)], text
        assert each_db.value("SELECT is_called FROM ticks") is False, text
        run = hook.last_run("mv")
        assert run is not None
        assert run.status == "failed"
        assert (run.error or {})["class"] == "InvalidDefinition"


_STATEMENTS = ["SELECT 1 AS n", "TABLE t", "VALUES (1)", "DROP TABLE t", "DELETE FROM t", "SELECT nextval('ticks')"]
_CLAUSES = [
    "WITH w AS",
    "INTO made",
    "UNION ALL",
    "COMMIT",
    "WITH NO DATA",
    "RETURNING *",
    "AS",
    "INSERT INTO t TABLE t",
]
_SIGNS = [";", "--", "/*", "*/", "'", '"', "$$", "$q$", "(", ")", "\n", "\\", "E'", "{", "%", "%s", "$1", ","]
_FRAGMENTS = st.sampled_from([*_STATEMENTS, *_CLAUSES, *_SIGNS])


def test_whatever_the_text_a_view_comes_of_it_or_nothing(db: Database) -> None:
    hook = hook_on(db)
    db.execute(*_TABLE, "CREATE SEQUENCE ticks")
    before = _relations(db)

    @given(st.lists(_FRAGMENTS, min_size=1, max_size=6).map(" ".join))
    @settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
    def harmless(text: str) -> None:
        assume(text.strip())
        try:
            hook.create(MatViewDefinition(name="mv", sql=text), with_data=False)
        except (InvalidDefinition, psycopg.Error):
            assert _relations(db) == before
        else:
            assert _relations(db) == sorted([("mv", "m"), *before])
            db.execute("DROP MATERIALIZED VIEW mv")
        assert db.rows("TABLE t") == [(1, "one"), (2, None)]
        assert db.value("SELECT is_called FROM ticks") is False

    harmless()


def test_a_query_over_a_temporary_table_is_refused(db: Database) -> None:
    hook = hook_on(db)
    connect = hook.get_conn

    def with_temporary_table() -> Any:
        connection = connect()
        connection.execute("CREATE TEMP TABLE mine AS SELECT 1 AS a")
        connection.commit()
        return connection

    hook.get_conn = with_temporary_table  # type: ignore[method-assign]
    for text in ("SELECT * FROM mine", "SELECT * FROM pg_temp.mine"):
        with pytest.raises(InvalidDefinition, match="temporary"):
            hook.create(MatViewDefinition(name="mv", sql=text))
    assert _relations(db) == []


def test_a_function_that_makes_a_temporary_table_fails_and_leaves_nothing(db: Database) -> None:
    db.execute(
        "CREATE FUNCTION sly() RETURNS integer LANGUAGE plpgsql AS "
        "$$BEGIN CREATE TEMP TABLE made AS SELECT 1 AS a; RETURN 1; END$$"
    )
    hook = hook_on(db)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="security-restricted operation"):
        hook.create(MatViewDefinition(name="mv", sql="SELECT sly() AS a"))
    assert _relations(db) == []
    assert hook.runs("mv")[0].status == "failed"


_SMUGGLED: list[dict[str, Any]] = [
    {"indexes": [Index(columns=[IndexKey(expression="1)); DROP TABLE t; --")])]},
    {"indexes": [Index(columns=[IndexKey(expression="1); DROP TABLE t; CREATE INDEX ON t ((1")])]},
    {"indexes": [Index(columns=[IndexKey(expression="(SELECT nextval('ticks'))")])]},
    {"indexes": [Index(columns=["a"], where="true; DROP TABLE t")]},
    {"indexes": [Index(columns=["a"], name='i" ON t (a); DROP TABLE t; --', where="nextval('ticks') > 0")]},
    {"indexes": [Index(columns=[IndexKey(column="a", operator_class='"int4_ops); DROP TABLE t; --"')])]},
    {"indexes": [Index(columns=[IndexKey(column="v", collation='"C); DROP TABLE t; --"')])]},
    {"indexes": [Index(columns=["a"], storage_parameters={"fillfactor": "90); DROP TABLE t; --"})]},
    {"indexes": [Index(columns=["a"], tablespace="pg_default; DROP TABLE t; --")]},
    {"grants": {"PUBLIC; DROP TABLE t; --": ["SELECT"]}},
    {"grants": {'x" ; DROP TABLE t; --': ["SELECT"]}},
    {"storage_parameters": {"fillfactor": "90); DROP TABLE t; --"}},
    {"storage_parameters": {"fillfactor": "90') AS SELECT 1; DROP TABLE t; --"}},
    {"tablespace": 'pg_default" AS SELECT 1; DROP TABLE t; --'},
]


def test_nothing_can_be_smuggled_in_beside_the_query(db: Database) -> None:
    hook = hook_on(db)
    db.execute(*_TABLE, "CREATE SEQUENCE ticks")
    for arguments in _SMUGGLED:
        with pytest.raises(psycopg.Error):
            hook.create(MatViewDefinition(name="mv", sql="SELECT a, v FROM t", **arguments))
        assert _relations(db) == [("t", "r"), ("ticks", "S")], arguments
        assert db.rows("TABLE t") == [(1, "one"), (2, None)], arguments
        assert db.value("SELECT is_called FROM ticks") is False, arguments


def test_a_comment_is_text_whatever_it_holds(db: Database) -> None:
    comment = "'; DROP TABLE t; -- \\ %s \" $$ \n 漢"
    db.execute(*_TABLE)
    hook_on(db).create(MatViewDefinition(name="mv", sql="SELECT 1 AS a", comment=comment))
    assert db.value("SELECT obj_description('mv'::regclass)") == comment
    assert db.value("SELECT count(*) FROM t") == 2


def test_a_view_that_stands_is_skipped_and_its_drift_told(db: Database) -> None:
    hook = hook_on(db)
    first = MatViewDefinition(name="mv", sql="SELECT 1 AS a")
    hook.create(first)
    oid = db.value("SELECT 'mv'::regclass::oid")
    same = hook.create(MatViewDefinition(name="mv", sql="  select\n1 AS a  -- the same in other words"))
    assert (same.status, same.success, same.response["drift"]) == ("skipped", True, False)
    other = hook.create(MatViewDefinition(name="mv", sql="SELECT 2 AS a"), on_drift="report")
    assert (other.status, other.response["drift"]) == ("skipped", True)
    assert db.value("SELECT 'mv'::regclass::oid") == oid
    assert _rows(db, "mv") == [(1,)]
    assert [run.status for run in hook.runs("mv")] == ["skipped", "skipped", "success"]
    assert hook.runs("mv")[0].meta["response"]["drift"] is True


_NOT_VIEWS = {
    "CREATE TABLE other.mv (a int)": "a table",
    "CREATE TABLE other.mv (a int) PARTITION BY LIST (a)": "a partitioned table",
    "CREATE VIEW other.mv AS SELECT 1 AS a": "a plain view",
    "CREATE SEQUENCE other.mv": "a sequence",
    "CREATE TYPE other.mv AS (a int)": "a composite type",
    "CREATE TABLE other.t (mv int UNIQUE); ALTER INDEX other.t_mv_key RENAME TO mv": "an index",
}


def test_what_stands_under_the_name_and_is_no_materialized_view_is_left_alone(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="other.mv", sql="SELECT 1 AS a")
    for ddl, kind in _NOT_VIEWS.items():
        with db.connect() as connection:
            connection.execute(f"CREATE SCHEMA other; {ddl}".encode())
        before = _relations(db)
        operations: list[Callable[[], object]] = [
            partial(hook.create, definition, force=True),
            partial(hook.refresh, "other.mv"),
            partial(hook.delete, "other.mv", force=True, cascade=True),
        ]
        for operation in operations:
            with pytest.raises(NotAMaterializedView, match=f"other.mv is {kind}, not a materialized view"):
                operation()
        assert _relations(db) == before, kind
        db.execute("DROP SCHEMA other CASCADE")


def test_a_schema_that_does_not_exist_is_refused_with_the_ddl_that_makes_it(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name='"No Such".mv', sql="SELECT 1 AS a")
    with pytest.raises(InvalidDefinition, match='The schema "No Such" does not exist') as raised:
        hook.create(definition)
    _follow(db, raised.value.hint)
    assert hook.create(definition).status == "created"


def _follow(database: Database, hint: str | None) -> None:
    """Do what a hint says."""
    assert hint is not None
    _, _, statement = hint.partition("run: ")
    with database.connect() as connection:
        connection.execute(statement.encode())


def test_a_view_without_rows_is_filled_by_its_first_refresh(each_db: Database) -> None:
    hook = hook_on(each_db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 / 1 AS a", unique_index_columns=["a"])
    response = hook.create(definition, with_data=False, row_count_strategy="exact")
    assert (response.status, response.response["row_count_after"]) == ("created", None)
    assert "fill" not in [step["step"] for step in response.response["steps"]]
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        each_db.rows("TABLE mv")
    assert hook.refresh("mv").status == "updated"
    assert _rows(each_db, "mv") == [(1,)]


def test_a_view_that_is_not_managed_is_never_created(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", managed=False)
    for force in (False, True):
        with pytest.raises(ViewNotManaged, match="declared with managed=False"):
            hook.create(definition, force=force)
    assert _relations(db) == []


def test_every_kind_of_index_is_made_as_declared(each_db: Database) -> None:
    hook = hook_on(each_db)
    indexes = {
        "by_a": (Index(name="by_a", columns=["a"]), "USING btree (a)"),
        "Odd": (
            Index(name="Odd", columns=["B b", "a"], unique=True),
            'UNIQUE INDEX "Odd" ON {} USING btree ("B b", a)',
        ),
        "hashed": (Index(name="hashed", columns=["a"], method="hash"), "USING hash (a)"),
        "gin": (Index(name="gin", columns=["words"], method="gin"), "USING gin (words)"),
        "brin": (
            Index(name="brin", columns=["a"], method="brin", storage_parameters={"pages_per_range": 16}),
            "USING brin (a) WITH (pages_per_range='16')",
        ),
        "gist": (Index(name="gist", columns=["span"], method="gist"), "USING gist (span)"),
        "expression": (
            Index(name="expression", columns=[IndexKey(expression='lower("B b") -- a comment'), "a"]),
            'USING btree (lower("B b"), a)',
        ),
        "partial": (Index(name="partial", columns=["a"], where="a > 1 AND \"B b\" <> '%'"), "WHERE ((a > 1) AND"),
        "with_comment": (Index(name="with_comment", columns=["a"], where="a > 1 -- few"), "WHERE (a > 1)"),
        "covering": (
            Index(name="covering", columns=["a"], unique=True, include=["B b", "words"]),
            'INCLUDE ("B b", words)',
        ),
        "filled": (
            Index(name="filled", columns=["a"], storage_parameters={"fillfactor": 70, "deduplicate_items": False}),
            "WITH (fillfactor='70', deduplicate_items='false')",
        ),
        "detailed": (
            Index(
                name="detailed",
                columns=[
                    IndexKey(
                        column="B b",
                        order="desc",
                        nulls="last",
                        collation='pg_catalog."C"',
                        operator_class="text_pattern_ops",
                    )
                ],
            ),
            '("B b" COLLATE "C" text_pattern_ops DESC NULLS LAST)',
        ),
        "nulls": (
            Index(name="nulls", columns=["a", "nothing"], unique=True, nulls_not_distinct=True),
            "NULLS NOT DISTINCT",
        ),
    }
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT a, 'b' || a AS \"B b\", ARRAY['x', 'y'] AS words, int4range(a, a + 1) AS span, "
        "NULL::int AS nothing FROM generate_series(1, 3) a",
        unique_index_columns=["a", "B b"],
        indexes=[index for index, _ in indexes.values()],
    )
    for force in (False, True):
        hook.create(definition, force=force)
        made = {index.name: index.definition for index in hook.describe("mv").indexes}
        assert sorted(made) == sorted([*indexes, "mv_a_B b_key"])
        assert 'UNIQUE INDEX "mv_a_B b_key"' in made["mv_a_B b_key"]
        for name, (_, part) in indexes.items():
            assert part.format("public.mv") in made[name]
        assert all(index.valid for index in hook.describe("mv").indexes)


def test_a_view_has_the_comment_grants_parameters_and_tablespaces_that_are_declared(each_db: Database) -> None:
    reader, writer = each_db.role(), each_db.role()
    space = f"space_{each_db.name}"
    with each_db.connect() as connection:
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute(sql.SQL("CREATE TABLESPACE {} LOCATION ''").format(sql.Identifier(space)))
    try:
        hook = hook_on(each_db)
        definition = MatViewDefinition(
            name="mv",
            sql="SELECT 1 AS a, 'text' AS t",
            indexes=[Index(columns=["a"], tablespace=space)],
            comment="It's ours.",
            grants={reader: ["SELECT"], writer: ["select", "REFERENCES"], "public": ["TRIGGER"]},
            storage_parameters={"fillfactor": 80, "autovacuum_enabled": False, "toast.autovacuum_enabled": "off"},
            tablespace=space,
        )
        for force in (False, True):
            hook.create(definition, force=force)
            assert each_db.rows(
                "SELECT obj_description(c.oid), c.reloptions, t.reloptions, s.spcname, "
                "(SELECT spcname FROM pg_tablespace WHERE oid = i.reltablespace) "
                "FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid JOIN pg_tablespace s "
                "ON s.oid = c.reltablespace, pg_class i WHERE c.oid = 'mv'::regclass AND i.oid = 'mv_a_idx'::regclass"
            ) == [
                ("It's ours.", ["fillfactor=80", "autovacuum_enabled=false"], ["autovacuum_enabled=off"], space, space)
            ]
            grants = each_db.rows(
                "SELECT CASE grantee WHEN 0 THEN 'public' ELSE pg_get_userbyid(grantee) END, privilege_type "
                "FROM pg_class, aclexplode(relacl) WHERE oid = 'mv'::regclass AND grantee <> relowner"
            )
            assert sorted(grants) == sorted(
                [(reader, "SELECT"), (writer, "SELECT"), (writer, "REFERENCES"), ("public", "TRIGGER")]
            )
    finally:
        each_db.execute("DROP MATERIALIZED VIEW IF EXISTS mv")
        with each_db.connect() as connection:
            connection.execute(sql.SQL("DROP TABLESPACE {}").format(sql.Identifier(space)))


_MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"unique_index_columns": ["ID"]}, InvalidDefinition, "no column 'ID'.* Its columns are: id, n"),
    ({"indexes": [Index(columns=["id", "nope"])]}, InvalidDefinition, "no column 'nope', which its index"),
    ({"indexes": [Index(columns=["id"], include=["nope"])]}, InvalidDefinition, "no column 'nope'"),
    ({"indexes": [Index(columns=[IndexKey(expression="nope + 1")])]}, psycopg.errors.UndefinedColumn, "nope"),
    ({"indexes": [Index(columns=["id"], where="nope > 1")]}, psycopg.errors.UndefinedColumn, "nope"),
    ({"indexes": [Index(columns=["id"], method="nope")]}, psycopg.errors.UndefinedObject, "nope"),
    ({"grants": {"no such role": ["SELECT"]}}, psycopg.errors.UndefinedObject, "no such role"),
    ({"storage_parameters": {"fillfctor": 90}}, psycopg.errors.InvalidParameterValue, "fillfctor"),
    ({"tablespace": "nope"}, psycopg.errors.UndefinedObject, "nope"),
]


def test_a_mistake_beside_the_query_is_found_before_the_query_runs(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute("CREATE SEQUENCE ticks")
    for arguments, error, explanation in _MISTAKES:
        with pytest.raises(error, match=explanation):
            hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS id, nextval('ticks') AS n", **arguments))
        assert each_db.value("SELECT is_called FROM ticks") is False, explanation
        assert _relations(each_db) == [("ticks", "S")], explanation


def test_a_failing_create_leaves_nothing_but_a_failed_run(each_db: Database) -> None:
    hook = hook_on(each_db)
    role = each_db.role()
    for text, error, sqlstate, where in (
        ("SELECT 1 AS id FROM generate_series(1, 2)", psycopg.errors.UniqueViolation, "23505", "index mv_id_key"),
        ("SELECT 1 / (n - 2) AS id FROM generate_series(1, 2) n", psycopg.errors.DivisionByZero, "22012", "fill"),
    ):
        definition = MatViewDefinition(
            name="mv", sql=text, unique_index_columns=["id"], comment="Never seen.", grants={role: ["SELECT"]}
        )
        with pytest.raises(error) as raised:
            hook.create(definition)
        assert _relations(each_db) == []
        run = hook.last_run("mv")
        assert run is not None
        assert (run.operation, run.status) == ("create", "failed")
        assert run.error is not None
        assert run.error["sqlstate"] == sqlstate
        assert run.error["class"] == error.__name__
        response = raised.value.response  # type: ignore[attr-defined]
        assert (response.status, response.success, response.run_id) == (None, False, run.id)
        assert [step["step"] for step in response.response["steps"]][-1] == where


def test_every_response_has_the_same_shape_and_is_plain_data(db: Database) -> None:
    hook = hook_on(db)
    definition = MatViewDefinition(name="mv", sql="SELECT 1 AS a", unique_index_columns=["a"], comment="Ours.")
    responses = [
        hook.create(definition),
        hook.create(definition),
        hook.create(definition, force=True),
        hook.refresh("mv"),
        hook.refresh(definition, refresh_strategy="regular"),
        hook.delete("mv"),
        hook.delete(definition),
    ]
    assert [each.status for each in responses] == [
        "created",
        "skipped",
        "updated",
        "updated",
        "updated",
        "deleted",
        "skipped",
    ]
    runs = {run.id: run for run in hook.runs("mv")}
    for each in responses:
        assert each.success is True
        assert {"view", "sql", "strategy", "row_count_before", "row_count_after", "steps"} <= each.response.keys()
        assert each.response["view"] == each.request["view"] == "mv"
        assert json.loads(json.dumps(each.as_dict())) == each.as_dict()
        assert all(step["ms"] >= 0 and step["step"] for step in each.response["steps"])
        assert len(each.response["steps"]) == len(each.response["sql"])
        assert each.duration_ms is not None
        assert each.run_id is not None
        run = runs[each.run_id]
        assert run.status == ("skipped" if each.status == "skipped" else "success")
        assert run.meta["response"] == {"status": each.status, **each.response}
        assert run.meta["request"] == each.request
        assert run.duration_ms == each.duration_ms
    assert responses[0].response["sql"][0].startswith('CREATE MATERIALIZED VIEW "public"."mv" ("a") ')
    assert [step["step"] for step in responses[0].response["steps"]] == [
        "create",
        "attach",
        "fill",
        "index mv_a_key",
    ]


def test_rows_of_a_created_view_are_counted_as_asked(each_db: Database) -> None:
    hook = hook_on(each_db)

    def counts(**arguments: Any) -> tuple[int | None, int | None]:
        definition = MatViewDefinition(name="mv", sql="SELECT n FROM generate_series(1, 7) n")
        facts = hook.create(definition, **arguments).response
        return facts["row_count_before"], facts["row_count_after"]

    assert counts(row_count_strategy="none") == (None, None)
    assert counts(row_count_strategy="exact", force=True) == (7, 7)
    assert counts(row_count_strategy="none", force=True) == (None, None)
    # A view that takes another one's place is analysed before.
    assert counts(row_count_strategy="estimated", force=True) == (7, 7)
    assert counts(row_count_strategy="estimated") == (7, None)
    assert counts(row_count_strategy="exact") == (7, None)
    assert counts(row_count_strategy="none") == (None, None)
    each_db.execute("DROP MATERIALIZED VIEW mv", "CREATE MATERIALIZED VIEW mv AS SELECT n FROM generate_series(1, 7) n")
    # The estimate is unknown, not -1, before anybody has looked.
    assert counts(row_count_strategy="estimated") == (None, None)


def test_rows_of_a_created_view_are_counted_by_hand_where_the_server_does_not(db: Database) -> None:
    hook = hook_on(db, extra='{"options": "-c track_counts=off"}')
    for strategy, expected in (("none", None), ("estimated", None), ("exact", 7)):
        definition = MatViewDefinition(name=f"mv_{strategy}", sql="SELECT n FROM generate_series(1, 7) n")
        assert hook.create(definition, row_count_strategy=strategy).response["row_count_after"] == expected


def test_the_old_view_serves_until_the_new_one_takes_its_place(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(GATE)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 'old' AS a", unique_index_columns=["a"]))
    new = MatViewDefinition(name="mv", sql="SELECT 'new' AS a, gate() AS b", unique_index_columns=["a"])
    with (
        gate_closed(each_db) as open_gate,
        beside(lambda: hook.create(new, force=True, lock_timeout=60), open_gate) as replacing,
    ):
        until(each_db, AT_THE_GATE)
        with each_db.connect(options="-c statement_timeout=5s") as reader:
            assert reader.execute("SELECT a FROM mv").fetchall() == [("old",)]
            assert reader.execute("SELECT count(*) FROM pg_indexes WHERE tablename = 'mv'").fetchone() == (1,)
        assert not replacing.done()
        open_gate()
        assert replacing.result().status == "updated"
    assert _rows(each_db, "mv") == [("new", 1)]
    assert _relations(each_db) == [("mv", "m"), ("mv_a_key", "i")]


def test_a_replacement_that_waits_for_a_reader_neither_holds_up_others_nor_builds_again(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute("CREATE SEQUENCE ticks")
    hook.create(MatViewDefinition(name="mv", sql="SELECT 0::bigint AS a"))
    new = MatViewDefinition(name="mv", sql="SELECT nextval('ticks') AS a")
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'mv'::regclass AND NOT granted)"
    with each_db.connect() as reader:
        reader.execute("BEGIN")
        reader.execute("TABLE mv")
        with beside(lambda: hook.create(new, force=True, lock_timeout=0.2), reader.close) as replacing:
            for _ in range(3):
                until(each_db, waiting)
                with each_db.connect(options="-c statement_timeout=5s") as newcomer:
                    assert newcomer.execute("TABLE mv").fetchall() == [(0,)]
            reader.execute("ROLLBACK")
            assert replacing.result().status == "updated"
    assert _rows(each_db, "mv") == [(1,)]


def test_a_failing_replacement_leaves_the_old_view_as_it_was(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a", unique_index_columns=["a"], comment="Old."))
    before = (hook.describe("mv").attachments, db.value("SELECT 'mv'::regclass::oid"), _relations(db))
    with pytest.raises(psycopg.errors.UniqueViolation):
        hook.create(
            MatViewDefinition(
                name="mv", sql="SELECT 2 AS a FROM generate_series(1, 2)", unique_index_columns=["a"], comment="New."
            ),
            force=True,
        )
    assert (hook.describe("mv").attachments, db.value("SELECT 'mv'::regclass::oid"), _relations(db)) == before
    assert _rows(db, "mv") == [(1,)]


def test_a_replaced_view_keeps_its_owner(each_db: Database) -> None:
    hook, owner, reader = hook_on(each_db), each_db.role(), each_db.role()
    with each_db.connect() as connection:
        connection.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
        connection.execute(sql.SQL("ALTER MATERIALIZED VIEW mv OWNER TO {}").format(sql.Identifier(owner)))
    definition = MatViewDefinition(
        name="mv", sql="SELECT 2 AS a", unique_index_columns=["a"], grants={reader: ["SELECT"]}
    )
    assert hook.create(definition, force=True).status == "updated"
    assert each_db.rows(
        "SELECT relname, pg_get_userbyid(relowner) FROM pg_class WHERE relname LIKE 'mv%' ORDER BY 1"
    ) == [("mv", owner), ("mv_a_key", owner)]
    with each_db.connect(reader) as connection:
        assert connection.execute("TABLE mv").fetchall() == [(2,)]


def test_a_view_that_another_materialized_view_is_built_on_is_not_replaced(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    db.execute("CREATE VIEW over AS TABLE mv", 'CREATE MATERIALIZED VIEW "On Top" AS TABLE mv')
    with pytest.raises(DependentsExist, match="cannot be replaced") as raised:
        hook.create(MatViewDefinition(name="mv", sql="SELECT 2 AS a"))
    assert raised.value.dependents == ('materialized view "On Top"',)
    assert _rows(db, "mv") == [(1,)]


#: What somebody attaches to the view by hand. ``{role}`` and ``{declared}`` are roles.
_BY_HAND = [
    "CREATE INDEX by_hand ON mv (a)",
    "GRANT SELECT ON mv TO {role}",
    "GRANT SELECT ON mv TO public",
    "GRANT SELECT (a) ON mv TO {role}",
    "GRANT SELECT ON mv TO {declared} WITH GRANT OPTION",
    "GRANT INSERT ON mv TO {declared}",
    "COMMENT ON MATERIALIZED VIEW mv IS 'by hand'",
    "COMMENT ON COLUMN mv.a IS 'by hand'",
    "COMMENT ON INDEX mv_a_key IS 'by hand'",
    "ALTER MATERIALIZED VIEW mv SET (fillfactor = 70)",
    "ALTER MATERIALIZED VIEW mv SET (toast.autovacuum_enabled = false)",
    "ALTER MATERIALIZED VIEW mv ALTER b SET STORAGE EXTERNAL",
    "ALTER MATERIALIZED VIEW mv ALTER b SET COMPRESSION pglz",
    "ALTER MATERIALIZED VIEW mv ALTER a SET STATISTICS 500",
    "ALTER MATERIALIZED VIEW mv ALTER a SET (n_distinct = 5)",
    "ALTER INDEX mv_expr_idx ALTER 1 SET STATISTICS 500",
    "CREATE STATISTICS stats ON a, b FROM mv",
    "ALTER MATERIALIZED VIEW mv CLUSTER ON mv_a_key",
    "ALTER MATERIALIZED VIEW mv DEPENDS ON EXTENSION plpgsql",
    "ALTER INDEX mv_a_key DEPENDS ON EXTENSION plpgsql",
    "ALTER EXTENSION plpgsql ADD MATERIALIZED VIEW mv",
]


def _with_roles(text: str, role: str, declared: str) -> str:
    return text.replace("{role}", role).replace("{declared}", declared)


@pytest.mark.e2e
def test_whatever_is_attached_by_hand_stays_with_a_view_that_is_replaced(each_db: Database) -> None:
    hook, role, declared = hook_on(each_db), each_db.role(), each_db.role()
    definition = MatViewDefinition(
        name="mv",
        sql="SELECT 1 AS a, 'text' AS b",
        unique_index_columns=["a"],
        indexes=[Index(columns=[IndexKey(expression="lower(b)")])],
        grants={declared: ["SELECT"]},
    )
    other = replace(definition, sql="SELECT 2 AS a, 'text' AS b")
    for statement in _BY_HAND:
        hook.create(definition)
        before = hook.describe("mv").attachments
        with each_db.connect() as connection, connection.transaction():
            connection.execute(_with_roles(statement, role, declared).encode())
        attached = hook.describe("mv").attachments
        assert attached != before, statement
        plan = hook.plan(other)
        assert [step.kind for step in plan.steps] == ["change query"], statement
        if "ADD MATERIALIZED VIEW" in statement:
            with pytest.raises(StrategyRefused, match="belongs to an extension"):
                hook.create(other)
            each_db.execute("ALTER EXTENSION plpgsql DROP MATERIALIZED VIEW mv")
        else:
            assert plan.left_alone, statement
            assert hook.create(other).status == "updated", statement
            assert hook.describe("mv").attachments == attached, statement
            assert _rows(each_db, "mv") == [(2, "text")]
        each_db.execute("DROP MATERIALIZED VIEW mv")


#: What somebody does to the view while a new one is built -> what shows that it is still there afterwards.
_MEANWHILE: dict[LiteralString, LiteralString] = {
    "GRANT SELECT ON mv TO public": "SELECT has_table_privilege('public', 'mv', 'SELECT')",
    "CREATE INDEX by_hand ON mv (a)": "SELECT count(*) = 1 FROM pg_indexes WHERE tablename = 'mv'",
    "COMMENT ON MATERIALIZED VIEW mv IS 'by hand'": "SELECT obj_description('mv'::regclass) = 'by hand'",
    "CREATE VIEW over AS TABLE mv": "SELECT a = 2 FROM over",
}


def test_what_is_attached_while_the_new_view_is_built_is_not_lost(each_db: Database) -> None:
    hook = hook_on(each_db)
    each_db.execute(GATE)
    new = MatViewDefinition(name="mv", sql="SELECT gate() + 1 AS a")
    for statement, remains in _MEANWHILE.items():
        hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
        with (
            gate_closed(each_db) as open_gate,
            beside(lambda: hook.create(new, lock_timeout=60), open_gate) as replacing,
        ):
            until(each_db, AT_THE_GATE)
            each_db.execute(statement)
            open_gate()
            assert replacing.result().status == "updated"
        assert _rows(each_db, "mv") == [(2,)], statement
        assert each_db.value(remains) is True, statement
        each_db.execute("DROP MATERIALIZED VIEW mv CASCADE")
