"""What the catalogs say of a view is told in full: what it has, what it reads, and what is built on it."""

from __future__ import annotations

import pytest

from airflow_provider_matviews.definition import Index, IndexKey, MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidName, NotAMaterializedView, ViewNotFound
from tests.conftest import Database, hook_on


def test_a_view_is_described_as_it_stands_beside_what_is_recorded_of_it(each_db: Database) -> None:
    hook, reader = hook_on(each_db), each_db.role()
    each_db.execute("CREATE SCHEMA other", 'CREATE TABLE other."T t" (id int, v varchar(5))')
    definition = MatViewDefinition(
        name='other."My view"',
        sql='SELECT id, v AS "V v", now() AS at FROM other."T t"',
        unique_index_columns=["id"],
        indexes=[Index(columns=[IndexKey(expression='lower("V v")')], where="id > 0", name="partial")],
        comment="Mine.",
        grants={reader: ["SELECT"]},
        storage_parameters={"fillfactor": 80},
        description="For people.",
    )
    hook.create(definition)
    each_db.execute('CREATE VIEW above AS SELECT id FROM other."My view"')
    described = hook.describe('"other" . "My view"')
    assert described.name == 'other."My view"'
    assert described.owner == "postgres"
    assert described.populated is True
    assert 'FROM other."T t"' in described.query
    assert described.columns == (
        ("id", "integer"),
        ("V v", "character varying(5)"),
        ("at", "timestamp with time zone"),
    )
    assert [(i.name, i.unique, i.valid, i.partial, i.expressions, i.columns) for i in described.indexes] == [
        ("My view_id_key", True, True, False, False, ("id",)),
        ("partial", False, True, True, True, ()),
    ]
    assert [index.obstacle for index in described.indexes] == [None, "is not unique"]
    assert described.sources == ('other."T t"',)
    assert described.dependents == ("view above",)
    assert [each.description for each in described.attachments] == [
        "its comment",
        'index "My view_id_key"',
        "index partial",
        "storage parameter fillfactor=80",
        f"SELECT granted to {reader}",
    ]
    assert described.definition is not None
    assert MatViewDefinition.from_dict(described.definition.declaration) == definition
    assert described.last_run is not None
    assert (described.last_run.operation, described.last_run.status) == ("create", "success")


