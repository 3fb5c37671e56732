"""Rename: a view gets a new name and keeps everything else, its history too; or it keeps its old one, whole."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, LiteralString

import psycopg
import pytest

from airflow_provider_matviews.definition import Column, ExtendedStatistics, Index, MatViewDefinition
from airflow_provider_matviews.exceptions import (
    DriftFound,
    InvalidDefinition,
    MissingPrivilege,
    NotAMaterializedView,
    ViewLocked,
    ViewNotFound,
)
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.instructions import Instruction, Query, Result
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.operations import Operations
from tests.conftest import Database, hook_on
from tests.driving import InterruptedDriver, connecting
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

_SOURCE: LiteralString = "CREATE TABLE t AS SELECT n AS id, n % 2 AS parity FROM generate_series(1, 4) n"
A = MatViewDefinition(
    name="a",
    sql="SELECT id, parity FROM t",
    unique_index_columns=["id"],
    indexes=[Index(columns=["parity"], name="by_parity")],
    comment="Ours.",
    grants={"public": ["SELECT"]},
    storage_parameters={"fillfactor": 90},
    columns=[Column(name="id", comment="Whose.", statistics=50)],
)
B = replace(A, name="b", renamed_from="a")

#: True while somebody pauses who asked for a view's lock in vain.
WAITING: LiteralString = """
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'
                   AND query LIKE 'ROLLBACK /* waits%')
"""


def _stand(db: Database, definition: MatViewDefinition = A) -> int:
    """Make a view with a history; return its OID."""
    if db.value("SELECT to_regclass('t') IS NULL"):
        db.execute(_SOURCE)
    hook = hook_on(db)
    hook.create(definition)
    hook.refresh(definition.name)
    return _oid(db, definition.name)


def _oid(db: Database, view: str) -> int:
    return int(db.value("SELECT %s::regclass::oid", (view,)))


def _stands(db: Database, view: str) -> bool:
    return bool(db.value("SELECT to_regclass(%s) IS NOT NULL", (view,)))


def _what_it_is(db: Database, oid: int) -> list[tuple[Any, ...]]:
    """Everything that a view has but its name, and its indexes by their OIDs."""
    return [
        *db.rows(
            "SELECT c.oid, c.relfilenode, c.relowner, c.relacl::text, c.reloptions, c.relispopulated, "
            "obj_description(c.oid) FROM pg_class c WHERE c.oid = %(oid)s OR c.oid IN "
            "(SELECT indexrelid FROM pg_index WHERE indrelid = %(oid)s) ORDER BY c.oid",
            {"oid": oid},
        ),
        *db.rows(
            "SELECT attname, atttypid, attstattarget, attacl::text, col_description(attrelid, attnum) "
            "FROM pg_attribute WHERE attrelid = %s AND attnum > 0 ORDER BY attnum",
            (oid,),
        ),
        *db.rows("SELECT oid, stxname, stxkeys::text FROM pg_statistic_ext WHERE stxrelid = %s", (oid,)),
        *db.rows("SELECT classid, objid, deptype FROM pg_depend WHERE refobjid = %s ORDER BY 1, 2, 3", (oid,)),
    ]


def _indexes(db: Database, view: str) -> set[str]:
    return {
        name
        for (name,) in db.rows("SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass", (view,))
    }


def _history(db: Database, view: str) -> list[tuple[int, str, str]]:
    return [(run.id, run.operation, run.status) for run in reversed(hook_on(db).runs(view, limit=100))]


def _definition_ids(db: Database) -> dict[str, int]:
    return {record.name: record.id for record in hook_on(db).definitions()}


@contextmanager
def _locked(db: Database, name: str, schema: str = "public") -> Iterator[Callable[[], None]]:
    """Hold a view's lock as an operation on it does, until the block ends or what is yielded is called."""
    key = lock_key(ResolvedName(schema, name, name)).as_string(None)
    with db.connect() as other:
        other.execute(f"SELECT pg_advisory_lock({key})".encode())
        yield other.close


def test_rows_and_all_that_it_has_and_all_that_is_built_on_it_stay(each_db: Database) -> None:
    db = each_db
    oid = _stand(db)
    db.execute(
        "CREATE VIEW top AS SELECT id FROM a",
        "GRANT SELECT ON top TO PUBLIC",
        "CREATE MATERIALIZED VIEW on_top AS SELECT count(*) AS n FROM a",
        "CREATE FUNCTION rows_of_it() RETURNS SETOF a LANGUAGE sql AS 'SELECT * FROM top JOIN t USING (id)'",
        "CREATE TABLE secured AS SELECT 1 AS id",
        "CREATE POLICY known ON secured USING (id IN (SELECT id FROM a))",
        "CREATE STATISTICS of_it ON id, parity FROM a",
        "COMMENT ON INDEX by_parity IS 'By hand.'",
        "GRANT SELECT (id) ON a TO pg_monitor",
        "INSERT INTO t VALUES (5, 1)",
    )
    before, ids, history = _what_it_is(db, oid), _definition_ids(db), _history(db, "a")
    tops = db.rows("SELECT 'top'::regclass::oid, 'on_top'::regclass::oid, pg_get_viewdef('on_top')")
    hook = hook_on(db)
    response = hook.create(B)
    assert response.status == "updated"
    assert _oid(db, "b") == oid
    assert not _stands(db, "a")
    assert _what_it_is(db, oid) == before
    # Not one row was read or written for it.
    assert (
        db.rows("SELECT id FROM b ORDER BY 1") == db.rows("SELECT id FROM top ORDER BY 1") == [(1,), (2,), (3,), (4,)]
    )
    assert db.rows("SELECT 'top'::regclass::oid, 'on_top'::regclass::oid") == [tops[0][:2]]
    assert "FROM b" in db.value("SELECT pg_get_viewdef('on_top')")
    assert _definition_ids(db) == {"b": ids["a"]}
    assert response.run_id is not None
    assert _history(db, "b") == [*history, (response.run_id, "create", "success")]
    assert _history(db, "a") == []
    assert {run.view for run in hook.runs()} == {"b"}
    (record,) = hook.definitions()
    assert MatViewDefinition.from_dict(record.declaration) == B
    assert hook.refresh("b", refresh_strategy="concurrent").status == "updated"
    assert hook.refresh("on_top").status == "updated"
    assert db.rows("TABLE on_top") == [(5,)]


