"""Dry run: what would be done is told as it would then be done, and nothing is done."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
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
        hook.create(replace(_CHANGED, name="new"), dry_run=True)
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
def test_the_locks_told_are_those_that_are_then_taken(each_db: Database, case: Case) -> None:
    each_db.execute(*case.standing)
    told = _told_locks(case.do(hook_on(each_db), dry_run=True).response["locks"])
    taken: list[tuple[str, dict[str, int]]] = []
    with each_db.connect() as onlooker:
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

        with InterruptedDriver(connecting(each_db), after=look) as driver:
            work = getattr(Operations(Ledger("matviews")), case.operation)(case.subject, **case.arguments)
            statements = driver.run(work).response["sql"]
    # What was tried and undone came before.
    held_after = []
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
        whats = on.split(", ") if on else ["mv"]
        told.append({"materialized view mv" if what == "mv" else what: _STRENGTH.index(mode) for what in whats})
    return told
