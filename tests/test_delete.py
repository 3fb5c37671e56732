"""Delete: nothing goes that was not asked for or announced, and what is known of a view outlives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import DependentsExist, ViewNotManaged
from airflow_provider_matviews.hooks.matview import MatViewHook
from tests.conftest import Database, hook_on

_MV = MatViewDefinition(name="mv", sql="SELECT 1 AS a", unique_index_columns=["a"])

#: Everything that can be built on a view, in one piece; and how PostgreSQL describes each part.
_BUILT_ON_IT = (
    "CREATE VIEW v1 AS TABLE mv",
    "CREATE VIEW v2 AS TABLE v1",
    'CREATE MATERIALIZED VIEW "On Top" AS TABLE v2',
    'CREATE INDEX ON "On Top" (a)',
    "CREATE TABLE holder (id int, whole mv, many mv[])",
    "CREATE FUNCTION takes(mv) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION gives() RETURNS SETOF mv LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION reads() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM mv; END",
    "CREATE TABLE guarded (id int)",
    "CREATE POLICY only_known ON guarded USING (id IN (SELECT a FROM mv))",
    "CREATE RULE extra AS ON INSERT TO guarded DO ALSO SELECT a FROM mv",
)
_DESCRIBED = [
    "column many of table holder",
    "column whole of table holder",
    "function gives()",
    "function reads()",
    "function takes(mv)",
    'materialized view "On Top"',
    "policy only_known on table guarded",
    "rule extra on table guarded",
    "view v1",
    "view v2",
]


def _stands(database: Database, name: str) -> bool:
    return bool(database.value("SELECT to_regclass(%s) IS NOT NULL", [name]))


def _warnings(hook: MatViewHook) -> list[str]:
    lines: list[str] = []

    def warn(message: str, *arguments: object) -> None:
        lines.append(message % arguments)

    hook._log = SimpleNamespace(info=lambda *_: None, warning=warn)
    return lines


def test_dropping_what_does_not_stand_is_skipped_and_recorded(db: Database) -> None:
    hook = hook_on(db)
    for view in ("mv", '"No Such Schema".mv', _MV):
        response = hook.delete(view)
        assert (response.status, response.success) == ("skipped", True)
        assert response.response["reason"] == "it does not exist"
        assert response.response["sql"] == []
    assert [(run.operation, run.status) for run in hook.runs()] == [("drop", "skipped")] * 3


def test_a_dropped_view_leaves_its_definition_and_its_history(db: Database) -> None:
    hook = hook_on(db)
    hook.create(_MV)
    (known,) = hook.definitions()
    response = hook.delete("mv")
    assert response.status == "deleted"
    assert not _stands(db, "mv")
    assert response.response["sql"] == ['DROP MATERIALIZED VIEW "public"."mv" RESTRICT']
    assert response.response["dropped_with_it"] == []
    assert hook.definitions() == [known]
    assert [(run.operation, run.status) for run in hook.runs("mv")] == [("drop", "success"), ("create", "success")]
    assert hook.delete("mv").status == "skipped"
    assert hook.create(MatViewDefinition.from_dict(known.declaration)).status == "created"
    assert [record.id for record in hook.definitions()] == [known.id]


def test_a_view_that_others_are_built_on_is_kept_and_they_are_named(each_db: Database) -> None:
    hook = hook_on(each_db)
    hook.create(_MV)
    each_db.execute(*_BUILT_ON_IT)
    with pytest.raises(DependentsExist, match="mv cannot be dropped") as raised:
        hook.delete("mv")
    assert sorted(raised.value.dependents) == _DESCRIBED
    assert all(each in str(raised.value) for each in _DESCRIBED)
    assert "cascade=True" in (raised.value.hint or "")
    assert _stands(each_db, "mv")
    run = hook.last_run("mv")
    assert run is not None
    assert run.status == "failed"


def test_a_cascade_tells_what_goes_and_drops_exactly_that(each_db: Database) -> None:
    hook = hook_on(each_db)
    warnings = _warnings(hook)
    hook.create(_MV)
    each_db.execute(*_BUILT_ON_IT)
    response = hook.delete("mv", cascade=True)
    assert response.status == "deleted"
    assert sorted(response.response["dropped_with_it"]) == _DESCRIBED
    (told,) = warnings
    assert "With mv go 10 more" in told
    assert all(each in told for each in _DESCRIBED)
    assert [_stands(each_db, name) for name in ("mv", "v1", "v2", '"On Top"', "holder", "guarded")] == [
        *[False] * 4,
        *[True] * 2,
    ]
    assert each_db.rows("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace") == []
    assert each_db.rows("SELECT 1 FROM pg_policy") == []
    run = hook.last_run("mv")
    assert run is not None
    assert sorted(run.meta["response"]["dropped_with_it"]) == _DESCRIBED


def _before_the_drop(database: Database, hook: MatViewHook, statement: str) -> None:
    """Have another session do something just before the hook's DROP is sent."""
    connect = hook.get_conn

    class Racing(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
            if "DROP MATERIALIZED VIEW" in str(query):
                with database.connect() as other:
                    other.execute(statement.encode())
            return super().execute(query, *arguments, **options)

    def racing() -> Any:
        connection = connect()
        connection.cursor_factory = Racing
        return connection

    hook.get_conn = racing  # type: ignore[method-assign]


@pytest.mark.parametrize("already", [[], ["CREATE VIEW known AS TABLE mv"]])
def test_a_cascade_drops_nothing_that_came_after_it_was_announced(already: list[str], each_db: Database) -> None:
    hook = hook_on(each_db)
    hook.create(_MV)
    with each_db.connect() as connection:
        for statement in already:
            connection.execute(statement.encode())
    _before_the_drop(each_db, hook, "CREATE VIEW late AS TABLE mv")
    with pytest.raises(DependentsExist, match="mv was not dropped: while it was being dropped, view late") as raised:
        hook.delete("mv", cascade=True)
    assert raised.value.dependents == ("view late",)
    assert all(_stands(each_db, name) for name in ("mv", "late", *["known"] * len(already)))
    run = hook.last_run("mv")
    assert run is not None
    assert run.status == "failed"
    response = hook_on(each_db).delete("mv", cascade=True)
    assert "view late" in response.response["dropped_with_it"]
    assert not _stands(each_db, "late")


def test_without_cascade_what_came_late_keeps_the_view(db: Database) -> None:
    hook = hook_on(db)
    hook.create(_MV)
    _before_the_drop(db, hook, "CREATE VIEW late AS TABLE mv")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        hook.delete("mv")
    assert _stands(db, "mv")
    assert _stands(db, "late")


def test_a_view_of_somebody_else_goes_only_by_force(db: Database) -> None:
    hook = hook_on(db)
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a", "CREATE VIEW over AS TABLE mv")
    declared = MatViewDefinition(name="mv", sql="SELECT 1 AS a", managed=False)
    for view in ("mv", declared, "mv"):
        with pytest.raises(ViewNotManaged, match="no definition with managed=True") as raised:
            hook.delete(view, cascade=True)
        assert "force=True" in (raised.value.hint or "")
        assert _stands(db, "mv")
    # Force is about whose it is, not about what is built on it.
    with pytest.raises(DependentsExist):
        hook.delete("mv", force=True)
    assert hook.delete("mv", force=True, cascade=True).status == "deleted"
    assert not _stands(db, "mv")


def test_a_declared_view_may_be_dropped_by_its_name_alone(db: Database) -> None:
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    hook = hook_on(db)
    assert hook.create(_MV, on_drift="report").status == "skipped"
    assert hook.delete("mv").status == "deleted"