def test_what_is_renamed_already_is_left_alone_and_not_warned_of(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    oid = _stand(db)
    hook = hook_on(db)
    hook.create(B)
    capsys.readouterr()
    again = hook.create(B)
    assert (again.status, again.response["drift"], again.response["sql"]) == ("skipped", False, [])
    assert "[warning" not in capsys.readouterr().out
    assert hook.plan(B).empty
    assert _oid(db, "b") == oid
    # Nor is it renamed, or dropped, because somebody has made another one of the old name since.
    db.execute("CREATE MATERIALIZED VIEW a AS SELECT 'other' AS a")
    assert hook.create(B).status == "skipped"
    assert db.rows("TABLE a") == [("other",)]
    assert _oid(db, "b") == oid


def test_a_view_is_renamed_as_often_as_one_likes(db: Database) -> None:
    oid = _stand(db)
    hook = hook_on(db)
    for former, name in (("a", "b"), ("b", "c"), ("c", "a"), ("a", "b")):
        assert hook.create(replace(A, name=name, renamed_from=former)).status == "updated"
        assert _oid(db, name) == oid
        assert _indexes(db, name) == {f"{name}_id_key", "by_parity"}
    assert [operation for _, operation, _ in _history(db, "b")] == ["create", "refresh", *["create"] * 4]
    assert list(_definition_ids(db)) == ["b"]


def test_history_that_another_view_left_under_the_new_name_is_gone_on_with(db: Database) -> None:
    hook = hook_on(db)
    db.execute(_SOURCE)
    hook.create(replace(A, name="b", indexes=(), comment="Of old."))
    hook.refresh("b")
    hook.delete("b")
    _stand(db)
    ids = _definition_ids(db)
    everything = _history(db, "b") + _history(db, "a")
    assert len(everything) == 5
    response = hook.create(B)
    assert response.run_id is not None
    assert _history(db, "b") == [*everything, (response.run_id, "create", "success")]
    assert _history(db, "a") == []
    assert _definition_ids(db) == {"b": ids["a"]}
    (record,) = hook.definitions()
    assert record.declaration["comment"] == "Ours."
    assert hook.refresh("b").success


def test_history_under_the_new_name_alone_is_gone_on_with(db: Database) -> None:
    """The view that is renamed was made by hand, and never worked on."""
    hook = hook_on(db)
    db.execute(_SOURCE)
    hook.create(replace(A, name="b"))
    hook.delete("b")
    (former,) = _definition_ids(db).values()
    db.execute("CREATE MATERIALIZED VIEW a AS SELECT id, parity FROM t")
    oid = _oid(db, "a")
    assert hook.create(B).status == "updated"
    assert (_oid(db, "b"), _definition_ids(db)) == (oid, {"b": former})
    assert [operation for _, operation, _ in _history(db, "b")] == ["create", "drop", "create"]


def test_a_view_that_was_never_declared_is_renamed_and_declared(db: Database) -> None:
    db.execute(_SOURCE, "CREATE MATERIALIZED VIEW a AS SELECT id, parity FROM t")
    hook = hook_on(db)
    hook.refresh("a")
    oid = _oid(db, "a")
    assert hook.create(B).status == "updated"
    assert _oid(db, "b") == oid
    (record,) = hook.definitions()
    assert (record.name, record.managed) == ("b", True)
    assert [operation for _, operation, _ in _history(db, "b")] == ["refresh", "create"]


_NAMES = [
    ("a", "b"),
    ("a", "reports.a"),
    ("reports.a", "public.a"),
    ("a", "reports.b"),
    ("reports.a", "b"),
    ("A", "b"),
    ("a", '"A"'),
    ('"Odd ""Name"" %s {0}"', '"it\'s; DROP TABLE t; --"'),
    ('"Odd Schema"."a.b"', 'reports."100 %(x)s"'),
    ("public.a", '"Odd Schema"."line\nbreak"'),
    ('"select"', '"ünïcode 漢字"'),
    ("a" * 63, "b" * 63),
]


@pytest.mark.parametrize(("former", "name"), _NAMES)
def test_any_name_may_become_any_other(db: Database, former: str, name: str) -> None:
    db.execute("CREATE SCHEMA reports", 'CREATE SCHEMA "Odd Schema"')
    oid = _stand(db, replace(A, name=former))
    hook = hook_on(db)
    qualified = former if "." in former else f"public.{former}"
    definition = replace(A, name=name, renamed_from=qualified)
    assert hook.create(definition).status == "updated"
    view = ViewName.parse(name)
    assert db.rows(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = %s",
        (oid,),
    ) == [(view.schema or "public", view.name)]
    assert hook.create(definition).status == "skipped"
    assert len(hook.runs(name)) == 4
    assert hook.runs(qualified) == []
    assert [(each.schema_name, each.view_name) for each in hook.definitions()] == [(view.schema or "public", view.name)]


def test_an_old_name_without_a_schema_is_one_in_the_schema_of_the_new_one(db: Database) -> None:
    db.execute("CREATE SCHEMA reports")
    oid = _stand(db, replace(A, name="reports.a"))
    assert hook_on(db).create(replace(A, name="reports.b", renamed_from="a")).status == "updated"
    assert _oid(db, "reports.b") == oid


@pytest.mark.parametrize(("name", "renamed_from"), [("reports.a", "a"), ("a", "public.a"), ("public.a", "A")])
def test_a_view_that_would_be_renamed_from_itself_is_refused(db: Database, name: str, renamed_from: str) -> None:
    db.execute("CREATE SCHEMA reports")
    oid = _stand(db)
    definition = replace(A, name=name, renamed_from=renamed_from) if name != renamed_from else A
    for dry_run in (True, False):
        with pytest.raises(InvalidDefinition, match="renamed from itself") as raised:
            hook_on(db).create(definition, dry_run=dry_run)
        assert "schema" in (raised.value.hint or "")
    assert _oid(db, "a") == oid


def test_names_in_the_way_of_a_move_are_gone_around(db: Database) -> None:
    """Neither the old name in the new schema nor the new one in the old schema has to be free."""
    db.execute("CREATE SCHEMA reports", "CREATE TABLE reports.a ()", "CREATE TABLE b ()")
    oid = _stand(db)
    assert hook_on(db).create(replace(A, name="reports.b", renamed_from="public.a")).status == "updated"
    assert _oid(db, "reports.b") == oid


def test_neither_stands_so_it_is_created(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    db.execute(_SOURCE)
    hook = hook_on(db)
    assert hook.create(B).status == "created"
    assert "[warning" not in capsys.readouterr().out
    assert _indexes(db, "b") == {"b_id_key", "by_parity"}
    assert _history(db, "b") == [(1, "create", "success")]


def test_both_stand_so_the_old_one_is_left_alone_with_a_warning(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    oid = _stand(db)
    other = _stand(db, replace(A, name="b", indexes=[Index(columns=["parity"])]))
    hook = hook_on(db)
    before = _history(db, "a"), _what_it_is(db, oid)
    # by_parity is the old one's.
    assert hook.create(replace(B, indexes=[Index(columns=["parity"])])).status == "skipped"
    assert "renamed_from is passed over: a stands, and so does b already." in capsys.readouterr().out
    assert (_oid(db, "a"), _oid(db, "b")) == (oid, other)
    assert (_history(db, "a"), _what_it_is(db, oid)) == before


@pytest.mark.parametrize(
    ("ddl", "kind"), [("CREATE TABLE a ()", "a table"), ("CREATE VIEW a AS SELECT 1 AS id", "a plain view")]
)
def test_what_has_the_old_name_and_is_no_materialized_view_is_left_alone_with_a_warning(
    db: Database, ddl: LiteralString, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    db.execute(_SOURCE, ddl)
    oid = _oid(db, "a")
    assert hook_on(db).create(B).status == "created"
    assert f"renamed_from is passed over: a is {kind}, which is left alone." in capsys.readouterr().out
    assert _oid(db, "a") == oid
    # Once there is a view of the new name it is nobody's business.
    assert hook_on(db).create(B).status == "skipped"
    assert "passed over" not in capsys.readouterr().out


def test_a_new_name_that_something_else_has_is_refused(db: Database) -> None:
    oid = _stand(db)
    db.execute("CREATE TABLE b ()")
    with pytest.raises(NotAMaterializedView, match="b is a table"):
        hook_on(db).create(B)
    assert _oid(db, "a") == oid


def test_indexes_named_after_the_view_follow_it_and_others_do_not(db: Database) -> None:
    definition = replace(
        A,
        indexes=[
            Index(columns=["parity"]),
            Index(columns=["parity", "id"], name="a_by_hand"),
            Index(columns=["id", "parity"], unique=True),
        ],
    )
    _stand(db, definition)
    db.execute("CREATE INDEX a_undeclared_idx ON a (parity DESC)")
    assert _indexes(db, "a") == {"a_id_key", "a_parity_idx", "a_by_hand", "a_id_parity_key", "a_undeclared_idx"}
    oids = db.rows("SELECT indexrelid FROM pg_index WHERE indrelid = 'a'::regclass ORDER BY 1")
    hook = hook_on(db)
    renamed = replace(definition, name="b", renamed_from="a")
    hook.create(renamed)
    assert _indexes(db, "b") == {"b_id_key", "b_parity_idx", "a_by_hand", "b_id_parity_key", "a_undeclared_idx"}
    assert db.rows("SELECT indexrelid FROM pg_index WHERE indrelid = 'b'::regclass ORDER BY 1") == oids
    assert hook.plan(renamed).empty


def test_what_is_declared_anew_is_applied_with_the_rename(db: Database) -> None:
    oid = _stand(db)
    db.execute("CREATE VIEW top AS SELECT id, parity FROM a", "CREATE MATERIALIZED VIEW on_top AS TABLE top")
    changed = replace(
        B,
        sql="SELECT id, parity AS odd FROM t",
        comment="Renamed.",
        indexes=[Index(columns=["odd"], name="by_parity"), Index(columns=["odd", "id"])],
        grants={"public": ["SELECT"], "pg_monitor": ["SELECT"]},
        storage_parameters={"fillfactor": 70},
    )
    hook = hook_on(db)
    plan = hook.plan(changed)
    response = hook.create(changed)
    assert response.status == "updated"
    assert [step["kind"] for step in response.response["plan"]["steps"]] == [step.kind for step in plan.steps]
    assert _oid(db, "b") == oid
    assert db.rows("SELECT id, odd FROM b ORDER BY 1") == [(1, 1), (2, 0), (3, 1), (4, 0)]
    assert db.rows("SELECT id, parity FROM top ORDER BY 1") == [(1, 1), (2, 0), (3, 1), (4, 0)]
    assert _indexes(db, "b") == {"b_id_key", "by_parity", "b_odd_id_idx"}
    assert db.value("SELECT obj_description('b'::regclass)") == "Renamed."
    assert hook.plan(changed).empty


@pytest.mark.parametrize("schema", ["public", "reports"])
@pytest.mark.parametrize("force", [False, True])
def test_a_view_is_renamed_and_built_anew_at_once(each_db: Database, schema: str, force: bool) -> None:
    _stand(each_db)
    each_db.execute(
        "CREATE SCHEMA reports",
        "CREATE VIEW top AS SELECT id, parity FROM a",
        "CREATE VIEW topmost AS SELECT count(*) AS n FROM top JOIN a USING (id)",
        "GRANT SELECT ON top TO PUBLIC",
        "CREATE TABLE secured AS SELECT 1 AS id",
        "CREATE POLICY known ON secured USING (id IN (SELECT id FROM a))",
    )
    tops = each_db.rows("SELECT oid, relacl::text FROM pg_class WHERE relname LIKE 'top%' ORDER BY 1")
    history = _history(each_db, "a")
    changed = replace(B, name=f"{schema}.b", renamed_from="public.a")
    if not force:
        changed = replace(changed, sql="SELECT id, parity, 'new' AS extra FROM t WHERE id < 4")
    hook = hook_on(each_db)
    response = hook.create(changed, force=force)
    assert response.status == "updated"
    rows = 4 if force else 3
    assert (response.response["row_count_before"], response.response["row_count_after"]) == (4, rows)
    assert not _stands(each_db, "a")
    assert each_db.value("SELECT count(*) FROM top") == rows
    assert each_db.rows("TABLE topmost") == [(rows,)]
    assert each_db.rows("SELECT oid, relacl::text FROM pg_class WHERE relname LIKE 'top%' ORDER BY 1") == tops
    assert each_db.value(
        "SELECT pg_get_viewdef('top') LIKE '%%FROM ' || %s", (f"{changed.view}".removeprefix("public.") + ";",)
    )
    assert {name.rpartition(".")[2] for name in _indexes(each_db, changed.name)} == {"b_id_key", "by_parity"}
    assert each_db.value("SELECT obj_description(%s::regclass)", (changed.name,)) == "Ours."
    assert _history(each_db, changed.name) == [*history, (response.run_id, "create", "success")]
    assert hook.plan(changed).empty
    assert each_db.rows("SELECT relname FROM pg_class WHERE relname LIKE '%\\_mv\\_%'") == []


def test_statistics_go_on_with_the_view(each_db: Database) -> None:
    definition = replace(A, statistics=[ExtendedStatistics(name="of_it", columns=["id", "parity"])])
    _stand(each_db, definition)
    each_db.execute("CREATE SCHEMA reports")
    hook = hook_on(each_db)
    for former, name in (("a", "b"), ("public.b", "reports.b")):
        definition = replace(definition, name=name, renamed_from=former)
        hook.create(definition)
        assert each_db.value("SELECT count(*) FROM pg_statistic_ext WHERE stxrelid = %s::regclass", (name,)) == 1
        assert hook.plan(definition).empty


def test_readers_of_what_is_built_on_it_never_fail(db: Database) -> None:
    _stand(db)
    db.execute(
        "CREATE VIEW top AS SELECT count(*) AS n FROM a",
        "CREATE MATERIALIZED VIEW on_top AS SELECT count(*) AS n FROM a",
    )
    over = threading.Event()

    def read() -> int:
        reads = 0
        with db.connect() as reader:
            while not over.is_set():
                assert reader.execute("SELECT top.n, on_top.n FROM top, on_top").fetchall() == [(4, 4)]
                reads += 1
        return reads

    hook = hook_on(db)
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for former, name in [("a", "b"), ("b", "a")] * 5:
                assert hook.create(replace(A, name=name, renamed_from=former)).status == "updated"
        finally:
            over.set()
        assert all(reader.result() > 10 for reader in readers)


def test_readers_go_on_while_it_is_renamed_and_built_anew(db: Database) -> None:
    _stand(db)
    db.execute("CREATE VIEW top AS SELECT count(*) AS n FROM a")
    over = threading.Event()

    def read() -> int:
        reads = 0
        with db.connect() as reader:
            while not over.is_set():
                assert reader.execute("TABLE top").fetchall() in ([(4,)], [(3,)])
                reads += 1
        return reads

    hook = hook_on(db)
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for number, (former, name) in enumerate([("a", "b"), ("b", "a")] * 3):
                query = f"SELECT id, parity FROM t WHERE id <= {4 - (number + 1) % 2}"
                assert hook.create(replace(A, name=name, renamed_from=former, sql=query)).status == "updated"
        finally:
            over.set()
        assert all(reader.result() > 10 for reader in readers)


# Others at work


@pytest.mark.parametrize("held", ["a", "b"])
def test_an_operation_under_either_name_is_waited_for(
    db: Database, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    oid = _stand(db)
    with _locked(db, held) as let_go, beside(lambda: hook_on(db).create(B), let_go) as renaming:
        until(db, WAITING)
        assert _stands(db, "a")
        assert not renaming.done()
        let_go()
        assert renaming.result().response["waited_ms"] > 0
    assert _oid(db, "b") == oid
    assert f"Another operation on {held} is running; waiting for it" in capsys.readouterr().out


def test_a_refresh_under_the_old_name_that_is_running_ends_well_first(db: Database) -> None:
    db.execute(_SOURCE, GATE)
    definition = replace(A, sql="SELECT id, parity, gate() FROM t", indexes=(), refresh_strategy="concurrent")
    oid = _stand(db, definition)
    renamed = replace(definition, name="b", renamed_from="a")
    with (
        gate_closed(db) as open_gate,
        beside(lambda: hook_on(db).refresh("a", lock_timeout=60), open_gate) as refresh,
    ):
        until(db, AT_THE_GATE)
        with beside(lambda: hook_on(db).create(renamed, lock_timeout=60), open_gate) as renaming:
            until(db, WAITING)
            open_gate()
            assert refresh.result().status == "updated"
            assert renaming.result().status == "updated"
    assert _oid(db, "b") == oid
    assert _history(db, "b")[-2:] == [(3, "refresh", "success"), (4, "create", "success")]


@pytest.mark.parametrize("held", ["a", "b"])
def test_who_does_not_wait_stands_back_and_leaves_the_name(db: Database, held: str) -> None:
    oid = _stand(db)
    hook = hook_on(db)
    with _locked(db, held):
        assert hook.create(B, if_locked="skip").status == "skipped"
        with pytest.raises(ViewLocked, match=r"b \(renamed from a\) is being worked on by another operation"):
            hook.create(B, if_locked="fail")
        with pytest.raises(ViewLocked, match="for longer than max_wait"):
            hook.create(B, max_wait=0.2)
    assert _oid(db, "a") == oid
    assert not _stands(db, "b")
    assert [status for _, _, status in _history(db, "b")] == ["skipped"] * 3
    # What stood back was the view's as well.
    hook.create(B)
    assert [status for _, _, status in _history(db, "b")] == ["success", "success", *["skipped"] * 3, "success"]


def test_an_operation_under_the_old_name_that_comes_meanwhile_finds_no_view(db: Database) -> None:
    db.execute(_SOURCE, GATE)
    _stand(db)
    changed = replace(B, sql="SELECT id, parity, gate() FROM t")
    hook = hook_on(db)
    with (
        gate_closed(db) as open_gate,
        beside(lambda: hook_on(db).create(changed, lock_timeout=60), open_gate) as renaming,
    ):
        until(db, AT_THE_GATE)
        with beside(lambda: hook_on(db).refresh("a"), open_gate) as refresh:
            until(db, WAITING)
            assert hook.refresh("a", if_locked="skip").status == "skipped"
            open_gate()
            assert renaming.result().status == "updated"
            with pytest.raises(ViewNotFound, match="a does not exist"):
                refresh.result()
    # The one that stood back did so while the view had that name.
    assert _history(db, "b")[2:] == [(3, "create", "success"), (4, "refresh", "skipped")]
    assert _history(db, "a") == [(5, "refresh", "failed")]


def test_who_stands_back_under_the_new_name_meanwhile_is_no_obstacle(db: Database) -> None:
    """It records its run, and with it a definition of that name, which the rename then meets."""
    db.execute(_SOURCE, GATE)
    _stand(db)
    ids = _definition_ids(db)
    changed = replace(B, sql="SELECT id, parity, gate() FROM t")
    with (
        gate_closed(db) as open_gate,
        beside(lambda: hook_on(db).create(changed, lock_timeout=60), open_gate) as renaming,
    ):
        until(db, AT_THE_GATE)
        assert hook_on(db).create(changed, if_locked="skip").status == "skipped"
        assert _history(db, "b") == [(4, "create", "skipped")]
        open_gate()
        assert renaming.result().status == "updated"
    assert _history(db, "b")[2:] == [(3, "create", "success"), (4, "create", "skipped")]
    assert _definition_ids(db) == {"b": ids["a"]}


class Meddled(Driver):
    """Lets something happen once, before a statement with a certain word in it."""

    def __init__(self, db: Database, word: str, meddle: Callable[[], object]) -> None:
        super().__init__(db.connect)
        self._word, self._meddle = word, meddle
        self.meddled = False

    def _perform(self, instruction: Instruction) -> Result:
        if not self.meddled and isinstance(instruction, Query) and self._word in instruction.statement.as_string(None):
            self.meddled = True
            self._meddle()
        return super()._perform(instruction)


def test_who_stands_back_at_the_very_moment_is_recorded_all_the_same(db: Database) -> None:
    """The row that it would hang its run on has just become part of another one."""
    hook = hook_on(db)
    db.execute(_SOURCE)
    hook.create(replace(A, name="b"))
    hook.delete("b")
    _stand(db)
    with _locked(db, "b") as let_go:

        def rename() -> None:
            let_go()
            until(db, "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory')")
            assert hook.create(B).status == "updated"

        with Meddled(db, "interval '1 ms'", rename) as driver:
            response = driver.run(Operations(Ledger("matviews")).refresh("b", if_locked="skip"))
        assert driver.meddled
    assert response.status == "skipped"
    assert _history(db, "b")[-2:] == [(5, "create", "success"), (response.run_id, "refresh", "skipped")]


def test_a_live_run_under_the_new_name_is_not_called_lost_by_who_knew_the_old_one(db: Database) -> None:
    """Between looking for the view's row and taking its lock, the row becomes that of a view of another name."""
    _stand(db)
    hook = hook_on(db)

    def rename() -> None:
        hook.create(B)
        db.execute(
            "INSERT INTO matviews.mat_view_runs (mat_view_definition_id, status, operation, started_at) "
            "SELECT id, 1, 1, clock_timestamp() FROM matviews.mat_view_definitions WHERE name = 'b'"
        )

    with Meddled(db, "pg_try_advisory_xact_lock", rename) as driver, pytest.raises(ViewNotFound):
        driver.run(Operations(Ledger("matviews")).refresh("a"))
    assert driver.meddled
    assert _history(db, "b")[-1][1:] == ("refresh", "running")
    assert _history(db, "a")[-1][1:] == ("refresh", "failed")


@pytest.mark.parametrize("if_locked", ["wait", "skip"])
def test_renames_that_cross_end_one_after_the_other(db: Database, if_locked: str) -> None:
    oid = _stand(db)
    back = replace(A, renamed_from="b")
    hook_on(db).definitions()
    for _ in range(5):
        barrier = threading.Barrier(2)

        def rename(definition: MatViewDefinition, barrier: threading.Barrier) -> str | None:
            hook = hook_on(db)
            hook.definitions()
            barrier.wait()
            return hook.create(definition, if_locked=if_locked, max_wait=20).status

        with ThreadPoolExecutor(2) as pool:
            outcomes = {future.result() for future in [pool.submit(rename, each, barrier) for each in (B, back)]}
        assert outcomes <= {"updated", "skipped"}
        assert sorted((_stands(db, "a"), _stands(db, "b"))) == [False, True]
        name = "a" if _stands(db, "a") else "b"
        assert _oid(db, name) == oid
        assert _history(db, name)[:2] == [(1, "create", "success"), (2, "refresh", "success")]
        assert {run.status for run in hook_on(db).runs(limit=100)} <= {"success", "skipped"}


def test_of_two_that_take_both_locks_and_do_not_wait_one_gets_through(db: Database) -> None:
    """Each has taken one lock before either asks for the other one: unless both begin with the same."""
    db.execute(_SOURCE)
    hook_on(db).definitions()
    barrier = threading.Barrier(2)

    class InStep(Driver):
        tries = 0

        def _perform(self, instruction: Instruction) -> Result:
            result = super()._perform(instruction)
            if isinstance(instruction, Query) and "pg_try_advisory" in instruction.statement.as_string(None):
                self.tries += 1
                if self.tries == 1:
                    barrier.wait(20)
            return result

    def create(definition: MatViewDefinition) -> str | None:
        with InStep(db.connect) as driver:
            return driver.run(Operations(Ledger("matviews")).create(definition, if_locked="skip")).status

    with ThreadPoolExecutor(2) as pool:
        created = [pool.submit(create, each) for each in (B, replace(A, renamed_from="b"))]
        assert sorted(str(future.result()) for future in created) == ["created", "skipped"]


def test_an_operation_on_another_view_that_has_the_old_name_by_now_is_not_waited_for(db: Database) -> None:
    _stand(db)
    hook = hook_on(db)
    hook.create(B)
    db.execute("CREATE MATERIALIZED VIEW a AS SELECT 1 AS id")
    with _locked(db, "a"):
        assert hook.create(B, if_locked="fail").response["reason"] == "it stands already"
        assert hook.create(replace(B, comment="Another."), if_locked="fail").status == "updated"


def test_a_view_of_the_new_name_that_goes_while_its_lock_is_taken_lets_the_old_one_be_renamed(db: Database) -> None:
    oid = _stand(db)
    db.execute("CREATE MATERIALIZED VIEW b AS SELECT 1 AS id")
    hook_on(db).definitions()

    def drop() -> None:
        db.execute("DROP MATERIALIZED VIEW b")

    with Meddled(db, "pg_try_advisory_xact_lock", drop) as driver:
        work = Operations(Ledger("matviews")).create(B)
        with _locked(db, "a") as let_go, beside(lambda: driver.run(work), let_go) as renaming:
            # Both locks are asked for once the one view is gone.
            until(db, WAITING)
            let_go()
            assert renaming.result().status == "updated"
    assert driver.meddled
    assert _oid(db, "b") == oid


def test_runs_that_nobody_ended_are_found_under_both_names(db: Database) -> None:
    hook = hook_on(db)
    db.execute(_SOURCE)
    hook.create(replace(A, name="b"))
    hook.delete("b")
    _stand(db)
    db.execute("UPDATE matviews.mat_view_runs SET status = 1, finished_at = NULL, duration_ms = NULL")
    hook.create(B)
    hook.refresh("b")
    assert [status for _, _, status in _history(db, "b")] == [*["failed"] * 4, "success", "success"]


# What fails


def _index_in_the_way(db: Database) -> MatViewDefinition:
    db.execute(
        "CREATE SCHEMA reports", "CREATE TABLE reports.u AS SELECT 1 AS x", "CREATE INDEX by_parity ON reports.u (x)"
    )
    return replace(B, name="reports.b", renamed_from="public.a")


def _row_in_the_way(db: Database) -> MatViewDefinition:
    db.execute("UPDATE t SET id = 1")
    return replace(B, sql="SELECT id, parity, 'new' AS extra FROM t")


def _type_in_the_way(db: Database) -> MatViewDefinition:
    db.execute("CREATE TYPE b AS (x int)", "CREATE DOMAIN other AS int")
    return B


@pytest.mark.parametrize(
    ("in_the_way", "error"),
    [
        (_index_in_the_way, psycopg.errors.DuplicateTable),
        (_row_in_the_way, psycopg.errors.UniqueViolation),
        (_type_in_the_way, NotAMaterializedView),
    ],
)
def test_a_rename_that_fails_leaves_view_definition_and_history_as_they_were(
    db: Database, in_the_way: Callable[[Database], MatViewDefinition], error: type[Exception]
) -> None:
    oid = _stand(db)
    hook = hook_on(db)
    definition = in_the_way(db)
    before, records, history = _what_it_is(db, oid), hook.definitions(), _history(db, "a")
    with pytest.raises(error) as raised:
        hook.create(definition)
    assert _oid(db, "a") == oid
    assert not db.value("SELECT EXISTS (SELECT FROM pg_class WHERE relname = 'b' AND relkind = 'm')")
    assert _what_it_is(db, oid) == before
    run_id = raised.value.response.run_id  # type: ignore[attr-defined]
    if error is NotAMaterializedView:
        # Not a rename: something has the new name.
        assert _history(db, "b") == [(run_id, "create", "failed")]
        return
    assert hook.definitions() == records
    # The view is still called so, and there its run is found.
    assert _history(db, "a") == [*history, (run_id, "create", "failed")]
    assert _history(db, definition.name) == []
    run = hook.last_run("a")
    assert run is not None
    assert run.meta["response"]["view"] == str(definition.view)


def test_a_name_that_is_taken_is_found_before_the_new_view_is_filled(db: Database) -> None:
    oid = _stand(db)
    definition = replace(_index_in_the_way(db), sql="SELECT id, parity, 1 / 0 AS extra FROM t")
    with pytest.raises(InvalidDefinition, match="something else in the schema reports has that name"):
        hook_on(db).create(definition)
    assert _oid(db, "a") == oid


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize("word", ["RENAME TO", "COMMIT"])
def test_whatever_ends_the_process_half_way_leaves_all_as_it_was(db: Database, word: str, leftover: bool) -> None:
    hook = hook_on(db)
    if leftover:
        db.execute(_SOURCE)
        hook.create(replace(A, name="b"))
        hook.delete("b")
    oid = _stand(db)
    before, records = _what_it_is(db, oid), hook.definitions()
    histories = _history(db, "a"), _history(db, "b")

    class Ended(BaseException):
        pass

    def end(text: str) -> None:
        # The migrations' own COMMIT is not meant.
        if word in text and db.value("SELECT EXISTS (SELECT FROM matviews.mat_view_runs WHERE status = 1)"):
            raise Ended

    with InterruptedDriver(connecting(db), before=end) as driver, pytest.raises(Ended):
        driver.run(Operations(Ledger("matviews")).create(B))
    assert (_oid(db, "a"), _what_it_is(db, oid)) == (oid, before)
    assert hook.definitions() == records
    assert _history(db, "a")[:-1] == histories[0]
    assert _history(db, "a")[-1][1:] in [("create", "failed"), ("create", "running")]
    assert _history(db, "b") == histories[1]
    assert hook.create(B).status == "updated"
    assert _oid(db, "b") == oid


@pytest.mark.parametrize("on_drift", ["apply", "ignore"])
def test_who_may_not_rename_it_is_told_so(db: Database, on_drift: str) -> None:
    db.execute("CREATE SCHEMA reports")
    oid = _stand(db)
    role = db.role()
    with db.connect() as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA matviews TO {role}; GRANT SELECT ON t TO {role}".encode())
        connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA matviews TO {role}".encode())
        connection.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {role}".encode())
    hook = hook_on(db, user=role)
    with pytest.raises(MissingPrivilege, match=r"may not .* a, which belongs to"):
        hook.create(B, on_drift=on_drift)
    with db.connect() as connection:
        connection.execute(f"ALTER MATERIALIZED VIEW a OWNER TO {role}".encode())
    with pytest.raises(MissingPrivilege, match="lacks CREATE or USAGE on the schema"):
        hook.create(replace(B, name="reports.b", renamed_from="public.a"), on_drift=on_drift)
    assert _oid(db, "a") == oid
    assert hook.create(B, on_drift=on_drift).status == "updated"


def test_who_may_not_delete_from_the_record_can_rename_where_nothing_is_to_be_merged(db: Database) -> None:
    _stand(db)
    role = db.role()
    with db.connect() as connection:
        for statement in (
            "GRANT USAGE ON SCHEMA matviews TO {}",
            "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA matviews TO {}",
            "GRANT USAGE, CREATE ON SCHEMA public TO {}",
            "GRANT SELECT ON t TO {}",
            "ALTER MATERIALIZED VIEW a OWNER TO {}",
        ):
            connection.execute(statement.format(role).encode())
    hook = hook_on(db, user=role)
    oid = _oid(db, "a")
    assert hook.create(B).status == "updated"
    with pytest.raises(ViewNotFound):
        hook.refresh("a")
    before = _history(db, "b"), _history(db, "a"), hook.definitions()
    with pytest.raises(MissingPrivilege, match="may not use the run tables") as raised:
        hook.create(replace(A, renamed_from="b"))
    assert "DELETE" in (raised.value.hint or "")
    assert _oid(db, "b") == oid
    assert (_history(db, "b")[:-1], _history(db, "a"), hook.definitions()) == before


# What is done about drift


def test_a_rename_is_drift_that_is_reported_or_failed_for(db: Database) -> None:
    oid = _stand(db)
    hook = hook_on(db)
    changed = replace(B, comment="Another.")
    reported = hook.create(changed, on_drift="report")
    assert (reported.status, reported.response["drift"]) == ("skipped", True)
    with pytest.raises(DriftFound, match="rename view") as raised:
        hook.create(changed, on_drift="fail")
    assert raised.value.plan is not None
    assert raised.value.plan.steps[0].kind == "rename view"
    assert _oid(db, "a") == oid
    assert db.value("SELECT obj_description('a'::regclass)") == "Ours."
    assert [status for _, _, status in _history(db, "a")] == ["success", "success", "skipped", "failed"]
    (record,) = hook.definitions()
    assert (record.name, record.declaration["comment"]) == ("a", "Ours.")


def test_a_rename_is_made_where_drift_is_ignored_and_nothing_else(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    oid = _stand(db)
    before = _what_it_is(db, oid)
    response = hook_on(db).create(replace(B, comment="Another."), on_drift="ignore")
    assert response.status == "updated"
    assert response.response["sql"] == ['ALTER MATERIALIZED VIEW "public"."a" RENAME TO "b"']
    assert _oid(db, "b") == oid
    assert _what_it_is(db, oid) == before
    assert "Renamed from a; whatever else differs is left alone" in capsys.readouterr().out
    assert [operation for _, operation, _ in _history(db, "b")] == ["create", "refresh", "create"]


def test_a_plan_shows_the_rename_first_and_renames_nothing(db: Database) -> None:
    oid = _stand(db)
    plan = hook_on(db).plan(replace(B, comment="Another."))
    assert [step.kind for step in plan.steps] == ["rename view", "comment", "rename index"]
    assert plan.steps[0].sql == ('ALTER MATERIALIZED VIEW "public"."a" RENAME TO "b"',)
    assert _oid(db, "a") == oid
    assert len(hook_on(db).runs()) == 2


@pytest.mark.parametrize(
    ("changed", "on_drift"),
    [
        (False, "apply"),
        (True, "apply"),
        (True, "ignore"),
        (True, "report"),
    ],
)
def test_a_dry_run_tells_what_the_rename_does(db: Database, changed: bool, on_drift: str) -> None:
    oid = _stand(db)
    db.execute("CREATE VIEW top AS SELECT id FROM a")
    definition = replace(B, sql="SELECT id, parity, 1 AS extra FROM t") if changed else B
    hook = hook_on(db)
    before, records, history = _what_it_is(db, oid), hook.definitions(), _history(db, "a")
    with _locked(db, "a"):
        dry = hook.create(definition, on_drift=on_drift, dry_run=True)
    assert (_oid(db, "a"), _what_it_is(db, oid)) == (oid, before)
    assert (hook.definitions(), _history(db, "a")) == (records, history)
    plan = hook.plan(definition)
    real = hook.create(definition, on_drift=on_drift)
    assert dry.status == real.status
    assert _alike(dry.response["sql"]) == _alike(real.response["sql"])
    if dry.response["sql"]:
        assert "ACCESS EXCLUSIVE" in dry.response["locks"]
    if on_drift == "apply":
        # Beside the one that only takes the view's lock.
        locking = 'ALTER MATERIALIZED VIEW "public"."a" OWNER TO "postgres"'
        assert [text for text in _alike([*plan.sql]) if text != locking] == [
            text for text in _alike(real.response["sql"]) if text != locking
        ]


def _alike(statements: list[str]) -> list[str]:
    return [re.sub(r"_mv_[0-9a-f]{8}", "_mv_#", statement).strip().rstrip(";") for statement in statements]


# Other operations with a definition that has yet to be made so


def test_a_refresh_before_the_rename_says_that_create_renames(db: Database) -> None:
    oid = _stand(db)
    hook = hook_on(db)
    for dry_run in (True, False):
        with pytest.raises(ViewNotFound) as raised:
            hook.refresh(B, dry_run=dry_run)
        assert raised.value.message == (
            "The materialized view b does not exist. a does, which it is declared as renamed from."
        )
        assert "hook.create()), which renames that one." in (raised.value.hint or "")
    with pytest.raises(ViewNotFound) as raised:
        hook.refresh(replace(B, renamed_from="absent"))
    assert "renamed" not in str(raised.value)
    # What it left on record under the new name is the view's as well.
    assert hook.create(B).status == "updated"
    assert _oid(db, "b") == oid
    assert [status for _, _, status in _history(db, "b")] == ["success", "success", "failed", "failed", "success"]


def test_a_drop_before_the_rename_leaves_the_view_and_says_so(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    oid = _stand(db)
    assert hook_on(db).delete(B).status == "skipped"
    assert "a, which it is declared as renamed from, stands and is left alone" in capsys.readouterr().out
    assert _oid(db, "a") == oid
