"""What a recorded refresh costs over the bare statement. Run it: ``python -m benchmarks.refresh_overhead``.

Side by side in one run, turn by turn: ``hook.refresh()`` against REFRESH MATERIALIZED VIEW through psycopg, on a
view of 1,000 rows and on one whose query takes seconds. The server keeps its promises (fsync on). Both open
their connections anew each time, as tasks do: the hook two, the bare statement one or two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

# Read when Airflow loads: lines written to a terminal would be timed as well.
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "WARNING"

import psycopg

from benchmarks.connecting import hook_on
from demo.postgres_server import PostgresServer, find_installations


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1000


def _bare(dsn: str, view: str, connections: int) -> None:
    opened = [psycopg.connect(dsn, autocommit=True) for _ in range(connections)]
    opened[0].execute(f"REFRESH MATERIALIZED VIEW {view}")
    for connection in opened:
        connection.close()


def compare(server: PostgresServer, view: str, rounds: int) -> None:
    """Print the medians of both ways on one view, their difference and their ratio."""
    hook = hook_on(server)
    ways: dict[str, Callable[[], object]] = {
        "bare REFRESH, one connection": lambda: _bare(server.dsn(), view, 1),
        "bare REFRESH, two connections": lambda: _bare(server.dsn(), view, 2),
        "hook.refresh()": lambda: hook.refresh(view, refresh_strategy="regular"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_timed(way))
    print(f"\n{view}, {rounds} rounds, medians:")
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, each in times.items():
        print(f"  {name:32} {medians[name]:9.2f} ms  (from {min(each):.2f} to {max(each):.2f})")
    recorded, bare = medians["hook.refresh()"], medians["bare REFRESH, two connections"]
    print(f"  added beyond connecting: {recorded - bare:.2f} ms; ratio {recorded / bare:.3f}")


def main() -> None:
    """Start a server, make the two views, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="rounds on the small view (default 100)")
    parser.add_argument("--large-rounds", type=int, default=7, help="rounds on the large view (default 7)")
    arguments = parser.parse_args()
    installations = find_installations()
    with PostgresServer(bin_dir=installations[max(installations)], durable=True) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("SELECT setseed(0.5)")
            connection.execute(
                "CREATE TABLE events AS SELECT g AS id, (random() * 100000)::int AS account, random() AS amount, "
                "timestamptz '2026-01-01' + random() * interval '5 days' AS at "
                "FROM generate_series(1, 5000000) g"
            )
            connection.execute("CREATE MATERIALIZED VIEW small AS SELECT * FROM events WHERE id <= 1000")
            connection.execute(
                "CREATE MATERIALIZED VIEW large AS SELECT account, date_bin('1 day', at, '2026-01-01') AS day, "
                "count(*), sum(amount), max(id) FROM events GROUP BY 1, 2"
            )
            connection.execute("CREATE INDEX ON events (id)")
            connection.execute("VACUUM ANALYZE events")
        print(f"PostgreSQL {server.major}, durable, loopback")
        compare(server, "small", arguments.rounds)
        compare(server, "large", arguments.large_rounds)


if __name__ == "__main__":
    main()
