"""From an Airflow connection to the server: everything it says is honoured, and what cannot work is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from airflow.sdk import Connection
from psycopg import sql

from airflow_provider_matviews.definition import MatViewDefinition
from airflow_provider_matviews.exceptions import InvalidDefinition, UnsupportedServer
from airflow_provider_matviews.hooks.matview import MatViewHook
from demo.free_port import free_port
from demo.guarded import server_identity
from demo.postgres_server import PostgresServer
from tests.airflow_dags import set_connection
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on
from tests.proxy import hook_through
from tests.racing import AT_THE_GATE, GATE, beside, gate_closed, until

MV = MatViewDefinition(name="mv", sql="SELECT 1 AS a")
CONTEXT = {"dag_id": "nightly", "task_id": "refresh_sales", "run_id": "manual__1", "map_index": -1, "try_number": 1}


def _names_seen(db: Database, **arguments: Any) -> set[str]:
    """What pg_stat_activity calls the connections of a refresh, seen by somebody else."""
    db.execute(GATE, "CREATE MATERIALIZED VIEW mv AS SELECT gate() WITH NO DATA")
    hook = hook_on(db, **arguments)
    with gate_closed(db) as let_go_on, beside(lambda: hook.refresh("mv", lock_timeout=60), let_go_on):
        until(db, AT_THE_GATE)
        rows = db.rows(
            "SELECT application_name FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND query <> 'SELECT pg_advisory_lock(4711)' AND application_name <> ''"
        )
    assert len(rows) == 2
    return {name for (name,) in rows}


@pytest.mark.parametrize(
    ("context", "name"),
    [
        (CONTEXT, "matviews/nightly/refresh_sales/manual__1"),
        ({}, "matviews"),
        ({"dag_id": "nightly", "task_id": "refresh", "run_id": None}, "matviews/nightly/refresh"),
        ({"dag_id": "täglich", "task_id": "größe", "run_id": "☕"}, "matviews/t?glich/gr??e/?"),
        ({"dag_id": "d" * 30, "task_id": "t" * 30, "run_id": "r"}, f"matviews/{'d' * 30}/{'t' * 23}"),
    ],
)
def test_the_server_sees_whose_task_it_is(db: Database, context: Mapping[str, Any], name: str) -> None:
    assert len(name.encode()) <= 63
    assert _names_seen(db, context=context) == {name}


def test_the_connection_may_have_an_application_name_of_its_own(db: Database) -> None:
    assert _names_seen(db, context=CONTEXT, extra='{"application_name": "mine"}') == {"mine"}


def _parameters(hook: MatViewHook) -> dict[str, str]:
    with closing(hook.get_conn()) as connection:
        return dict(connection.info.get_parameters())


def test_a_dead_network_is_noticed_unless_the_connection_says_otherwise(db: Database) -> None:
    ours = _parameters(hook_on(db))
    assert {name: value for name, value in ours.items() if "keepalives" in name or "timeout" in name} == {
        "connect_timeout": "10",
        "keepalives": "1",
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
    }
    theirs = _parameters(hook_on(db, extra='{"connect_timeout": 3, "keepalives_idle": 7}'))
    assert (theirs["connect_timeout"], theirs["keepalives_idle"], theirs["keepalives_count"]) == ("3", "7", "3")


def test_options_of_the_connection_and_of_the_hook_are_honoured(db: Database) -> None:
    db.execute("CREATE SCHEMA one", "CREATE SCHEMA two", "CREATE TABLE one.t AS SELECT 1 AS a")
    of_connection = hook_on(db, extra='{"options": "-c search_path=one"}')
    assert of_connection.create(MatViewDefinition(name="mv", sql="TABLE t")).response["view"] == "one.mv"
    assert hook_on(db, options="-c search_path=two").create(MV).response["view"] == "two.mv"
    assert of_connection.refresh("mv").response["view"] == "one.mv"
    assert db.rows("SELECT schemaname || '.' || matviewname FROM pg_matviews ORDER BY 1") == [("one.mv",), ("two.mv",)]
    assert [run.view for run in of_connection.runs("mv")] == ["one.mv", "one.mv"]


@pytest.mark.parametrize("cursor", ["dictcursor", "namedtuplecursor"])
def test_the_row_shape_that_the_connection_asks_for_is_its_own_affair(db: Database, cursor: str) -> None:
    hook = hook_on(db, extra=json.dumps({"cursor": cursor}))
    assert hook.create(MV, row_count_strategy="exact").response["row_count_after"] == 1
    assert hook.refresh("mv").success
    assert hook.describe("mv").columns == (("a", "integer"),)
    assert hook.delete("mv").success
    assert len(hook.runs()) == 3
    row = hook.get_first("SELECT 7 AS seven")
    assert (row["seven"] if cursor == "dictcursor" else row.seven) == 7


def test_another_database_than_the_connections_may_be_named(db: Database) -> None:
    other = f"{db.name}_other"
    with db.connect() as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(other)))
    try:
        hook = MatViewHook("views", connection=hook_on(db).connection, database=other)
        assert hook.create(MV).success
        assert hook.asset_uri("mv").endswith(f"/{other}/public/mv")
        assert Database(db.server, other).rows("SELECT a FROM mv") == [(1,)]
        assert db.rows("SELECT 1 FROM pg_matviews") == []
    finally:
        with db.connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(other)))


def test_it_is_a_postgres_hook_like_any_other(db: Database) -> None:
    hook = hook_on(db)
    assert hook.get_records("SELECT generate_series(1, 2)") == [(1,), (2,)]
    hook.run("CREATE TABLE t (a integer)", autocommit=True)
    hook.insert_rows("t", [(1,), (2,)])
    assert db.value("SELECT count(*) FROM t") == 2


def test_the_connection_is_looked_up_by_its_id(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    set_connection(monkeypatch, db)
    set_connection(monkeypatch, db, conn_id="other", extra={"options": "-c search_path=pg_catalog,pg_temp"})
    assert MatViewHook().create(MV).success
    assert MatViewHook("other").runs("public.mv")[0].status == "success"


def test_airflows_connection_object_stays_as_it_was(db: Database) -> None:
    extra = '{"options": "-c search_path=public"}'
    hook = hook_on(db, extra=extra)
    connection = hook.connection
    hook.create(MV)
    hook.refresh("mv")
    assert connection.extra == extra


@pytest.mark.parametrize("conn_type", ["mysql", "sqlite", "redshift"])
def test_a_connection_to_something_else_is_refused_before_it_is_opened(conn_type: str) -> None:
    connection = Connection(conn_id="views", conn_type=conn_type, host="127.0.0.1", port=free_port())
    hook = MatViewHook("views", connection=connection)
    for operation in (lambda: hook.refresh("mv"), hook.runs, hook.get_conn):
        with pytest.raises(InvalidDefinition, match=f"views is of type '{conn_type}', not PostgreSQL"):
            operation()


def test_a_server_that_is_not_there_is_an_error_of_its_own(db: Database) -> None:
    hook = hook_on(db)
    hook.connection.port = free_port()
    with pytest.raises(psycopg.OperationalError, match="onnection refused"):
        hook.refresh("mv")


def test_a_server_that_is_too_old_is_refused(each_db: Database) -> None:
    """The server's own greeting with another major in it."""
    major = each_db.server.major

    def older(said: bytes) -> bytes:
        return said.replace(b"server_version\0%d." % major, b"server_version\0" + b"13.")

    with hook_through(each_db, to_client=older) as hook:
        with pytest.raises(UnsupportedServer, match=r"behind views is version 13;.* PostgreSQL 14 or newer") as raised:
            hook.create(MV)
        until(
            each_db,
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'matviews'",
        )
    assert raised.value.hint is not None
    assert each_db.rows("SELECT 1 FROM pg_class WHERE relname LIKE 'mv%' OR relname LIKE 'mat_view%'") == []