def test_a_view_that_nobody_recorded_is_described_too(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a WITH NO DATA")
    described = hook_on(db).describe("mv")
    assert (described.populated, described.estimated_rows) == (False, None)
    assert (described.definition, described.last_run) == (None, None)
    assert (described.indexes, described.dependents, described.sources, described.attachments) == ((), (), (), ())


def test_an_estimate_is_told_once_there_is_one(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT generate_series(1, 12) AS a")
    assert hook.describe("mv").estimated_rows is None
    db.execute("ANALYZE mv")
    assert hook.describe("mv").estimated_rows == 12


@pytest.mark.parametrize(
    ("name", "error"), [("nope", ViewNotFound), ("t", NotAMaterializedView), ("a.b.c", InvalidName)]
)
def test_what_is_no_view_is_not_described(name: str, error: type[Exception], db: Database) -> None:
    db.execute("CREATE TABLE t (a int)")
    with pytest.raises(error):
        hook_on(db).describe(name)


def test_sources_are_the_relations_that_the_query_reads(each_db: Database) -> None:
    each_db.execute(
        "CREATE SCHEMA s",
        "CREATE TABLE s.t (a int)",
        "CREATE TABLE unused (a int)",
        'CREATE TABLE "Odd" (a int)',
        "CREATE TABLE parted (a int) PARTITION BY LIST (a)",
        "CREATE VIEW v AS SELECT * FROM unused",
        "CREATE MATERIALIZED VIEW lower AS SELECT 1 AS a",
        'CREATE MATERIALIZED VIEW mv AS WITH w AS (SELECT a FROM s.t) SELECT w.a FROM w JOIN "Odd" USING (a) '
        "JOIN parted USING (a) JOIN v USING (a) WHERE EXISTS (SELECT FROM lower WHERE lower.a = w.a) "
        "AND w.a IN (SELECT a FROM s.t)",
    )
    assert hook_on(each_db).describe("mv").sources == (
        'public."Odd"',
        "public.lower",
        "public.parted",
        "public.v",
        "s.t",
    )


def test_dependents_are_found_through_any_depth_and_each_once(each_db: Database) -> None:
    each_db.execute(
        "CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a, 2 AS b",
        "CREATE UNIQUE INDEX ON mv (a)",
        "CREATE STATISTICS stats ON a, b FROM mv",
        "CREATE TABLE beside (a int)",
        "CREATE VIEW beside_v AS TABLE beside",
        "CREATE VIEW v1 AS SELECT a FROM mv",
        "CREATE VIEW v2 AS SELECT v1.a FROM v1 JOIN mv USING (a)",
        "CREATE MATERIALIZED VIEW m3 AS SELECT x.a FROM v2 x JOIN v2 y USING (a)",
        "CREATE UNIQUE INDEX ON m3 (a)",
        "CREATE VIEW v4 AS TABLE m3",
        "CREATE FUNCTION of_v4(v4) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    )
    described = hook_on(each_db).describe("mv")
    assert described.dependents == ("function of_v4(v4)", "materialized view m3", "view v1", "view v2", "view v4")
    with each_db.connect() as connection, pytest.raises(Exception, match="depend on it") as raised:
        connection.execute("DROP MATERIALIZED VIEW mv")
    # As PostgreSQL itself tells it.
    told = raised.value.diag.message_detail  # type: ignore[attr-defined]
    assert sorted(line.split(" depends on ")[0] for line in told.splitlines()) == sorted(described.dependents)


def test_a_circle_of_views_does_not_go_on_for_ever(db: Database) -> None:
    db.execute(
        "CREATE VIEW v AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW mv AS SELECT a FROM v",
        "CREATE OR REPLACE VIEW v AS SELECT a FROM mv",
    )
    described = hook_on(db).describe("mv")
    assert described.dependents == ("view v",)
    assert described.sources == ("public.v",)


def test_definitions_are_listed_by_name_with_all_that_was_declared(db: Database) -> None:
    hook = hook_on(db)
    assert hook.definitions() == []
    db.execute("CREATE SCHEMA other", "CREATE MATERIALIZED VIEW other.found AS SELECT 3 AS c")
    declared = MatViewDefinition(
        name="B", sql="SELECT 1 AS a -- mine", refresh_strategy="concurrent", unique_index_columns=["a"]
    )
    hook.create(declared)
    hook.create(MatViewDefinition(name='"A"', sql="SELECT 2 AS b"))
    hook.refresh("other.found")
    first, second, third = sorted(hook.definitions(), key=lambda record: record.id)
    assert [record.name for record in hook.definitions()] == sorted(['"A"', "b", "other.found"])
    assert (first.name, first.schema_name, first.view_name) == ("b", "public", "b")
    assert (first.sql, first.refresh_strategy, first.unique_index_columns, first.managed) == (
        "SELECT 1 AS a -- mine",
        "concurrent",
        ("a",),
        True,
    )
    assert MatViewDefinition.from_dict(first.declaration) == declared
    assert (second.name, second.view_name, second.refresh_strategy) == ('"A"', "A", "auto")
    assert (third.name, third.managed, third.declaration) == ("other.found", False, {})
    assert "SELECT 3 AS c" in (third.sql or "")


def test_a_changed_definition_is_recorded_in_its_own_row(db: Database) -> None:
    hook = hook_on(db)
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    (before,) = hook.definitions()
    hook.create(MatViewDefinition(name="mv", sql="SELECT 1 AS a"))
    assert hook.definitions() == [before]
    hook.create(MatViewDefinition(name="MV", sql="SELECT 2 AS a", refresh_strategy="regular"), force=True)
    (after,) = hook.definitions()
    assert (after.id, after.created_at) == (before.id, before.created_at)
    assert (after.sql, after.refresh_strategy) == ("SELECT 2 AS a", "regular")
    assert after.updated_at > before.updated_at
