"""Streaming replication: a hot standby of a server, as a base backup makes it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from demo.guarded import server_identity
from demo.postgres_server import PostgresServer
from tests.conftest import INSTALLATIONS, Database
from tests.racing import until

#: A standby has to have room for at least what its primary may use.
_ROOM = ("max_prepared_transactions", "max_connections", "max_worker_processes", "max_locks_per_transaction")


@contextmanager
def standby_of(primary: PostgresServer, folder: Path) -> Iterator[PostgresServer]:
    """Yield a hot standby of a server.

    :param folder: where its data are to live, open to the server's user.
    """
    data = folder / "standby"
    bin_dir = INSTALLATIONS[primary.major]
    subprocess.run(
        [bin_dir / "pg_basebackup", "-d", primary.dsn(), "-D", data, "-R", "-X", "stream", "-c", "fast"],
        check=True,
        capture_output=True,
    )
    if (user := server_identity().user) is not None:
        for path in (folder, data, *data.rglob("*")):
            shutil.chown(path, *user)
    with psycopg.connect(primary.dsn()) as connection:
        rows = connection.execute(
            "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", (list(_ROOM),)
        ).fetchall()
    settings: dict[str, str] = dict(rows)
    with PostgresServer(bin_dir, data, settings) as standby:
        yield standby


def caught_up(primary: Database, standby: Database) -> None:
    """Wait until a standby shows all that was committed."""
    # What was flushed: whatever is being written by an open transaction may take its time.
    position = sql.Literal(primary.value("SELECT pg_current_wal_flush_lsn()::text"))
    until(standby, sql.SQL("SELECT pg_last_wal_replay_lsn() >= {}::pg_lsn").format(position))


def promote(standby: Database) -> None:
    """Make a standby the primary; returns when it takes writes."""
    standby.execute("SELECT pg_promote(wait => true, wait_seconds => 30)")
    until(standby, "SELECT NOT pg_is_in_recovery()")
