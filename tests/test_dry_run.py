"""Dry run: what would be done is told as it would then be done, and nothing is done."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.models.asset import AssetEvent
from airflow.sdk import DAG, Asset, AssetAlias
from airflow.utils.session import create_session
from psycopg import sql
from sqlalchemy import select

from airflow_provider_matviews.definition import Column, Index, MatViewDefinition
from airflow_provider_matviews.exceptions import (
    ConcurrentRefreshRefused,
    DependentsExist,
    DriftFound,
    InvalidDefinition,
    MissingPrivilege,
    NotAMaterializedView,
    StrategyRefused,
    UnsupportedServer,
    ViewNotFound,
    ViewNotManaged,
)
from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.operators.matview import (
    CreateMatViewOperator,
    DeleteMatViewOperator,
    RefreshMatViewOperator,
)
from airflow_provider_matviews.services.catalog import ResolvedName
from airflow_provider_matviews.services.instructions import Session
from airflow_provider_matviews.services.ledger import Ledger
from airflow_provider_matviews.services.locking import lock_key
from airflow_provider_matviews.services.operations import Operations
from airflow_provider_matviews.services.response import ServiceResponse
from tests.airflow_dags import run_dag, set_connection
from tests.conftest import Database, hook_on
from tests.driving import InterruptedDriver, connecting
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

#: Who waits for a lock that somebody keeps is to fail soon, and not to hang.
BRIEFLY: dict[str, Any] = {"lock_timeout": 0.2, "max_wait": 0.2}

#: Every way in which rows can come into a view leaves a trace of having run.
_WORLD: tuple[LiteralString, ...] = (
    "CREATE TABLE t AS SELECT n AS id, n % 2 AS parity FROM generate_series(1, 4) n",
    "CREATE TABLE trace (what text)",
    "CREATE SEQUENCE ticks",
    """
    CREATE FUNCTION traced() RETURNS integer LANGUAGE plpgsql AS
    $$BEGIN INSERT INTO public.trace VALUES ('ran'); RETURN nextval('public.ticks'); END$$
    """,
    "GRANT SELECT ON t TO pg_monitor",
    "GRANT INSERT ON trace TO pg_monitor",
    "GRANT USAGE ON SEQUENCE ticks TO pg_monitor",
    "GRANT CREATE ON SCHEMA public TO pg_monitor",
)
_STANDING: tuple[LiteralString, ...] = (
    *_WORLD,
    "CREATE MATERIALIZED VIEW mv WITH (fillfactor = 90) AS SELECT id, parity, traced() AS tick FROM t",
    "CREATE UNIQUE INDEX mv_id_key ON mv (id)",
    "CREATE INDEX by_parity ON mv (parity)",
    "COMMENT ON MATERIALIZED VIEW mv IS 'As it was.'",
    "GRANT SELECT ON mv TO PUBLIC",
    "CREATE STATISTICS mv_statistics ON id, parity FROM mv",
    "CREATE VIEW top AS SELECT id, parity FROM mv",
    "CREATE VIEW topmost AS SELECT count(*) AS n FROM top JOIN mv USING (id)",
    "GRANT SELECT ON top TO PUBLIC",
    "CREATE TABLE secured (id int)",
    "CREATE POLICY known ON secured USING (id IN (SELECT id FROM mv))",
    "TRUNCATE trace",
    "ALTER SEQUENCE ticks RESTART",
)
_AS_IT_STANDS = MatViewDefinition(
    name="mv", sql="SELECT id, parity, traced() AS tick FROM t", unique_index_columns=["id"]
)
_DRIFTED = replace(
    _AS_IT_STANDS,
    comment="As it should be.",
    indexes=[Index(columns=["parity"], name="by_parity", unique=False, include=["id"]), Index(columns=["tick"])],
    grants={"pg_monitor": ["SELECT"]},
    storage_parameters={"fillfactor": 80},
    columns=[Column(name="id", comment="Whose."), Column(name="tick", statistics=100)],
)
_CHANGED = replace(_DRIFTED, sql="SELECT id, parity, traced() AS tick, 'more' AS more FROM t WHERE id < 4")


@dataclass(frozen=True)
class Case:
    """Something to do.

    :ivar standing: what is there before.
    :ivar work: does it.
    """

    name: str
    operation: str
    subject: str | MatViewDefinition
    arguments: dict[str, Any]
    standing: tuple[LiteralString, ...] = _STANDING

    def do(self, hook: MatViewHook, **arguments: Any) -> ServiceResponse:
        response = getattr(hook, self.operation)(self.subject, **self.arguments, **arguments)
        assert isinstance(response, ServiceResponse)
        return response


def _case(name: str, operation: str, subject: str | MatViewDefinition, *more: LiteralString, **arguments: Any) -> Case:
    return Case(name, operation, subject, arguments, (*_STANDING, *more))


CASES = [
    Case("create new", "create", _CHANGED, {}, _WORLD),
    Case("create new, without rows", "create", _CHANGED, {"with_data": False}, _WORLD),
    Case("create new, for another owner", "create", replace(_CHANGED, owner="pg_monitor"), {}, _WORLD),
    _case("nothing to do", "create", _AS_IT_STANDS),
    _case("drift", "create", _DRIFTED),
    _case("drift, exclusive", "create", _DRIFTED, exclusive=True),
    _case("drift, reported", "create", _DRIFTED, on_drift="report"),
    _case("drift, ignored", "create", _DRIFTED, on_drift="ignore"),
    _case("a column's name", "create", replace(_AS_IT_STANDS, sql="SELECT id, parity AS odd, traced() AS tick FROM t")),
    _case("changed query", "create", _CHANGED),
    _case("changed query, without rows", "create", _CHANGED, with_data=False),
    _case("changed query, another owner", "create", replace(_CHANGED, owner="pg_monitor")),
    _case("force", "create", _AS_IT_STANDS, force=True),
    _case("auto", "refresh", "mv", "DROP INDEX mv_id_key"),
    _case("auto, few rows", "refresh", "mv"),
    _case("auto, unpopulated", "refresh", "mv", "REFRESH MATERIALIZED VIEW mv WITH NO DATA"),
    _case("swap", "refresh", "mv", refresh_strategy="swap"),
    _case("swap, not analyzed", "refresh", "mv", refresh_strategy="swap", analyze=False, vacuum=True),
    _case("concurrent", "refresh", "mv", refresh_strategy="concurrent", analyze=True),
    _case(
        "concurrent, unpopulated",
        "refresh",
        "mv",
        "REFRESH MATERIALIZED VIEW mv WITH NO DATA",
        refresh_strategy="concurrent",
    ),
    _case("regular", "refresh", "mv", refresh_strategy="regular", vacuum=True, row_count_strategy="exact"),
    _case("delete", "delete", "mv", "DROP VIEW top CASCADE", "DROP POLICY known ON secured", force=True),
    _case("delete, cascade", "delete", "mv", cascade=True, force=True),
    _case("delete what is not there", "delete", "absent"),
]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _everything(db: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in a database that an operation could change: catalog rows and who wrote them, sequences, rows."""
    catalogs = (
        "pg_attribute",
        "pg_depend",
        "pg_description",
        "pg_index",
        "pg_namespace",
        "pg_policy",
        "pg_proc",
        "pg_rewrite",
        "pg_seclabel",
        "pg_statistic_ext",
        "pg_type",
    )
    found: dict[str, list[tuple[Any, ...]]] = {}
    with db.connect() as connection:
        for catalog in catalogs:
            statement = sql.SQL("SELECT xmin::text, c::text FROM {} c ORDER BY 2").format(sql.Identifier(catalog))
            found[catalog] = connection.execute(statement).fetchall()
        # Without what autovacuum keeps in it.
        found["pg_class"] = connection.execute(
            "SELECT xmin::text, to_jsonb(c) - '{relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid}'"
            "::text[] FROM pg_class c ORDER BY oid"
        ).fetchall()
        for name, kind in connection.execute(
            "SELECT oid::regclass::text, relkind FROM pg_class WHERE oid >= 16384 AND relispopulated "
            "AND relkind IN ('r', 'm', 'S') AND relnamespace <> 'pg_toast'::regnamespace ORDER BY 1"
        ).fetchall():
            columns = "last_value, is_called" if kind == "S" else "ctid, xmin::text, x::text"
            found[name] = connection.execute(f"SELECT {columns} FROM {name} x".encode()).fetchall()
    return found


