"""Races made to order: something that runs beside the test, and a wait for the moment that matters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import LiteralString, TypeVar

from psycopg import sql

from tests.conftest import Database

_T = TypeVar("_T")

#: A function that waits while somebody holds :data:`GATE_LOCK`: in a view's query it holds up the building of it.
GATE = """
CREATE FUNCTION gate() RETURNS integer LANGUAGE plpgsql AS
$$BEGIN PERFORM pg_advisory_xact_lock_shared(4711); RETURN 1; END$$
"""
#: True once a query stands before the gate.
AT_THE_GATE = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted)"


@contextmanager
def beside(function: Callable[[], _T], release: Callable[[], object] = lambda: None) -> Iterator[Future[_T]]:
    """Run something in a thread of its own; it has ended when the block ends.

    :param release: called when the block ends, for what the thread may still wait for: a test that fails must not
        hang instead.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(function)
        finally:
            release()


@contextmanager
def gate_closed(database: Database) -> Iterator[Callable[[], None]]:
    """Hold up every query with ``gate()`` in it until the block ends or the function that is given is called."""
    with database.connect() as connection:
        connection.execute("SELECT pg_advisory_lock(4711)")
        yield connection.close


def until(database: Database, condition: LiteralString | sql.Composed, seconds: float = 20) -> None:
    """Wait until a query answers true. It is asked on a session of its own, beside no idle ones of the test."""
    database.leave()
    deadline = time.monotonic() + seconds
    with database.connect() as connection:
        while True:
            row = connection.execute(condition).fetchone()
            if row is not None and row[0]:
                return
            assert time.monotonic() < deadline, f"did not come true: {condition}"
            # What is waited for needs the processor as well.
            time.sleep(0.002)
