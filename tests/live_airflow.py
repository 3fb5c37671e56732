"""A real Airflow over a real PostgreSQL for the tests, views that hold a refresh up, and a watch on the server.

Every view has a gate of its own: a refresh of it waits, in the middle of its query, for as long as the test keeps
the gate closed. So a refresh that is to be stopped is provably at work, and nothing depends on how fast anything is.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from airflow_provider_matviews.hooks.matview import MatViewHook
from demo.airflow_server import AirflowServer
from demo.dag_runs import wait_for_dags
from demo.free_port import free_port
from demo.guarded import GuardedProcess, Identity
from demo.postgres_server import PostgresServer
from tests.conftest import INSTALLATIONS, NEWEST, Database, hook_on

DAGS = Path(__file__).parent / "dags"
#: The Airflow connection to the database of the views.
CONNECTION = "warehouse"

# One advisory lock for each view is its gate, another one is held by whoever builds it. The latter needs no watching:
# whoever does not get it has met a twin, and a sequence keeps count whatever becomes of the transaction.
_GATE_CLASS, _BUILD_CLASS = 4711, 4712
_SET_UP = f"""
CREATE SEQUENCE twins;
CREATE FUNCTION gate(view integer) RETURNS integer LANGUAGE plpgsql SET lock_timeout = 0 AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock({_BUILD_CLASS}, view) THEN PERFORM nextval('public.twins'); END IF;
    PERFORM pg_advisory_xact_lock_shared({_GATE_CLASS}, view);
    RETURN view;
END $$
"""
_BUILDING = f"""
SELECT l.objid::integer AS gate, l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.classid = {_GATE_CLASS} AND l.mode = 'ShareLock'
      AND a.datname = current_database() AND a.application_name LIKE 'matviews%'
"""
_LOOK_EVERY_SECONDS = 0.02
_POLL_SECONDS = 0.2
START_SECONDS = 120.0


@dataclass(frozen=True)
class Sight:
    """Who was seen building a view, from a moment on until the next sight.

    :ivar at: by this machine's clock, as Airflow's times are.
    :ivar pids: of the server's processes.
    """

    at: float
    pids: frozenset[int]


class Watch:
    """Looks at the server all the time, on a connection in autocommit (else it would see the first look for ever)."""

    def __init__(self, database: Database) -> None:
        self._connection = database.connect(application_name="watch")
        self._ended = threading.Event()
        self._seen: dict[int, list[Sight]] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._connection.close()

    def sights(self, gate: int) -> list[Sight]:
        """Return all changes of who was building a view."""
        return list(self._seen.get(gate, ()))

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_SECONDS):
            building: dict[int, set[int]] = {}
            for gate, pid in self._connection.execute(_BUILDING):
                building.setdefault(gate, set()).add(pid)
            now = time.time()
            for gate in building.keys() | self._seen.keys():
                sights = self._seen.setdefault(gate, [])
                pids = frozenset(building.get(gate, ()))
                if not sights or sights[-1].pids != pids:
                    sights.append(Sight(now, pids))


class GatedView:
    """A materialized view of one row and one column ``value``, which is 1 in the view and 2 in its source."""

    def __init__(self, name: str, gate: int, database: Database, watch: Watch) -> None:
        self.name = name
        self._gate, self._database, self._watch = gate, database, watch
        source = sql.Identifier(f"source_of_{name}")
        with database.connect() as connection:
            connection.execute(sql.SQL("CREATE TABLE {} AS SELECT 1 AS value").format(source))
            connection.execute(
                sql.SQL("CREATE MATERIALIZED VIEW {} AS SELECT value, gate({}) FROM {}").format(
                    sql.Identifier(name), sql.Literal(gate), source
                )
            )
            connection.execute(sql.SQL("UPDATE {} SET value = 2").format(source))
        self._gatekeeper = database.connect(application_name="gatekeeper")

    def close_gate(self) -> None:
        """Hold up every refresh from now on."""
        self._gatekeeper.execute("SELECT pg_advisory_lock(%s, %s)", (_GATE_CLASS, self._gate))

    def open_gate(self) -> None:
        """Let pass who waits, and everybody after."""
        self._gatekeeper.execute("SELECT pg_advisory_unlock_all()")

    def close(self) -> None:
        self._gatekeeper.close()

    def served(self) -> int:
        """What a reader gets at once, without waiting for anybody."""
        with self._database.connect(options="-c lock_timeout=100ms") as connection:
            row = connection.execute(sql.SQL("SELECT value FROM {}").format(sql.Identifier(self.name))).fetchone()
        assert row is not None
        return int(row[0])

    def runs(self) -> list[dict[str, Any]]:
        """Return the record of its runs, oldest first."""
        with self._database.connect(row_factory=dict_row) as connection:
            try:
                return connection.execute(
                    "SELECT * FROM matviews.mat_view_run_history WHERE view = %s ORDER BY id", (self.name,)
                ).fetchall()
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                return []

    def building(self) -> frozenset[int]:
        """The server's processes that are in the middle of building it now."""
        sights = self._watch.sights(self._gate)
        return sights[-1].pids if sights else frozenset()

    def builders(self) -> list[int]:
        """All of the server's processes that ever were, in order."""
        seen: list[int] = []
        for sight in self._watch.sights(self._gate):
            seen += sorted(sight.pids.difference(seen))
        return seen

    def most_at_once(self) -> int:
        """How many were seen building it at one moment, at the most."""
        return max((len(sight.pids) for sight in self._watch.sights(self._gate)), default=0)

    def gone_at(self, builder: int) -> float:
        """When one of them was first seen to be gone."""
        was_there = False
        for sight in self._watch.sights(self._gate):
            if was_there and builder not in sight.pids:
                return sight.at
            was_there = was_there or builder in sight.pids
        raise AssertionError(f"{self.name} is still being built by {builder}")

    def wait_for_first_builder(self, seconds: float = 90.0) -> int:
        """Wait until somebody has come to the gate, perhaps to leave again, and return who."""
        wait_until(
            lambda: self.builders() != [], lambda: f"{self.name} has been built; its runs: {self.runs()}", seconds
        )
        return self.builders()[0]

    def wait_for_builder(self, other_than: frozenset[int] = frozenset(), seconds: float = 90.0) -> int:
        """Wait until somebody stands at the gate, and return who."""
        wait_until(
            lambda: bool(self.building() - other_than),
            lambda: f"{self.name} is being built; its runs: {self.runs()}",
            seconds,
        )
        (builder,) = self.building() - other_than
        return builder

    def wait_until_gone(self, builder: int, seconds: float = 30.0) -> float:
        """Wait until one of the server's processes builds it no more, and return when it was gone."""
        wait_until(lambda: builder not in self.building(), f"{builder} no longer builds {self.name}", seconds)
        return self.gone_at(builder)