@contextmanager
def nothing_changes(db: Database) -> Iterator[None]:
    before = _everything(db)
    yield
    after = _everything(db)
    assert before.keys() == after.keys()
    for what, rows in before.items():
        assert after[what] == rows, what


@contextmanager
def readers_and_an_operation(db: Database) -> Iterator[None]:
    """Hold what a long report holds of all there is, and what an operation on the view holds."""
    key = lock_key(ResolvedName("public", "mv", "mv")).as_string(None)
    with db.connect() as reader, reader.transaction():
        for relation in ("t", "mv", "top", "topmost", "secured"):
            # What does not stand, or has no rows, nobody reads.
            with suppress(psycopg.Error), reader.transaction():
                reader.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(relation)))
        reader.execute(f"SELECT pg_advisory_xact_lock({key})".encode())
        yield


def _alike(statements: list[str]) -> list[str]:
    """Statements without the tokens in the names beside, each of which is made anew."""
    return [re.sub(r"_mv_[0-9a-f]{8}", "_mv_#", statement) for statement in statements]


@EVERY_CASE
def test_what_is_told_is_what_is_then_done(each_db: Database, case: Case) -> None:
    each_db.execute(*case.standing)
    hook = hook_on(each_db)
    dry, real = case.do(hook, dry_run=True), case.do(hook)
    assert dry.status == real.status
    assert _alike(dry.response["sql"]) == _alike(real.response["sql"])
    assert dry.response["strategy"] == real.response["strategy"]
    assert dry.response.get("reason") == real.response.get("reason")
    assert dry.response.get("drift") == real.response.get("drift")
    steps = [step["step"] for step in dry.response["steps"]]
    assert steps == [step["step"] for step in real.response["steps"]]
    assert len(dry.response["locks"]) == len(dry.response["sql"])
    assert (dry.run_id, dry.duration_ms) == (None, None)
    assert dry.success
    assert dry.response["dry_run"] is True
    assert "dry_run" not in real.response
    assert json.loads(json.dumps(dry.as_dict())) == dry.as_dict()


