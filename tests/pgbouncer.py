"""A PgBouncer of our own before a server, in transaction mode: its clients share a few server connections."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import pytest

from demo.free_port import free_port
from demo.guarded import GuardedProcess, server_identity
from demo.postgres_server import PostgresServer

#: Debian puts it where only root's PATH looks.
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed (apt install pgbouncer)")

_START_TIMEOUT_SECONDS = 20.0
_END_TIMEOUT_SECONDS = 10.0
_START_ATTEMPTS = 5


class PgBouncer:
    """A pooler, a context manager. It knows the role ``postgres`` and passes on every database's name.

    :param server: where it connects to; it has to run on the port that it has now for as long as the pooler does.
    :param pool_size: how many server connections there are for each database.
    :param settings: further lines of its configuration.
    """

    def __init__(self, server: PostgresServer, pool_size: int = 4, **settings: str) -> None:
        assert PROGRAM is not None
        self.port = 0
        self._server = server
        self._settings = {
            "listen_addr": "127.0.0.1",
            "unix_socket_dir": "",
            "auth_type": "trust",
            "admin_users": "postgres",
            "pool_mode": "transaction",
            "default_pool_size": str(pool_size),
            "max_client_conn": "500",
            # A server that comes back is not to be waited for any longer than it takes.
            "server_login_retry": "0.2",
            **settings,
        }
        self._process: GuardedProcess | None = None
        self._folder: Path | None = None

    def dsn(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} dbname={database} user=postgres"

    def connect(self, database: str, **arguments: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn(database), autocommit=True, prepare_threshold=None, **arguments)

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.halt()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def halt(self) -> None:
        """End it at once: every connection of both sides is cut."""
        process, self._process = self._process, None
        if process is not None:
            process.end(signal.SIGTERM, timeout=_END_TIMEOUT_SECONDS)

    def restart(self) -> None:
        """End it at once and start it again on the same port."""
        self.halt()
        self._start()

    def _start(self) -> None:
        for _ in range(_START_ATTEMPTS):
            self.port = self.port or free_port()
            if self._spawn():
                return
            # Somebody else was faster to take the port that was free.
            self.port = 0
        raise RuntimeError(f"PgBouncer did not start\n{self._log.read_text(errors='replace')[-2000:]}")

    @property
    def _log(self) -> Path:
        assert self._folder is not None
        return self._folder / "log"

    def _spawn(self) -> bool:
        assert self._folder is not None
        users = self._folder / "users.txt"
        users.write_text('"postgres" ""\n')
        settings = {**self._settings, "listen_port": str(self.port), "auth_file": str(users)}
        configuration = self._folder / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._server.port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in settings.items())
        )
        identity = server_identity()
        if identity.user is not None:
            for path in (self._folder, users, configuration):
                os.chown(path, *identity.user)
        self._process = GuardedProcess(
            [PROGRAM, configuration],
            work_dir=self._folder,
            log=self._log,
            orphan_signal=signal.SIGTERM,
            # Like PostgreSQL it refuses to run as root.
            identity=identity,
            environment={"PATH": os.environ.get("PATH", "")},
        )
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self.connect("pgbouncer").close()
            except psycopg.OperationalError:
                time.sleep(0.01)
            else:
                return True
        self.halt()
        return False