READ_ONLY: LiteralString = "SET default_transaction_read_only = on"


@pytest.mark.parametrize("how", ["options", "role"])
def test_a_connection_that_is_set_to_read_only_is_refused_clearly(db: Database, how: str) -> None:
    user, extra = "postgres", None
    if how == "options":
        extra = '{"options": "-c default_transaction_read_only=on"}'
    else:
        user = db.role("LOGIN SUPERUSER")
        with db.connect() as connection:
            connection.execute(sql.SQL("ALTER ROLE {} " + READ_ONLY).format(sql.Identifier(user)))
    db.execute("CREATE MATERIALIZED VIEW mv AS SELECT 1 AS a")
    hook = hook_on(db, user=user, extra=extra)
    _require_refused(hook, "is set to read-only transactions", "unset default_transaction_read_only")
    assert db.rows("SELECT 1 FROM pg_class WHERE relname LIKE 'mat_view%'") == []


def _require_refused(hook: MatViewHook, message: str, hint: str) -> None:
    for operation in (
        lambda: hook.create(MV, force=True),
        lambda: hook.refresh("mv"),
        lambda: hook.delete("mv", force=True),
    ):
        with pytest.raises(UnsupportedServer, match=message) as raised:
            operation()
        assert raised.value.hint is not None
        assert hint in raised.value.hint


