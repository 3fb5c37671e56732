"""Servers and databases for the tests: a real PostgreSQL of every major at hand, a fresh database for each test."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

# A memory file system where there is one with room: making and dropping databases is what takes the time.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 * 1024**3:
    tempfile.tempdir = str(_MEMORY)

# What anything leaves there goes with the tests.
tempfile.tempdir = tempfile.mkdtemp(prefix="matviews-tests-")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

# Before anything of Airflow is imported: it reads its home and its database when it loads.
_AIRFLOW_HOME = tempfile.mkdtemp(prefix="matviews-tests-airflow-")
atexit.register(shutil.rmtree, _AIRFLOW_HOME, ignore_errors=True)
os.environ.update(
    AIRFLOW_HOME=_AIRFLOW_HOME,
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{_AIRFLOW_HOME}/airflow.db",
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__CORE__DAGS_FOLDER=f"{_AIRFLOW_HOME}/dags",
    AIRFLOW__API_AUTH__JWT_SECRET="for the tests and nothing else, and long enough for every algorithm that signs",
)

import psycopg
import pytest
from airflow.sdk import Connection
from psycopg import sql

from airflow_provider_matviews.hooks.matview import MatViewHook
from demo.postgres_server import PostgresServer, find_installations

INSTALLATIONS = find_installations()
#: Tests that do not depend on the major run on the newest one.
NEWEST = max(INSTALLATIONS)

_numbers = itertools.count(1)

#: Files that take longest, the longest first: begun last, one of them would leave the other worker nothing to do.
_LONGEST = (
    "test_e2e",
    "test_kill",
    "test_chaos",
    "test_browser",
    "test_stopping",
    "test_events_e2e",
    "test_celery",
    "test_lineage",
    "test_create",
    "test_adopt",
    "test_verify",
    "test_example_dags",
    "test_dry_run",
    "test_execute_async",
    "test_execute",
    "test_swap",
    "test_staleness",
    "test_change_log",
    "test_rename",
    "test_plan",
    "test_fire",
    "test_timeouts",
    "test_deferral",
    "test_pooler",
    "test_cli",
    "test_operators",
    "test_retention",
    "test_task_group",
    "test_fleet",
    "test_stats",
    "test_docs_permissions",
    "test_refresh",
    "test_progress",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def examples(number: int) -> int:
    """Return how many examples a property is tried with; ``EXAMPLES=50`` in the environment makes it 50 times more."""
    return number * int(os.environ.get("EXAMPLES") or 1)


@dataclass(frozen=True)
class Database:
    """A fresh database. Its helpers open a connection of their own for each call.

    :ivar looking: idle sessions that :meth:`rows` and :meth:`value` use again, for opening one takes longer than most
        of what they look for; None where there are to be none. What writes never does.
    """

    server: PostgresServer
    name: str
    roles: list[str] = field(default_factory=list)
    looking: list[psycopg.Connection[Any]] | None = field(default=None, compare=False, repr=False)

    def dsn(self, user: str = "postgres") -> str:
        return self.server.dsn(self.name, user)

    def connect(self, user: str = "postgres", **arguments: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn(user), autocommit=True, **arguments)

    def role(self, options: LiteralString = "LOGIN") -> str:
        """Make a role of a name of its own (roles belong to the whole server); it goes with the database."""
        name = f"role_{next(_numbers)}"
        self.roles.append(name)
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE ROLE {} " + options).format(sql.Identifier(name)))
        return name

    def execute(self, *statements: LiteralString) -> None:
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement)

    def rows(self, statement: LiteralString, parameters: Any = None) -> list[tuple[Any, ...]]:
        if self.looking is None or not str(statement).lstrip().startswith(("SELECT", "TABLE", "SHOW")):
            with self.connect() as connection:
                return connection.execute(statement, parameters).fetchall()
        try:
            connection = self.looking.pop()
            connection.execute("SELECT")
        except (IndexError, psycopg.OperationalError):
            # There is none, or the server was stopped meanwhile.
            connection = self.connect(prepare_threshold=None)
        try:
            found = connection.execute(statement, parameters).fetchall()
            # As if the session ended: what it has read is counted.
            connection.execute("SELECT pg_stat_force_next_flush()")
        except BaseException:
            connection.close()
            raise
        self.looking.append(connection)
        return found

    def leave(self) -> None:
        """Keep no idle session, for who counts sessions."""
        while self.looking:
            self.looking.pop().close()

    def value(self, statement: LiteralString, parameters: Any = None) -> Any:
        return self.rows(statement, parameters)[0][0]


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[int, PostgresServer]]:
    """Started when first asked for, one for each major."""
    started: dict[int, PostgresServer] = {}
    try:
        yield started
    finally:
        for server in started.values():
            server.stop()


def _database(servers: dict[int, PostgresServer], major: int) -> Iterator[Database]:
    if major not in servers:
        # Few buffers: a process takes longer to start and to end, and DROP DATABASE to look through them, with more.
        settings = {"max_prepared_transactions": "5", "deadlock_timeout": "100ms", "shared_buffers": "16MB"}
        servers[major] = PostgresServer(bin_dir=INSTALLATIONS[major], settings=settings)
        servers[major].start()
    server, name = servers[major], f"test_{next(_numbers)}"
    # Before 15 there was no other way.
    copying = sql.SQL("STRATEGY file_copy" if major >= 15 else "")
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} {}").format(sql.Identifier(name), copying))
    # From 15 on a session sends its counters when it is told to, and not only when it ends.
    database = Database(server, name, looking=[] if major >= 15 else None)
    yield database
    database.leave()
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
        for role in database.roles:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.fixture(
    params=[
        # Every day on the newest one; the whole suite repeats it on those before.
        pytest.param(major, marks=() if major == NEWEST else pytest.mark.e2e)
        for major in sorted(INSTALLATIONS)
    ],
    ids=lambda major: f"pg{major}",
)
def each_db(request: pytest.FixtureRequest, servers: dict[int, PostgresServer]) -> Iterator[Database]:
    """A database on every major at hand in turn: for what could differ between them."""
    yield from _database(servers, request.param)


@pytest.fixture
def db(servers: dict[int, PostgresServer]) -> Iterator[Database]:
    """A database on the newest major."""
    yield from _database(servers, NEWEST)


@pytest.fixture(autouse=True)
def _without_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a deferred task waits for is a scheduler, and `dag.test()` has none."""
    monkeypatch.setattr("airflow_provider_matviews.operators.base.SETTLING", 0.0)


def hook_on(database: Database, user: str = "postgres", **arguments: Any) -> MatViewHook:
    """Return a hook on a test's database. ``extra`` and ``password`` go into the Airflow connection."""
    connection = Connection(
        conn_id="views",
        conn_type="postgres",
        host="127.0.0.1",
        port=database.server.port,
        login=user,
        password=arguments.pop("password", None),
        schema=database.name,
        extra=arguments.pop("extra", None),
    )
    return MatViewHook(postgres_conn_id="views", connection=connection, **arguments)
