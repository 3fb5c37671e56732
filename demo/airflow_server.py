"""A real Airflow on this machine, in a temporary home: API server, scheduler, DAG processor and triggerer.

These are the processes of `airflow standalone`, started one by one. That is because `airflow standalone` also
starts two log servers that listen on every network interface and cannot be told not to; here everything listens
on the loopback address only, and the API server reads the logs from their files.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.airflow_api import AirflowApi
from demo.console import say
from demo.free_port import free_port
from demo.guarded import GuardedProcess, Identity

_COMPONENTS = {
    "api-server": ("api-server",),
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
    "triggerer": ("triggerer", "--skip-serve-logs"),
}
START_TIMEOUT_SECONDS = 180.0
STOP_TIMEOUT_SECONDS = 10.0


class AirflowServerError(RuntimeError):
    """Airflow did not start; the message ends with the tail of the log."""


class AirflowServer:
    """One Airflow with its own home, a context manager; leaving it ends every process and removes the home.

    :param dags: the folder of DAGs.
    :param connections: Airflow connections by their id, as JSON would hold them.
    :param settings: environment variables, before those that make it what it is otherwise: another executor,
        another metadata database.
    :param base_path: under which it is served, as behind a proxy: ``/airflow``.
    """

    def __init__(
        self,
        dags: Path,
        connections: Mapping[str, Mapping[str, object]],
        settings: Mapping[str, str] | None = None,
        base_path: str = "",
    ) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="airflow-demo-"))
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}{base_path}"
        self.api = AirflowApi(self.url)
        self._environment = {**self._make_environment(dags, connections), **(settings or {})}
        self._processes: dict[str, GuardedProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def begin_migration(self) -> None:
        """Begin to make Airflow's own database, and return at once."""
        self.add("db-migrate", "db", "migrate")

    def start(self, further: Mapping[str, Sequence[str]] | None = None) -> None:
        """Start all components, when the database is there, and wait until they are healthy.

        :param further: processes to start beside them, by a name: what follows `airflow` on the command line.
        :raises AirflowServerError: when they are not after a while.
        """
        migration = self._processes.pop("db-migrate")
        try:
            if migration.wait(START_TIMEOUT_SECONDS) != 0:
                raise AirflowServerError(f"airflow db migrate failed\n{self._log_tail('db-migrate')}")
        finally:
            migration.end(timeout=STOP_TIMEOUT_SECONDS)
        say("Airflow: database ready, starting " + ", ".join(_COMPONENTS))
        for name, arguments in {**_COMPONENTS, **(further or {})}.items():
            self.add(name, *arguments)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self.api.healthy():
            self.check()
            if time.monotonic() > deadline:
                logs = "\n".join(f"{name}:\n{self._log_tail(name)}" for name in _COMPONENTS)
                raise AirflowServerError(f"Airflow is not healthy after {START_TIMEOUT_SECONDS:.0f} s\n{logs}")
            time.sleep(0.3)

    def check(self) -> None:
        """Look after the processes.

        :raises AirflowServerError: when one has ended.
        """
        for name, process in self._processes.items():
            if (status := process.poll()) is not None:
                raise AirflowServerError(f"airflow {name} ended with status {status}\n{self._log_tail(name)}")

    def stop(self) -> None:
        """End every process and remove the home; harmless when that has been done."""
        for process in self._processes.values():
            process.ask(signal.SIGTERM)  # All at once first, so that the waits overlap.
        for process in self._processes.values():
            process.end(timeout=STOP_TIMEOUT_SECONDS)
        self._processes.clear()
        shutil.rmtree(self._home, ignore_errors=True)

    def add(self, name: str, *arguments: str) -> GuardedProcess:
        """Start another process of this Airflow, such as a second triggerer, and look after it.

        :param name: a name for it that is free.
        :param arguments: the command line after `airflow`.
        """
        process = self._processes[name] = GuardedProcess(
            (sys.executable, "-m", "airflow", *arguments),
            work_dir=self._home,
            log=self._log(name),
            orphan_signal=signal.SIGKILL,  # Nothing of it is worth an orderly end that nobody waits for.
            identity=Identity(),
            own_session=True,
            environment=self._environment,
        )
        return process

    @property
    def pids(self) -> dict[str, int]:
        """The ids of the processes that are looked after, by their names."""
        return {name: process.pid for name, process in self._processes.items()}

    def release(self, name: str) -> GuardedProcess:
        """Look after a process no longer: it is going to end; whoever asks sees to that."""
        return self._processes.pop(name)

    def log_text(self, name: str) -> str:
        """Return what a process has printed."""
        return self._log(name).read_text(errors="replace")

    def _make_environment(self, dags: Path, connections: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
        """Build the environment: nothing of another Airflow that the user may have configured."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "PG"))},
            "PATH": path,
            # The DAG folder belongs to the user: no __pycache__ there.
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "AIRFLOW_HOME": str(self._home),
            # What is kept from one reading of the DAG files to the next goes with it.
            "TMPDIR": str(self._home),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self._home / 'airflow.db'}",
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self._port),
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(),
            # Nobody listens there, and by default another Airflow's log server might.
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "AIRFLOW__MATVIEWS__CONNECTIONS": ",".join(connections),
            **{f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in connections.items()},
        }

    def _log(self, name: str) -> Path:
        return self._home / f"{name}.log"

    def _log_tail(self, name: str, lines: int = 30) -> str:
        try:
            return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"