@EVERY_CASE
def test_nothing_is_changed_and_nobody_is_waited_for(db: Database, case: Case) -> None:
    db.execute(*case.standing)
    hook = hook_on(db)
    with nothing_changes(db), readers_and_an_operation(db):
        assert case.do(hook, dry_run=True, **BRIEFLY).success
    assert db.rows("TABLE trace") == []
    assert db.value("SELECT is_called FROM ticks") is False
    assert db.value("SELECT to_regnamespace('matviews') IS NULL")


def test_nothing_is_recorded_where_there_is_a_record(db: Database) -> None:
    db.execute(*_STANDING)
    hook = hook_on(db)
    hook.create(_AS_IT_STANDS)
    db.execute("CREATE MATERIALIZED VIEW other AS SELECT 1 AS a")
    with nothing_changes(db):
        hook.create(_CHANGED, dry_run=True)
        hook.create(replace(_CHANGED, name="new", indexes=()), dry_run=True)
        hook.refresh("mv", dry_run=True)
        hook.refresh("other", dry_run=True)
        hook.delete("mv", cascade=True, dry_run=True)
        with pytest.raises(ViewNotFound):
            hook.refresh("absent", dry_run=True)
    assert [run.operation for run in hook.runs()] == ["create"]


_STRENGTH = ["none", "SHARE UPDATE EXCLUSIVE", "SHARE", "EXCLUSIVE", "ACCESS EXCLUSIVE"]
_MODES = {
    "ShareUpdateExclusiveLock": 1,
    "ShareLock": 2,
    "ShareRowExclusiveLock": 3,
    "ExclusiveLock": 3,
    "AccessExclusiveLock": 4,
}


