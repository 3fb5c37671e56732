"""Servers and databases for the tests: a real PostgreSQL of every major at hand, a fresh database for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from demo.postgres_server import PostgresServer, find_installations

INSTALLATIONS = find_installations()
#: Tests that do not depend on the major run on the newest one.
NEWEST = max(INSTALLATIONS)

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Database:
    """A fresh database. Its helpers open a connection of their own for each call."""

    server: PostgresServer
    name: str

    def dsn(self, user: str = "postgres") -> str:
        return self.server.dsn(self.name, user)

    def connect(self, user: str = "postgres", **arguments: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn(user), autocommit=True, **arguments)

    def execute(self, *statements: LiteralString) -> None:
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement)

    def rows(self, statement: LiteralString, parameters: Any = None) -> list[tuple[Any, ...]]:
        with self.connect() as connection:
            return connection.execute(statement, parameters).fetchall()

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
        servers[major] = PostgresServer(
            bin_dir=INSTALLATIONS[major], settings={"max_prepared_transactions": "5", "deadlock_timeout": "100ms"}
        )
        servers[major].start()
    server, name = servers[major], f"test_{next(_numbers)}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield Database(server, name)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(params=sorted(INSTALLATIONS), ids=lambda major: f"pg{major}")
def each_db(request: pytest.FixtureRequest, servers: dict[int, PostgresServer]) -> Iterator[Database]:
    """A database on every major at hand in turn: for what could differ between them."""
    yield from _database(servers, request.param)


@pytest.fixture
def db(servers: dict[int, PostgresServer]) -> Iterator[Database]:
    """A database on the newest major."""
    yield from _database(servers, NEWEST)