@dataclass(frozen=True)
class LiveAirflow:
    """All of it: Airflow, the database of the views, the watch on it."""

    airflow: AirflowServer
    database: Database
    watch: Watch
    views: dict[str, GatedView]

    def view(self, name: str) -> GatedView:
        """Make a view, its gate open."""
        view = self.views[name] = GatedView(name, len(self.views) + 1, self.database, self.watch)
        return view

    @property
    def hook(self) -> MatViewHook:
        return hook_on(self.database)

    def start(self, dag_id: str, run_id: str) -> None:
        """Ask for a run of a DAG; its id is also the name of the view that it is about."""
        self.airflow.api.trigger(dag_id, run_id)

    def task(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return the one task instance of a run."""
        (task,) = self.airflow.api.task_instances(dag_id, run_id)
        return task

    def wait_for_task(self, dag_id: str, run_id: str, *states: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until the one task instance of a run is in one of some states."""

        def story() -> str:
            task = self.task(dag_id, run_id)
            runs = self.views[run_id].runs()
            return f"{' or '.join(states)}: {task}\n{self.airflow.api.log(task)}\n{runs}\n{self.sessions(run_id)}"

        wait_until(lambda: self.task(dag_id, run_id)["state"] in states, story, seconds)
        return self.task(dag_id, run_id)

    def wait_until_deferred(self, run_id: str, try_number: int = 1) -> None:
        """Wait until the scheduler has taken note that a task's process ended with the deferral.

        A trigger that fires before that fails its task in Airflow 3.3 (measured): the scheduler then takes the end of
        the first half for that of the second one.
        """
        key = f"run_id='{run_id}', try_number={try_number},"
        wait_until(
            lambda: any(
                "Received executor event with state success" in line and key in line
                for line in self.airflow.log_text("scheduler").splitlines()
            ),
            f"the scheduler has taken note that try {try_number} of {run_id} is deferred",
            30,
        )

    def twins(self) -> int:
        """How often a refresh began to build a view while another one did, as the refreshes themselves noticed."""
        row = self.database.rows("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM twins")[0]
        return int(row[0])

    def client_of(self, server_process: int) -> int:
        """Return the id of this machine's process at the other end of a connection."""
        port = self.database.value("SELECT client_port FROM pg_stat_activity WHERE pid = %s", (server_process,))
        server = ("127.0.0.1", self.database.server.port)
        (process,) = {
            connection.pid
            for connection in psutil.net_connections("tcp4")
            if connection.laddr == ("127.0.0.1", port) and connection.raddr == server and connection.pid is not None
        }
        return process

    def waiting(self, run_id: str) -> list[int]:
        """Return the server's processes of a run that wait for another operation on its view."""
        return [
            pid
            for (pid,) in self.database.rows(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s "
                "AND query LIKE '%%waits for another operation on the view%%'",
                (f"matviews/%/{run_id}",),
            )
        ]

    def sessions(self, run_id: str) -> list[tuple[Any, ...]]:
        """Return what the server has of a run's connections: the application's name, and what they are doing."""
        return self.database.rows(
            "SELECT application_name, pid, state, wait_event, pg_blocking_pids(pid), query "
            "FROM pg_stat_activity WHERE application_name LIKE %s",
            (f"matviews/%/{run_id}",),
        )


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], seconds: float) -> None:
    """Wait until a condition holds.

    :param what: the condition in words.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so after {seconds:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(_POLL_SECONDS)


def moment(text: str) -> float:
    """Return a time of Airflow's API as seconds of this machine's clock."""
    return datetime.fromisoformat(text).timestamp()


def parent_of(pid: int) -> int:
    """Return the id of a process's parent."""
    # The second field, the name, may hold blanks and parentheses; what follows the last one does not.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ancestors_of(pid: int) -> list[int]:
    """Return the ids of a process's parent, its parent's parent, and so on."""
    found = []
    while (pid := parent_of(pid)) > 1:
        found.append(pid)
    return found