@EVERY_CASE
def test_the_locks_told_are_those_that_are_then_taken(db: Database, case: Case) -> None:
    db.execute(*case.standing)
    told = _told_locks(case.do(hook_on(db), dry_run=True).response["locks"])
    taken: list[tuple[str, dict[str, int]]] = []
    with db.connect() as onlooker:
        names = dict(
            onlooker.execute(
                "SELECT oid, pg_describe_object('pg_class'::regclass, oid, 0) FROM pg_class "
                "WHERE oid >= 16384 AND relkind IN ('m', 'v', 'r')"
            ).fetchall()
        )

        def look(text: str) -> None:
            pid = driver._connections[Session.WORK].info.backend_pid
            held: dict[str, int] = {}
            for oid, mode in onlooker.execute(
                "SELECT relation, mode FROM pg_locks WHERE pid = %s AND locktype = 'relation' AND granted", [pid]
            ):
                if oid in names:
                    held[names[oid]] = max(held.get(names[oid], 0), _MODES.get(mode, 0))
            taken.append((text, held))

        with InterruptedDriver(connecting(db), after=look) as driver:
            work = getattr(Operations(Ledger("matviews")), case.operation)(case.subject, **case.arguments)
            statements = driver.run(work).response["sql"]
    # What was tried and undone came before.
    held_after: list[dict[str, int]] = []
    for statement in reversed(statements):
        text, held = taken.pop()
        while text != statement:
            text, held = taken.pop()
        held_after.insert(0, held)
    so_far: dict[str, int] = {}
    for statement, said, held in zip(statements, told, held_after, strict=True):
        for what, lock in said.items():
            so_far[what] = max(so_far.get(what, 0), lock)
        for what, lock in held.items():
            assert lock <= so_far.get(what, 0), (statement, what)
        # That readers have to wait is not said for nothing.
        for what, lock in said.items():
            assert lock < 4 or what not in names.values() or held.get(what) == 4, (statement, what)


def _told_locks(locks: list[str]) -> list[dict[str, int]]:
    """What each statement locks, by the server's descriptions."""
    told = []
    for text in locks:
        mode, _, on = text.partition(" on ")
        # A policy locks the table that it is on.
        whats = [what.rpartition(" on ")[2].replace("public.", "") for what in (on or "mv").split(", ")]
        told.append({"materialized view mv" if what == "mv" else what: _STRENGTH.index(mode) for what in whats})
    return told


def test_what_the_definition_declares_decides_as_it_would(db: Database) -> None:
    """How a view is refreshed, its settings, and whether it is ours to drop."""
    db.execute(*_STANDING)
    hook = hook_on(db)
    hook.create(replace(_AS_IT_STANDS, refresh_strategy="regular", session_settings={"work_mem": "1MB"}))
    assert hook.refresh("mv", dry_run=True).response["sql"] == ['REFRESH MATERIALIZED VIEW "public"."mv"']
    assert hook.refresh("mv", refresh_strategy="concurrent", dry_run=True).response["strategy"] == "concurrent"
    assert hook.delete("mv", cascade=True, dry_run=True).status == "deleted"
    db.execute(
        "UPDATE matviews.mat_view_definitions "
        "SET declaration = jsonb_set(declaration, '{session_settings,work_mem}', '\"1 parsec\"')"
    )
    for dry_run in (True, False):
        with pytest.raises(InvalidDefinition, match="1 parsec"):
            hook.refresh("mv", dry_run=dry_run)


def test_history_decides_as_it_would(db: Database) -> None:
    """`auto` rebuilds where concurrent refreshes took much longer, which is known from their runs."""
    db.execute(*_STANDING)
    hook = hook_on(db)
    hook.refresh("mv", refresh_strategy="swap")
    assert hook.refresh("mv").response["strategy"] == "concurrent"
    db.execute("UPDATE matviews.mat_view_runs SET duration_ms = 1000000 WHERE meta->>'strategy' = 'concurrent'")
    dry, real = hook.refresh("mv", dry_run=True), hook.refresh("mv")
    assert dry.response["strategy"] == real.response["strategy"] == "swap"
    assert "a concurrent refresh of it took" in real.response["reason"]
    assert dry.response["reason"] == real.response["reason"]


@dataclass(frozen=True)
class Refusal:
    """Something that is refused, and how.

    :ivar arguments: of the hook's method.
    :ivar role: whether it is done by a role without rights.
    """

    name: str
    error: type[Exception]
    operation: str
    subject: str | MatViewDefinition
    arguments: dict[str, Any]
    standing: tuple[LiteralString, ...] = ()
    role: bool = False
    options: str = ""