@contextmanager
def standby_of(database: Database, folder: Path) -> Iterator[PostgresServer]:
    """Yield a hot standby of the server of a database."""
    server = database.server
    data = folder / "standby"
    bin_dir = INSTALLATIONS[server.major]
    subprocess.run(
        [bin_dir / "pg_basebackup", "-d", server.dsn(), "-D", data, "-R", "-X", "stream", "-c", "fast"],
        check=True,
        capture_output=True,
    )
    if (user := server_identity().user) is not None:
        for path in (folder, data, *data.rglob("*")):
            shutil.chown(path, *user)
    # A standby has to have room for what its primary may prepare.
    room = database.value("SHOW max_prepared_transactions")
    with PostgresServer(bin_dir, data, {"max_prepared_transactions": room}) as standby:
        yield standby


def test_a_standby_is_refused_clearly_and_can_be_read(db: Database, tmp_path: Path) -> None:
    assert db.server.major == NEWEST
    hook_on(db).create(MV)
    with standby_of(db, tmp_path) as standby:
        replica = Database(standby, db.name)
        until(replica, "SELECT pg_is_in_recovery() AND to_regclass('mv') IS NOT NULL")
        hook = hook_on(replica)
        _require_refused(hook, f"database {db.name} is a standby", "target_session_attrs=read-write")
        assert [run.status for run in hook.runs("mv")] == ["success"]
        assert hook.describe("mv").populated
        assert [record.name for record in hook.definitions()] == ["mv"]
        # As the hint says: among several hosts the primary is found.
        ports = f"{standby.port},{db.server.port}"
        hook = hook_on(replica, extra=json.dumps({"port": ports, "target_session_attrs": "read-write"}))
        hook.connection.host = "127.0.0.1,127.0.0.1"
        assert hook.refresh("mv").success


@pytest.mark.parametrize(
    ("fields", "view", "uri"),
    [
        ({"host": "db", "port": 5433, "schema": "dwh"}, "mv", "postgres://db:5433/dwh/public/mv"),
        ({"host": "db", "schema": "dwh"}, "a.mv", "postgres://db:5432/dwh/a/mv"),
        ({"schema": "dwh"}, "mv", "postgres://localhost:5432/dwh/public/mv"),
        ({"host": "db", "schema": "d w/h"}, '"A.b"."c/d é"', "postgres://db:5432/d%20w%2Fh/A.b/c%2Fd%20%C3%A9"),
    ],
)
def test_a_view_has_the_uri_that_lineage_gives_it(fields: dict[str, Any], view: str, uri: str) -> None:
    connection = Connection(conn_id="views", conn_type="postgres", password="secret", login="me", **fields)
    assert MatViewHook("views", connection=connection).asset_uri(view) == uri


def test_what_is_no_definition_is_refused(db: Database) -> None:
    for wrong in ("mv", {"name": "mv", "sql": "SELECT 1"}, None):
        with pytest.raises(InvalidDefinition, match="takes a MatViewDefinition"):
            hook_on(db).create(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"row_count_strategy": "guess"},
        {"if_locked": "hope"},
        {"lock_timeout": 0},
        {"lock_timeout": -1},
        {"max_wait": 0},
        {"max_wait": "1"},
        {"max_wait": True},
        {"lock_timeout": float("nan")},
        {"max_wait": float("inf")},
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_before_anything_connects(wrong: dict[str, Any]) -> None:
    connection = Connection(conn_id="views", conn_type="postgres", host="127.0.0.1", port=free_port())
    (name,) = wrong
    with pytest.raises(InvalidDefinition, match=f"{name}="):
        MatViewHook("views", connection=connection).refresh("mv", **wrong)