def descendants_of(pid: int) -> list[int]:
    """Return the ids of all that a process has started, and they in turn."""
    found, parents = [], {pid}
    processes = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    parent = {}
    for process in processes:
        with suppress(OSError):
            parent[process] = parent_of(process)
    while parents:
        parents = {child for child, its_parent in parent.items() if its_parent in parents}
        found += sorted(parents)
    return found


def kill(*pids: int, number: signal.Signals = signal.SIGKILL) -> float:
    """Send a signal to processes, and return when."""
    now = time.time()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return now


#: Debian installs it there; it need not be on PATH.
REDIS = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin")


@contextmanager
def redis_server() -> Iterator[str]:
    """Run a Redis of our own, in memory and on the loopback address only, and yield its URL."""
    assert REDIS is not None
    folder, port = Path(tempfile.mkdtemp(prefix="redis-")), free_port()
    process = GuardedProcess(
        (REDIS, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder),
        work_dir=folder,
        log=folder / "log",
        orphan_signal=signal.SIGKILL,
        identity=Identity(),
        environment=os.environ,
    )
    try:
        wait_until(lambda: _listens(port), "Redis listens", 20)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.end(signal.SIGTERM, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def live_airflow(
    dags: str,
    dag_ids: tuple[str, ...],
    settings: Mapping[str, str],
    further: Mapping[str, tuple[str, ...]],
) -> Iterator[LiveAirflow]:
    """Run an Airflow with its metadata in PostgreSQL, beside the database of the views on the same server.

    :param dags: the folder, below ``tests/dags``.
    :param dag_ids: the DAGs to wait for; they are unpaused.
    :param settings: environment variables of Airflow.
    :param further: processes of Airflow beside the usual ones, by a name: what follows ``airflow`` on the command line.
    """
    server = PostgresServer(INSTALLATIONS[NEWEST], settings={"max_connections": "300"})
    with server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for name in ("airflow", "warehouse"):
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        database = Database(server, "warehouse")
        with database.connect() as connection:
            connection.execute(_SET_UP)
        # Whichever task came first would say that it made the run tables.
        hook_on(database).definitions()
        address = {"conn_type": "postgres", "host": "127.0.0.1", "port": server.port, "login": "postgres"}
        metadata = f"postgresql+psycopg2://postgres@127.0.0.1:{server.port}/airflow"
        with AirflowServer(
            DAGS / dags,
            {CONNECTION: {**address, "schema": database.name}},
            # The executor that preloads is a module of the tests.
            {"PYTHONPATH": str(DAGS.parent.parent), "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": metadata, **settings},
        ) as airflow:
            airflow.begin_migration()
            airflow.start(further)
            wait_for_dags(airflow, dag_ids)
            for dag_id in dag_ids:
                airflow.api.set_paused(dag_id, False)
            watch = Watch(database)
            live = LiveAirflow(airflow, database, watch, {})
            try:
                yield live
            finally:
                for view in live.views.values():
                    view.close()
                watch.close()