_ONE = MatViewDefinition(name="new", sql="SELECT 1 AS a")
REFUSALS = [
    Refusal("absent", ViewNotFound, "refresh", "absent", {}),
    Refusal("a table", NotAMaterializedView, "refresh", "t", {}),
    Refusal("a table to drop", NotAMaterializedView, "delete", "t", {}),
    Refusal("a table to create", NotAMaterializedView, "create", replace(_ONE, name="t"), {}),
    Refusal("dependents", DependentsExist, "delete", "mv", {"force": True}),
    Refusal("not ours", ViewNotManaged, "delete", "mv", {"cascade": True}),
    Refusal("not managed", ViewNotManaged, "create", replace(_ONE, managed=False), {}),
    Refusal(
        "no index",
        ConcurrentRefreshRefused,
        "refresh",
        "mv",
        {"refresh_strategy": "concurrent"},
        ("DROP INDEX mv_id_key",),
    ),
    Refusal(
        "on top, swap",
        StrategyRefused,
        "refresh",
        "mv",
        {"refresh_strategy": "swap"},
        ("CREATE MATERIALIZED VIEW on_top AS TABLE mv",),
    ),
    Refusal("on top, changed", DependentsExist, "create", _CHANGED, {}, ("CREATE MATERIALIZED VIEW m AS TABLE mv",)),
    Refusal("column in use", DependentsExist, "create", replace(_AS_IT_STANDS, sql="SELECT id FROM t"), {}),
    Refusal("drift", DriftFound, "create", _DRIFTED, {"on_drift": "fail"}),
    Refusal("two queries", InvalidDefinition, "create", replace(_ONE, sql="SELECT 1 AS a; SELECT 2"), {}),
    Refusal("no such column", InvalidDefinition, "create", replace(_ONE, unique_index_columns=["b"]), {}),
    Refusal("no such schema", InvalidDefinition, "create", replace(_ONE, name="absent.new"), {}),
    Refusal(
        "taken name", InvalidDefinition, "create", replace(_CHANGED, indexes=[Index(columns=["id"], name="t")]), {}
    ),
    Refusal("a bad argument", InvalidDefinition, "refresh", "mv", {"refresh_strategy": "fast"}),
    Refusal("no such table", psycopg.errors.UndefinedTable, "create", replace(_ONE, sql="TABLE absent"), {}),
    Refusal("no such role", psycopg.errors.UndefinedObject, "create", replace(_ONE, grants={"absent": ["SELECT"]}), {}),
    Refusal("no such tablespace", psycopg.errors.UndefinedObject, "create", replace(_ONE, tablespace="absent"), {}),
    Refusal(
        "taken index",
        psycopg.errors.DuplicateTable,
        "create",
        replace(_ONE, indexes=[Index(columns=["a"], name="t")]),
        {},
    ),
    Refusal("may not create", MissingPrivilege, "create", _ONE, {}, role=True),
    Refusal("may not refresh", MissingPrivilege, "refresh", "mv", {}, role=True),
    Refusal("may not drop", MissingPrivilege, "delete", "mv", {"force": True, "cascade": True}, role=True),
    Refusal("may not alter", MissingPrivilege, "create", _DRIFTED, {}, role=True),
    Refusal("read-only", UnsupportedServer, "refresh", "mv", {}, options="-c default_transaction_read_only=on"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_would_be_refused_is_refused_in_the_same_words(db: Database, refusal: Refusal) -> None:
    db.execute(*_STANDING, *refusal.standing)
    extra = json.dumps({"options": refusal.options}) if refusal.options else None
    hook_on(db).definitions()
    role = db.role() if refusal.role else "postgres"
    with db.connect() as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA matviews TO {role}".encode())
        connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA matviews TO {role}".encode())
    hook = hook_on(db, user=role, extra=extra)

    def refused(**arguments: Any) -> Exception:
        with pytest.raises(refusal.error) as raised:
            getattr(hook, refusal.operation)(refusal.subject, **refusal.arguments, **arguments)
        return raised.value

    with nothing_changes(db):
        dry = refused(dry_run=True)
    real = refused()
    assert type(dry) is type(real)
    assert _alike([str(dry)]) == _alike([str(real)])
    assert getattr(dry, "hint", None) == getattr(real, "hint", None)
    assert getattr(dry, "__notes__", []) == getattr(real, "__notes__", [])
    if isinstance(dry, DependentsExist) and isinstance(real, DependentsExist):
        assert dry.dependents == real.dependents


def test_who_may_only_read_the_record_can_rehearse(db: Database) -> None:
    db.execute(*_STANDING)
    hook_on(db).create(replace(_AS_IT_STANDS, refresh_strategy="regular"))
    role = db.role()
    with db.connect() as connection:
        for statement in (
            "ALTER MATERIALIZED VIEW mv OWNER TO {}",
            "GRANT CREATE ON SCHEMA public TO {}",
            "GRANT SELECT ON t TO {}",
            "GRANT USAGE ON SCHEMA matviews TO {}",
            "GRANT SELECT ON ALL TABLES IN SCHEMA matviews TO {}",
        ):
            connection.execute(statement.format(role).encode())
    hook = hook_on(db, user=role)
    definition = replace(_AS_IT_STANDS, name="new")
    with nothing_changes(db):
        assert hook.refresh("mv", dry_run=True).response["strategy"] == "regular"
        assert hook.create(definition, dry_run=True).status == "created"
    with pytest.raises(MissingPrivilege, match="may not use the run tables"):
        hook.refresh("mv")


def test_who_may_not_read_the_record_can_rehearse_what_needs_none(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    db.execute(*_STANDING)
    hook_on(db).create(replace(_AS_IT_STANDS, refresh_strategy="regular"))
    role = db.role()
    with db.connect() as connection:
        connection.execute(f"GRANT CREATE ON SCHEMA public TO {role}; GRANT SELECT ON t TO {role}".encode())
        connection.execute(f"ALTER MATERIALIZED VIEW mv OWNER TO {role}".encode())
    hook = hook_on(db, user=role)
    assert hook.create(replace(_AS_IT_STANDS, name="new"), dry_run=True).status == "created"
    assert "The record cannot be read, and is not needed for this: permission denied" in capsys.readouterr().out
    assert not hook.plan(replace(_AS_IT_STANDS, name="new")).empty
    # What is declared of it cannot be known: how it would be refreshed is not guessed at.
    with pytest.raises(MissingPrivilege, match="may not use the run tables"):
        hook.refresh("mv", dry_run=True)


def test_who_keeps_readers_off_is_waited_for_where_the_view_has_to_be_read(db: Database) -> None:
    db.execute(
        GATE,
        "CREATE TABLE t AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW mv AS SELECT id, gate() FROM t",
        "CREATE VIEW top AS TABLE mv",
    )
    hook = hook_on(db)
    with (
        gate_closed(db) as open_gate,
        beside(lambda: hook_on(db).refresh("mv", refresh_strategy="regular", lock_timeout=60), open_gate) as refresh,
    ):
        until(db, AT_THE_GATE)
        # A regular refresh keeps even readers off. What is told of it without reading it is told at once.
        response = hook.refresh(
            "mv", refresh_strategy="regular", row_count_strategy="exact", dry_run=True, **BRIEFLY
        ).response
        assert (response["sql"], response["row_count_before"]) == (['REFRESH MATERIALIZED VIEW "public"."mv"'], None)
        assert hook.delete("mv", force=True, cascade=True, dry_run=True, **BRIEFLY).success
        with pytest.raises(psycopg.errors.LockNotAvailable) as raised:
            hook.refresh("mv", refresh_strategy="swap", dry_run=True, **BRIEFLY)
        assert "others kept a lock on mv" in raised.value.__notes__[0]
        with beside(lambda: hook.refresh("mv", refresh_strategy="swap", dry_run=True, lock_timeout=0.1)) as rehearsal:
            until(db, "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'mv'::regclass AND NOT granted)")
            until(db, "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE relation = 'mv'::regclass AND NOT granted)")
            assert not rehearsal.done()
            open_gate()
            assert rehearsal.result().response["sql"][0].startswith("CREATE MATERIALIZED VIEW")
        assert refresh.result().success


def test_a_refusal_carries_what_was_told_so_far(db: Database) -> None:
    db.execute(*_STANDING, "CREATE TABLE taken ()")
    definition = replace(_ONE, grants={"absent": ["SELECT"]})
    with pytest.raises(psycopg.errors.UndefinedObject) as raised:
        hook_on(db).create(definition, dry_run=True)
    response = raised.value.response  # type: ignore[attr-defined]
    assert (response.status, response.run_id) == (None, None)
    assert response.response["sql"][-1] == 'GRANT SELECT ON "public"."new" TO "absent"'
    assert len(response.response["steps"]) == len(response.response["sql"]) == len(response.response["locks"])


def test_the_log_tells_statement_by_statement_what_would_be_done(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    db.execute(*_STANDING)
    hook = hook_on(db)
    response = hook.refresh("mv", refresh_strategy="regular", vacuum=True, dry_run=True)
    assert _told(capsys) == [
        "Strategy regular, as asked for.",
        "Dry run: mv would be updated by 1 statement, in one transaction. Nothing was changed.",
        '  [lock: ACCESS EXCLUSIVE] REFRESH MATERIALIZED VIEW "public"."mv";',
        '  [after COMMIT, lock: SHARE UPDATE EXCLUSIVE] ANALYZE (SKIP_LOCKED) "public"."mv";',
        '  [after COMMIT, lock: SHARE UPDATE EXCLUSIVE] VACUUM (SKIP_LOCKED) "public"."mv";',
    ]
    assert response.response["then"] == [
        'ANALYZE (SKIP_LOCKED) "public"."mv"',
        'VACUUM (SKIP_LOCKED) "public"."mv"',
    ]
    hook.delete("mv", cascade=True, force=True, dry_run=True)
    assert _told(capsys) == [
        "With mv go 3 more: policy known on table secured, view top, view topmost.",
        "Dry run: mv would be dropped by 1 statement, in one transaction. Nothing was changed.",
        "  [lock: ACCESS EXCLUSIVE on mv, policy known on table secured, view top, view topmost] "
        'DROP MATERIALIZED VIEW "public"."mv" CASCADE;',
    ]
    hook.delete("absent", dry_run=True)
    assert _told(capsys) == [
        "Nothing to drop: absent does not exist.",
        "Dry run: nothing would be done (it does not exist).",
    ]
    hook.create(_AS_IT_STANDS, dry_run=True)
    assert _told(capsys)[-1] == "Dry run: nothing would be done (it stands already)."
    hook.create(_DRIFTED, on_drift="report", dry_run=True)
    told = _told(capsys)
    assert "Left as it is (on_drift='report')." in told
    assert told[-1].startswith("Dry run: nothing would be done (it differs: storage parameters, ")
    response = hook.create(_CHANGED, dry_run=True)
    log = "\n".join(_told(capsys))
    count = len(response.response["sql"])
    assert f"Dry run: mv would be updated by {count} statements, in one transaction. Nothing was changed." in log
    assert re.search(r"\[lock: none\] REFRESH MATERIALIZED VIEW \"public\"\.\"mv_mv_\w{8}\";", log)
    assert "[lock: ACCESS EXCLUSIVE on view public.top] ALTER VIEW public.top OWNER TO postgres;" in log
    assert "[lock: ACCESS EXCLUSIVE on view public.top] CREATE OR REPLACE VIEW public.top AS" in log
    assert re.search(
        r"\[lock: ACCESS EXCLUSIVE\] DROP MATERIALIZED VIEW \"public\"\.\"mv_mv_\w{8}_old\" RESTRICT;", log
    )
    hook.create(replace(_CHANGED, name="new", indexes=()), with_data=False, dry_run=True)
    log = "\n".join(_told(capsys))
    assert "Dry run: new would be created by " in log
    assert "REFRESH" not in log


def _told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the log, without what stands before and after each."""
    return re.findall(
        r"^\S+ \[\w+ *\] (.*?) *\[airflow\.task\.hooks\.\S+\] loc=\S+$",
        capsys.readouterr().out,
        re.MULTILINE | re.DOTALL,
    )


def test_secrets_are_in_no_log_and_no_summary(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    hook = hook_on(db, password="hunter2-secret")
    definition = MatViewDefinition(name="mv", sql="SELECT 'password=hunter2-secret' AS a")
    hook.create(definition, dry_run=True)
    hook.create(definition)
    hook.create(replace(definition, sql="SELECT 'hunter2-secret' AS b"), dry_run=True)
    log = capsys.readouterr().out
    assert "password=***" in log
    assert "hunter2" not in log


def test_in_an_event_loop_it_is_the_same(db: Database) -> None:
    db.execute(*_STANDING)
    hook = hook_on(db)
    told = [hook.create(_CHANGED, dry_run=True), hook.refresh("mv", dry_run=True)]

    async def both() -> list[ServiceResponse]:
        return [await hook.acreate(_CHANGED, dry_run=True), await hook.arefresh("mv", dry_run=True)]

    with nothing_changes(db):
        beside = asyncio.run(both())
    for one, other in zip(told, beside, strict=True):
        assert _alike(one.response["sql"]) == _alike(other.response["sql"])
        assert one.response["locks"] == other.response["locks"]


def test_it_says_dry_run_only_with_a_flag(db: Database) -> None:
    with pytest.raises(InvalidDefinition, match="dry_run"):
        hook_on(db).refresh("mv", dry_run="yes")  # type: ignore[arg-type]


# Operators


@pytest.fixture
def _connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db, password="hunter2-secret")


@pytest.mark.usefixtures("_connection")
@pytest.mark.parametrize("deferrable", [False, True])
def test_operators_tell_it_in_log_and_xcom_and_leave_no_trace(db: Database, deferrable: bool) -> None:
    db.execute(*_STANDING)
    outlets = [Asset("views://mv"), AssetAlias("views")]
    changed = replace(_CHANGED, sql=f"{_CHANGED.sql} AND 'hunter2-secret' <> ''")
    dry: dict[str, Any] = {"dry_run": True, "outlets": outlets}
    with DAG("rehearsed", schedule=None) as dag:
        create = CreateMatViewOperator(task_id="create", definition=changed, deferrable=deferrable, **dry)
        refresh = RefreshMatViewOperator(task_id="refresh", view="mv", deferrable=deferrable, **dry)
        delete = DeleteMatViewOperator(task_id="delete", view="mv", force=True, cascade=True, **dry)
        mapped = RefreshMatViewOperator.partial(task_id="mapped", dry_run=True).expand(view=["mv"])
        create >> refresh >> delete >> mapped
    with nothing_changes(db):
        run = run_dag(dag)
    assert set(run.states.values()) == {"success"}
    summary = run.xcom("delete")
    assert summary == {
        "view": "mv",
        "status": "deleted",
        "strategy": None,
        "row_count_before": 4,
        "row_count_after": None,
        "duration_ms": None,
        "reason": None,
        "mat_view_run_id": None,
        "dry_run": True,
        "sql": ['DROP MATERIALIZED VIEW "public"."mv" CASCADE'],
        "locks": ["ACCESS EXCLUSIVE on mv, policy known on table secured, view top, view topmost"],
        "then": [],
    }
    assert run.xcom("mapped[0]")["dry_run"] is True
    created = run.xcom("create")
    assert (created["status"], created["drift"]) == ("updated", True)
    assert len(created["sql"]) == len(created["locks"]) > 10
    assert "hunter2" not in json.dumps(created)
    assert "Dry run: mv would be updated by" in run.log
    assert "Dry run: mv would be dropped by 1 statement" in run.log
    assert "Deferred" not in run.log
    with create_session() as session:
        assert session.scalars(select(AssetEvent).where(AssetEvent.source_run_id == run.run_id)).all() == []


@pytest.mark.usefixtures("_connection")
def test_a_refused_rehearsal_fails_the_task(db: Database) -> None:
    db.execute(*_STANDING)
    with DAG("refused", schedule=None) as dag:
        DeleteMatViewOperator(task_id="delete", view="mv", force=True, dry_run=True)
    run = run_dag(dag)
    assert run.states == {"delete": "failed"}
    assert "mv cannot be dropped: built on it are policy known on table secured, view top, view topmost." in run.log


def test_airflows_own_dry_run_still_renders_templates(capsys: pytest.CaptureFixture[str]) -> None:
    operator = RefreshMatViewOperator(task_id="refresh", view="mv", dry_run=True)
    operator.dry_run()
    assert "Rendering template for view" in capsys.readouterr().out


def test_what_only_a_try_can_tell_is_said_to_be_untried(db: Database, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether what is built on a view takes to another type of a column shows under locks that a dry run never has."""
    db.execute(*_STANDING)
    changed = replace(_AS_IT_STANDS, sql="SELECT id, parity::text AS parity, traced() AS tick FROM t")
    hook = hook_on(db)
    assert hook.create(changed, dry_run=True).status == "updated"
    log = "\n".join(_told(capsys))
    assert "the column parity changes its type, and view top uses it: whether it takes to that is tried before" in log
    with pytest.raises(DependentsExist, match="does not take to the new one"):
        hook.create(changed)
    assert db.rows("TABLE trace") == []
