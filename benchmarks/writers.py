"""What each way to notice changes costs those who write. Run it: ``python -m benchmarks.writers``.

pgbench updates one row a transaction, with many clients at once, on a table that a materialized view reads; turn by
turn, so that whatever else the machine does falls on all ways alike: nobody watches; a watcher reads the fingerprints
each second; the table has the change log's trigger and a watcher reads the log each second; the trigger also rings the
bell and a watcher listens. The server keeps its promises (fsync on, synchronous_commit on).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "WARNING"

import psycopg

from airflow_provider_matviews.hooks.matview import MatViewHook
from airflow_provider_matviews.names import ViewName
from airflow_provider_matviews.services import watching
from airflow_provider_matviews.services.execute import Driver
from airflow_provider_matviews.services.ledger import Ledger
from benchmarks.connecting import hook_on
from demo.postgres_server import PostgresServer, find_installations

#: Debian installs it there; it need not be on PATH.
PGBENCH = shutil.which("pgbench", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin")
ROWS = 100_000
SET_UP = (
    "CREATE TABLE accounts (id integer PRIMARY KEY, balance integer NOT NULL) WITH (fillfactor = 50)",
    f"INSERT INTO accounts SELECT id, 0 FROM generate_series(1, {ROWS}) AS id",
    "VACUUM ANALYZE accounts",
    "CREATE MATERIALIZED VIEW total AS SELECT sum(balance) FROM accounts",
)
#: One row a transaction; many rows a statement.
SCRIPTS = {
    "one-row updates": f"\\set id random(1, {ROWS})\nUPDATE accounts SET balance = balance + 1 WHERE id = :id;\n",
    "updates of 100 rows": (
        f"\\set id random(1, {ROWS - 100})\n"
        "UPDATE accounts SET balance = balance + 1 WHERE id BETWEEN :id AND :id + 99;\n"
    ),
}


@contextmanager
def _watched(server: PostgresServer, *, with_log: bool, bell: bool) -> Iterator[None]:
    """Have a watcher look once a second, or when the bell rings, at most ten times a second."""
    ended = threading.Event()

    def look_on() -> None:
        connection = psycopg.connect(server.dsn(), autocommit=True)
        with connection, Driver(lambda: connection) as driver:
            if bell:
                driver.run(watching.listen())
            while not ended.wait(0.1 if bell else 1.0):
                driver.run(watching.see(Ledger("matviews"), [ViewName("total")], everything=False, with_log=with_log))
                if bell:
                    list(connection.notifies(timeout=1, stop_after=1))

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _rate(server: PostgresServer, script: Path, clients: int, seconds: int) -> float:
    """Return the transactions a second."""
    assert PGBENCH is not None
    options = f"-n -M prepared -f {script} -c {clients} -j 2 -T {seconds} -h 127.0.0.1 -p {server.port} -U postgres"
    run = subprocess.run([PGBENCH, *options.split(), "postgres"], capture_output=True, text=True, check=True)
    found = re.search(r"tps = ([0-9.]+)", run.stdout)
    assert found is not None, run.stdout
    return float(found[1])


def compare(server: PostgresServer, hook: MatViewHook, script: Path, clients: int, rounds: int, seconds: int) -> None:
    """Print the medians of all ways, and their ratios to the first."""

    def unwatched() -> float:
        return _rate(server, script, clients, seconds)

    def watched(*, with_log: bool, bell: bool = False) -> float:
        if with_log:
            hook.install_change_log("total", bell=bell)
        try:
            with _watched(server, with_log=with_log, bell=bell):
                return _rate(server, script, clients, seconds)
        finally:
            hook.prune_change_log()
            hook.remove_change_log()

    ways: dict[str, Callable[[], float]] = {
        "nobody watches": unwatched,
        "fingerprints, polled each second": lambda: watched(with_log=False),
        "change log": lambda: watched(with_log=True),
        "change log and bell": lambda: watched(with_log=True, bell=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                connection.execute("VACUUM accounts")
                connection.execute("CHECKPOINT")
    first = statistics.median(rates["nobody watches"])
    for name, each in rates.items():
        median = statistics.median(each)
        print(f"  {name:34} {median:8.0f} tps  {median / first:5.2f}x  (from {min(each):.0f} to {max(each):.0f})")


def main() -> None:
    """Start a server, make a table and a view of it, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all ways (default 7)")
    parser.add_argument("--seconds", type=int, default=4, help="seconds of each run (default 4)")
    parser.add_argument("--clients", type=int, default=16, help="clients at once (default 16)")
    arguments = parser.parse_args()
    if PGBENCH is None:
        raise SystemExit("pgbench is not installed (Debian: apt install postgresql-contrib); nothing was measured.")
    installations = find_installations()
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer(bin_dir=installations[max(installations)], durable=True) as server,
    ):
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for statement in SET_UP:
                connection.execute(statement)  # type: ignore[arg-type]
        hook = hook_on(server)
        hook.refresh("total", refresh_strategy="regular")
        for name, text in SCRIPTS.items():
            script = Path(folder) / "script.sql"
            script.write_text(text)
            print(
                f"\n{name}, PostgreSQL {server.major}, {arguments.clients} clients, {arguments.rounds} rounds of "
                f"{arguments.seconds} s, medians:"
            )
            compare(server, hook, script, arguments.clients, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
